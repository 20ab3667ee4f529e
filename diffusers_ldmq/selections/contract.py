"""The contract of a selection, and how steps are given to trajectories."""

import random
from collections import deque
from collections.abc import Callable, Sequence

from ..calls import Recording, SampleId

Selection = Callable[[Recording, int | None], tuple[SampleId, ...]]
"""(recording, n) -> n of its samples, by default one per trajectory. One with a true attribute `needs_features` reads
Recording.features, which are then recorded."""


def wanted(recording: Recording, n: int | None) -> int:
    """How many samples `n` asks for: by default one per trajectory, at most all."""
    samples = recording.samples()
    return min(n or len({sample.trajectory for sample in samples}), len(samples))


def give_steps(recording: Recording, places: Sequence[float], seed: int) -> tuple[SampleId, ...]:
    """One sample per place in the schedule, from 0 (the noisiest step) to 1 (the last); at most as many as there are
    samples. Trajectories take turns in an order drawn with `seed`, so up to their number each gives one sample; what
    a trajectory has given already is replaced by its nearest step that is left."""
    steps: dict[tuple[int, int], list[int]] = {}
    for sample in recording.samples():
        steps.setdefault(sample.trajectory, []).append(sample.step)
    trajectories = list(steps)
    random.Random(seed).shuffle(trajectories)
    turns = deque((trajectory, list(range(len(steps[trajectory])))) for trajectory in trajectories)
    chosen: list[SampleId] = []
    for place in sorted(places):  # equal steps come one after the other and so go to different trajectories
        trajectory, free = turns.popleft()
        own = sorted(steps[trajectory])
        position = round(place * (len(own) - 1))
        nearest = min(free, key=lambda index: (abs(index - position), index))
        free.remove(nearest)
        chosen.append(SampleId(trajectory, own[nearest]))
        if free:
            turns.append((trajectory, free))
    return tuple(chosen)
