"""Features of picture sets, and what is kept of reference pictures."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_evaluation import FEATURES, classifier_folder, picture_folder
from torch import Tensor

from diffusers_ldmq.errors import EvaluationError
from diffusers_ldmq.extractors import FeatureExtractor, Features, load_extractor
from diffusers_ldmq.features import ENTRY, TENSORS, Measured, measure, measure_reference
from diffusers_ldmq.picture_sets import PictureSet, picture_set


class Counting(FeatureExtractor):
    """Tells how many pictures it was asked about."""

    def __init__(self, inner: FeatureExtractor) -> None:
        self.inner, self.asked = inner, 0
        self.name, self.digest, self.pixels = inner.name, inner.digest, inner.pixels

    def to(self, device: str) -> FeatureExtractor:
        return self

    def __call__(self, pictures: Tensor) -> Features:
        self.asked += len(pictures)
        return self.inner(pictures)


@pytest.fixture
def extractor(tmp_path: Path) -> Counting:
    return Counting(load_extractor(classifier_folder(tmp_path / "classifier")))


@pytest.fixture
def pictures(tmp_path: Path) -> PictureSet:
    return picture_set(picture_folder(tmp_path / "pictures", 15))


def equal(one: Measured, other: Measured) -> bool:
    pairs = [
        (one.pooled.total, other.pooled.total),
        (one.pooled.products, other.pooled.products),
        (one.spatial.total, other.spatial.total),
        (one.spatial.products, other.spatial.products),
        (one.kept, other.kept),
    ]
    same = (one.pictures, one.count, one.pooled.count) == (other.pictures, other.count, other.pooled.count)
    return same and all(torch.equal(a, b) for a, b in pairs)


def test_everything_is_measured_in_any_batches(
    pictures: PictureSet, extractor: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []
    whole = measure(pictures, extractor, progress=lambda done, every: told.append((done, every)))
    assert told == [(15, 15)]
    assert whole.count == whole.pooled.count == len(whole.kept) == 15
    assert whole.kept.shape == (15, FEATURES)
    torch.testing.assert_close(whole.pooled.total, whole.kept.double().sum(0))
    assert whole.logits is not None
    assert whole.logits.shape == (15, 3)
    monkeypatch.setattr("diffusers_ldmq.features.BATCH", 4)
    monkeypatch.setattr("diffusers_ldmq.features.KEPT", 5)
    parts = measure(pictures, extractor)
    torch.testing.assert_close(parts.pooled.products, whole.pooled.products)
    torch.testing.assert_close(parts.spatial.products, whole.spatial.products)
    torch.testing.assert_close(parts.kept, whole.kept[::3])


def test_a_reference_is_measured_once(pictures: PictureSet, extractor: Counting, tmp_path: Path) -> None:
    first = measure_reference(pictures, extractor, folder=tmp_path / "kept")
    assert extractor.asked == 15
    second = measure_reference(pictures, extractor, folder=tmp_path / "kept")
    assert extractor.asked == 15
    assert equal(first, second)
    assert first.logits is None


def test_other_pictures_sizes_and_extractors_have_their_own_place(
    pictures: PictureSet, extractor: Counting, tmp_path: Path
) -> None:
    measure_reference(pictures, extractor, folder=tmp_path / "kept")
    measure_reference(pictures.taken(10), extractor, folder=tmp_path / "kept")
    assert extractor.asked == 25
    extractor.digest = "another"
    measure_reference(pictures, extractor, folder=tmp_path / "kept")
    assert extractor.asked == 40
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_the_librarys_cache_is_used_unless_it_is_off(
    pictures: PictureSet, extractor: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers_ldmq.features.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("LDMQ_CACHE", "0")
    measure_reference(pictures, extractor)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("LDMQ_CACHE", "1")
    measure_reference(pictures, extractor)
    measure_reference(pictures, extractor)
    assert extractor.asked == 30
    assert len(list((tmp_path / "cache" / "references").iterdir())) == 1


def _entry(place: Path, change: Callable[[dict[str, Any]], object]) -> None:
    entry = json.loads((place / ENTRY).read_text())
    change(entry)
    (place / ENTRY).write_text(json.dumps(entry))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda place: (place / TENSORS).write_bytes((place / TENSORS).read_bytes()[:-1] + b"?"),
    "half a file": lambda place: (place / TENSORS).write_bytes((place / TENSORS).read_bytes()[:100]),
    "tensors missing": lambda place: (place / TENSORS).unlink(),
    "entry missing": lambda place: (place / ENTRY).unlink(),
    "no JSON": lambda place: (place / ENTRY).write_text("{"),
    "a list": lambda place: (place / ENTRY).write_text("[]"),
    "of other pictures": lambda place: _entry(place, lambda e: e["made_of"].update(pictures="0")),
    "no count": lambda place: _entry(place, lambda e: e.pop("count")),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_damaged_or_foreign_is_measured_anew_with_a_warning(
    name: str, pictures: PictureSet, extractor: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = measure_reference(pictures, extractor, folder=tmp_path / "kept")
    (place,) = (tmp_path / "kept").iterdir()
    DAMAGES[name](place)
    again = measure_reference(pictures, extractor, folder=tmp_path / "kept")
    assert extractor.asked == 30
    assert "damaged" in caplog.text
    assert equal(first, again)
    measure_reference(pictures, extractor, folder=tmp_path / "kept")
    assert extractor.asked == 30


def test_a_place_that_cannot_be_written_costs_a_warning_only(
    pictures: PictureSet, extractor: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "kept").write_text("a file")
    assert measure_reference(pictures, extractor, folder=tmp_path / "kept").count == 15
    assert "are not kept" in caplog.text


def test_pictures_of_a_wrong_size_are_refused_before_any_is_read(tmp_path: Path, extractor: Counting) -> None:
    with pytest.raises(EvaluationError, match="takes pictures of 32x32 pixels, these have 24x24"):
        measure(picture_set(picture_folder(tmp_path / "small", 3, size=24)), extractor)


def test_features_that_are_not_finite_are_refused(pictures: PictureSet, extractor: Counting) -> None:
    class Broken(Counting):
        def __call__(self, pictures: Tensor) -> Features:
            found = super().__call__(pictures)
            return replace(found, spatial=found.spatial * torch.nan)

    with pytest.raises(EvaluationError, match="hold NaN or Inf"):
        measure(pictures, Broken(extractor.inner))
