"""A saved denoiser with every scheme, and copies of it that somebody damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_ldmq.errors import CheckpointError

Tensors = dict[str, Tensor]

FILE = "diffusion_pytorch_model.safetensors"
INTACT = Path(__file__).parent / "golden" / "v1"
"""The golden checkpoint: tests edit copies of it."""


def key_of(folder: Path, scheme: str, tensor: str) -> str:
    """The key of a tensor in the first layer of a scheme."""
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    return next(f"{name}.{tensor}" for name, entry in layers.items() if entry["scheme"] == scheme)


def refused(folder: Path, key: str, match: str) -> None:
    """Loading fails, naming the tensor's module and key, and says why."""
    module, _, tensor = key.rpartition(".")
    with pytest.raises(CheckpointError, match=match) as caught:
        UNet2DModel.from_pretrained(folder)
    assert f"module {module!r}, tensor {tensor!r}" in str(caught.value)


def edited(intact: Path, target: Path, edit: Callable[[Tensors], object]) -> Path:
    """A copy of the checkpoint whose tensors went through `edit`."""
    folder = target / "edited"
    shutil.copytree(intact, folder)
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    """The tensor with its first element replaced."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return change


def config_edited(intact: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the checkpoint whose quantization_config went through `edit`."""
    folder = target / "edited"
    shutil.copytree(intact, folder)
    path = folder / "config.json"
    data = json.loads(path.read_text())
    edit(data["quantization_config"])
    path.write_text(json.dumps(data))
    return folder


def first_layer(config: dict[str, Any], scheme: str = "w8a8") -> dict[str, Any]:
    return next(entry for entry in config["layers"].values() if entry["scheme"] == scheme)
