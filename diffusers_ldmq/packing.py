"""A layer in a backend's form, the stand-in its weight becomes meanwhile, and how a change is noticed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .backends import Backend
from .errors import CheckpointError, place

# A stand-in is filled with what real codes are not: int8 codes stop at -127, and no weight has -8 as its
# every 4-bit code. So a stand-in is still known as one after somebody copied it to another device.
STAND_IN = {torch.int8: -128, torch.uint8: 0}


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """A layer in a backend's form, and what it was made of: any change to those makes it stale."""

    backend: Backend
    data: Any
    device: torch.device
    stand_in: Tensor  # kept alive, so that its address is nobody else's
    made_of: tuple[tuple[str, Tensor | None, int | None, int], ...]  # name, tensor, version, address


_UNREAD = "_name_in_file"


def leave_unread(weight: Tensor, name: str) -> None:
    """Note that nobody has looked at these int8 codes of a file yet, in which they are called `name`."""
    setattr(weight, _UNREAD, name)


def check_codes(weight: Tensor) -> None:
    """Raise CheckpointError if the weight's int8 codes were left unread and hold what none can."""
    name = vars(weight).pop(_UNREAD, None)
    if name is not None and weight.numel() and int(weight.min()) == -128:
        raise CheckpointError(f"{place(name)}: holds the code -128, outside -127..127; the file is damaged")


def make_stand_in(weight: Tensor) -> Tensor:
    """One element of `weight`'s dtype and device, to be expanded to its shape."""
    return torch.full((1,), STAND_IN[weight.dtype], dtype=weight.dtype, device=weight.device)


def identity(name: str, tensor: Tensor | None) -> tuple[str, Tensor | None, int | None, int]:
    """What tells that a tensor is still the same: itself, how often it was written to (unknown for those made in
    inference mode), its address. Writing through `.data` escapes, as it escapes autograd."""
    if tensor is None:
        return name, None, None, 0
    return name, tensor, None if tensor.is_inference() else tensor._version, tensor.data_ptr()


def is_current(pack: Pack, parameters: Mapping[str, Tensor | None], buffers: Mapping[str, Tensor | None]) -> bool:
    """False if any tensor of the layer was assigned, changed in place or moved since packing, by whatever route:
    loaders and offloading write into `_parameters` and `.data`, so watching __setattr__ would not do."""
    for name, tensor, version, pointer in pack.made_of:
        now = parameters[name] if name in parameters else buffers.get(name)
        if now is not tensor:
            return False
        if now is not None and (now.data_ptr() != pointer or (version is not None and now._version != version)):
            return False
    return True


def ordinary(tensor: Tensor) -> Tensor:
    """The tensor, or its copy if it was made in inference mode: packing sets `.data` outside of that mode, and what is
    then half an inference tensor can neither be viewed nor counted."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def leave_file(tensor: Tensor) -> Tensor:
    """The same values outside of the file they were loaded from: the tensors of a safetensors file are views of one
    mapping, and the smallest of them would hold all of it in memory."""
    if tensor._base is not None:
        return tensor.detach().clone()
    tensor.data = tensor.detach().clone()
    return tensor


def make_own(
    held: Mapping[str, Tensor], parameters: dict[str, nn.Parameter | None], buffers: dict[str, Tensor | None]
) -> None:
    """Make a layer's tensors ordinary ones, and all but its weight, which is going to be packed, leave their file.

    held: those in its `parameters` and `buffers` that are there.
    """
    for name, tensor in held.items():
        if name in buffers:
            buffers[name] = leave_file(ordinary(tensor))
        elif tensor.is_inference():
            parameters[name] = nn.Parameter(ordinary(tensor.detach()), requires_grad=False)
        elif name == "bias":
            leave_file(tensor)  # a Parameter is no view


def is_stand_in(weight: Tensor, pack: Pack) -> bool:
    """Also for a copy of it, on whatever device."""
    if weight.data_ptr() == pack.stand_in.data_ptr():
        return True
    return weight.dtype in STAND_IN and weight.numel() > 0 and bool((weight == STAND_IN[weight.dtype]).all())
