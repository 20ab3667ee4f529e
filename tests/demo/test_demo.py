"""The main job on the bundled model, once, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ldmq import Plan, Profile, Report
from diffusers_ldmq.demo import demo_captions, demo_model, demo_prompts
from diffusers_ldmq.demo.job import MARKER, refuse_demo_folder
from diffusers_ldmq.layers import quantized_layers


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, what --json printed) of one demo, written over an earlier demo's folder."""
    out = tmp_path_factory.mktemp("demo") / "out"
    out.mkdir()
    (out / MARKER).write_text("an earlier demo")
    (out / "leftover.txt").write_text("of the earlier demo")
    command = [sys.executable, "-m", "diffusers_ldmq", "demo", "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout)


def test_folder_holds_exactly_what_was_promised(demo_run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = demo_run
    files = {"report.html", "plan.json", "profile.json", "comparison.png", "sqnr.png", "summary.json"}
    assert set(os.listdir(folder)) == {"quantized", MARKER, *files}
    assert os.listdir(folder.parent) == ["out"]


def test_artifacts_read_back_and_agree(demo_run: tuple[Path, dict[str, Any]]) -> None:
    folder, printed = demo_run
    assert Plan.load(folder / "plan.json") == Plan.load(folder / "quantized" / "plan.json")
    assert Profile.load(folder / "profile.json") == Profile.load(folder / "quantized" / "profile.json")
    report = Report.load(folder / "quantized" / "report.json")
    summary = json.loads((folder / "summary.json").read_text())
    assert {key: printed[key] for key in summary} == summary
    assert summary["output_sqnr_db"]["all"] == pytest.approx(report.sqnr_db)
    assert summary["schemes"] == Plan.load(folder / "plan.json").counts()


def test_figures_hold(demo_run: tuple[Path, dict[str, Any]]) -> None:
    _, summary = demo_run
    assert summary["output_sqnr_db"]["all"] >= summary["uniform_output_sqnr_db"]["all"] + 9
    assert summary["int8_macs_share"] >= 0.75
    assert summary["size"]["file_ratio_fp32"] <= 0.30
    assert summary["size"]["ratio_fp16"] <= 0.58
    assert summary["calibration"]["forward_calls"] <= len(demo_captions())
    assert summary["pictures"]["psnr_db_worst"] > 25
    assert summary["pictures"]["ssim_worst"] > 0.95


def test_times_name_dtype_batch_and_machine(demo_run: tuple[Path, dict[str, Any]]) -> None:
    _, summary = demo_run
    times = summary["seconds_per_step"]
    assert times["versions"]["float"]["dtype"] == times["versions"]["quantized"]["dtype"] == "float32"
    assert times["versions"]["float, fastest dtype"]["dtype"] in ("float32", "bfloat16")
    assert times["batch_rows"] == 16
    assert times["cpu"]
    assert all(version["seconds"] > 0 for version in times["versions"].values())


def test_plain_diffusers_loads_the_quantized_folder(demo_run: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = demo_run
    pipe = DiffusionPipeline.from_pretrained(folder / "quantized", torch_dtype=torch.float32)
    layers = quantized_layers(pipe.unet)
    assert len(layers) == sum(count for scheme, count in summary["schemes"].items() if scheme != "float")


def test_pictures_are_pictures(demo_run: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = demo_run
    sheet, curves = Image.open(folder / "comparison.png"), Image.open(folder / "sqnr.png")
    assert sheet.width >= len(demo_prompts()) * 192
    assert sheet.height >= 2 * 192
    assert min(curves.size) > 500


def test_the_report_shows_what_was_measured(demo_run: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = demo_run
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{summary['output_sqnr_db']['all']:.1f} dB" in page
    assert all(prompt in page for prompt in demo_prompts())
    assert page.count("data:image/png;base64,") >= 2 * len(demo_prompts()) + 6


def test_marked_and_empty_folders_may_be_replaced(tmp_path: Path) -> None:
    refuse_demo_folder(tmp_path)
    (tmp_path / MARKER).touch()
    refuse_demo_folder(tmp_path)
    refuse_demo_folder(tmp_path / "new")


def test_captions_and_prompts_are_disjoint() -> None:
    assert len(demo_captions()) == 32
    assert len(demo_prompts()) == 8
    assert not set(demo_captions()) & set(demo_prompts())
    assert (demo_model() / "model_index.json").is_file()
