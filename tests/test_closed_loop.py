"""Targets in the whole job: they hold on held-out calls, or it says by how much and what would be reachable."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from diffusers_ldmq import Profile, Recording, verify
from diffusers_ldmq.closed_loop import Job
from diffusers_ldmq.correction import DEFAULT
from diffusers_ldmq.errors import LDMQError, PlanError
from diffusers_ldmq.families import find_denoiser
from diffusers_ldmq.job import Outcome, quantize_pipeline
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.planners import parse_target, plan_bytes, predict
from diffusers_ldmq.settings import Settings, corrections_of
from diffusers_ldmq.tables import LayerTimes

Make = Callable[[str], Any]
Inputs = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def job(make: Make, inputs_of: Inputs) -> Callable[..., tuple[Any, Outcome]]:
    """(kind, settings) -> the quantized pipeline and what was measured."""

    def do(kind: str, **settings: Any) -> tuple[Any, Outcome]:
        pipe = make(kind)
        return pipe, quantize_pipeline(pipe, inputs_of(kind), Settings(**settings))

    return do


def counted(pipe: Any) -> list[int]:
    """A list that grows by one with every call of the pipe's denoiser."""
    calls: list[int] = []
    find_denoiser(pipe)[1].register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize(("kind", "db"), [("pixel", 33.0), ("pixel", 37.0), ("bundled", 38.0)], indirect=["kind"])
def test_an_sqnr_target_of_the_budget_planner_holds_on_held_out_calls(
    kind: str, db: float, job: Callable[..., Any]
) -> None:
    target = f"sqnr>={db}dB"
    pipe, outcome = job(kind, planner="budget", target=target)
    assert outcome.report.sqnr_db >= db
    assert verify(find_denoiser(pipe)[1], outcome.recording).sqnr_db == pytest.approx(outcome.report.sqnr_db)
    assert (outcome.plan.planner, outcome.plan.target) == ("budget", target)
    assert outcome.plan.reasons["measured_on_select_db"] >= db
    assert outcome.report.bytes < 0.4 * outcome.report.fp32_bytes


def test_an_sqnr_out_of_the_budget_planners_reach_says_so(job: Callable[..., Any]) -> None:
    with pytest.raises(PlanError, match=r"'sqnr>=45dB, size<=0.27x'.* \d+\.\d dB"):
        job("pixel", planner="budget", target="sqnr>=45dB, size<=0.27x")


def test_a_speed_out_of_reach_names_what_was_measured_and_what_is_possible(job: Callable[..., Any]) -> None:
    told = r"'speed>=50x' is missed: \d\.\d\dx measured; with every layer in its fastest scheme \d\.\d\dx is predicted"
    with pytest.raises(PlanError, match=told):
        job("pixel", planner="uniform", target="speed>=50x")
    with pytest.raises(PlanError, match=r"'speed>=50x' cannot be met: the fastest is predicted at \d\.\d\dx"):
        job("pixel", planner="budget", target="speed>=50x")


def test_a_speed_within_reach_is_measured_and_told(job: Callable[..., Any]) -> None:
    _, outcome = job("pixel", planner="budget", target="speed>=0.01x")
    assert outcome.report.speedup is not None
    assert outcome.report.speedup >= 0.01
    assert outcome.times is not None
    assert outcome.plan.reasons["predicted_ms"] == outcome.times.predicted_ms(outcome.plan.quantized())
    _, without = job("dit", planner="uniform")
    assert without.report.speedup is without.times is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target": "size<=0.2x"}, r"'size<=0.2x' cannot be met: the smallest w8a8 plan takes 0\.\d MB \(0\.\d+x"),
        ({"target": "size<=1KB", "planner": "budget", "scheme": "w4a8"}, "the smallest w4a8 plan"),
        ({"target": "size<=0.27x", "keep_float": "up_blocks"}, "--keep-float none or a larger target"),
        ({"corrections": "polish"}, "unknown correction 'polish'; known: .*bias.*smooth"),
        ({"corrections": "smooth,polish"}, "unknown correction 'polish'"),
    ],
)
def test_what_cannot_be_is_refused_before_the_denoiser_is_called(
    settings: dict[str, Any], match: str, make: Make, inputs_of: Inputs
) -> None:
    pipe = make("pixel")
    calls = counted(pipe)
    with pytest.raises(LDMQError, match=match):
        quantize_pipeline(pipe, inputs_of("pixel"), Settings(**settings))
    assert calls == []


@pytest.mark.parametrize("target", ["sqnr>=45dB, size<=0.27x", "sqnr>=36dB, int8>=50%"])
def test_raising_for_an_sqnr_breaks_no_other_demand(target: str, job: Callable[..., Any]) -> None:
    with pytest.raises(PlanError, match=r"cannot be met: the best plan reaches \d+\.\d dB, \d+\.\d dB short"):
        job("pixel", planner="uniform", target=target)


def test_integer_work_is_held_against_what_was_measured(job: Callable[..., Any]) -> None:
    with pytest.raises(PlanError, match=r"'int8>=10%' is missed: 0 % integer work measured; lower the target"):
        job("dit", planner="uniform", scheme="w8a16", target="int8>=10%")
    _, outcome = job("dit", planner="uniform", target="int8>=100%")
    assert outcome.report.int8_macs == 1.0


def test_a_raised_uniform_plan_says_so(job: Callable[..., Any]) -> None:
    _, outcome = job("pixel", planner="uniform", target="sqnr>=34dB")
    assert outcome.plan.planner == "uniform, raised"
    assert outcome.report.sqnr_db >= 34
    assert outcome.plan.reasons["raised_after_measuring"][0] == "conv_out"


