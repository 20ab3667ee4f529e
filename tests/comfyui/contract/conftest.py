"""The pack as ComfyUI would load it, on the stand-in: as the oldest recorded version and as the newest."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from comfyui.contract.record_api import read_table
from comfyui.contract.standin import StandIn, standing_in


@pytest.fixture(params=[list(read_table())[0], list(read_table())[-1]])
def stand_in(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StandIn]:
    """The stand-in for one version, with folders of its own that the pack has registered."""
    with standing_in(request.param, tmp_path) as made:
        from comfyui_nodes.files import register_folders

        register_folders()
        yield made
