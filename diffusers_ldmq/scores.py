"""Scores of sets of pictures from their features: FID and sFID, Inception Score, precision and recall, CLIP score.

The first three and the last go through torchmetrics, which is fed with features instead of pictures, so that features
of real pictures are computed once and kept.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import EvaluationError
from .extractors import Clip

NEIGHBOURS = 3
"""k of precision and recall, as Kynkäänniemi 2019 recommends."""
SPLITS = 10
"""Parts that the Inception Score is averaged over (Salimans 2016), where each has at least SPLIT_LEAST pictures."""
SPLIT_LEAST = 100
ROWS = 1000
"""Rows of the distance matrix that are in memory at once."""


@dataclass(frozen=True, slots=True)
class Moments:
    """What FID needs to know of features: count, total fp64 [d], products fp64 [d, d] = sum of x xT."""

    count: int
    total: Tensor
    products: Tensor

    @staticmethod
    def of(features: Tensor) -> "Moments":
        """Of features [n, d], accumulated in fp64."""
        x = features.double()
        return Moments(x.shape[0], x.sum(0), x.T @ x)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.total + other.total, self.products + other.products)


def frechet_distance(real: Moments, generated: Moments) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^1/2) of two sets of features (Heusel 2017, eq. 6), 0 = alike. FID on pooled
    features, sFID on spatial ones. Raises EvaluationError for sets of fewer than two, or of other features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(real.count, generated.count) < 2:
        raise EvaluationError(f"{real.count} and {generated.count} pictures: each set needs at least 2")
    if real.total.shape != generated.total.shape:
        lengths = f"{len(real.total)} and {len(generated.total)}"
        raise EvaluationError(f"features of {lengths} values cannot be compared; use one extractor for both sets")
    metric: Any = FrechetInceptionDistance(_Given(len(real.total)))
    for name, moments in (("real", real), ("fake", generated)):
        setattr(metric, f"{name}_features_sum", moments.total)
        setattr(metric, f"{name}_features_cov_sum", moments.products)
        setattr(metric, f"{name}_features_num_samples", torch.tensor(moments.count))
    metric.orig_dtype = torch.float64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that compute() came before update(): the states were set instead
        return max(float(metric.compute()), 0.0)


class _Given(nn.Module):
    """Stands where torchmetrics expects the network: the features are there already."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.num_features = values

    def forward(self, features: Tensor) -> Tensor:
        return features


def inception_score(logits: Tensor) -> tuple[float, float | None]:
    """exp(E KL(p(y|x) || p(y))) of logits [n, classes] (Salimans 2016), 1 = nothing recognised .. classes, and its
    standard deviation over SPLITS parts; None where there are too few pictures to split."""
    from torchmetrics.image.inception import InceptionScore

    splits = SPLITS if len(logits) >= SPLITS * SPLIT_LEAST else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about memory, and about the deviation of a single part
        metric: Any = InceptionScore(_Given(logits.shape[1]), splits=splits)
        metric.update(logits.double())
        with torch.random.fork_rng(devices=[]):  # it shuffles, with the global generator
            torch.manual_seed(0)
            mean, deviation = metric.compute()
    return float(mean), float(deviation) if splits > 1 else None


def precision_recall(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of generated pictures inside the manifold of the real ones, and the reverse (Kynkäänniemi 2019, eq. 1-3).
    real [n, d], generated [m, d]: features; use n = m. A manifold is the union of the balls around its features that
    reach to each one's k-th nearest neighbour. Raises EvaluationError for sets of k pictures or fewer."""
    if min(len(real), len(generated)) <= k:
        raise EvaluationError(f"{len(real)} and {len(generated)} pictures: precision and recall need more than {k}")
    return _inside(generated, real, k), _inside(real, generated, k)


def _inside(points: Tensor, manifold: Tensor, k: int) -> float:
    # the nearest neighbour of a point in its own set is itself, so the k-th other one is number k + 1
    radii = torch.cat([_distances(rows, manifold).kthvalue(k + 1, dim=1).values for rows in manifold.split(ROWS)])
    found = [(_distances(rows, manifold) <= radii).any(1).sum() for rows in points.split(ROWS)]
    return float(sum(found)) / len(points)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Euclidean, [n, m]; in fp64, because the fast form by matrix products loses half of the digits."""
    return torch.cdist(one.double(), other.double(), compute_mode="use_mm_for_euclid_dist")


def clip_score(clip: Clip, pictures: Iterable[Tensor], prompts: Sequence[str]) -> float:
    """Mean of 100 cos(picture, prompt), at least 0 (Hessel 2021 without its factor 2.5), up to 100. pictures: batches
    uint8 [n, 3, h, w], in all one per prompt. Raises EvaluationError if the numbers differ."""
    from torchmetrics.multimodal import CLIPScore

    metric: Any = CLIPScore(lambda: (clip, clip.processor))
    told = 0
    for batch in pictures:
        texts = list(prompts[told : told + len(batch)])
        if len(texts) != len(batch):
            raise EvaluationError(f"{len(prompts)} prompts for more pictures; give one prompt per picture")
        metric.update(list(batch), texts)
        told += len(batch)
    if told != len(prompts) or not told:
        raise EvaluationError(f"{len(prompts)} prompts for {told} pictures; give one prompt per picture")
    return float(metric.compute())
