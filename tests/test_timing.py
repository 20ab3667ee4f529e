"""Interleaved timing of denoisers."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffusers_ldmq import Recording
from diffusers_ldmq.families import find_denoiser, quantizable_layers
from diffusers_ldmq.tables import LayerTimes
from diffusers_ldmq.timing import fastest_float, layer_times, layout_name, measured_speedup, seconds_per_step


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


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_every_layer_is_timed_in_float_and_under_every_scheme(
    dtype: torch.dtype | None, denoiser_of: Callable[[str], Any], recordings: Callable[[str], Recording]
) -> None:
    recording, loads = recordings("pixel"), []

    def load() -> Any:
        loads.append(1)
        return denoiser_of("pixel")

    times = layer_times(load, recording.batch(recording.calls[0]), ("w8a8", "w8a16"), dtype)
    assert times.layers.keys() == quantizable_layers(denoiser_of("pixel")).keys()
    assert all(list(ms) == ["float", "w8a8", "w8a16"] for ms in times.layers.values())
    assert all(0 < value < 1000 for ms in times.layers.values() for value in ms.values())
    # layers are a part of the call, which also has norms and hooks
    assert sum(ms["float"] for ms in times.layers.values()) < 1.5 * times.step_ms
    assert (times.device, times.rows) == ("cpu", 2)
    assert times.fastest_dtype in ("float32", "bfloat16")
    assert times.dtype == (str(dtype).removeprefix("torch.") if dtype else times.fastest_dtype)
    if times.dtype == times.fastest_dtype:
        assert times.step_ms == times.fastest_ms
    assert len(loads) == 1 + (times.dtype != times.fastest_dtype)


def test_layers_of_one_shape_are_timed_once(
    denoiser_of: Callable[[str], Any], recordings: Callable[[str], Recording]
) -> None:
    recording = recordings("pixel")
    times = layer_times(lambda: denoiser_of("pixel"), recording.batch(recording.calls[0]), ("w8a8",)).layers
    attention = "mid_block.attentions.0"
    assert times[f"{attention}.to_q"] == times[f"{attention}.to_k"]
    # the same weights on another number of pixels take other time
    assert times["up_blocks.1.resnets.0.conv2"] != times["down_blocks.1.resnets.0.conv2"]


def test_timing_leaves_the_denoiser_without_hooks(
    denoiser_of: Callable[[str], Any], recordings: Callable[[str], Recording]
) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    layers = dict(quantizable_layers(denoiser))
    layer_times(lambda: denoiser, recording.batch(recording.calls[0]), ("w8a8",), torch.float32)
    assert all(quantizable_layers(denoiser)[name] is layer for name, layer in layers.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())


def test_a_plan_takes_the_float_call_and_what_its_layers_change() -> None:
    layers = {"a": {"float": 10.0, "w8a8": 4.0, "w8a16": 12.0}, "b": {"float": 5.0, "w8a8": 4.5}}
    times = LayerTimes("cpu", "float32", 2, 40.0, layers, 30.0, "bfloat16")
    assert times.predicted_ms({}) == 40.0
    assert times.predicted_ms({"a": "w8a8"}) == 34.0
    assert times.predicted_ms({"a": "w8a16", "b": "w8a8"}) == 41.5
    assert times.predicted_ms({"a": "float"}) == 40.0


def test_a_slower_model_has_a_speedup_below_one(
    denoiser_of: Callable[[str], Any], recordings: Callable[[str], Recording]
) -> None:
    recording = recordings("pixel")
    batch = recording.batch(recording.calls[0])
    slow = _sleeping(denoiser_of("pixel"))
    assert 0 < measured_speedup(slow, lambda: denoiser_of("pixel"), batch, rounds=3) < 0.6
    delayed = lambda: _sleeping(denoiser_of("pixel"))  # noqa: E731
    assert measured_speedup(denoiser_of("pixel"), delayed, batch, rounds=3) > 1.6


def _sleeping(denoiser: Any) -> Any:
    denoiser.mid_block.register_forward_hook(lambda *_: time.sleep(0.15))
    return denoiser
