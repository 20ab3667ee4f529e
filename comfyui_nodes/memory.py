"""Memory that ran out."""

import torch


def is_out_of_memory(cause: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    told = str(cause)
    known = isinstance(cause, (MemoryError, torch.OutOfMemoryError))
    return known or "DefaultCPUAllocator" in told or "out of memory" in told.lower()
