"""Model files made without ComfyUI: two layers and a float tensor under every scheme and correction."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from comfyui_nodes.native.file_writer import entry, write_tensors
from comfyui_nodes.native.model_format import PREFIX, Description
from diffusers_ldmq.affine import QParams, quantize_weight, symmetric_scale, weight_rows, weight_to_quantize
from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.specs import LayerState, parse_scheme

SHAPES = {"blocks.0.linear": (6, 9), "blocks.0.conv": (8, 4, 3, 3)}
FLOATS = {"norm.weight": (4,), "time_embed.0.weight": (6, 5)}
SCHEMES = ("w8a16", "w8a8", "w8a8-dyn", "w4a16", "w4a16-g4", "w4a8", "w4a4-dyn")


def weight_of(shape: tuple[int, ...], seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state_of(shape: tuple[int, ...], scheme: str, bias: bool = True) -> LayerState:
    """A state with random weights; static input ranges of 0.1."""
    parsed = parse_scheme(scheme)
    layer = nn.Module()
    layer.register_buffer("weight", weight_of(shape))
    layer.register_buffer("bias", weight_of(shape[:1], 4).half() if bias else None)
    if not parsed.is_static:
        return layer_state("layer", layer, parsed, None)
    plain = layer_state("layer", layer, parse_scheme(scheme.split("a")[0] + "a16"), None)
    ranges = {"input_scale": torch.tensor(0.1), "input_zero_point": torch.tensor(-3, dtype=torch.int32)}
    return dataclasses.replace(plain, scheme=parsed, **ranges)


def corrected_state(shape: tuple[int, ...]) -> LayerState:
    """8-bit weights, smoothed and with a low-rank branch; rotated where the channels allow."""
    channels = shape[1]
    rotation = 4 if channels % 4 == 0 else 0
    held: dict[str, Any] = {"low_rank_a": weight_of((2, math.prod(shape[1:])), 5)}
    held["low_rank_b"] = weight_of((shape[0], 2), 6)
    held["pre_quant_scale"] = weight_of((channels,), 7).abs() + 0.5
    scheme = parse_scheme("w8a8-dyn")
    assert scheme.weight is not None
    empty = LayerState(scheme, torch.empty(0), torch.empty(0), rotation=rotation, **held)
    weight = weight_to_quantize(weight_of(shape), empty)
    scale = symmetric_scale(weight_rows(weight, scheme.weight).abs().amax(-1, keepdim=True), scheme.weight)
    codes, scales = quantize_weight(weight, QParams(scale, torch.zeros_like(scale, dtype=torch.int32)), scheme.weight)
    return dataclasses.replace(empty, weight=codes, weight_scale=scales)


def entry_of(state: LayerState) -> dict[str, Any]:
    found: dict[str, Any] = {"scheme": state.scheme.name, "tensors": sorted(state.tensors())}
    return found | {key: value for key in ("rotation", "rank") if (value := getattr(state, key))}


def description_of(states: dict[str, LayerState], **changes: Any) -> Description:
    said: dict[str, Any] = {
        "layers": {name: entry_of(state) for name, state in states.items()},
        "shapes": {name: SHAPES[name] for name in states},
        "floats": tuple(FLOATS),
        "dtype": "float16",
        "model_type": "EPS",
        "sampling": {"linear_start": 0.001},
    }
    return Description(**said | changes)


def tensors_of(states: dict[str, LayerState]) -> dict[str, Tensor]:
    """Every tensor of the file, by its name there."""
    found = {f"{PREFIX}{name}": weight_of(shape, 8).half() for name, shape in FLOATS.items()}
    for name, state in states.items():
        found |= {f"{PREFIX}{name}.{leaf}": value for leaf, value in state.tensors().items()}
    return found


def written(path: Path, states: dict[str, LayerState], **changes: Any) -> Path:
    """A sound model file, unless `changes` of its description make it one that is not."""
    entries = [entry(name, value) for name, value in tensors_of(states).items()]
    write_tensors(path, entries, description_of(states, **changes).metadata())
    return path


def edited(path: Path, name: str | None, value: Tensor | None, metadata: dict[str, str] | None = None) -> Path:
    """The file with one tensor replaced (None = left out) or its metadata changed, as others' tools write it."""
    with safe_open(path, framework="pt") as opened:
        found = opened.metadata() or {}
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    if name is not None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path, found | (metadata or {}))
    return path
