"""Figures of profiles, plans and reports."""

import math
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from PIL import Image

from diffusers_ldmq import Plan, Profile, Report, make_plan
from diffusers_ldmq.artifacts import BlockCurve
from diffusers_ldmq.drawing import Drawing
from diffusers_ldmq.plots import (
    RANKED,
    added_noise_db,
    block_curve,
    layer_ranking,
    noise_map,
    output_curve,
    own_effect_db,
    plot_sqnr,
    predicted_curve,
)


def report(noise: float = 1.0) -> Report:
    return Report((900.0, 1.0), (1000.0, 1000.0), (noise, 10 * noise), "float32", {"w8a8": 10}, {}, 0.8, 30, 100)


def pixels(drawing: Drawing) -> Image.Image:
    return Image.open(BytesIO(drawing.png())).convert("RGB")


def colours(drawing: Drawing) -> int:
    return len(pixels(drawing).getcolors(1 << 24) or [])


def with_own(profile: Profile) -> Profile:
    """The profile with own effects at the output, a little different for every layer."""
    layers = tuple(
        replace(noise, own={s: tuple(1e-4 * (k + 1) for _ in power) for s, power in noise.noise.items()})
        for k, noise in enumerate(profile.layers)
    )
    return replace(profile, layers=layers)


def test_curves_are_drawn_without_touching_the_users_settings(profiles: Any, tmp_path: Path) -> None:
    before, profile = dict(mpl.rcParams), profiles("pixel")
    plot_sqnr(tmp_path / "sqnr.png", profile, make_plan(profile), {"hybrid": report(), "uniform": report(30.0)})
    plot_sqnr(tmp_path / "uniform.png", profile, make_plan(profile, planner="uniform"), {})
    assert dict(mpl.rcParams) == before
    assert Image.open(tmp_path / "sqnr.png").width >= 1200


@pytest.mark.parametrize("kind", ["pixel", "dit"], indirect=True)
def test_every_figure_of_a_profile_is_drawn_and_explained(kind: str, profiles: Callable[[str], Profile]) -> None:
    profile = profiles(kind)
    plan = make_plan(profile)
    drawings = [block_curve(profile, plan), noise_map(profile), layer_ranking(profile, plan)]
    drawings += [output_curve({"this plan": report()}, plan)]
    for drawing in drawings:
        assert drawing.explanation.endswith(".")
        assert colours(drawing) > 20
        titled = Image.open(BytesIO(drawing.png(titled=True)))
        assert titled.height > pixels(drawing).height
        assert titled.width == drawing.width


def test_the_same_figure_has_the_same_bytes(profiles: Any) -> None:
    assert noise_map(profiles("pixel")).png() == noise_map(profiles("pixel")).png()


def test_a_backward_curve_and_its_explanation_appear_where_it_was_measured(profiles: Any) -> None:
    profile = profiles("pixel")
    plan = make_plan(profile)
    backward = replace(profile.curve, direction="backward", noise=profile.curve.noise[::-1])
    both = replace(profile, curves=(backward,))
    assert "backward" not in block_curve(profile, plan).explanation
    assert "backward" in block_curve(both, plan).explanation
    assert block_curve(both, plan).png() != block_curve(profile, plan).png()


def test_groups_of_several_blocks_can_be_drawn(toy: Any, toy_profile: Any) -> None:
    profile = toy_profile([toy("a", 1e-4, "encoder"), toy("b", 2e-4), toy("c", 4e-4)])
    curve = replace(profile.curve, groups=(("a", "b"), ("c",)), noise=((1e-4,), (4e-4,)))
    grouped = replace(profile, curve=curve)
    plan = replace(make_plan(profile), reasons={"sensitive_blocks": ["b"], "cut_off": "c"})
    assert colours(block_curve(grouped, plan)) > 20
    assert colours(noise_map(grouped)) > 20


def test_added_noise_is_a_difference_of_powers() -> None:
    curve = BlockCurve("w8a8", (100.0,), ((1.0,), (1.0,), (3.0,), (2.5,), (2.5 + 1e-12,)), (("a",),) * 5)
    first, nothing, more, cancels, rounding = (row[0] for row in added_noise_db(curve))
    assert first == pytest.approx(-20)
    assert math.isnan(nothing)
    assert more == pytest.approx(10 * math.log10(0.02))
    assert cancels == -math.inf
    assert math.isnan(rounding)


def test_own_effect_is_relative_to_the_output_and_ranks_where_it_was_measured(profiles: Any) -> None:
    profile = profiles("pixel")
    plan = make_plan(profile)
    known = with_own(profile)
    noise = known.layers[3]
    signal = sum(profile.curve.signal)
    expected = 10 * math.log10(signal / sum(noise.own["w8a8"]))
    assert own_effect_db(known, noise, "w8a8") == pytest.approx(expected)
    unknown = replace(profile, layers=tuple(replace(noise, own={}) for noise in profile.layers))
    assert own_effect_db(unknown, unknown.layers[3], "w8a8") is None
    assert "denoiser's output" in layer_ranking(known, plan).explanation
    assert "layer's own output" in layer_ranking(unknown, plan).explanation
    assert layer_ranking(known, plan).title.startswith(f"The {min(RANKED, len(known.layers))} layers")


def test_exact_and_unmeasured_values_leave_gaps_instead_of_failing(toy: Any, toy_profile: Any) -> None:
    profile = toy_profile([toy("a", 0.0, "encoder"), toy("b", 0.0)])
    silent = replace(profile, layers=tuple(replace(noise, noise={}) for noise in profile.layers))
    plan = Plan("Toy", "0", "uniform", {}, predicted_sqnr_db=math.inf, reasons={"predicted_curve_db": {"900": "inf"}})
    assert predicted_curve(plan) == {900.0: math.inf}
    for drawing in (block_curve(profile, plan), noise_map(profile), layer_ranking(silent, plan)):
        assert pixels(drawing).width == drawing.width
    assert pixels(output_curve({"exact": report(0.0)}, plan)).width > 1000


def test_names_are_never_read_as_formulas(toy: Any, toy_profile: Any) -> None:
    profile = toy_profile([toy(r"$\frac{broken$", 1e-4, "encoder"), toy("$b$", 2e-4)])
    plan = make_plan(profile)
    for drawing in (block_curve(profile, plan), noise_map(profile), layer_ranking(profile, plan)):
        assert colours(drawing) > 20
    assert colours(output_curve({r"$\frac{x$": report()}, plan)) > 20


def test_very_many_blocks_stay_a_picture_of_reasonable_size(toy: Any, toy_profile: Any) -> None:
    profile = toy_profile([toy(f"block.{k}", 1e-6 * (k + 1), "encoder" if k < 200 else "decoder") for k in range(400)])
    width, height = pixels(noise_map(profile)).size
    assert 2000 < width < 4000
    assert height < 1000
