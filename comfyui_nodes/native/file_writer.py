"""Writing a safetensors file tensor by tensor: a large model is never in memory twice, and an interrupt is noticed
between any two tensors. Needs no ComfyUI."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.headers import DTYPES
from diffusers_ldmq.output import file_beside
from diffusers_ldmq.progress import Progress

NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 8
"""The format wants the data to begin at a multiple of so many bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write. read: makes it when its turn comes, on any device; dtype, shape: what it will have."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def entry(name: str, value: Tensor) -> Entry:
    """The entry of a tensor that is there already."""
    return Entry(name, value.dtype, tuple(value.shape), lambda: value)


def parts(progress: Progress | None, layers: int) -> tuple[Progress, Progress]:
    """Two equal parts of a progress: while `layers` layers are looked at, and while they are written."""
    tell = progress or (lambda done, total: None)

    def writing(done: int, total: int) -> None:
        tell(layers + layers * done // total, 2 * layers)

    return (lambda done, total: tell(layers * done // total, 2 * layers)), writing


def write_tensors(
    path: str | os.PathLike[str],
    entries: Sequence[Entry],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
) -> None:
    """Write a safetensors file, complete or not at all. The same entries give the same bytes.

    Raises OutputError if it cannot be written, LDMQError if a tensor is not what its entry says.
    """
    # wide elements first, so that every tensor is aligned
    ordered = sorted(entries, key=lambda e: (-e.dtype.itemsize, e.name))
    with file_beside(path) as beside, open(beside, "wb") as file:
        file.write(_header(ordered, metadata))
        for done, item in enumerate(ordered):
            file.write(_bytes(item))
            if progress:
                progress(done + 1, len(ordered))


def _header(ordered: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    found: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for item in ordered:
        start, end = end, end + item.nbytes
        found[item.name] = {"dtype": NAMES[item.dtype], "shape": list(item.shape), "data_offsets": [start, end]}
    text = json.dumps(found, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(item: Entry) -> memoryview:
    value = item.read().detach().to("cpu").contiguous()
    if value.dtype != item.dtype or tuple(value.shape) != item.shape:
        raise LDMQError(
            f"tensor {item.name!r} is {value.dtype} {list(value.shape)} where {item.dtype} {list(item.shape)} was "
            f"announced: the model changed while it was written; run the node again"
        )
    return value.reshape(-1).view(torch.uint8).numpy().data
