"""Which recorded samples calibrate."""

from collections.abc import Callable

import pytest

from diffusers_ldmq import Recording
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.selections import SELECTIONS, first_step, uniform

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


def test_asking_for_more_than_there_is_gives_everything_once(recordings: Recordings) -> None:
    recording = recordings("pixel").only("calibrate")
    assert set(uniform(recording, 10**6)) == set(recording.samples())
    assert len(first_step(recording, 10**6)) == 4


def test_an_unknown_selection_lists_the_known_ones() -> None:
    with pytest.raises(LDMQError, match="unknown selection 'last-step'; known: first-step, uniform"):
        SELECTIONS["last-step"]
