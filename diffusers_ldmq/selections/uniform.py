"""Calibration samples spread evenly over all sampling steps (Q-Diffusion, section 3.2)."""

from ..calls import Recording, SampleId


def uniform(recording: Recording, n: int | None = None) -> tuple[SampleId, ...]:
    """`n` samples (default: one per trajectory), trajectories in turn, steps evenly from first to last."""
    samples = recording.samples()
    trajectories = list(dict.fromkeys(sample.trajectory for sample in samples))
    steps = {t: sorted(s.step for s in samples if s.trajectory == t) for t in trajectories}
    n = min(n or len(trajectories), len(samples))
    chosen: dict[SampleId, None] = {}
    for k in range(n):
        trajectory = trajectories[k % len(trajectories)]
        own = steps[trajectory]
        position = round(k * (len(own) - 1) / max(n - 1, 1))
        free = sorted(own, key=lambda step: (abs(own.index(step) - position), step))
        chosen[next(s for step in free if (s := SampleId(trajectory, step)) not in chosen)] = None
    return tuple(chosen)
