"""What safetensors files say they hold, without reading a tensor."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError
from .loading import refuse_pickles

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The format's names of dtypes; others are none that a checkpoint of ours holds."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of one tensor, and where it is: file, name there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    key: str

    def like(self) -> Tensor:
        """A tensor on meta of this dtype and shape."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def read(self) -> Tensor:
        """The tensor, in a mapping of its own: dropping it gives back the memory, which a view of a whole file's
        mapping would hold."""
        with safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.key)


def read_headers(files: Iterable[str]) -> dict[str, Header]:
    """Tensor name -> header, of all files of a checkpoint. Raises CheckpointError for what is no safetensors file, a
    damaged one, a tensor that two files hold, or no file at all."""
    found: dict[str, Header] = {}
    for file in files:
        refuse_pickles([file])
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (a file is no dict)
                    part = opened.get_slice(name)
                    if name in found:
                        raise CheckpointError(f"{file}: holds tensor {name!r}, which another file holds already")
                    dtype = part.get_dtype()
                    if dtype not in DTYPES:
                        raise CheckpointError(f"{file}, tensor {name!r}: dtype {dtype}, which no model of ours has")
                    found[name] = Header(DTYPES[dtype], tuple(part.get_shape()), file, name)
        except (SafetensorError, OSError) as cause:
            raise CheckpointError(f"{file}: is no readable safetensors file ({cause}); get it again") from cause
    if not found:
        raise CheckpointError("a quantized model is loaded from a folder or repository, not from a state_dict")
    return found
