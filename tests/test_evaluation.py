"""A set of pictures against real ones, prompts and the float model's."""

import logging
import math
from pathlib import Path

import pytest
from PIL import Image
from tiny_evaluation import classifier_folder, clip_folder, picture_folder

from diffusers_ldmq.errors import EvaluationError
from diffusers_ldmq.evaluation import Against, Evaluation, Run, evaluate, evaluation_table
from diffusers_ldmq.extractors import Clip, FeatureExtractor, load_extractor
from diffusers_ldmq.features import measure
from diffusers_ldmq.picture_sets import PictureSet, picture_set
from diffusers_ldmq.scores import frechet_distance

RUN = Run("tiny", 20, 7)


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> FeatureExtractor:
    return load_extractor(classifier_folder(tmp_path_factory.mktemp("c") / "classifier"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip(clip_folder(tmp_path_factory.mktemp("clip")))


def pictures(folder: Path, count: int, first: int = 0, size: int = 32) -> PictureSet:
    return picture_set(picture_folder(folder / f"{first}-{count}-{size}", count, first=first, size=size))


def test_everything_at_once(tmp_path: Path, extractor: FeatureExtractor, clip: Clip) -> None:
    drawn, real, originals = (pictures(tmp_path, 60, first) for first in (0, 100, 200))
    reference = measure(real, extractor)
    told: list[tuple[str, int, int]] = []
    against = Against(extractor, reference, clip, ["red apple", "blue whale"], originals)
    found = evaluate(drawn, against, RUN, progress=lambda *stage: told.append(stage))
    mine = measure(drawn, extractor)
    assert (found.run, found.count, found.reference_count, found.neighbours_among) == (RUN, 60, 60, 60)
    assert (found.extractor, found.reference) == ("classifier, 50.00 %", real.digest)
    assert found.fid == frechet_distance(reference.pooled, mine.pooled) > 0
    assert found.sfid == frechet_distance(reference.spatial, mine.spatial) > 0
    for share in (found.precision, found.recall):
        assert share is not None
        assert 0 < share < 1
    assert found.inception_score is not None
    assert 1 < found.inception_score <= 3
    assert found.clip_score is not None
    # two pictures of independent uniform noise: mean square error 2 * variance = 1 / 6
    assert found.psnr_db == pytest.approx(10 * math.log10(6), abs=0.1)
    assert found.sample_sqnr_db == pytest.approx(-10 * math.log10(2), abs=0.1)
    assert found.ssim is not None
    assert found.psnr_db is not None
    assert found.psnr_db_worst is not None
    assert found.psnr_db_worst < found.psnr_db
    assert found.notes == ()
    assert told == [("features", 60, 60)]
    found.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == found
    assert evaluation_table(found).row_count == 13


def test_equal_sets_are_perfect(tmp_path: Path, extractor: FeatureExtractor) -> None:
    drawn = pictures(tmp_path, 60)
    found = evaluate(drawn, Against(extractor, measure(drawn, extractor), originals=drawn), RUN)
    assert found.fid == pytest.approx(0, abs=1e-6)
    assert found.sfid == pytest.approx(0, abs=1e-6)
    assert (found.precision, found.recall, found.ssim) == (1, 1, pytest.approx(1))
    assert (found.psnr_db, found.sample_sqnr_db) == (math.inf, math.inf)
    found.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == found


def test_a_fault_in_the_pictures_shows(tmp_path: Path, extractor: FeatureExtractor) -> None:
    real, good, bad = pictures(tmp_path, 80, 0), pictures(tmp_path, 80, 100), pictures(tmp_path, 80, 200)
    for name in bad.names:
        picture = Image.open(bad.path / name)
        picture.paste((0, 0, 0), (0, 0, 16, 32))
        picture.save(bad.path / name)
    reference = measure(real, extractor)
    one, other = (evaluate(s, Against(extractor, reference), RUN) for s in (good, bad))
    assert one.fid is not None
    assert other.fid is not None
    assert other.fid > 2 * one.fid
    assert one.precision is not None
    assert other.precision is not None
    assert other.precision < one.precision


def test_without_a_reference_only_what_needs_none(tmp_path: Path, extractor: FeatureExtractor) -> None:
    found = evaluate(pictures(tmp_path, 5), Against(extractor), RUN)
    assert found.inception_score is not None
    assert {found.fid, found.sfid, found.precision, found.reference, found.psnr_db, found.clip_score} == {None}


def test_fewer_pictures_than_features_are_warned_of(
    tmp_path: Path, extractor: FeatureExtractor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        few = evaluate(pictures(tmp_path, 20), Against(extractor, measure(pictures(tmp_path, 60, 90), extractor)), RUN)
    assert few.fid is not None
    assert [note.split(" of ")[0] for note in few.notes] == ["sFID"]
    assert "49 features want more than 49 pictures" in caplog.text
    least = evaluate(pictures(tmp_path, 3), Against(extractor, measure(pictures(tmp_path, 60, 90), extractor)), RUN)
    assert [note.split(" of ")[0] for note in least.notes[:2]] == ["FID", "sFID"]
    assert "left out" in least.notes[2]
    assert least.precision is None


def test_sets_that_do_not_fit_are_refused(tmp_path: Path, extractor: FeatureExtractor, clip: Clip) -> None:
    drawn = pictures(tmp_path, 5)
    refused = {
        "5 of 32x32 pictures cannot be compared with 4 of 32x32": Against(originals=pictures(tmp_path, 4)),
        "cannot be compared with 5 of 24x24": Against(originals=pictures(tmp_path, 5, size=24)),
        "nothing to measure": Against(),
        "needs the extractor": Against(clip=clip, reference=measure(drawn, extractor)),
        "one prompt per picture": Against(clip=clip),
    }
    for expected, against in refused.items():
        with pytest.raises(EvaluationError, match=expected):
            evaluate(drawn, against, RUN)
    with pytest.raises(EvaluationError, match="1 picture: at least 2"):
        evaluate(drawn.taken(1), Against(extractor), RUN)


def test_a_file_that_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    for text in ("[]", "{}", '{"format_version": 99}', '{"format_version": 1, "count": 3}', "{"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(EvaluationError):
            Evaluation.load(tmp_path / "x.json")
