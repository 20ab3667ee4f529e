"""How long one sampling step takes: the same recorded call on several versions of a denoiser, in turn."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from .calls import Batch, run
from .verification import floating_dtype

WARM_UP = 2
"""Untimed calls of each version: the first packs weights, the second fills caches."""
TRIALS = 3
"""Timed calls of each dtype and layout when the fastest one is searched."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Median seconds of one denoiser call. dtype: of its floating tensors; layout: of its convolutions' weights."""

    seconds: float
    dtype: str
    layout: str


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Times of several versions, taken in turn in one run. rows: batch of the call (guidance doubles the images);
    threads: that torch used."""

    versions: dict[str, StepTime]
    rows: int
    rounds: int
    device: str
    threads: int

    def speedup(self, version: str, over: str) -> float:
        """How many times faster `version` is than `over`; below 1 = slower."""
        return self.versions[over].seconds / self.versions[version].seconds


def seconds_per_step(versions: Mapping[str, nn.Module], batch: Batch, rounds: int = 7) -> StepTimes:
    """Median seconds of one call of each denoiser on the same arguments, interleaved so that a change in the
    machine's load or clock meets all of them."""
    for denoiser in versions.values():
        for _ in range(WARM_UP):
            run(denoiser, batch)
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(rounds):
        for name, denoiser in versions.items():
            seconds[name].append(_timed(denoiser, batch))
    first = next(iter(versions.values()))
    times = {name: StepTime(median(seconds[name]), dtype_name(d), layout_name(d)) for name, d in versions.items()}
    device = next(first.parameters()).device.type
    return StepTimes(times, batch.output.shape[0], rounds, device, torch.get_num_threads())


def fastest_float(denoiser: nn.Module, batch: Batch, dtypes: tuple[torch.dtype, ...] | None = None) -> nn.Module:
    """Bring a float denoiser, in place, into the dtype and memory layout in which this device runs `batch` fastest.

    dtypes: to choose from (default: float32 and bfloat16, the other 16-bit type too on a GPU). Only one copy is ever
    held, so weights end up rounded to the coarsest dtype that was tried: good for timing, not for results.
    """
    if dtypes is None:
        on_cpu = next(denoiser.parameters()).device.type == "cpu"
        dtypes = (torch.float32, torch.bfloat16) + (() if on_cpu else (torch.float16,))
    choices = [(dtype, layout) for dtype in dtypes for layout in (torch.contiguous_format, torch.channels_last)]
    found: dict[tuple[torch.dtype, torch.memory_format], float] = {}
    for dtype, layout in choices:
        denoiser.to(dtype=dtype).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        run(denoiser, batch)
        found[dtype, layout] = min(_timed(denoiser, batch) for _ in range(TRIALS))
    dtype, layout = min(found, key=lambda choice: found[choice])
    return denoiser.to(dtype=dtype).to(memory_format=layout)  # pyright: ignore[reportCallIssue]


def _timed(denoiser: nn.Module, batch: Batch) -> float:
    start = time.perf_counter()
    run(denoiser, batch)  # ends with the output on the CPU, so a GPU has finished too
    return time.perf_counter() - start


def dtype_name(denoiser: nn.Module) -> str:
    """Such as 'float32': of the denoiser's first floating parameter."""
    return str(floating_dtype(denoiser)).removeprefix("torch.")


def layout_name(denoiser: nn.Module) -> str:
    """'channels_last' if any convolution's weight lies so in memory, else 'contiguous'."""
    weights = [p for p in denoiser.parameters() if p.dim() == 4 and min(p.shape[1], p.shape[2] * p.shape[3]) > 1]
    last = any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
    return "channels_last" if last else "contiguous"
