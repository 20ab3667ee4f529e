"""TDAC: scores against brute force, counts as the paper's code rounds them, one step per trajectory."""

import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffusers_ldmq import Recording
from diffusers_ldmq.calls import Call
from diffusers_ldmq.errors import CalibrationError, LDMQError
from diffusers_ldmq.selections import SELECTIONS, TDAC, TDACScores, find_selection, selection_name, uniform
from diffusers_ldmq.selections.tdac import allocate, squared_differences, variety

Recordings = Callable[[str], Recording]


def made_features(steps: int = 7, seed: int = 0) -> Tensor:
    """A walk: neighbouring steps are alike, and nearly so in the second half."""
    draw = torch.Generator().manual_seed(seed)
    strides = torch.randn(steps, 2, 6, 3, 2, generator=draw) * torch.linspace(1, 0.2, steps).view(-1, 1, 1, 1, 1)
    return strides.cumsum(0)


def made_recording(features: Tensor | None, images: int, runs: int = 2, steps: int | None = None) -> Recording:
    """Calls without arguments, `images` in each of the runs; steps: of the runs (default: those of the features)."""
    steps = steps or (len(features) if features is not None else 7)
    calls = tuple(
        Call("calibrate", run, step, float(steps - step), images, {}, {}, "output")
        for run in range(runs)
        for step in range(steps)
    )
    return Recording("Toy", calls, {"output": torch.zeros(images, 1)}, features=features)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_the_gram_matrix_gives_the_mean_squared_difference_of_every_pair(offset: float) -> None:
    features = made_features() + offset
    found = squared_differences(features)
    exact = features.double()
    for i in range(7):
        for j in range(7):
            assert found[i, j] == pytest.approx((exact[i] - exact[j]).square().mean().item(), rel=1e-6, abs=1e-9)
    assert torch.equal(found, found.T)


def test_variety_in_one_pass_is_the_loop_over_all_pairs() -> None:
    features = made_features()
    features[3, 0, :, 1, 1] = 0  # a vector without a direction is unlike everything
    brute = [0.0] * 7
    for i in range(7):
        for j in range(7):
            if i != j:
                one, other = features[i].double(), features[j].double()
                brute[i] += (1 - torch.cosine_similarity(one, other, dim=1)).sum().item()
    assert variety(features).tolist() == pytest.approx(brute, rel=1e-9)


@pytest.mark.parametrize("radius", [0.5, 1.0])
def test_an_absolute_radius_counts_the_steps_within_it(radius: float) -> None:
    features = made_features()
    near = [
        sum((features[i] - features[j]).square().mean().item() <= radius for j in range(7) if j != i) for i in range(7)
    ]
    low, high = min(near), max(near)
    assert high > low
    expected = [(count - low) / (high - low) for count in near]
    scores = TDAC(radius=radius, quantile=0.9).scores(features, 20)
    assert scores.density == pytest.approx(expected)
    assert scores.radius == radius


def test_the_radius_is_the_quantile_of_all_pairs() -> None:
    features = made_features()
    pairs = sorted((features[i] - features[j]).square().mean().item() for i in range(7) for j in range(i))
    for quantile, index in ((0.0, 0), (0.5, 10), (1.0, 20)):
        assert TDAC(quantile=quantile).scores(features, 20).radius == pytest.approx(pairs[index], rel=1e-5)


@pytest.mark.parametrize("scale", [1000, 1e-3])
def test_the_scale_of_the_features_does_not_matter_without_an_absolute_radius(scale: float) -> None:
    features = made_features(20)
    plain, scaled = TDAC().scores(features, 100), TDAC().scores(features * scale, 100)
    assert plain.counts == scaled.counts
    assert plain.density == scaled.density
    assert TDAC(radius=1.0).scores(features, 100).density != TDAC(radius=1.0).scores(features * scale, 100).density


def test_samples_go_where_density_and_variety_are() -> None:
    features = made_features(20)
    only_dense = TDAC(strength=0).scores(features, 1000)
    share = [density / sum(only_dense.density) for density in only_dense.density]
    assert [count / 1000 for count in only_dense.counts] == pytest.approx(share, abs=2e-3)
    varied = TDAC(strength=1e6).scores(features, 1000)
    share = [v / sum(varied.variety) for v in varied.variety]
    assert [count / 1000 for count in varied.counts] == pytest.approx(share, abs=2e-3)
    assert min(only_dense.density) == min(varied.variety) == 0
    assert max(only_dense.density) == max(varied.variety) == 1


@pytest.mark.parametrize(
    ("weights", "n", "counts"),
    [
        ([2, 1, 1], 8, (4, 2, 2)),
        ([5, 3, 3, 3], 3, (1, 1, 1, 0)),  # 4 after rounding: the last, cleanest step loses one
        ([4, 3, 3, 3, 3], 3, (1, 1, 1, 0, 0)),
        ([3, 4, 3, 3, 3, 3], 2, (1, 1, 0, 0, 0, 0)),  # all round to 0: those with most, earlier ones first, get one
        ([1, 6, 1.2, 1.2], 3, (0, 3, 0, 0)),  # 2 after rounding: one more for the step that has most
        ([0, 0, 0], 6, (2, 2, 2)),
    ],
)
def test_rounded_counts_are_mended_as_in_the_papers_code(weights: list[float], n: int, counts: tuple[int, ...]) -> None:
    assert allocate(weights, n) == counts


