"""How strictly the tensors of a checkpoint are read: every one that its config.json names, at its dtype and shape, with
values that can be, and no other. diffusers and transformers would warn at most."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .affine import unpack_int4
from .errors import CheckpointError, LDMQError, place
from .packing import check_codes, leave_unread
from .quantized_layer import QuantizedLayer
from .specs import check_state, tensor_specs

LARGE = 2**20
"""Bytes from which on int8 codes are looked at when they are packed, which reads them anyway: reading them twice would
take most of the time of loading a model that is mapped."""


def check_keys(expected: Iterable[str], found: Iterable[str], ignored: Iterable[str] = ()) -> None:
    """Raise CheckpointError for a tensor that only one of model and file has. ignored: patterns of names that a file
    may hold besides."""
    expected, found = set(expected), set(found)
    extra = sorted(key for key in found - expected if not any(re.search(pattern, key) for pattern in ignored))
    missing = sorted(expected - found)
    if missing and not any(key.endswith("weight_scale") for key in found):
        raise CheckpointError(
            f"{place(missing[0])}: the file lacks this tensor ({more(missing)}) and holds no scales at all: it is a "
            f"float model's, saved with a quantized model's config.json; remove its 'quantization_config' entry"
        )
    if missing:
        raise CheckpointError(f"{place(missing[0])}: the file lacks this tensor ({more(missing)}); get it again")
    if extra:
        raise CheckpointError(
            f"{place(extra[0])}: the checkpoint holds this tensor, which its quantization_config does not name "
            f"({more(extra)}); it is damaged or was changed by hand"
        )


def refuse_pickles(files: Iterable[str]) -> None:
    """Raise CheckpointError for weights of ours in any other file than safetensors."""
    for file in files:
        if not str(file).endswith(".safetensors"):
            raise CheckpointError(
                f"{Path(file).name}: quantized models are read from safetensors files only, since a pickle may run "
                f"any code; get the checkpoint again from its author"
            )


def put(model: nn.Module, name: str, raw: Tensor, cast: Tensor, device: torch.device | str | int) -> None:
    """Check one tensor of a file and put it in place. raw: as the file holds it; cast: at the dtype that was asked for,
    which integers and scales do not take. Raises CheckpointError naming the tensor."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    exact = exact_dtype(module, leaf)
    check_dtype(name, exact, raw.dtype)
    before = module._parameters.get(leaf)
    if before is not None and not before.is_meta:
        raise CheckpointError(f"{place(name)}: two files of the checkpoint hold this tensor; get the checkpoint again")
    check_values(name, raw, module)
    placed = (raw if exact is not None else cast).to(device)
    if leaf in module._parameters:
        module._parameters[leaf] = weight = nn.Parameter(placed, requires_grad=exact is None)
        if raw.dtype == torch.int8 and raw.nbytes >= LARGE:
            leave_unread(weight, name)
    else:
        module._buffers[leaf] = placed.clone()  # or this small tensor would hold the whole mapped file


def exact_dtype(module: nn.Module, leaf: str) -> torch.dtype | None:
    """The dtype that a tensor of a quantized layer has in every file; None where it may be any floating one."""
    if isinstance(module, QuantizedLayer) and not module.scheme.is_float:
        return tensor_specs(module.scheme, module.geometry, module.rank)[leaf].dtype
    return None


def check_dtype(name: str, exact: torch.dtype | None, found: torch.dtype) -> None:
    """Raise CheckpointError naming the tensor unless it has the dtype of `exact_dtype`."""
    if exact is not None and found != exact:
        raise CheckpointError(f"{place(name)}: dtype {found}, expected {exact}; wrong file?")
    if exact is None and not found.is_floating_point:
        raise CheckpointError(f"{place(name)}: dtype {found}, expected a floating one; wrong file?")


def check_shape(name: str, expected: Tensor, found: Tensor) -> None:
    """Raise CheckpointError naming the tensor unless both have one shape."""
    if found.shape != expected.shape:
        sizes = f"shape {list(found.shape)}, expected {list(expected.shape)}"
        raise CheckpointError(f"{place(name)}: {sizes}; wrong file?")


def check_complete(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
    """Raise CheckpointError if a tensor is still missing or one of the quantized layers is not what its scheme says."""
    empty = sorted(name for name, value in model.state_dict().items() if value.is_meta)
    if empty:
        raise CheckpointError(f"{place(empty[0])}: no file gave this tensor ({more(empty)}); a shard is missing")
    for name, layer in layers.items():
        try:
            check_state(layer.state(), layer.geometry)
        except LDMQError as cause:
            raise CheckpointError(f"module {name!r} was not loaded as its scheme asks: {cause}") from None


def check_values(name: str, value: Tensor, module: nn.Module) -> None:
    """Raise CheckpointError naming the tensor if it holds what no tensor of its name can. module: its owner."""
    if value.is_floating_point():
        if value.numel() and not torch.isfinite(torch.stack(value.aminmax())).all():  # isfinite alone would copy it
            raise CheckpointError(f"{place(name)}: holds NaN or Inf; the file is damaged, get it again")
        if name.endswith("_scale") and not (value > 0).all():
            raise CheckpointError(f"{place(name)}: a scale is zero or negative; the file is damaged, get it again")
    elif name.endswith("input_zero_point") and isinstance(module, QuantizedLayer):
        spec = module.scheme.activation
        if spec is not None and not spec.qmin <= int(value) <= spec.qmax:
            raise CheckpointError(f"{place(name)}: zero point {int(value)}, outside {spec.qmin}..{spec.qmax}; damaged")
    elif value.dtype == torch.int8 and value.nbytes < LARGE:
        leave_unread(value, name)
        check_codes(value)
    elif value.dtype == torch.uint8 and isinstance(module, QuantizedLayer):
        columns = module.geometry.columns
        if columns % 2 and not (unpack_int4(value[:, -1:], 2)[:, 1] == 0).all():
            raise CheckpointError(f"{place(name)}: a padding nibble is not 8; the file is damaged")


def more(keys: list[str]) -> str:
    """How many they are, in words."""
    return f"{len(keys)} such tensor{'s' if len(keys) > 1 else ''}"
