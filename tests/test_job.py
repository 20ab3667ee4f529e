"""The whole job in one call: targets hold on held-out calls or it says by how much they do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import nn

from diffusers_ldmq import Recording, make_plan, verify
from diffusers_ldmq.errors import LDMQError, PlanError
from diffusers_ldmq.families import find_denoiser, layer_table
from diffusers_ldmq.job import Outcome, Settings, quantize_pipeline
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.planners import parse_target
from diffusers_ldmq.selections import TDAC, selection_name
from diffusers_ldmq.serialization import to_json

Make = Callable[[str], Any]
Inputs = Callable[[str], list[dict[str, Any]]]
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def job(make: Make, inputs_of: Inputs) -> Callable[..., tuple[Any, Outcome]]:
    """(kind, settings) -> the quantized pipeline and what was measured; the float denoiser can be had again."""

    def do(kind: str, **settings: Any) -> tuple[Any, Outcome]:
        pipe = make(kind)
        reload = lambda: find_denoiser(make(kind))[1]  # noqa: E731
        return pipe, quantize_pipeline(pipe, inputs_of(kind), Settings(**settings), reload=reload)

    return do


@pytest.mark.parametrize("kind", ["pixel", "dit"], indirect=True)
def test_the_job_is_its_stages_in_a_row(kind: str, job: Callable[..., Any]) -> None:
    pipe, outcome = job(kind)
    assert outcome.profile is not None
    assert outcome.plan == make_plan(outcome.profile)
    layers = quantized_layers(find_denoiser(pipe)[1])
    assert {name: layer.scheme.name for name, layer in layers.items()} == outcome.plan.quantized()
    again = verify(find_denoiser(pipe)[1], outcome.recording)
    assert (again.signal, again.noise) == (outcome.report.signal, outcome.report.noise)
    facts = outcome.report.calibration
    assert facts["selection"] == "first-step"
    assert facts["sampler_calls"] == facts["forward_calls"] == 2
    assert facts["sampler_calls"] <= facts["samples"] == 4


def test_a_selection_may_be_an_object_whose_scores_are_kept_for_the_report(job: Callable[..., Any]) -> None:
    chosen = TDAC(strength=5.0)
    _, outcome = job("pixel", planner="uniform", calibration=chosen)
    facts, features = outcome.report.calibration, outcome.recording.features
    assert facts["selection"] == selection_name(chosen) != "tdac"
    assert features is not None
    assert facts["scores"] == to_json(chosen.scores(features, facts["samples"]))
    assert sum(facts["scores"]["counts"]) == facts["samples"] == 4


def test_hybrid_is_better_than_uniform_on_the_trained_model(
    make: Make, inputs_of: Inputs, quantized_folder: Path
) -> None:
    from diffusers_ldmq import Report

    hybrid = Report.load(quantized_folder / "report.json")
    uniform = quantize_pipeline(make("bundled"), inputs_of("bundled"), Settings(planner="uniform", observer="minmax"))
    assert uniform.profile is None
    assert hybrid.sqnr_db >= uniform.report.sqnr_db + 9
    assert hybrid.bytes <= 1.08 * uniform.report.bytes
    assert hybrid.int8_macs >= 0.75
    assert uniform.report.int8_macs == 1.0


@pytest.mark.parametrize(("kind", "target"), [("bundled", "sqnr>=40dB"), ("pixel", "sqnr>=34dB")], indirect=["kind"])
def test_an_sqnr_target_holds_on_held_out_calls(kind: str, target: str, job: Callable[..., Any]) -> None:
    wanted = parse_target(target).min_sqnr_db
    assert wanted is not None
    pipe, outcome = job(kind, target=target)
    assert outcome.report.sqnr_db >= wanted
    measured = verify(find_denoiser(pipe)[1], outcome.recording, on="verify")
    assert measured.sqnr_db == pytest.approx(outcome.report.sqnr_db)
    assert outcome.plan.target == target
    assert outcome.plan.quantized()


def test_an_impossible_sqnr_target_says_by_how_much_it_is_missed(job: Callable[..., Any]) -> None:
    with pytest.raises(PlanError, match=r"target 'sqnr>=90dB' (cannot be met|is missed).*\d+\.\d dB.*lower the target"):
        job("pixel", target="sqnr>=90dB")


def test_a_target_that_needs_a_reload_says_so_where_there_is_none(make: Make, inputs_of: Inputs) -> None:
    settings = Settings(target="sqnr>=60dB", dtype=torch.bfloat16)  # bf16 alone is worse than that
    with pytest.raises(PlanError, match=r"'sqnr>=60dB'.*dB"):
        quantize_pipeline(make("dit"), inputs_of("dit"), settings)


@pytest.mark.parametrize("target", ["size<=0.4x", "size<=220KB"])
def test_a_size_target_holds_in_the_saved_file(target: str, job: Callable[..., Any], tmp_path: Path) -> None:
    pipe, outcome = job("pixel", target=target)
    pipe.unet.save_pretrained(tmp_path)
    stored = sum(t.numel() * t.element_size() for t in load_file(tmp_path / FILE).values())
    limit = parse_target(target).byte_limit(layer_table(pipe.unet))
    assert limit is not None
    assert stored == outcome.report.bytes <= limit


@pytest.mark.parametrize("planner", ["hybrid", "uniform"])
def test_a_size_that_cannot_be_reached_is_refused(planner: str, job: Callable[..., Any]) -> None:
    with pytest.raises(PlanError, match=r"target 'size<=0.1x' cannot be met: .* MB \(0\.\d+x of fp32\)"):
        job("pixel", planner=planner, target="size<=0.1x")


def test_a_given_plan_is_held_against_a_size_target(job: Callable[..., Any], denoiser_of: Make) -> None:
    plan = make_plan(layer_table(denoiser_of("pixel")), planner="uniform")
    with pytest.raises(PlanError, match=r"target 'size<=0.2x' is missed by the plan given, which takes \d+\.\d MB"):
        job("pixel", plan=plan, target="size<=0.2x")


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w4a4", "w8a16", "w8a8-dyn"])
@pytest.mark.parametrize("planner", ["uniform", "hybrid"])
def test_every_scheme_runs_and_is_saved_packed(
    scheme: str, planner: str, job: Callable[..., Any], recordings: Callable[[str], Recording], tmp_path: Path
) -> None:
    pipe, outcome = job("pixel", scheme=scheme, planner=planner)
    assert outcome.plan.counts()[scheme] > 10
    pipe.unet.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    name = next(name for name, choice in outcome.plan.layers.items() if choice.scheme == scheme)
    float_elements = outcome.profile and outcome.profile.table.layer(name).parameters
    assert tensors[f"{name}.weight"].dtype == (torch.uint8 if scheme.startswith("w4") else torch.int8)
    if float_elements:
        assert tensors[f"{name}.weight"].numel() == (float_elements // 2 if scheme.startswith("w4") else float_elements)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert verify(loaded, recordings("pixel")).noise == outcome.report.noise


def test_a_given_plan_is_used_as_it_is(job: Callable[..., Any], denoiser_of: Make) -> None:
    plan = make_plan(layer_table(denoiser_of("dit")), planner="uniform", scheme="w8a8-dyn")
    _, outcome = job("dit", plan=plan)
    assert outcome.plan == plan
    assert outcome.profile is None


def test_the_dtype_reaches_all_models_of_the_pipeline(job: Callable[..., Any]) -> None:
    pipe, outcome = job("dit", dtype=torch.bfloat16, planner="uniform")
    assert outcome.report.dtype == "bfloat16"
    assert pipe.vae.dtype == pipe.transformer.dtype == torch.bfloat16
    assert pipe.transformer.config["quantization_config"].compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target": "fast"}, "cannot read the target 'fast'"),
        ({"target": 30}, "target is 30; write 'sqnr>=25dB'"),
        ({"components": "vae"}, "components is 'vae', expected a scheme for each name"),
        ({"keep_float": "absent"}, "keep-float names 'absent'"),
        ({"planner": "best"}, "unknown planner 'best'"),
        ({"scheme": "w1a1"}, "unknown scheme 'w1a1'"),
        ({"observer": "best"}, "unknown observer 'best'"),
        ({"calibration": "best"}, "unknown selection 'best'"),
    ],
)
def test_bad_settings_are_refused_and_the_model_stays_float(
    settings: dict[str, Any], match: str, make: Make, inputs_of: Inputs
) -> None:
    pipe, told = make("dit"), []
    with pytest.raises(LDMQError, match=match):
        quantize_pipeline(pipe, inputs_of("dit"), Settings(**settings), progress=lambda *stage: told.append(stage))
    assert not told  # before anything slow
    assert not quantized_layers(pipe.transformer)
    assert not any(isinstance(m, nn.Linear) and m._forward_hooks for m in pipe.transformer.modules())


def test_another_models_plan_is_refused_before_anything_is_recorded(
    make: Make, inputs_of: Inputs, denoiser_of: Make
) -> None:
    plan = make_plan(layer_table(denoiser_of("dit")), planner="uniform")
    told: list[str] = []
    with pytest.raises(PlanError, match=r"layers that UNet2DModel lacks: pos_embed.proj"):
        quantize_pipeline(
            make("pixel"), inputs_of("pixel"), Settings(plan=plan), progress=lambda stage, *_: told.append(stage)
        )
    assert told == []


def test_quantizing_a_pipeline_twice_is_refused(job: Callable[..., Any], inputs_of: Inputs) -> None:
    pipe, _ = job("dit", planner="uniform")
    with pytest.raises(LDMQError, match="is quantized already"):
        quantize_pipeline(pipe, inputs_of("dit"))


def test_stages_are_told_in_order(make: Make, inputs_of: Inputs) -> None:
    told: list[str] = []
    settings = Settings(target="sqnr>=20dB")
    quantize_pipeline(make("dit"), inputs_of("dit"), settings, progress=lambda stage, *_: told.append(stage))
    stages = list(dict.fromkeys(told))
    assert stages == ["record", "profile", "calibrate", "check target", "quantize", "verify"]
