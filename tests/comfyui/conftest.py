"""A real ComfyUI in this process, for tests of what nodes do to its MODEL."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SKIPPED = "COMFYUI_PATH is not set, so nothing was tested against a real ComfyUI (set it to a ComfyUI folder)"


@pytest.fixture(scope="session")
def comfy_path() -> Path:
    """Folder of the ComfyUI that COMFYUI_PATH names."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        pytest.skip(SKIPPED)
    assert (Path(path) / "comfy").is_dir(), f"COMFYUI_PATH is {path}, which holds no ComfyUI"
    return Path(path)


@pytest.fixture(scope="session")
def imported_comfy(comfy_path: Path) -> ModuleType:
    """Package `comfy` of that folder, on the CPU whatever the machine has."""
    sys.path.insert(0, str(comfy_path))
    importlib.import_module("comfy.cli_args").args.cpu = True
    for name in ("comfy.sd", "comfy.sample", "comfy.samplers", "comfy.controlnet", "comfy.supported_models"):
        importlib.import_module(name)
    return sys.modules["comfy"]


@pytest.fixture
def comfy(imported_comfy: ModuleType) -> Iterator[ModuleType]:
    """Package `comfy`, with nothing loaded before and after the test, in inference mode as nodes run."""
    with torch.inference_mode():
        yield imported_comfy
    sys.modules["comfy.model_management"].unload_all_models()
