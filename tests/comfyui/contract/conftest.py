"""The pack as ComfyUI would load it, on the stand-in: as the oldest recorded version and as the newest."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from comfyui.contract.record_api import read_table
from comfyui.contract.standin import StandIn, standing_in

VERSIONS = list(read_table())


@pytest.fixture(params=[VERSIONS[0], VERSIONS[-1]])
def stand_in(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StandIn]:
    """The stand-in for one version, with folders of its own that the pack has registered."""
    with _registered(request.param, tmp_path) as made:
        yield made


@pytest.fixture
def newest(tmp_path: Path) -> Iterator[StandIn]:
    """The same for the newest version alone: what does not depend on the API need not run twice."""
    with _registered(VERSIONS[-1], tmp_path) as made:
        yield made


@contextmanager
def _registered(version: str, base: Path) -> Iterator[StandIn]:
    with standing_in(version, base) as made:
        from comfyui_nodes.files import register_folders

        register_folders()
        yield made
