"""Every command once on a tiny pipeline."""

import json
import os
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from diffusers_ldmq import Plan, Profile, QuantizedLDMPipeline


def test_quantized_folder_is_complete_and_loads(quantized: Path) -> None:
    assert {"model_index.json", "plan.json", "profile.json", "report.json", "unet"} <= set(os.listdir(quantized))
    assert [p.name for p in quantized.parent.iterdir() if p.name.startswith(".")] == []
    pipe = QuantizedLDMPipeline.from_pretrained(quantized)
    assert isinstance(pipe, StableDiffusionPipeline)
    assert pipe.report.sqnr_db > 15


def test_json_is_one_object_and_nothing_else(tiny: Path, prompts: Path, tmp_path: Path, ldmq) -> None:
    out = tmp_path / "new" / "folder"
    common = ("--prompts", prompts, "--steps", 2, "--planner", "uniform", "--dtype", "bfloat16", "--json")
    result = ldmq("quantize", tiny, "--out", out, *common)
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["planner"] == "uniform"
    assert data["dtype"] == "bfloat16"
    assert data["schemes"] == {"w8a8": sum(data["schemes"].values())}
    assert data["size"]["ratio_fp16"] == pytest.approx(2 * data["size"]["ratio_fp32"])
    assert data["calibration"]["forward_calls"] <= len(prompts.read_text().splitlines())
    assert data["out"] == str(out)
    assert (out / "plan.json").is_file()


def test_profile_then_plan_then_quantize(tiny: Path, prompts: Path, profile_file: Path, tmp_path: Path, ldmq) -> None:
    plan_file = tmp_path / "plan.json"
    planned = ldmq("plan", profile_file, "--target", "size<=0.4x", "-o", plan_file, "--json")
    assert planned.code == 0, planned.err
    assert json.loads(planned.out)["size"]["ratio_fp32"] <= 0.4
    steps = ("--prompts", prompts, "--steps", 2)
    result = ldmq("quantize", tiny, "--out", tmp_path / "q", "--plan", plan_file, *steps, "--json")
    assert result.code == 0, result.err
    assert Plan.load(tmp_path / "q" / "plan.json") == Plan.load(plan_file)
    assert json.loads(result.out)["schemes"] == Plan.load(plan_file).counts()


def test_profile_command_shows_every_block(profile_file: Path, ldmq) -> None:
    shown = ldmq("plan", profile_file, "-o", profile_file.parent / "p.json")
    assert shown.code == 0
    assert "int8" in shown.out
    assert len(Profile.load(profile_file).curve.noise) == len(Profile.load(profile_file).table.blocks)


def test_inputs_file_replaces_prompts(tiny: Path, prompts: Path, tmp_path: Path, ldmq) -> None:
    lines = [json.dumps({"prompt": [name], "guidance_scale": 3.0}) for name in prompts.read_text().splitlines()]
    (tmp_path / "inputs.jsonl").write_text("\n".join(lines))
    out = tmp_path / "profile.json"
    result = ldmq("profile", tiny, "--inputs", tmp_path / "inputs.jsonl", "--steps", 2, "-o", out)
    assert result.code == 0, result.err
    assert "mid_block" in result.out
    assert out.is_file()


@pytest.mark.parametrize("which", ["tiny", "quantized"])
def test_sample_draws_the_same_picture_for_a_seed(which: str, request, tmp_path: Path, ldmq) -> None:
    folder = request.getfixturevalue(which)
    common = ("--steps", 2, "--guidance", 3, "--seed", 7)
    assert ldmq("sample", folder, "red apple", "-o", tmp_path / "one.png", *common).code == 0
    result = ldmq("sample", folder, "red apple", "-o", tmp_path / "two.png", *common, "--num-images", 2, "--json")
    files = json.loads(result.out)["files"]
    assert files == [str(tmp_path / "two-1.png"), str(tmp_path / "two-2.png")]
    one, first, second = (Image.open(p).tobytes() for p in (tmp_path / "one.png", *files))
    assert one == first != second


def test_compare_scores_every_prompt(tiny: Path, quantized: Path, prompts: Path, tmp_path: Path, ldmq) -> None:
    sheet = tmp_path / "sheet.png"
    common = ("--prompts", prompts, "--steps", 2)
    result = ldmq("compare", tiny, quantized, *common, "-o", sheet, "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert [picture["prompt"] for picture in data["pictures"]] == prompts.read_text().splitlines()
    assert data["psnr_db_worst"] <= data["psnr_db_mean"]
    assert data["ssim_worst"] <= data["ssim_mean"] <= 1
    assert Image.open(sheet).width > 4 * 190
    same = ldmq("compare", tiny, tiny, *common)
    assert same.code == 0
    assert "inf" in same.out


def test_a_report_shows_what_is_stored_and_with_the_float_model_pictures_and_times(
    tiny: Path, quantized: Path, prompts: Path, tmp_path: Path, ldmq
) -> None:
    short = ldmq("report", quantized, "-o", tmp_path / "short.html")
    assert short.code == 0, short.err
    assert "open it in a browser" in short.out
    common = ("--float", tiny, "--prompts", prompts, "--steps", 2, "--pngs", "--json")
    full = ldmq("report", quantized, "-o", tmp_path / "full.html", *common)
    assert full.code == 0, full.err
    assert json.loads(full.out)["out"] == str(tmp_path / "full.html")
    pages = [(tmp_path / name).read_text(encoding="utf-8") for name in ("short.html", "full.html")]
    assert [page.count("data:image/png") for page in pages][0] < [page.count("data:image/png") for page in pages][1]
    assert {"full-milliseconds.png", "full-noise-map.png"} <= set(os.listdir(tmp_path))


def test_a_full_profile_measures_everything_and_leaves_no_memory(
    tiny: Path, prompts: Path, tmp_path: Path, ldmq
) -> None:
    out = tmp_path / "full.json"
    result = ldmq("profile", tiny, "--prompts", prompts, "--steps", 3, "--full", "-o", out)
    assert result.code == 0, result.err
    profile = Profile.load(out)
    assert {(c.direction, c.part) for c in (profile.curve, *profile.curves)} == {
        (d, p) for d in ("forward", "backward") for p in ("both", "weight", "activation")
    }
    assert profile.timesteps == profile.schedule
    assert len(profile.timesteps) == 3
    assert os.listdir(tmp_path) == ["full.json"]


def test_a_budget_plan_with_corrections_from_the_command_line(tiny: Path, prompts: Path, tmp_path: Path, ldmq) -> None:
    target = ("--planner", "budget", "--target", "size<=0.5x, int8>=60%", "--corrections", "smooth,bias")
    result = ldmq("quantize", tiny, "--out", tmp_path / "q", "--prompts", prompts, "--steps", 2, *target, "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["planner"] == "budget"
    assert data["size"]["ratio_fp32"] <= 0.5
    assert QuantizedLDMPipeline.from_pretrained(tmp_path / "q").report.corrections


def test_info_tells_schemes_backends_sizes_and_sqnr(quantized: Path, tiny: Path, ldmq) -> None:
    data = json.loads(ldmq("info", quantized, "--layers", "--json").out)
    assert data["stored"]["output_sqnr_db"]["all"] > 15
    assert data["size"]["ratio_fp32"] < 0.6
    assert sum(data["schemes"].values()) == len(data["layers"])
    assert all(line["backend"] for line in data["layers"] if line["scheme"] != "float")
    shown = ldmq("info", quantized, "--layers").out
    assert "of fp16" in shown
    assert "mid_block" in shown
    assert json.loads(ldmq("info", tiny, "--json").out)["stored"] is None
