"""`ldmq evaluate` on tiny pipelines."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny_evaluation import classifier_folder, clip_folder, picture_folder, tiny_ddim32

from diffusers_ldmq.evaluation import Evaluation


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, the same a little otherwise, an extractor, CLIP and real pictures."""
    folder = tmp_path_factory.mktemp("evaluate")
    pipe = tiny_ddim32()
    pipe.save_pretrained(folder / "float")
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.02)
    pipe.save_pretrained(folder / "other")
    classifier_folder(folder / "classifier")
    clip_folder(folder / "clip")
    picture_folder(folder / "real", 60)
    picture_folder(folder / "large", 20, size=40)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers_ldmq.features.cache_folder", lambda: tmp_path / "cache")


FEW = ("--count", 6, "--batch", 4, "--steps", 2)


def test_everything_in_one_command_and_again_from_what_is_kept(place: Path, tmp_path: Path, ldmq) -> None:
    measured_with = ("--extractor", place / "classifier", "--reference", place / "real", "--float", place / "float")
    kept = ("--samples", tmp_path / "s", "-o", tmp_path / "e.json", "--json")
    result = ldmq("evaluate", place / "other", *measured_with, *FEW, *kept, "--seed", 3)
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["run"] == {"model": str(place / "other"), "steps": 2, "seed": 3, "guidance": None}
    assert (data["count"], data["reference_count"], data["extractor"]) == (6, 60, "classifier, 50.00 %")
    assert data["fid"] > 0
    assert 10 < data["psnr_db"] < 60
    assert len(data["notes"]) == 2
    assert "means little" in result.err
    assert "sample float: 6 of 6" in result.err
    assert sorted(os.listdir(tmp_path / "s")) == sorted(os.listdir(tmp_path / "s-float"))
    assert Evaluation.load(tmp_path / "e.json").fid == data["fid"]
    again = ldmq("evaluate", place / "other", *measured_with, *FEW, *kept, "--seed", 3)
    assert json.loads(again.out) == data
    refused = ldmq("evaluate", place / "float", *measured_with, *FEW, *kept, "--seed", 3)
    refused.is_refused("drawn otherwise: the model's weights")


def test_a_table_for_people_and_no_pictures_left(place: Path, tmp_path: Path, ldmq) -> None:
    result = ldmq("evaluate", place / "float", "--extractor", place / "classifier", *FEW)
    assert result.code == 0, result.err
    assert "Inception Score" in result.out
    assert "classifier, 50.00 %" in result.out
    assert "FID" not in result.out
    assert os.listdir(tmp_path) == []


def test_text_to_image_with_clip_and_resized_real_pictures(place: Path, tiny: Path, prompts: Path, ldmq) -> None:
    extractor = ("--extractor", place / "clip", "--reference", place / "large", "--resize")
    result = ldmq("evaluate", tiny, "--clip", place / "clip", *extractor, "--prompts", prompts, *FEW, "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["clip_score"] is not None
    assert data["fid"] > 0
    assert data["inception_score"] is None  # CLIP names no classes


REFUSED = {
    "nothing to measure": ([], "nothing to measure"),
    "reference alone": (["--reference", "{place}/real"], "--reference needs --extractor"),
    "no such extractor": (["--extractor", "{place}/none"], "none: no such folder"),
    "wrong extractor folder": (["--extractor", "{place}/float"], "config.json: no such file"),
    "no such reference": (
        ["--extractor", "{place}/classifier", "--reference", "{place}/none"],
        "no such folder or zip",
    ),
    "empty reference": (["--extractor", "{place}/classifier", "--reference", "{tmp}"], "0 pictures, at least 2"),
    "reference of another size": (["--extractor", "{place}/classifier", "--reference", "{place}/large"], "--resize"),
    "large batch": (["--extractor", "{place}/classifier", "--batch", "7"], "--batch 7 is larger than --count 6"),
    "prompts for nothing": (["--extractor", "{place}/classifier", "--prompts", "{place}/p.txt"], "leave --prompts out"),
    "clip without prompts": (["--clip", "{place}/clip"], "takes no prompts"),
    "no clip": (["--clip", "{place}/classifier"], "cannot be loaded as a CLIP model"),
    "float model missing": (["--float", "{place}/none"], "no such folder"),
    "foreign samples": (["--extractor", "{place}/classifier", "--samples", "{place}/real"], "holds other files"),
    "output is a folder": (["--extractor", "{place}/classifier", "-o", "{tmp}"], "is a folder"),
    "unknown device": (["--extractor", "{place}/classifier", "--device", "abacus"], "--device abacus"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_user_can_get_wrong_is_one_line(name: str, place: Path, tmp_path: Path, ldmq) -> None:
    (place / "p.txt").write_text("red apple\n")
    given, expected = REFUSED[name]
    options = [text.format(place=place, tmp=tmp_path) for text in given]
    result = ldmq("evaluate", place / "float", "--count", 6, "--steps", 2, *options)
    result.is_refused(expected)
    assert os.listdir(tmp_path) == []


def test_a_single_picture_has_no_statistics(place: Path, ldmq) -> None:
    result = ldmq("evaluate", place / "float", "--extractor", place / "classifier", "--count", 1)
    assert result.code == 2
    assert "--count" in result.err


def test_a_text_model_without_prompts_is_refused(place: Path, tiny: Path, ldmq) -> None:
    ldmq("evaluate", tiny, "--clip", place / "clip", *FEW).is_refused("draws from text; give prompts (--prompts FILE")
