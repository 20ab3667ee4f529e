"""The recorded table and the schemas against the ComfyUI that COMFYUI_PATH names, in an interpreter of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from comfyui.contract.locales import ROOT
from comfyui.contract.record_api import read_table, version_of

LOOK = """
import asyncio, json, sys, time
from pathlib import Path
comfyui, root, models, result = sys.argv[1:]
sys.path[:0] = [root, str(Path(root) / "tests")]
from comfyui.contract.record_api import recorded
table = recorded(Path(comfyui))
import folder_paths
folder_paths.models_dir = models
loaded = {"diffusers", "diffusers_ldmq", "transformers"} & set(sys.modules)
start = time.perf_counter()
import comfyui_nodes
extension = asyncio.run(comfyui_nodes.comfy_entrypoint())
nodes = asyncio.run(extension.get_node_list())
infos = {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in nodes}
heavy = sorted(({"diffusers", "diffusers_ldmq", "transformers"} & set(sys.modules)) - loaded)
Path(result).write_text(json.dumps([table, infos, heavy, time.perf_counter() - start]))
"""


@pytest.fixture(scope="module")
def looked(comfy_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any, float]:
    """Signatures, what the server would tell browsers of the nodes, heavy packages loaded, seconds."""
    folder = tmp_path_factory.mktemp("real")
    result, python = folder / "result.json", os.environ.get("COMFYUI_PYTHON", sys.executable)
    run = [python, "-c", LOOK, str(comfy_path), str(ROOT), str(folder), str(result)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(result.read_text(encoding="utf-8")))


def test_the_table_is_what_that_version_takes(comfy_path: Path, looked: tuple[Any, ...]) -> None:
    version, table = version_of(comfy_path), read_table()
    if version not in table:
        pytest.skip(f"ComfyUI {version} is not in the table, so it was not compared; record_api.py adds it")
    assert looked[0] == table[version]


def test_its_own_schema_classes_take_every_node(looked: tuple[Any, ...]) -> None:
    infos = looked[1]
    assert len(infos) >= 12
    for node_id, info in infos.items():
        assert info["category"] == "LDM-Q", node_id
        assert all(info["output_tooltips"]), node_id
        for inputs in (info["input"].get("required", {}), info["input"].get("optional", {})):
            assert all(options["tooltip"] for _, options in inputs.values()), node_id


def test_in_it_the_pack_loads_quickly_and_nothing_heavy(looked: tuple[Any, ...]) -> None:
    assert looked[2] == []
    assert looked[3] <= 0.5
