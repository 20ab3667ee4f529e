"""The report's numbers equal direct computations."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusers_ldmq import Recording, Report, calibrate, make_plan, verify
from diffusers_ldmq.calls import run
from diffusers_ldmq.correction import apply_everywhere
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.planners import integer_share
from diffusers_ldmq.quantization import quantized_for_now
from diffusers_ldmq.specs import parse_scheme
from diffusers_ldmq.verification import float_parameters, floating_dtype, stored_bytes

Recordings = Callable[[str], Recording]
Mixed = Callable[[str], Any]


@pytest.mark.parametrize("on", ["select", "verify"])
@pytest.mark.parametrize("kind", ["pixel", "dit"], indirect=True)
def test_output_sqnr_is_that_of_a_direct_comparison(
    kind: str, on: Any, mixed_denoiser: Mixed, recordings: Recordings
) -> None:
    denoiser, recording = mixed_denoiser(kind), recordings(kind)
    report = verify(denoiser, recording, on=on)
    signal: dict[float, float] = {}
    noise: dict[float, float] = {}
    for call in recording.only(on).calls:
        batch = recording.batch(call)
        error = run(denoiser, batch).double() - batch.output.double()
        signal[call.timestep] = signal.get(call.timestep, 0.0) + float(batch.output.double().square().sum())
        noise[call.timestep] = noise.get(call.timestep, 0.0) + float(error.square().sum())
    assert report.timesteps == tuple(sorted(signal, reverse=True))
    assert report.signal == pytest.approx([signal[t] for t in report.timesteps], rel=1e-5)
    assert report.noise == pytest.approx([noise[t] for t in report.timesteps], rel=1e-5)
    expected = 10 * math.log10(sum(signal.values()) / sum(noise.values()))
    assert report.sqnr_db == pytest.approx(expected, abs=0.01)
    curve = {t: 10 * math.log10(signal[t] / noise[t]) for t in report.timesteps}
    assert report.curve_db() == pytest.approx(list(curve.values()), abs=0.01)
    worst = min(curve, key=lambda t: curve[t])
    assert report.worst() == (worst, pytest.approx(curve[worst], abs=0.01))


def test_the_float_model_has_no_noise(kind: str, denoiser_of: Mixed, recordings: Recordings) -> None:
    report = verify(denoiser_of(kind), recordings(kind))
    assert report.sqnr_db == math.inf
    assert report.int8_macs == 0
    assert report.backends == {}
    assert report.schemes == {"float": len(layer_table(denoiser_of(kind)).layers)}


def test_layers_are_counted_by_scheme_and_backend(mixed_denoiser: Mixed, recordings: Recordings) -> None:
    denoiser = mixed_denoiser("pixel")
    for layer in quantized_layers(denoiser).values():
        layer.use_backend("reference")
    report = verify(denoiser, recordings("pixel"))
    assert sum(report.schemes.values()) == 51
    assert set(report.schemes) == {"float", "w8a16", "w8a8", "w8a8-dyn", "w4a16", "w4a8", "w4a4", "w4a16-g8"}
    assert report.backends == {f"{s} on reference": n for s, n in report.schemes.items() if s != "float"}
    assert report.dtype == "float32"


@pytest.mark.parametrize("kind", ["pixel", "dit"], indirect=True)
def test_the_integer_share_is_that_of_counted_multiply_accumulates(
    kind: str, mixed_denoiser: Mixed, recordings: Recordings, profiles: Any
) -> None:
    denoiser = mixed_denoiser(kind)
    schemes = {name: layer.scheme.name for name, layer in quantized_layers(denoiser).items()}
    table = profiles(kind).table
    whole = sum(info.macs for info in table.layers)
    integer = sum(i.macs for i in table.layers if i.name in schemes and parse_scheme(schemes[i.name]).is_integer)
    report = verify(denoiser, recordings(kind))
    assert 0 < report.int8_macs < 1
    assert report.int8_macs == pytest.approx(integer / whole)
    assert report.int8_macs == pytest.approx(integer_share(table, schemes))


def test_bytes_are_those_of_the_saved_file(
    kind: str, mixed_denoiser: Mixed, denoiser_of: Mixed, tmp_path: Path
) -> None:
    denoiser = mixed_denoiser(kind)
    assert float_parameters(denoiser) == sum(p.numel() for p in denoiser_of(kind).parameters())
    denoiser.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert stored_bytes(denoiser) == sum(value.numel() * value.element_size() for value in tensors.values())


def test_the_dtype_is_the_denoisers_own(denoiser_of: Mixed, recordings: Recordings) -> None:
    denoiser = denoiser_of("dit").to(torch.bfloat16)
    assert floating_dtype(denoiser) == torch.bfloat16
    report = verify(denoiser, recordings("dit"))
    assert report.dtype == "bfloat16"
    assert 25 < report.sqnr_db < 60


def test_verifying_leaves_no_hooks_and_reports_progress(mixed_denoiser: Mixed, recordings: Recordings) -> None:
    denoiser, told = mixed_denoiser("dit"), []
    verify(denoiser, recordings("dit"), progress=lambda done, whole: told.append((done, whole)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert not any(m._forward_hooks for m in denoiser.modules())


def test_a_recording_without_held_out_calls_is_refused(mixed_denoiser: Mixed, recordings: Recordings) -> None:
    with pytest.raises(LDMQError, match="no calls for the set 'verify'"):
        verify(mixed_denoiser("dit"), recordings("dit").only("select"))


def test_a_report_survives_its_file(mixed_denoiser: Mixed, recordings: Recordings, tmp_path: Path) -> None:
    report = verify(mixed_denoiser("dit"), recordings("dit"))
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == report


def test_a_low_rank_branch_counts_as_float_work(denoiser_of: Callable[[str], Any], recordings: Recordings) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    plan = make_plan(layer_table(denoiser), planner="uniform")
    calibration = calibrate(denoiser, plan, recording)
    branched = apply_everywhere(denoiser, calibration, recording, "low-rank")
    with quantized_for_now(denoiser, calibration):
        assert verify(denoiser, recording).int8_macs == 1.0
    with quantized_for_now(denoiser, branched):
        assert 0.5 < verify(denoiser, recording).int8_macs < 1.0
