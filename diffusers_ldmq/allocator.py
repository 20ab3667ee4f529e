"""The process's own memory."""

import ctypes
import mmap
import sys
from pathlib import Path

from torch import Tensor

MADV_DONTNEED = 4


def give_back() -> None:
    """Return freed memory to the system. glibc keeps freed blocks below its mmap threshold, which grows to 32 MB: about
    the size of one layer's weight, so that working through a large model layer by layer would hold what nobody uses.
    Does nothing where there is no glibc."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def release_file_pages(tensor: Tensor) -> None:
    """Let go of the resident pages of a tensor that lies in a mapped file and was not written to: they are read again
    when somebody looks. Nothing else is touched, because memory outside of a file would lose its values. Does nothing
    where it is not known what is mapped."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if sys.platform == "linux" and tensor.device.type == "cpu" and start < end and _is_in_a_file(start, end):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


def _is_in_a_file(start: int, end: int) -> bool:
    """Whether one mapping of a file holds these addresses."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, _, high = line.partition(" ")[0].partition("-")
        if int(low, 16) <= start and end <= int(high, 16):
            return line.split()[4] != "0"  # the file's number
    return False
