"""Our model file: one safetensors file with a quantized denoiser's integers and its float rest. What its header says,
and how strictly it is read. Needs no ComfyUI.

Every tensor's name begins with `PREFIX`, so that no other loader takes the file for a model it knows: convolutions
whose codes were read as weights would draw noise.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusers_ldmq.allocator import release_file_pages
from diffusers_ldmq.errors import CheckpointError, LDMQError, place
from diffusers_ldmq.headers import Header, read_headers
from diffusers_ldmq.layers import QuantConv2d, QuantizedLayer, QuantLinear
from diffusers_ldmq.loading import check_complete, check_dtype, check_shape, check_values, more, put, refuse_pickles
from diffusers_ldmq.manifest import checked_entries, prepare
from diffusers_ldmq.packing import check_codes
from diffusers_ldmq.progress import Progress
from diffusers_ldmq.serialization import from_json, to_json
from diffusers_ldmq.specs import LayerState
from diffusers_ldmq.version import __version__

FORMAT = "ldmq"
FORMAT_VERSION = 1
PREFIX = "ldmq."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Logical dtypes of a model: those of the float layers that the integers stand for."""


@dataclass(frozen=True, slots=True)
class Description:
    """What the header says.

    layers: layer name -> {'scheme', 'tensors', 'rotation', 'rank'} as in a checkpoint's config.json; shapes: of their
    float weights; floats: names of all other tensors; dtype: the model's logical one; model_type: what the denoiser
    predicts, in ComfyUI's words ('EPS', 'V_PREDICTION', 'FLUX', ...); sampling: ComfyUI's settings of the noise
    schedule.
    """

    layers: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    floats: tuple[str, ...]
    dtype: str
    model_type: str
    sampling: dict[str, Any]
    ldmq_version: str = __version__
    format_version: int = FORMAT_VERSION

    def metadata(self) -> dict[str, str]:
        """The file's __metadata__."""
        return {"format": FORMAT, "format_version": str(self.format_version), FORMAT: json.dumps(to_json(self))}


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """A quantized denoiser, however it was stored. states, shapes: of its quantized layers, by their names in ComfyUI's
    module; floats: every other tensor; source: what errors call it; the rest as in Description."""

    source: str
    states: dict[str, LayerState]
    shapes: dict[str, tuple[int, ...]]
    floats: dict[str, Tensor]
    dtype: torch.dtype
    model_type: str
    sampling: dict[str, Any]


def read_description(path: str | os.PathLike[str]) -> Description:
    """What a model file's header says. Raises CheckpointError for a file that is none of ours or of another version."""
    refuse_pickles([os.fspath(path)])
    try:
        with safe_open(os.fspath(path), framework="pt") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as cause:
        raise CheckpointError(f"{path}: is no readable safetensors file ({cause}); get it again") from cause
    if metadata.get("format") != FORMAT or FORMAT not in metadata:
        raise CheckpointError(
            f"{path}: was not written by LDM-Q Save model; open a float model with the stock Load Diffusion Model or "
            f"Load Checkpoint node and quantize it with LDM-Q Quantize"
        )
    version = metadata.get("format_version")
    if version != str(FORMAT_VERSION):
        raise CheckpointError(
            f"{path}: has format_version {version!r}, diffusers-ldmq {__version__} reads {FORMAT_VERSION}; update it "
            f"(pip install -U diffusers-ldmq)"
        )
    try:
        description = from_json(Description, json.loads(metadata[FORMAT]), CheckpointError, "header")
        _check_description(description)
    except (LDMQError, ValueError, RecursionError) as cause:
        raise CheckpointError(f"{path}: the header is damaged ({cause}); get the file again") from cause
    return description


def _check_description(description: Description) -> None:
    entries = checked_entries(description.layers)
    if not entries:
        raise CheckpointError("it names no quantized layer")
    if set(entries) != set(description.shapes):
        raise CheckpointError("'layers' and 'shapes' name different layers")
    for name, shape in description.shapes.items():
        if len(shape) not in (2, 4) or not all(1 <= size < 2**31 for size in shape) or math.prod(shape) >= 2**40:
            raise CheckpointError(f"layer {name!r} has shape {list(shape)}, which no layer has")
    if description.dtype not in DTYPES:
        raise CheckpointError(f"dtype is {description.dtype!r}, expected one of {', '.join(DTYPES)}")


def read_model(path: str | os.PathLike[str], progress: Progress | None = None) -> Content:
    """What a model file holds, every tensor checked: integers lie in the mapped file until they are packed, everything
    else is outside of it.

    Raises CheckpointError naming the file and the layer for a missing, extra, truncated or damaged tensor, or one of
    another shape or dtype, and for a file that is none of ours.
    """
    path = Path(path)
    description = read_description(path)
    headers = {name.removeprefix(PREFIX): header for name, header in read_headers([os.fspath(path)]).items()}
    try:
        skeleton = _skeleton(description, headers)
        _check_names({*skeleton.state_dict(), *description.floats}, set(headers))
        return _read(path, description, headers, skeleton, progress)
    except LDMQError as cause:
        raise CheckpointError(f"{path}: {cause}") from cause


