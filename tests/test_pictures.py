"""Scores of pictures, and comparison sheets."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from diffusers_ldmq import LDMQError
from diffusers_ldmq.pictures import CELL, comparison_sheet, picture_scores
from diffusers_ldmq.serialization import to_json


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_scores_of_equal_and_different_pictures() -> None:
    red, dark = picture((255, 0, 0)), picture((250, 0, 0))
    scores = picture_scores([red, red], [red, dark])
    assert scores.psnr_db[0] == math.inf
    assert scores.worst_psnr_db == pytest.approx(-10 * math.log10((5 / 255) ** 2 / 3), abs=1e-4)
    assert scores.ssim[0] == pytest.approx(1)
    assert scores.worst_ssim < scores.mean_ssim < 1
    assert json.dumps(to_json(scores.data()))


def test_scores_refuse_what_cannot_be_compared() -> None:
    with pytest.raises(LDMQError, match="1 pictures with 2"):
        picture_scores([picture((0, 0, 0))], [picture((0, 0, 0))] * 2)
    with pytest.raises(LDMQError, match="64x64 .* 32x64"):
        picture_scores([picture((0, 0, 0))], [picture((0, 0, 0), (32, 64))])


def test_sheet_enlarges_small_pictures_pixel_by_pixel(tmp_path: Path) -> None:
    small = picture((10, 200, 30), (16, 16))
    small.putpixel((0, 0), (255, 0, 0))
    comparison_sheet(tmp_path / "sheet.png", {"float": [small], "other": [small]}, ["a very long caption " * 5])
    sheet = Image.open(tmp_path / "sheet.png").convert("RGB")
    counts = {colour: count for count, colour in sheet.getcolors(1 << 24) or []}
    assert counts[255, 0, 0] == 2 * (CELL // 16) ** 2  # one red pixel in each row, a square of its own each
    with pytest.raises(LDMQError, match="row 'other' has 0 pictures for 1"):
        comparison_sheet(tmp_path / "bad.png", {"float": [small], "other": []}, ["x"])


def test_a_caption_of_several_lines_becomes_one(tmp_path: Path) -> None:
    for name, caption in (("one", "a red apple"), ("two", "a red\n\tapple")):
        comparison_sheet(tmp_path / name, {"float": [picture((1, 2, 3))]}, [caption])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_sheet_reduces_large_pictures(tmp_path: Path) -> None:
    comparison_sheet(tmp_path / "sheet.png", {"float": [picture((1, 2, 3), (2048, 1024))]}, ["x"])
    assert Image.open(tmp_path / "sheet.png").width < 3 * CELL
