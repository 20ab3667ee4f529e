"""Which recorded samples calibrate."""

import statistics
from collections.abc import Callable

import pytest

from diffusers_ldmq import Recording
from diffusers_ldmq.calls import Call
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.selections import SELECTIONS, first_step, normal, uniform

Recordings = Callable[[str], Recording]


@pytest.mark.parametrize("n", [None, 1, 3])
def test_first_step_takes_every_trajectory_at_the_noisiest_timestep(n: int | None, recordings: Recordings) -> None:
    recording = recordings("pixel").only("calibrate")
    chosen = first_step(recording, n)
    assert {sample.step for sample in chosen} == {0}
    assert len(chosen) == (n or 4)
    largest = max(call.timestep for call in recording.calls)
    assert {batch.timestep for batch in recording.batches(list(chosen))} == {largest}


def test_uniform_takes_one_sample_per_trajectory_from_first_step_to_last(recordings: Recordings) -> None:
    chosen = uniform(recordings("bundled").only("calibrate"))
    assert len({sample.trajectory for sample in chosen}) == 4
    assert [sample.step for sample in chosen] == [0, 1, 2, 3]


def test_uniform_covers_the_steps_evenly_whatever_the_number(recordings: Recordings) -> None:
    recording = recordings("bundled").only("calibrate")
    for n in range(1, 17):
        chosen = uniform(recording, n)
        steps = [sample.step for sample in chosen]
        assert len(chosen) == len(set(chosen)) == n
        assert max(map(steps.count, range(4))) - min(map(steps.count, range(4))) <= 2
    assert set(uniform(recording, 16)) == set(recording.samples())


def test_normal_draws_more_steps_near_the_finished_picture_from_the_whole_schedule() -> None:
    calls = tuple(Call("calibrate", 0, step, 50.0 - step, 2000, {}, {}, "output") for step in range(50))
    recording = Recording("Toy", calls, {})
    chosen = normal(recording)
    assert len({sample.trajectory for sample in chosen}) == len(chosen) == 2000
    places = [sample.step / 49 for sample in chosen]
    assert {sample.step for sample in chosen} == set(range(50))
    # N(0.6, 0.5) of the way from noise to picture, cut off at both ends: mean 0.532, deviation 0.274
    assert sum(places) / 2000 == pytest.approx(0.532, abs=0.02)
    assert statistics.pstdev(places) == pytest.approx(0.274, abs=0.02)
    assert max(map([sample.step for sample in chosen].count, (0, 49))) < 80  # no pile on the ends


def test_asking_for_more_than_there_is_gives_everything_once(recordings: Recordings) -> None:
    recording = recordings("pixel").only("calibrate")
    assert set(uniform(recording, 10**6)) == set(recording.samples())
    assert len(first_step(recording, 10**6)) == 4


def test_an_unknown_selection_lists_the_known_ones() -> None:
    with pytest.raises(LDMQError, match="unknown selection 'last-step'; known: first-step, normal, tdac, uniform"):
        SELECTIONS["last-step"]
