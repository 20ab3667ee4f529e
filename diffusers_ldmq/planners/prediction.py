"""What a plan will do at the denoiser's output, foretold from the layers' own effects.

Noise of different layers is nearly independent: on the bundled model the sum of effects measured one layer at a time is
within 0.3 dB of what the layers make together. The effects in a profile are estimates from few samples; the end of its
measured block curve says how far their sum is off, per timestep.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..artifacts import Profile
from ..errors import PlanError
from ..metrics import sqnr_db
from .low_precision import low_precision

MOST_CORRECTION = 2.0
"""Estimates are corrected by this factor at most: a curve that ends in rounding errors must not scale everything."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Noise-to-signal power per layer and scheme. total: over the whole schedule; steps: [T] at the profiled ones."""

    timesteps: tuple[float, ...]
    total: dict[str, dict[str, float]]
    steps: dict[str, dict[str, tuple[float, ...]]]

    def nsr(self, schemes: Mapping[str, str]) -> float:
        """Noise-to-signal power at the output under a plan (layers not named are float)."""
        return sum(self.total[name][scheme] for name, scheme in schemes.items())

    def sqnr_db(self, schemes: Mapping[str, str]) -> float | None:
        """Output SQNR in dB over the whole schedule; None where nothing is quantized."""
        nsr = self.nsr(schemes)
        return sqnr_db(1.0, nsr) if nsr > 0 else None

    def corrected(self, left: Mapping[str, float]) -> "Prediction":
        """The prediction where corrections leave only this share of some layers' noise."""
        scaled = lambda rows, share: {s: tuple(share * n for n in row) for s, row in rows.items()}  # noqa: E731
        total = {n: {s: left.get(n, 1.0) * p for s, p in row.items()} for n, row in self.total.items()}
        steps = {n: scaled(rows, left[n]) if n in left else rows for n, rows in self.steps.items()}
        return Prediction(self.timesteps, total, steps)

    def curve_db(self, schemes: Mapping[str, str]) -> dict[str, float]:
        """Timestep -> output SQNR in dB, at the profiled timesteps."""
        rows = [self.steps[name][scheme] for name, scheme in schemes.items()]
        return {f"{t:g}": sqnr_db(1.0, sum(row[i] for row in rows)) for i, t in enumerate(self.timesteps) if rows}


def predict(profile: Profile) -> Prediction:
    """Read a profile's own effects. Raises PlanError if it holds none."""
    if not all(noise.own for noise in profile.layers):
        raise PlanError("the profile holds no effects at the denoiser's output; profile again with this version")
    if not any(profile.curve.signal):
        raise PlanError(
            "the denoiser's recorded output is zero everywhere; its SQNR means nothing, record other inputs"
        )
    corrections = _corrections(profile)
    signal = _over_schedule(profile, profile.curve.signal)
    total: dict[str, dict[str, float]] = {}
    steps: dict[str, dict[str, tuple[float, ...]]] = {}
    for noise in profile.layers:
        corrected = {s: [c * n for c, n in zip(corrections, row, strict=True)] for s, row in noise.own.items()}
        total[noise.name] = {scheme: _over_schedule(profile, row) / signal for scheme, row in corrected.items()}
        steps[noise.name] = {
            scheme: tuple(n / s if s else 0.0 for n, s in zip(row, profile.curve.signal, strict=True))
            for scheme, row in corrected.items()
        }
    return Prediction(profile.timesteps, total, steps)


def _corrections(profile: Profile) -> list[float]:
    """[T] measured noise of the whole curve over the sum of its layers' estimated effects."""
    kept = profile.settings.get("keep_float", "default")
    left = {info.name for info in profile.table.layers if info.keep_float} if kept == "default" else set(kept)
    rows = [
        noise.own[low_precision(noise, profile.curve.scheme).scheme]
        for noise in profile.layers
        if noise.name not in left
    ]
    measured = profile.curve.noise[-1] if profile.curve.noise else ()
    estimated = [sum(row[i] for row in rows) for i in range(len(measured))]
    return [
        min(max(m / e, 1 / MOST_CORRECTION), MOST_CORRECTION) if e > 0 and m > 0 else 1.0
        for m, e in zip(measured, estimated, strict=True)
    ] or [1.0] * len(profile.timesteps)


def _over_schedule(profile: Profile, powers: Sequence[float]) -> float:
    """Sum of [T] powers over every timestep of the schedule, interpolated in dB between the profiled ones."""
    schedule = profile.schedule or profile.timesteps
    places = [schedule.index(t) for t in profile.timesteps]
    total = 0.0
    for index in range(len(schedule)):
        right = next((i for i, place in enumerate(places) if place >= index), len(places) - 1)
        left = max(right - 1, 0) if places[right] > index else right
        low, high = powers[left], powers[right]
        if left == right or low <= 0 or high <= 0:
            total += high
            continue
        share = (index - places[left]) / (places[right] - places[left])
        total += math.exp((1 - share) * math.log(low) + share * math.log(high))
    return total