def test_counts_always_sum_to_n() -> None:
    draw = random.Random(0)
    for _ in range(300):
        weights = [draw.choice([0.0, draw.random(), 10 * draw.random()]) for _ in range(draw.randint(1, 12))]
        n = draw.randint(1, 200)
        counts = allocate(weights, n)
        assert sum(counts) == n
        assert min(counts) >= 0


def test_every_trajectory_gives_one_step_and_the_counts_are_kept() -> None:
    recording = made_recording(made_features(), images=20)
    chosen = TDAC()(recording)
    assert sorted(sample.trajectory for sample in chosen) == [(run, i) for run in (0, 1) for i in range(20)]
    taken = Counter(sample.step for sample in chosen)
    assert recording.features is not None
    assert tuple(taken[step] for step in range(7)) == TDAC().scores(recording.features, 40).counts
    for run in (0, 1):  # dealt across the runs, not one run after the other
        assert len({sample.step for sample in chosen if sample.trajectory[0] == run}) > 3


def test_the_seed_decides_who_gives_which_step() -> None:
    recording = made_recording(made_features(), images=20)
    assert TDAC()(recording) == TDAC()(recording)
    assert set(TDAC(seed=1)(recording)) != set(TDAC()(recording))
    assert Counter(s.step for s in TDAC(seed=1)(recording)) == Counter(s.step for s in TDAC()(recording))


def test_more_samples_than_trajectories_are_further_steps_of_theirs() -> None:
    recording = made_recording(made_features(), images=4)
    for n in range(9, 57):
        chosen = TDAC()(recording, n)
        assert len(chosen) == len(set(chosen)) == n
        each = Counter(sample.trajectory for sample in chosen)
        assert max(each.values()) - min(each.values()) <= 1
    assert set(TDAC()(recording, 10**6)) == set(recording.samples())


@pytest.mark.parametrize("name", ["normal", "tdac"])
def test_runs_of_other_lengths_give_the_same_places_of_their_own_schedule(name: str) -> None:
    short, long = made_recording(made_features(), 6), made_recording(made_features(), 6, steps=13)
    calls = tuple(replace(call, run=call.run + 2) for call in long.calls)
    mixed = replace(short, calls=(*short.calls, *calls))
    chosen = SELECTIONS[name](mixed, 24)
    assert len({sample.trajectory for sample in chosen}) == 24
    assert max(sample.step for sample in chosen if sample.trajectory[0] >= 2) > 6
    assert set(SELECTIONS[name](mixed, 10**6)) == set(mixed.samples())


def test_fewer_samples_than_steps_work_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    recording = made_recording(made_features(), images=2)
    with caplog.at_level(logging.WARNING):
        assert len(TDAC()(recording)) == 4
    assert "only 4 samples for 7 sampling steps" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        TDAC()(recording, 7)
    assert not caplog.records


def test_a_recording_without_features_says_how_to_get_them() -> None:
    recording = made_recording(None, images=2)
    with pytest.raises(CalibrationError, match=r"recording of this Toy has no features.*selection='tdac'"):
        TDAC()(recording)
    assert len(SELECTIONS["normal"](recording, None)) == len(uniform(recording)) == 4


def test_features_that_cannot_be_compared_are_refused() -> None:
    features = made_features()
    features[2, 0, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="features hold NaN or Inf"):
        TDAC().scores(features, 4)
    with pytest.raises(CalibrationError, match=r"shape \[7, 2, 6, 3\]; expected \[steps, batch"):
        TDAC().scores(made_features()[..., 0], 4)


@pytest.mark.parametrize("steps", [1, 3])
def test_equal_steps_share_equally(steps: int) -> None:
    features = torch.ones(steps, 2, 4, 2, 2)
    scores = TDAC().scores(features, 6)
    assert scores.counts == (6 // steps,) * steps
    assert set(scores.density) == set(scores.variety) == {0.0}
    assert len(TDAC()(made_recording(features, images=3))) == 6


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"strength": -1.0}, "TDAC's strength is -1.0; expected a number of 0 or more"),
        ({"quantile": 1.5}, "TDAC's quantile is 1.5; expected a number from 0 to 1"),
        ({"radius": float("nan")}, "TDAC's radius is nan; expected a number of 0 or more"),
    ],
)
def test_unusable_options_are_named(arguments: dict[str, float], told: str) -> None:
    with pytest.raises(CalibrationError, match=told):
        TDAC(**arguments)  # pyright: ignore[reportArgumentType]


def test_scores_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(CalibrationError, match="scores are of 2, 1 and 2 steps"):
        TDACScores((0.0, 1.0), (1.0,), (2, 3), 0.5)


def test_a_selection_is_found_by_name_or_given_and_has_a_name() -> None:
    strong = TDAC(strength=5.0)
    assert find_selection("tdac") == TDAC()
    assert find_selection(strong) is strong
    with pytest.raises(LDMQError, match="selection is 5; expected one of first-step, normal, tdac, uniform or"):
        find_selection(5)  # pyright: ignore[reportArgumentType]
    assert selection_name("any") == "any"
    assert selection_name(uniform) == "uniform"
    assert selection_name(TDAC()) == "tdac"
    assert selection_name(strong) == "TDAC(strength=5.0, quantile=0.25, radius=None, seed=0)"


def test_density_is_a_hump_for_a_real_model(recordings: Recordings) -> None:
    features = recordings("bundled").features
    assert features is not None
    scores = TDAC(quantile=0.5).scores(features, 8)
    peak = scores.density.index(1.0)
    assert 0 < peak < len(scores.density) - 1
    assert scores.variety[0] == 1.0
