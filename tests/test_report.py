"""Figures, scores and the summary."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from PIL import Image
from rich.console import Console

from diffusers_ldmq import LDMQError, Plan, Profile, Report, make_plan
from diffusers_ldmq.report import CELL, PictureScores, comparison_sheet, picture_scores, plot_sqnr
from diffusers_ldmq.serialization import to_json
from diffusers_ldmq.summary import (
    FLOAT,
    FLOAT_BEST,
    QUANTIZED,
    QUANTIZED_BEST,
    Summary,
    scores_table,
    summary_data,
    summary_table,
)
from diffusers_ldmq.timing import StepTime, StepTimes


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def report(noise: float = 1.0) -> Report:
    facts: dict[str, Any] = {
        "selection": "first-step",
        "observer": "minmax",
        "samples": 16,
        "forward_calls": 2,
        "sampler_calls": 2,
    }
    schemes, backends = {"float": 3, "w8a8": 10}, {"w8a8 on cpu_onednn": 10}
    return Report(
        (900.0, 1.0), (1000.0, 1000.0), (noise, 10 * noise), "float32", schemes, backends, 0.8, 30, 100, facts
    )


def times(quantized: float) -> StepTimes:
    versions = {
        FLOAT: StepTime(0.4, "float32", "contiguous"),
        FLOAT_BEST: StepTime(0.2, "bfloat16", "channels_last"),
        QUANTIZED: StepTime(quantized, "float32", "contiguous"),
        QUANTIZED_BEST: StepTime(2 * quantized, "bfloat16", "contiguous"),
    }
    return StepTimes(versions, rows=16, rounds=7, device="cpu", threads=2)


def plan() -> Plan:
    return Plan("Net", "0", "hybrid", {})


def shown(renderable: Any) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


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


def test_sheet_reduces_large_pictures(tmp_path: Path) -> None:
    comparison_sheet(tmp_path / "sheet.png", {"float": [picture((1, 2, 3), (2048, 1024))]}, ["x"])
    assert Image.open(tmp_path / "sheet.png").width < 3 * CELL


def test_curves_are_drawn_without_touching_the_users_backend(profiles: Any, tmp_path: Path) -> None:
    before, profile = mpl.rcParams["backend"], profiles("pixel")
    assert isinstance(profile, Profile)
    plot_sqnr(tmp_path / "sqnr.png", profile, make_plan(profile), {"hybrid": report(), "uniform": report(30.0)})
    plot_sqnr(tmp_path / "uniform.png", profile, make_plan(profile, planner="uniform"), {})
    assert mpl.rcParams["backend"] == before
    assert Image.open(tmp_path / "sqnr.png").width >= 1200


def test_summary_says_the_same_in_both_forms() -> None:
    scores = PictureScores((30.0, 20.0), (0.9, 0.8))
    summary = Summary("m", "Net", plan(), report(), report(100.0), times(0.05), scores, file_bytes=31, cpu="AMX")
    data = json.loads(json.dumps(to_json(summary_data(summary))))
    assert data["size"]["ratio_fp32"] == 0.3
    assert data["size"]["ratio_fp16"] == 0.6
    assert data["output_sqnr_db"] == {
        "all": pytest.approx(10 * math.log10(2000 / 11)),
        "worst": pytest.approx(20),
        "worst_timestep": 1,
    }
    assert data["seconds_per_step"]["speedup_same_dtype"] == pytest.approx(8)
    assert data["seconds_per_step"]["speedup_fastest"] == pytest.approx(4)
    text = shown(summary_table(summary))
    told = (
        "0.300x of fp32",
        "0.600x of fp16",
        "22.6 dB",
        "(t = 1)",
        "8.00x",
        "4.00x",
        "worst 20.0 dB",
        "80.0 %",
        "AMX",
    )
    for part in (*told, "10 w8a8 on cpu_onednn", "3 float", "16 rows", "bfloat16, channels_last", "2 denoiser calls"):
        assert part in text
    assert "why not faster" not in text


def test_summary_says_why_where_it_is_slower() -> None:
    text = shown(summary_table(Summary("m", "Net", plan(), report(), times=times(0.3))))
    assert "0.67x as fast" in text
    assert "why not faster" in text


def test_scores_table_lists_every_prompt_and_the_worst() -> None:
    text = shown(scores_table(PictureScores((30.0, 20.0), (0.9, 0.8)), ["red apple", "rocket"]))
    assert "red apple" in text
    assert "25.0" in text
    assert "0.850" in text
