"""Normally distributed steps, skewed towards the finished picture (PTQ4DM, arXiv 2211.15736)."""

import random

from ..calls import Recording, SampleId
from .contract import give_steps, wanted

MEAN, DEVIATION = 0.4, 0.5
"""Of the diffusion time t / T (1 = pure noise). The paper draws t ~ N(mu, T / 2) with mu <= T / 2 and leaves mu open;
its code has options for both, 0.5 and 0.35 unless given."""
SEED = 0


def normal(recording: Recording, n: int | None = None) -> tuple[SampleId, ...]:
    """`n` samples (default: one per trajectory) at times t ~ N(0.4 T, T / 2), drawn with a fixed seed.

    A time outside [0, T] is drawn again: the paper's code sets it to the nearest end, which at this deviation would
    put a third of all samples on the schedule's two ends.
    """
    draw, count = random.Random(SEED), wanted(recording, n)
    places: list[float] = []
    while len(places) < count:
        time = draw.gauss(MEAN, DEVIATION)
        if 0 <= time <= 1:
            places.append(1 - time)
    return give_steps(recording, places, SEED)
