"""Planners on hand-made profiles: what is sensitive, where the cut-off falls, what runs in which precision."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from diffusers_ldmq import Profile, make_plan
from diffusers_ldmq.artifacts import LayerNoise, Plan
from diffusers_ldmq.errors import LDMQError, PlanError
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.planners import (
    PLANNERS,
    Target,
    fp32_bytes,
    higher_precision,
    integer_share,
    low_precision,
    parse_target,
    plan_bytes,
)
from diffusers_ldmq.planners.hybrid import read_curve

Toys = Callable[..., Any]
ToyProfile = Callable[[Sequence[Any]], Profile]


def schemes(plan: Plan) -> list[str]:
    return [choice.scheme for choice in plan.layers.values()]


@pytest.fixture
def five(toy: Toys, toy_profile: ToyProfile) -> Profile:
    """delta_n = 1, 1, -0.5, 1, 10 times 1e-4: the last block is sensitive, the third cancels errors."""
    levels = [1e-4, 2e-4, 1.5e-4, 2.5e-4, 12.5e-4]
    return toy_profile([toy(f"block{k}", nsr, "encoder" if k == 0 else "decoder") for k, nsr in enumerate(levels)])


def test_delta_n_is_the_noise_that_each_block_adds(five: Profile) -> None:
    curve = read_curve(five, frozenset())
    assert curve.delta_n == pytest.approx([1e-4, 1e-4, -0.5e-4, 1e-4, 10e-4])
    assert curve.starts == (0, 1, 2, 3, 4)


def test_groups_of_blocks_are_raised_together_from_their_first_block(five: Profile) -> None:
    grouped = replace(
        five.curve, noise=((2e-4,), (12.5e-4,)), groups=(("block0", "block1"), ("block2", "block3", "block4"))
    )
    curve = read_curve(replace(five, curve=grouped), frozenset())
    assert curve.delta_n == pytest.approx([2e-4, 10.5e-4])
    assert curve.starts == (0, 2)


@pytest.mark.parametrize("groups", [(("block0",),), (("block1", "block0", "block2", "block3", "block4"),)])
def test_a_curve_of_other_blocks_is_refused(groups: tuple[tuple[str, ...], ...], five: Profile) -> None:
    with pytest.raises(PlanError, match="does not cover the model's blocks in order; profile again"):
        make_plan(replace(five, curve=replace(five.curve, groups=groups, noise=((1e-4,),))))


def test_a_block_is_sensitive_above_four_times_the_median_with_negative_delta_n_as_zero(
    five: Profile, toy: Toys, toy_profile: ToyProfile
) -> None:
    assert read_curve(five, frozenset()).threshold == pytest.approx(4e-4)
    assert read_curve(five, frozenset()).sensitive == (4,)
    # counted 0, 0, 0, 1, 5: median 0; as they are -3, -3, 0, 1, 5 the same, but -9, 1, 1.5, 2, 7 tells them apart
    cumulated = [0.0010, 0.0011, 0.0003, 0.0005, 0.00121]
    curve = read_curve(toy_profile([toy(f"b{k}", n) for k, n in enumerate(cumulated)]), frozenset())
    assert curve.delta_n == pytest.approx([1e-3, 1e-4, -8e-4, 2e-4, 7.1e-4])
    assert curve.threshold == pytest.approx(8e-4)  # median of 0, 1, 2, 7.1, 10 e-4
    assert curve.sensitive == (0,)


def test_blocks_that_stay_float_do_not_count_into_the_median(toy: Toys, toy_profile: ToyProfile) -> None:
    levels = [0.0, 0.0, 0.0, 2e-4, 4e-4, 14e-4]
    toys = [toy(f"b{k}", nsr, keep_float=k < 3) for k, nsr in enumerate(levels)]
    curve = read_curve(toy_profile(toys), frozenset(t.name + ".layer" for t in toys[:3]))
    assert curve.threshold == pytest.approx(8e-4)
    assert curve.sensitive == (5,)


def test_without_a_target_the_suffix_begins_at_the_first_sensitive_decoder_block(five: Profile) -> None:
    plan = make_plan(five)
    assert schemes(plan) == ["w8a8"] * 4 + ["w8a16"]
    assert plan.reasons["cut_off"] == "block4"
    assert plan.reasons["sensitive_blocks"] == ["block4"]
    assert plan.reasons["delta_n"]["block2"] == pytest.approx(-0.5e-4)
    # (1 + 1 + 0 + 1 + 1, the last at a tenth) e-4, times 12.5 / 13 measured over estimated
    assert plan.predicted_sqnr_db == pytest.approx(34.15, abs=0.01)


def test_a_sensitive_encoder_block_starts_no_suffix(toy: Toys, toy_profile: ToyProfile) -> None:
    toys = [toy("encoder", 10e-4, "encoder"), *(toy(f"b{k}", (10 + k) * 1e-4) for k in range(1, 5))]
    plan = make_plan(toy_profile(toys))
    assert schemes(plan) == ["w8a8"] * 5
    assert plan.reasons["sensitive_blocks"] == ["encoder"]
    assert plan.reasons["cut_off"] is None


@pytest.mark.parametrize(
    ("macs", "raised"),
    [((100, 100, 100, 50, 50), 2), ((100, 100, 100, 51, 50), 1), ((10, 10, 10, 10, 50), 0)],
    ids=["75 % exactly", "just below", "one block too heavy"],
)
def test_without_a_target_three_quarters_of_the_work_stay_integer(
    macs: tuple[int, ...], raised: int, toy: Toys, toy_profile: ToyProfile
) -> None:
    levels = [1e-4, 2e-4, 3e-4, 20e-4, 40e-4]  # the last two are sensitive
    profile = toy_profile([toy(f"b{k}", n, macs=m) for k, (n, m) in enumerate(zip(levels, macs, strict=True))])
    plan = make_plan(profile)
    assert schemes(plan) == ["w8a8"] * (5 - raised) + ["w8a16"] * raised
    assert integer_share(profile.table, plan.quantized()) >= 0.75


@pytest.mark.parametrize(
    ("target", "low", "whole"),
    [("sqnr>=29dB", 5, 5), ("sqnr>=30dB", 4, 5), ("sqnr>=35dB", 3, 5), ("sqnr>=36", 1, 5), ("sqnr>=39", 0, 5),
     ("sqnr>=45", 0, 4), ("sqnr>=50", 0, 1)],
)  # fmt: skip
def test_an_sqnr_target_takes_the_lowest_precision_predicted_to_meet_it(
    target: str, low: int, whole: int, five: Profile
) -> None:
    plan = make_plan(five, target)
    assert schemes(plan) == ["w8a8"] * low + ["w8a16"] * (whole - low) + ["float"] * (5 - whole)
    assert plan.target == target
    assert plan.predicted_sqnr_db is not None
    assert plan.predicted_sqnr_db >= float(target.removeprefix("sqnr>=").removesuffix("dB"))


def test_an_sqnr_that_no_plan_reaches_is_refused_with_the_best(five: Profile) -> None:
    with pytest.raises(PlanError, match=r"cannot be met: the best w8a8 plan .* reach 50\.2 dB, 39\.8 dB short; lower"):
        make_plan(five, "sqnr>=90dB")


# a layer takes 10000 codes and 400 bytes of scales (static: and 8 more) of 40000 bytes at fp32, 20000 in floating point
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("size<=0.4x", ["w8a8", "w8a8", "w8a8", "float", "float"]),
        ("size<=73KB", ["w8a8", "w8a8", "w8a8", "float", "float"]),
        ("size<=0.36x", ["w8a8", "w8a8", "w8a8", "float", "float"]),
        ("size<=0.31x", ["w8a8", "w8a8", "w8a8", "w8a8", "float"]),
        ("size<=62KB", ["w8a8", "w8a8", "w8a8", "w8a8", "float"]),
        ("size<=0.27x", ["w8a8", "w8a8", "w8a8", "w8a8", "w8a8"]),
        ("size<=0.053MB", ["w8a8", "w8a8", "w8a8", "w8a8", "w8a8"]),
    ],
)
def test_a_size_target_keeps_as_much_of_the_suffix_as_fits(
    target: str, expected: list[str], toy: Toys, toy_profile: ToyProfile
) -> None:
    levels = [1e-4, 2e-4, 3e-4, 20e-4, 40e-4]
    weights = {3: 10.0, 4: 10.0}  # weight noise dominates in the sensitive blocks, so they become float
    toys = [toy(f"b{k}", n, macs=10 if k > 2 else 100, weight_db=weights.get(k, 40.0)) for k, n in enumerate(levels)]
    profile = toy_profile(toys)
    plan = make_plan(profile, target)
    assert schemes(plan) == expected
    limit = parse_target(target).byte_limit(profile.table)
    assert limit is not None
    assert plan_bytes(profile.table, plan.quantized()) <= limit


@pytest.mark.parametrize("planner", list(PLANNERS))
@pytest.mark.parametrize("target", ["size<=0.2x", "size<=51KB"])
def test_a_size_no_plan_can_reach_is_refused_with_the_least_and_a_way_out(
    planner: str, target: str, five: Profile
) -> None:
    with pytest.raises(
        PlanError, match=r"cannot be met.*: .*w8a8.* 0\.1 MB \(0\.260x of fp32\).*[Cc]hoose a(nother|\s*smaller)"
    ):
        make_plan(five, target, planner=planner)


@pytest.mark.parametrize(
    ("weight_db", "activation_db", "scheme"), [(40, 30, "w8a16"), (30, 30, "w8a16"), (30, 40, "float")]
)
def test_higher_precision_removes_the_noise_that_dominates(
    weight_db: float, activation_db: float, scheme: str, toy: Toys, toy_profile: ToyProfile
) -> None:
    profile = toy_profile([toy("b", 1e-3, weight_db=weight_db, activation_db=activation_db)])
    choice = higher_precision(profile, "b.layer", "w8a8")
    assert choice.scheme == scheme
    assert f"weight noise {weight_db:.1f} dB, activation noise {activation_db:.1f} dB" in choice.reason


@pytest.mark.parametrize(
    ("static_db", "dynamic_db", "scheme"),
    [(30.0, 32.9, "w8a8"), (30.0, 33.1, "w8a8-dyn"), (30.0, 20.0, "w8a8")],
)
def test_dynamic_ranges_are_taken_where_they_gain_three_decibels(
    static_db: float, dynamic_db: float, scheme: str, toy: Toys, toy_profile: ToyProfile
) -> None:
    profile = toy_profile([toy("b", 1e-3, static_db=static_db, dynamic_db=dynamic_db)])
    assert low_precision(profile.layers[0], "w8a8").scheme == scheme
    assert schemes(make_plan(profile, "sqnr>=20dB")) == [scheme]


def test_a_scheme_without_a_dynamic_twin_is_taken_as_it_is() -> None:
    noise = LayerNoise("b", (1.0,), {"w8a16": (0.1,), "w4a16": (0.1,)})
    assert low_precision(noise, "w4a16").scheme == "w4a16"
    assert low_precision(noise, "w8a8").scheme == "w8a8"


def test_hybrid_keeps_the_familys_defaults_float_and_uniform_does_not(toy: Toys, toy_profile: ToyProfile) -> None:
    profile = toy_profile([toy("conv_in", 1e-4, keep_float=True), toy("b", 2e-4)])
    assert schemes(make_plan(profile)) == ["float", "w8a8"]
    assert schemes(make_plan(profile.table, planner="uniform")) == ["w8a8", "w8a8"]
    with pytest.raises(
        PlanError, match="would quantize .*conv_in.* which the profile's curve left float; profile again"
    ):
        make_plan(profile, keep_float="none")
    assert schemes(make_plan(profile.table, planner="uniform", keep_float=("b",))) == ["w8a8", "float"]
    assert "family default" in make_plan(profile).layers["conv_in.layer"].reason


def test_hybrid_without_a_profile_or_with_one_of_another_scheme_says_what_to_run(five: Profile) -> None:
    with pytest.raises(PlanError, match="needs a profile; run `ldmq profile` first"):
        make_plan(five.table)
    with pytest.raises(PlanError, match="block curve is for w8a8, the plan asks for w4a8"):
        make_plan(five, scheme="w4a8")


def test_an_unknown_planner_lists_the_known_ones(five: Profile) -> None:
    with pytest.raises(LDMQError, match="unknown planner 'best'; known: budget, hybrid, uniform"):
        make_plan(five, planner="best")


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("sqnr>=25dB", "min_sqnr_db", 25.0),
        (" SQNR >= 25.5 db ", "min_sqnr_db", 25.5),
        ("sqnr>=-3", "min_sqnr_db", -3.0),
        ("size<=0.3x", "max_ratio", 0.3),
        ("size <= 900 MB", "max_bytes", 900_000_000),
        ("size<=1.5GiB", "max_bytes", 3 * 2**29),
        ("size<=10kb", "max_bytes", 10_000),
        ("speed >= 1.5x", "min_speedup", 1.5),
        ("int8>=80%", "min_integer_share", 0.8),
    ],
)
def test_targets_are_read(text: str, field: str, value: float) -> None:
    target = parse_target(text)
    assert getattr(target, field) == value
    assert target == replace(Target(text), **{field: value})


def test_several_demands_are_read_at_once() -> None:
    target = parse_target("sqnr>=28dB, size<=0.3x,speed>=1.2x, int8>=75%")
    assert target == Target(target.text, 28.0, None, 0.3, 1.2, 0.75)


@pytest.mark.parametrize(
    "text",
    ["", "fast", "sqnr<=25dB", "sqnr>25dB", "sqnr>=dB", "sqnr>=nan", "sqnr>=inf", "size>=0.3x", "size<=0x",
     "size<=-1MB", "size<=3", "size<=1e9MB", "sqnr>=25dB size<=0.3x", "size<=0.3 of fp32", "sqnr>=25dBm",
     "sqnr>=25dB, sqnr>=26dB", "size<=0.3x, size<=9MB", "speed>=0x", "speed>=2", "int8>=101%", "int8>=80", "sqnr>=1,"],
)  # fmt: skip
def test_targets_that_cannot_be_read_are_refused_with_examples(text: str) -> None:
    with pytest.raises(PlanError, match=r"cannot read the target .*write 'sqnr>=25dB', 'size<=0.3x'"):
        parse_target(text)


def test_predicted_bytes_are_those_of_the_saved_tensors(
    kind: str, mixed_denoiser: Callable[[str], Any], tmp_path: Path
) -> None:
    denoiser = mixed_denoiser(kind)
    table = layer_table(denoiser)
    plan = {n: entry["scheme"] for n, entry in denoiser.config["quantization_config"].layers.items()}
    denoiser.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert plan_bytes(table, plan) == sum(value.numel() * value.element_size() for value in tensors.values())


def test_fp32_bytes_are_those_of_the_float_model(kind: str, denoiser_of: Callable[[str], Any]) -> None:
    denoiser = denoiser_of(kind)
    assert fp32_bytes(layer_table(denoiser)) == 4 * sum(p.numel() for p in denoiser.parameters())