def test_corrections_leave_their_trials_in_the_report(job: Callable[..., Any]) -> None:
    pipe, outcome = job("pixel", corrections="auto")
    plain, without = job("pixel")
    trials = outcome.report.corrections
    layers = list(dict.fromkeys(trial.layer for trial in trials))
    assert len(layers) == 8
    assert {trial.correction for trial in trials} >= set(DEFAULT)
    assert all(trial.reason for trial in trials)
    assert without.report.corrections == ()
    # those that cause most noise at the output, the noisiest first
    effects, schemes = predict(outcome.profile).total, outcome.plan.quantized()
    causes = sorted((n for n in schemes if schemes[n].startswith("w8a8")), key=lambda n: -effects[n][schemes[n]])
    assert layers == causes[:8]
    kept = [trial for trial in trials if trial.kept]
    assert kept
    assert outcome.report.noise != without.report.noise
    assert verify(find_denoiser(pipe)[1], outcome.recording).noise == outcome.report.noise
    assert quantized_layers(find_denoiser(plain)[1]).keys() == quantized_layers(find_denoiser(pipe)[1]).keys()


def test_correction_names_are_read() -> None:
    assert corrections_of("none") == ()
    assert corrections_of("auto") == DEFAULT
    assert corrections_of("smooth, bias") == ("smooth", "bias")
    for text in ("", "smooth,,bias", "auto,none"):
        with pytest.raises(LDMQError, match="unknown correction"):
            corrections_of(text)


# -- asking for more ---------------------------------------------------------------------------------------------------


@pytest.fixture
def toy_job(toy: Any, toy_profile: Callable[[Sequence[Any]], Profile]) -> Callable[..., Job]:
    """(target, settings) -> a job on a hand-made profile of five equal layers, without a recording."""

    def make_job(target: str, **settings: Any) -> Job:
        profile = toy_profile([toy(f"b{k}", (k + 1) * 1e-4, weight_db=45.0) for k in range(5)])
        ms = {"float": 10.0, "w8a8": 4.0, "w8a8-dyn": 5.0, "w8a16": 9.0}
        times = LayerTimes("cpu", "float32", 1, 60.0, {n.name: ms for n in profile.layers}, 60.0, "float32")
        nothing = Recording("Toy", (), {})
        wanted = Settings(target=target, **settings)
        return Job(nothing, profile.table, profile, times, wanted, parse_target(target), lambda *_: None)

    return make_job


def test_a_higher_demand_keeps_the_others_and_adds_up(toy_job: Callable[..., Job]) -> None:
    job = toy_job("sqnr>=33dB, size<=0.4x", planner="budget")
    plan = job.first_plan()
    higher = job.higher(plan, 2.0)
    assert higher is not None
    assert higher.reasons["demanded"] == {"min_sqnr_db": 35.0, "min_speedup": None}
    again = job.higher(higher, 1.5)
    assert again is not None
    assert again.reasons["demanded"]["min_sqnr_db"] == 36.5
    predicted = [p.predicted_sqnr_db or 0.0 for p in (plan, higher, again)]
    assert predicted == sorted(predicted)
    assert predicted[1] >= 35
    assert predicted[2] >= 36.5
    assert plan_bytes(job.table, again.quantized()) <= 0.4 * 4 * 50000
    assert job.higher(again, 40.0) is None


@pytest.mark.parametrize("planner", ["budget", "hybrid"])
def test_a_faster_plan_is_asked_for_with_what_was_missed(planner: str, toy_job: Callable[..., Job]) -> None:
    job = toy_job("speed>=1.2x", planner=planner)
    plan = job.first_plan()
    assert job.times is not None
    faster = job.faster(plan, 1.3)
    assert faster is not None
    assert faster.reasons["demanded"]["min_speedup"] == pytest.approx(1.2 * 1.3 * 1.02)
    assert job.times.predicted_ms(faster.quantized()) <= 60 / (1.2 * 1.3 * 1.02)
    assert job.faster(faster, 1.5) is None
    assert toy_job("speed>=1.2x", planner="uniform").faster(plan, 1.1) is None


def test_a_given_plan_and_the_uniform_one_are_raised_block_by_block(toy_job: Callable[..., Job]) -> None:
    job = toy_job("sqnr>=33dB", planner="uniform")
    plan = job.first_plan()
    raised = job.higher(plan, 9.0)
    assert raised is not None
    assert [c.scheme for c in raised.layers.values()] == ["w8a8"] * 4 + ["w8a16"]
    given = toy_job("sqnr>=33dB", planner="budget", plan=plan).higher(plan, 9.0)
    assert given == raised
    assert replace(job, profile=None).higher(plan, 1.0) is None


@pytest.mark.parametrize(("also", "fits"), [("int8>=80%", True), ("int8>=81%", False), ("size<=0.27x", True)])
def test_a_block_is_raised_only_within_the_other_demands(also: str, fits: bool, toy_job: Callable[..., Job]) -> None:
    job = toy_job(f"sqnr>=1dB, {also}", planner="hybrid")
    plan = job.first_plan()
    assert plan.counts() == {"w8a8": 5}
    assert (job.higher(plan, 9.0) is not None) == fits


def test_a_given_plan_must_fit_the_size(toy_job: Callable[..., Job]) -> None:
    plan = toy_job("sqnr>=1dB", planner="uniform").first_plan()
    with pytest.raises(PlanError, match="missed by the plan given"):
        toy_job("size<=0.2x", plan=plan).first_plan()
    assert toy_job("size<=0.27x", plan=plan).first_plan() is plan
