"""Temporal distribution alignment calibration ("EDA-DM", arXiv 2401.04585, section 2.1): more samples from steps whose
features resemble those of many other steps, and from steps whose features are unlike all others."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..calls import Recording, SampleId
from ..errors import CalibrationError
from .contract import give_steps, wanted

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TDACScores:
    """How the samples are spread. density, variety: [steps], each min-max normalised to 0..1, noisiest step first;
    counts: [steps], samples of each step; radius: mean squared difference up to which two steps count as close."""

    density: tuple[float, ...]
    variety: tuple[float, ...]
    counts: tuple[int, ...]
    radius: float

    def __post_init__(self) -> None:
        if not self.counts or not len(self.density) == len(self.variety) == len(self.counts):
            raise CalibrationError(
                f"TDAC's scores are of {len(self.density)}, {len(self.variety)} and {len(self.counts)} steps; expected "
                f"a density, a variety and a count of every step"
            )


@dataclass(frozen=True, slots=True)
class TDAC:
    """Steps by density and variety of the features in the denoiser's middle, every trajectory at one step.

    Step i gets a share proportional to D_i + strength * V_i. D_i: how many other steps are closer than a radius; V_i:
    sum over all steps and positions of 1 - cosine similarity along the channels.

    strength: lambda, by default 1.0, the published value for unconditional latent diffusion (1.2 for pixel space and
    class-conditional, 5.0 for Stable Diffusion; both scores are normalised, so 1 weighs them alike);
    quantile: the radius is this quantile of all pairwise mean squared differences, which does not depend on the
    features' scale; radius: an absolute one instead, as published (3.0 or 0.3, set by hand for each model);
    seed: of the order in which trajectories are given their steps.
    """

    needs_features: ClassVar[bool] = True

    strength: float = 1.0
    quantile: float = 0.25
    radius: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (("strength", 0, None), ("quantile", 0, 1), ("radius", 0, None)):
            value = getattr(self, name)
            if value is not None and not (value >= least and (most is None or value <= most)):
                expected = f"from {least} to {most}" if most is not None else f"of {least} or more"
                raise CalibrationError(f"TDAC's {name} is {value!r}; expected a number {expected}")

    def __call__(self, recording: Recording, n: int | None = None) -> tuple[SampleId, ...]:
        """`n` samples, by default one per trajectory. More than that take further steps of the trajectories, and a step
        that is wanted more often than there are trajectories is replaced by its neighbours. Fewer samples than steps
        are warned of.

        Raises CalibrationError for a recording without usable features.
        """
        if recording.features is None:
            raise CalibrationError(
                f"the recording of this {recording.denoiser} has no features, which TDAC chooses steps by; record "
                f"again with record_calls(pipe, inputs, selection='tdac')"
            )
        counts = self.scores(recording.features, wanted(recording, n)).counts
        if sum(counts) < len(counts):
            logger.warning(
                "only %d samples for %d sampling steps: some steps calibrate nothing; record more images",
                sum(counts),
                len(counts),
            )
        last = max(len(counts) - 1, 1)
        places = [step / last for step, count in enumerate(counts) for _ in range(count)]
        return give_steps(recording, places, self.seed)

    def scores(self, features: Tensor, n: int) -> TDACScores:
        """Scores and the counts of `n` samples for features [steps, B, C, h, w]. Raises CalibrationError for features
        of another shape, and for NaN or Inf."""
        if features.ndim != 5 or not features.numel():
            raise CalibrationError(
                f"TDAC got features of shape {list(features.shape)}; expected [steps, batch, channels, height, width]"
            )
        if not torch.isfinite(features).all():
            raise CalibrationError("the recorded features hold NaN or Inf; load the model in float32 and record again")
        closeness = squared_differences(features)
        radius = self.radius if self.radius is not None else self._radius(closeness)
        density = _normalised((closeness <= radius).sum(1).double() - 1)  # a step is always close to itself
        spread = _normalised(variety(features))
        weights = density + self.strength * spread
        return TDACScores(tuple(density.tolist()), tuple(spread.tolist()), allocate(weights.tolist(), n), radius)

    def _radius(self, closeness: Tensor) -> float:
        """The quantile, over pairs of different steps; 'lower' gives one of them, so that no rounding of a value in
        between decides."""
        first, second = torch.triu_indices(*closeness.shape, offset=1)
        pairs = closeness[first, second]
        return float(pairs.quantile(self.quantile, interpolation="lower")) if len(pairs) else 0.0


def squared_differences(features: Tensor) -> Tensor:
    """fp64 [steps, steps]: mean squared difference of the features [steps, B, C, h, w] of every two steps, from one
    Gram matrix: |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, summed one image at a time."""
    steps = len(features)
    gram = torch.zeros(steps, steps, dtype=torch.float64)
    for rows in features.unbind(1):
        flat = rows.reshape(steps, -1).double()
        gram += flat @ flat.T
    gram = (gram + gram.T) / 2  # equal in both triangles to the last bit, as is what comes of it
    power = gram.diagonal()
    return ((power[:, None] + power[None, :] - 2 * gram) / features[0].numel()).clamp(min=0).fill_diagonal_(0)


def variety(features: Tensor) -> Tensor:
    """fp64 [steps]: V_i = sum over j != i and positions of 1 - cos(F_i, F_j), cosines along the channels.

    With unit vectors f and their sum S over steps this is P (steps - 1) - sum over positions of f_i . (S - f_i), for P
    positions: O(steps) where the pairs are O(steps^2).
    """
    steps = len(features)
    found = torch.zeros(steps, dtype=torch.float64)
    for rows in features.unbind(1):
        unit = normalize(rows.double(), dim=1)
        others = unit.sum(0, keepdim=True) - unit
        found += (steps - 1) * unit[0, 0].numel() - (unit * others).flatten(1).sum(1)
    return found


def allocate(weights: Sequence[float], n: int) -> tuple[int, ...]:
    """`n` samples over the steps in proportion to `weights`, as the paper's code rounds them: what is missing goes to
    the steps that have most, what is too much is taken from the last, cleanest step backwards."""
    total = sum(weights)
    shares = [weight / total for weight in weights] if total > 0 else [1 / len(weights)] * len(weights)
    counts = [round(n * share) for share in shares]
    most_first = sorted(range(len(counts)), key=lambda step: -counts[step])
    for turn in range(n - sum(counts)):
        counts[most_first[turn % len(counts)]] += 1
    while sum(counts) > n:
        for step in reversed(range(len(counts))):
            if counts[step] and sum(counts) > n:
                counts[step] -= 1
    return tuple(counts)


def _normalised(values: Tensor) -> Tensor:
    """Stretched to 0..1; zeros where all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)
