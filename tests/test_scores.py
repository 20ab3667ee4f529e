"""Scores from features: known values, brute force, what is refused."""

import math
from pathlib import Path

import pytest
import torch
from tiny_evaluation import clip_folder
from torch import Tensor

from diffusers_ldmq.errors import EvaluationError
from diffusers_ldmq.extractors import Clip
from diffusers_ldmq.scores import Moments, clip_score, frechet_distance, inception_score, precision_recall


def features(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n: int = 400, d: int = 4) -> Tensor:
    """Features of mean 0 and covariance 1, exactly."""
    x = features(n, d)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T


def test_equal_sets_are_no_distance_apart() -> None:
    moments = Moments.of(features(50))
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-6)


def test_a_shift_costs_its_square_and_a_spread_its_own() -> None:
    x, shift = whitened(), torch.tensor([3.0, 0, -1, 0.5])
    assert frechet_distance(Moments.of(x), Moments.of(x + shift)) == pytest.approx(10.25, abs=1e-6)
    # standard deviations 1 and 3 in each of 4 directions: sum of (3 - 1)^2
    assert frechet_distance(Moments.of(x), Moments.of(3 * x)) == pytest.approx(16, abs=1e-6)
    assert frechet_distance(Moments.of(3 * x), Moments.of(x)) == pytest.approx(16, abs=1e-6)


def test_moments_of_parts_add_up() -> None:
    x = features(30)
    parts, whole = Moments.of(x[:11]) + Moments.of(x[11:]), Moments.of(x)
    assert parts.count == whole.count == 30
    torch.testing.assert_close(parts.products, whole.products)
    assert frechet_distance(parts, whole) == pytest.approx(0, abs=1e-6)


def test_fewer_pictures_than_features_still_give_a_number() -> None:
    found = frechet_distance(Moments.of(features(5, 40)), Moments.of(features(6, 40, seed=1)))
    assert math.isfinite(found)
    assert found > 0


def test_frechet_distance_refuses_single_pictures_and_other_features() -> None:
    with pytest.raises(EvaluationError, match="at least 2"):
        frechet_distance(Moments.of(features(9)), Moments.of(features(1)))
    with pytest.raises(EvaluationError, match="6 and 7 values"):
        frechet_distance(Moments.of(features(9)), Moments.of(features(9, 7)))


def test_inception_score_of_no_opinion_is_one_and_of_certainty_the_classes() -> None:
    assert inception_score(torch.zeros(40, 10)) == (pytest.approx(1), None)
    certain = 200 * torch.eye(10).repeat(200, 1)
    mean, deviation = inception_score(certain)
    assert 9.5 < mean <= 10  # each split of shuffled pictures has not quite equal classes
    assert deviation is not None
    assert inception_score(certain[:50])[0] == pytest.approx(10)


def test_inception_score_leaves_the_global_generator_alone_and_repeats() -> None:
    logits = features(1000, 5)
    state = torch.get_rng_state()
    assert inception_score(logits) == inception_score(logits)
    assert torch.equal(state, torch.get_rng_state())


def brute_force(points: Tensor, manifold: Tensor, k: int) -> float:
    """Share of points that lie in the ball of any feature, loop by loop."""
    inside = 0
    for point in points:
        for i, centre in enumerate(manifold):
            others = sorted(float((centre - other).norm()) for j, other in enumerate(manifold) if j != i)
            if float((point - centre).norm()) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_brute_force(k: int) -> None:
    real, drawn = features(25, 2), features(20, 2, seed=1) * 0.8 + 1
    found = precision_recall(real, drawn, k)
    assert found == (brute_force(drawn, real, k), brute_force(real, drawn, k))
    assert 0 < found[0] < 1
    assert 0 < found[1] < 1
    assert found[0] != found[1]


def test_precision_and_recall_do_not_depend_on_how_rows_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    real, drawn = features(25, 2), features(20, 2, seed=1) * 1.5
    whole = precision_recall(real, drawn)
    monkeypatch.setattr("diffusers_ldmq.scores.ROWS", 7)
    assert precision_recall(real, drawn) == whole


def test_precision_and_recall_of_far_and_of_equal_sets() -> None:
    real = features(10)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, real + 100) == (0, 0)
    with pytest.raises(EvaluationError, match="more than 3"):
        precision_recall(real, real[:3])


def test_clip_score_is_the_cosine_of_embeddings(tmp_path: Path) -> None:
    clip = Clip(clip_folder(tmp_path / "clip"))
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8, generator=generator)
    texts = ["red apple", "blue whale", "a green tree by a lake"]
    found = clip_score(clip, pictures.split(2), texts)
    seen = clip.get_image_features(clip.processor(images=list(pictures), return_tensors="pt")["pixel_values"])
    read = [clip.processor(text=text, return_tensors="pt") for text in texts]
    said = torch.cat([clip.get_text_features(one["input_ids"], one["attention_mask"]) for one in read])
    expected = 100 * torch.nn.functional.cosine_similarity(seen, said).mean()
    assert found == pytest.approx(max(float(expected), 0), abs=1e-3)
    for prompts in (texts[:2], [*texts, "one more"], []):
        with pytest.raises(EvaluationError, match="one prompt per picture"):
            clip_score(clip, pictures.split(2), prompts)
