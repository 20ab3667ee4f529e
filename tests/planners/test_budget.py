"""The budget planner against all plans there are on hand-made profiles, and against the hybrid one on real ones."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from diffusers_ldmq import Plan, Profile, make_plan
from diffusers_ldmq.artifacts import LayerNoise
from diffusers_ldmq.errors import PlanError
from diffusers_ldmq.planners import Target, fp32_bytes, integer_share, plan_bytes, predict
from diffusers_ldmq.planners.budget import FLOAT_PENALTY, MARGIN_DB, MIN_INTEGER_SHARE, MOST_BYTES
from diffusers_ldmq.tables import LayerTimes

Toys = Callable[..., Any]
ToyProfile = Callable[[Sequence[Any]], Profile]
SCHEMES = ("w8a8", "w8a8-dyn", "w8a16", "float")
MS = {"float": 10.0, "w8a8": 3.0, "w8a8-dyn": 4.0, "w8a16": 12.0}


@pytest.fixture
def five(toy: Toys, toy_profile: ToyProfile) -> Profile:
    """Five layers of different sizes, work and noise, none of which is best everywhere."""
    noise = [3e-4, 1e-4, 8e-4, 2e-5, 6e-4]
    toys = [
        toy(f"b{k}", sum(noise[: k + 1]), macs=macs, weight_db=weight, dynamic_db=dynamic)
        for k, (macs, weight, dynamic) in enumerate(
            [(100, 40.0, 31.0), (300, 33.0, 34.0), (60, 50.0, 36.0), (200, 31.0, 30.0), (90, 45.0, 39.0)]
        )
    ]
    profile = toy_profile(toys)
    shapes = [(100, 100), (200, 50), (40, 300), (10, 10), (150, 170)]
    layers = tuple(replace(info, shape=s) for info, s in zip(profile.table.layers, shapes, strict=True))
    return replace(profile, table=replace(profile.table, layers=layers))


@pytest.fixture
def times(five: Profile) -> LayerTimes:
    """A call of 100 ms, of which the layers take from 5 to 25 in float."""
    layers = {n.name: {s: ms * (k + 1) / 2 for s, ms in MS.items()} for k, n in enumerate(five.layers)}
    return LayerTimes("cpu", "float32", 1, 100.0, layers, 90.0, "bfloat16")


def every_plan(profile: Profile, schemes: Sequence[str] = SCHEMES) -> Iterator[dict[str, str]]:
    names = [info.name for info in profile.table.layers]
    for chosen in itertools.product(schemes, repeat=len(names)):
        yield {n: s for n, s in zip(names, chosen, strict=True) if s != "float"}


def least_noise(profile: Profile, fits: Callable[[dict[str, str]], bool]) -> float:
    prediction = predict(profile)
    return min(prediction.nsr(plan) for plan in every_plan(profile) if plan and fits(plan))


def nsr(profile: Profile, plan: Plan) -> float:
    return predict(profile).nsr(plan.quantized())


def floor(profile: Profile) -> float:
    """The share of integer work that is asked for by itself."""
    everywhere = {info.name: "w8a8" for info in profile.table.layers}
    return MIN_INTEGER_SHARE * integer_share(profile.table, everywhere) - 1e-9


@pytest.mark.parametrize("ratio", [0.262, 0.28, 0.3, 0.35, 0.4])
def test_within_a_size_the_noise_is_the_least_of_all_plans(ratio: float, five: Profile) -> None:
    table = five.table
    plan = make_plan(five, f"size<={ratio}x", planner="budget")
    limit = int(ratio * fp32_bytes(table))
    assert plan_bytes(table, plan.quantized()) <= limit
    assert integer_share(table, plan.quantized()) >= floor(five)
    best = least_noise(five, lambda p: plan_bytes(table, p) <= limit and integer_share(table, p) >= floor(five))
    assert nsr(five, plan) == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("share", [0, 20, 50, 90, 100])
def test_with_a_share_of_integer_work_the_noise_is_the_least_of_all_plans(share: int, five: Profile) -> None:
    table = five.table
    plan = make_plan(five, f"int8>={share}%", planner="budget")
    most = MOST_BYTES * plan_bytes(table, {info.name: "w8a8" for info in table.layers})
    assert integer_share(table, plan.quantized()) >= share / 100
    assert plan_bytes(table, plan.quantized()) <= most
    best = least_noise(five, lambda p: integer_share(table, p) >= share / 100 - 1e-9 and plan_bytes(table, p) <= most)
    assert nsr(five, plan) == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("speedup", [1.0, 1.2, 1.5, 1.85])
def test_within_milliseconds_the_noise_is_the_least_of_all_plans(
    speedup: float, five: Profile, times: LayerTimes
) -> None:
    plan = make_plan(five, f"speed>={speedup}x", planner="budget", times=times)
    limit = 90.0 / speedup
    assert times.predicted_ms(plan.quantized()) <= limit + 1e-6
    assert plan.reasons["predicted_ms"] == pytest.approx(times.predicted_ms(plan.quantized()))
    best = least_noise(
        five,
        lambda p: times.predicted_ms(p) <= limit + 1e-9 and integer_share(five.table, p) >= floor(five),
    )
    assert nsr(five, plan) == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("db", [28.0, 31.0, 34.0, 36.0, 40.0])
def test_for_an_sqnr_the_plan_is_the_smallest_and_most_integer_that_reaches_it(db: float, five: Profile) -> None:
    table, prediction = five.table, predict(five)

    def cost(plan: dict[str, str]) -> float:
        return plan_bytes(table, plan) / fp32_bytes(table) - FLOAT_PENALTY * integer_share(table, plan)

    plan = make_plan(five, f"sqnr>={db}dB", planner="budget")
    assert plan.predicted_sqnr_db == pytest.approx(prediction.sqnr_db(plan.quantized()))
    assert plan.predicted_sqnr_db is not None
    assert plan.predicted_sqnr_db >= db + MARGIN_DB - 1e-6
    reached = [p for p in every_plan(five) if p and -10 * math.log10(prediction.nsr(p)) >= db + MARGIN_DB]
    integer = [p for p in reached if integer_share(table, p) >= floor(five)]
    best = min(cost(p) for p in integer or reached)
    assert cost(plan.quantized()) == pytest.approx(best, abs=2e-3 * abs(best))


def test_several_demands_hold_at_once(five: Profile, times: LayerTimes) -> None:
    table = five.table
    plan = make_plan(five, "size<=0.3x, speed>=1.3x, int8>=85%", planner="budget", times=times)
    limit = int(0.3 * fp32_bytes(table))

    def fits(p: dict[str, str]) -> bool:
        return plan_bytes(table, p) <= limit and times.predicted_ms(p) <= 90 / 1.3 and integer_share(table, p) >= 0.85

    assert fits(plan.quantized())
    assert nsr(five, plan) == pytest.approx(least_noise(five, fits), rel=2e-3)


def test_three_quarters_stay_integer_unless_the_target_forbids_it(five: Profile, times: LayerTimes) -> None:
    slow = {n: {**ms, "w8a8": 99.0, "w8a8-dyn": 99.0, "w8a16": 1.0} for n, ms in times.layers.items()}
    plan = make_plan(five, "speed>=1.1x", planner="budget", times=replace(times, layers=slow))
    assert integer_share(five.table, plan.quantized()) < floor(five)
    assert integer_share(five.table, make_plan(five, planner="budget").quantized()) >= floor(five)


def test_layers_that_share_an_input_get_one_scheme(five: Profile) -> None:
    apart = make_plan(five, planner="budget").quantized()
    first = next(iter(apart))
    names = (first, next(name for name in apart if apart[name] != apart[first]))
    table, prediction = five.table, predict(five)
    shared = replace(five, shared=(names,))
    plan = make_plan(shared, planner="budget")
    assert len({plan.layers[name].scheme for name in names}) == 1
    most = MOST_BYTES * plan_bytes(table, {info.name: "w8a8" for info in table.layers})
    best = min(
        prediction.nsr(p)
        for p in every_plan(five)
        if p.get(names[0]) == p.get(names[1])
        and plan_bytes(table, p) <= most
        and integer_share(table, p) >= floor(five)
    )
    assert nsr(five, plan) == pytest.approx(best, rel=2e-3)


def test_named_layers_stay_float_alone_and_of_a_group(five: Profile) -> None:
    shared = replace(five, shared=(("b0.layer", "b1.layer", "b2.layer"),))
    plan = make_plan(shared, planner="budget", keep_float=("b1", "b3.layer"))
    kept = {name for name, choice in plan.layers.items() if choice.reason == "kept float by request"}
    assert kept == {"b1.layer", "b3.layer"}
    assert not kept & plan.quantized().keys()
    assert plan.layers["b0.layer"].scheme == plan.layers["b2.layer"].scheme


def test_the_familys_defaults_are_free(toy: Toys, toy_profile: ToyProfile) -> None:
    profile = toy_profile([toy("a", 1e-4, keep_float=True), toy("b", 2e-4)])
    assert set(make_plan(profile, "size<=0.3x", planner="budget").quantized()) == {"a.layer", "b.layer"}


def fitted(profile: Profile, kept: tuple[str, ...]) -> tuple[Plan, Plan]:
    """The hybrid plan, and the budget plan of its bytes and share of integer work; no input is shared."""
    profile = replace(profile, shared=())
    hybrid = make_plan(profile, keep_float=kept)
    size = plan_bytes(profile.table, hybrid.quantized())
    share = integer_share(profile.table, hybrid.quantized()) - 1e-9
    target = Target("as hybrid", max_bytes=size, min_integer_share=share)
    return hybrid, make_plan(profile, target, planner="budget", keep_float=kept)


def test_it_is_never_noisier_than_the_hybrid_plan_of_that_size_and_work(
    five: Profile, profiles: Callable[[str], Profile], kind: str
) -> None:
    defaults = tuple(info.name for info in profiles(kind).table.layers if info.keep_float)
    for profile, kept in ((profiles(kind), defaults), (five, ("b3",))):
        hybrid, budget = fitted(profile, kept)
        assert plan_bytes(profile.table, budget.quantized()) <= plan_bytes(profile.table, hybrid.quantized())
        assert nsr(profile, budget) <= nsr(profile, hybrid) * 1.001


def test_on_the_trained_model_it_is_clearly_less_noisy(profiles: Callable[[str], Profile]) -> None:
    profile = profiles("bundled")
    hybrid, budget = fitted(profile, tuple(i.name for i in profile.table.layers if i.keep_float))
    assert nsr(profile, budget) < 0.8 * nsr(profile, hybrid)


def test_without_a_profile_it_says_what_to_run(five: Profile) -> None:
    with pytest.raises(PlanError, match="needs a profile; run `ldmq profile` first or choose --planner uniform"):
        make_plan(five.table, planner="budget")


def test_a_scheme_that_was_not_measured_is_refused(five: Profile) -> None:
    with pytest.raises(PlanError, match=r"has not measured w4a8; profile again with --scheme w4a8"):
        make_plan(five, planner="budget", scheme="w4a8")
    layers = tuple(
        LayerNoise(n.name, n.signal, {"w8a8": n.noise["w8a8"]}, {"w8a8": n.own["w8a8"]}) for n in five.layers
    )
    mixed = make_plan(replace(five, layers=layers), planner="budget")
    assert set(mixed.counts()) <= {"w8a8", "float"}


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("size<=0.2x", r"'size<=0.2x' cannot be met: the smallest w8a8 plan takes 0\.1 MB \(0\.2\d\dx of fp32\)"),
        ("speed>=9x", r"cannot be met: the fastest is predicted at 1\.89x of the fastest float"),
        ("int8>=50%, speed>=2.8x", r"the fastest is predicted at 1\.89x .*, at most 100 % of the work can be integer"),
    ],
)
def test_a_target_out_of_reach_is_refused_with_the_best(
    target: str, match: str, five: Profile, times: LayerTimes
) -> None:
    with pytest.raises(PlanError, match=match):
        make_plan(five, target, planner="budget", times=times)


def test_an_sqnr_out_of_reach_within_a_size_names_the_best_of_all_plans(five: Profile) -> None:
    limit = int(0.27 * fp32_bytes(five.table))
    best = -10 * math.log10(least_noise(five, lambda p: plan_bytes(five.table, p) <= limit))
    with pytest.raises(PlanError, match=rf"within the other demands {best:.1f} dB is best"):
        make_plan(five, "sqnr>=60dB, size<=0.27x", planner="budget")


def test_speed_without_times_says_what_to_do(five: Profile) -> None:
    with pytest.raises(PlanError, match=r"asks for speed, which needs times measured on this device; `ldmq quantize`"):
        make_plan(five, "speed>=1.5x", planner="budget")


def test_a_plan_that_would_leave_everything_float_is_refused(five: Profile) -> None:
    with pytest.raises(PlanError, match="'sqnr>=100dB' leaves every layer in floating point.*lower it"):
        make_plan(five, "sqnr>=100dB", planner="budget")
    with pytest.raises(PlanError, match="keep-float names every layer, so there is nothing to quantize"):
        make_plan(five, planner="budget", keep_float=("b0", "b1", "b2", "b3", "b4"))


def test_equal_profiles_give_equal_plans(five: Profile) -> None:
    assert make_plan(five, "size<=0.3x", planner="budget") == make_plan(five, "size<=0.3x", planner="budget")
