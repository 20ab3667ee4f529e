"""The process's own memory."""

import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system. glibc keeps freed blocks below its mmap threshold, which grows to 32 MB: about
    the size of one layer's weight, so that working through a large model layer by layer would hold what nobody uses.
    Does nothing where there is no glibc."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