def _check_names(expected: set[str], found: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing:
        raise CheckpointError(f"{place(missing[0])}: the file lacks this tensor ({more(missing)}); get it again")
    if extra:
        raise CheckpointError(
            f"{place(extra[0])}: the file holds this tensor, which its header does not name ({more(extra)}); it is "
            f"damaged or was changed by hand"
        )


def _skeleton(description: Description, headers: dict[str, Header]) -> nn.Module:
    """The quantized layers in their places, empty, and nothing else. Raises LDMQError for an entry that fits none."""
    root = nn.Module()
    for name, entry in description.layers.items():
        parent, leaf = _parent_of(root, name)
        layer = _empty_layer(description.shapes[name], headers.get(f"{name}.pre_quant_scale"))
        try:
            prepare(layer, entry)
        except LDMQError as cause:
            raise CheckpointError(f"layer {name!r}: {cause}") from None
        parent.add_module(leaf, layer)
    return root


def _parent_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """(module that a layer of this name goes into, the last part of the name). Raises CheckpointError for a name that
    no module has."""
    parts = name.split(".")
    if not all(parts) or any(hasattr(nn.Module(), part) for part in parts):
        raise CheckpointError(f"{name!r} is no name of a layer; the header is damaged")
    parent = root
    for part in parts[:-1]:
        if isinstance(parent, QuantizedLayer):
            break
        if part not in parent._modules:
            parent.add_module(part, nn.Module())
        parent = parent.get_submodule(part)
    if isinstance(parent, QuantizedLayer) or parts[-1] in parent._modules:
        raise CheckpointError(f"layer {name!r} is inside of another layer or holds one; the header is damaged")
    return parent, parts[-1]


def _empty_layer(shape: tuple[int, ...], scaling: Header | None) -> QuantizedLayer:
    """A layer on meta of this weight shape, as long as the model that it belongs to is not known. scaling: header of
    the one tensor that is as long as all input channels, not those of a group only."""
    if len(shape) == 2:
        return QuantLinear(shape[1], shape[0], device="meta")
    channels = scaling.shape[0] if scaling is not None and len(scaling.shape) == 1 else shape[1]
    groups = channels // shape[1]
    fits = groups * shape[1] == channels and groups > 0 and shape[0] % groups == 0
    groups = groups if fits else 1
    return QuantConv2d(shape[1] * groups, shape[0], (shape[2], shape[3]), groups=groups, device="meta")


def _read(
    path: Path, description: Description, headers: dict[str, Header], skeleton: nn.Module, progress: Progress | None
) -> Content:
    floats: dict[str, Tensor] = {}
    expected = skeleton.state_dict()
    for name, like in expected.items():
        check_shape(name, like, headers[name].like())
    layers = {name: skeleton.get_submodule(name) for name in description.layers}
    steps = [*layers, *description.floats]
    for done, name in enumerate(steps):
        if name in layers:
            for tensor in description.layers[name]["tensors"]:
                _read_tensor(skeleton, f"{name}.{tensor}", headers)
        else:
            floats[name] = _read_float(name, headers[name])
        if progress:
            progress(done + 1, len(steps))
    check_complete(skeleton, {name: layer for name, layer in layers.items() if isinstance(layer, QuantizedLayer)})
    return Content(
        source=os.fspath(path),
        states={name: _state(layer) for name, layer in layers.items() if isinstance(layer, QuantizedLayer)},
        shapes=description.shapes,
        floats=floats,
        dtype=DTYPES[description.dtype],
        model_type=description.model_type,
        sampling=description.sampling,
    )


def _read_tensor(skeleton: nn.Module, name: str, headers: dict[str, Header]) -> None:
    """Check one tensor of a quantized layer and put it in place. Codes are read once and their pages let go of: they
    are in memory again when the layer is packed."""
    raw = headers[name].read()
    put(skeleton, name, raw, raw, "cpu")
    owner, _, leaf = name.rpartition(".")
    if leaf == "weight":
        check_codes(skeleton.get_submodule(owner).get_parameter("weight"))
        release_file_pages(raw)


def _read_float(name: str, header: Header) -> Tensor:
    check_dtype(name, None, header.dtype)
    value = header.read()
    check_values(name, value, nn.Module())
    return value


def _state(layer: QuantizedLayer) -> LayerState:
    """The layer's state, its bias outside of the mapped file as all its small tensors are."""
    state = layer.state()
    return state if state.bias is None else replace(state, bias=state.bias.clone())
