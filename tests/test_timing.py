"""Interleaved timing of denoisers."""

from collections.abc import Callable
from typing import Any

import torch

from diffusers_ldmq import Recording
from diffusers_ldmq.families import find_denoiser
from diffusers_ldmq.timing import fastest_float, layout_name, seconds_per_step


def test_versions_are_named_and_timed(make: Callable[[str], Any], recordings: Callable[[str], Recording]) -> None:
    recording = recordings("pixel")
    batch = recording.batch(recording.calls[0])
    plain, other = (find_denoiser(make("pixel"))[1] for _ in range(2))
    other.to(torch.bfloat16).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    times = seconds_per_step({"a": plain, "b": other}, batch, rounds=3)
    assert times.versions["a"].dtype == "float32"
    assert times.versions["b"].dtype == "bfloat16"
    assert (times.versions["a"].layout, times.versions["b"].layout) == ("contiguous", "channels_last")
    assert times.rows == batch.output.shape[0]
    assert times.speedup("a", "b") == times.versions["b"].seconds / times.versions["a"].seconds > 0


def test_fastest_float_keeps_one_copy(make: Callable[[str], Any], recordings: Callable[[str], Recording]) -> None:
    recording = recordings("pixel")
    denoiser = find_denoiser(make("pixel"))[1]
    best = fastest_float(denoiser, recording.batch(recording.calls[0]), (torch.bfloat16,))
    assert best is denoiser
    assert {p.dtype for p in best.parameters()} == {torch.bfloat16}
    assert layout_name(best) in ("contiguous", "channels_last")
