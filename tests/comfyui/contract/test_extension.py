"""How ComfyUI takes the pack in: by the entry point alone, whatever else its version calls."""

import asyncio
from pathlib import Path

import pytest
from comfyui.contract.record_api import read_table
from comfyui.contract.standin import standing_in


@pytest.mark.parametrize("version", read_table())
def test_asking_for_the_nodes_makes_their_folders_known(version: str, tmp_path: Path) -> None:
    with standing_in(version, tmp_path) as stand_in:
        from comfyui_nodes import comfy_entrypoint

        assert "ldmq_plans" not in stand_in.modules["folder_paths"].folder_names_and_paths
        for node in asyncio.run(asyncio.run(comfy_entrypoint()).get_node_list()):
            assert node.define_schema().node_id.startswith("ldmq_")
        for kind in ("ldmq_plans", "ldmq_models", "ldmq_pipelines"):
            assert kind in stand_in.modules["folder_paths"].folder_names_and_paths
