"""What a user can get wrong: one clear line, exit code 2, nothing lost."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import DanceDiffusionPipeline, IPNDMScheduler, UNet1DModel

from diffusers_ldmq import Plan
from diffusers_ldmq.artifacts import LayerChoice
from diffusers_ldmq.demo.job import MARKER


def _no_pipeline(folder: Path, tiny: Path) -> Path:
    (folder / "readme.txt").write_text("not a model")
    return folder


def _no_denoiser(folder: Path, tiny: Path) -> Path:
    """A pipeline for sound: its network is of no family that we know."""
    DanceDiffusionPipeline(UNet1DModel(), IPNDMScheduler()).save_pretrained(folder)
    return folder


def _missing_denoiser(folder: Path, tiny: Path) -> Path:
    return shutil.copytree(tiny, folder / "model", ignore=shutil.ignore_patterns("unet"))


BAD_MODELS = {
    "unknown path": (lambda folder, tiny: folder / "missing", "no such folder"),
    "no pipeline": (_no_pipeline, "no model_index.json"),
    "no denoiser": (_no_denoiser, "has no denoiser that can be quantized"),
    "denoiser's files missing": (_missing_denoiser, "cannot be loaded as a diffusers pipeline"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
@pytest.mark.parametrize("command", ["quantize", "profile", "sample", "info"])
def test_bad_model_is_one_line(name: str, command: str, tiny: Path, tmp_path: Path, ldmq) -> None:
    make, expected = BAD_MODELS[name]
    (tmp_path / "in").mkdir()
    model = make(tmp_path / "in", tiny)
    where = {"quantize": ("--out", tmp_path / "o"), "profile": ("-o", tmp_path / "o"), "info": ()}
    result = ldmq(command, model, *where.get(command, ("a bear", "-o", tmp_path / "o")))
    result.is_refused(expected)
    assert os.listdir(tmp_path) == ["in"]


def _edited_plan(quantized: Path, path: Path, **changes: object) -> Path:
    replace(Plan.load(quantized / "plan.json"), **changes).save(path)  # pyright: ignore[reportArgumentType]
    return path


def _plan_with_missing_layer(quantized: Path, path: Path) -> Path:
    return _edited_plan(quantized, path, layers={"down_blocks.9.nothing": LayerChoice("w8a8", "invented")})


REFUSED_BEFORE_WORK = {
    "unreadable target": (["--target", "sqnr=25"], "cannot read the target 'sqnr=25'"),
    "unknown scheme": (["--scheme", "w9a9"], "unknown scheme 'w9a9'"),
    "float scheme": (["--scheme", "float"], "nothing would be quantized"),
    "unknown planner": (["--planner", "best"], "unknown planner 'best'"),
    "unknown selection": (["--calibration", "all"], "unknown selection 'all'"),
    "unknown correction": (["--corrections", "magic"], "unknown correction 'magic'"),
    "two demands of a kind": (["--target", "size<=0.3x,size<=9MB"], "cannot read the target"),
    "unknown observer": (["--observer", "guess"], "unknown observer 'guess'"),
    "unknown dtype": (["--dtype", "float8"], "float8"),
    "unknown device": (["--device", "abacus"], "--device abacus"),
    "missing prompt file": (["--prompts", "{tmp}/none.txt"], "no such file"),
    "empty prompt file": (["--prompts", "{tmp}/empty.txt"], "the prompt file is empty"),
    "empty inputs file": (["--inputs", "{tmp}/empty.txt"], "the inputs file is empty"),
    "two kinds of input": (["--inputs", "{tmp}/some.txt", "--prompts", "{tmp}/some.txt"], "exclude each other"),
    "missing plan": (["--plan", "{tmp}/none.json"], "no such file"),
    "no plan": (["--plan", "{tmp}/list.json"], "not a plan"),
    "plan beside planner": (["--plan", "{tmp}/list.json", "--planner", "hybrid"], "--plan decides already"),
    "output is a file": (["--out", "{tmp}/some.txt"], "is a file"),
    "output not empty": (["--out", "{tmp}"], "not empty"),
    "overwriting no pipeline": (["--out", "{tmp}", "--overwrite"], "holds no pipeline"),
    "parent is a file": (["--out", "{tmp}/some.txt/x"], "not a writable folder"),
}


@pytest.mark.parametrize("name", REFUSED_BEFORE_WORK)
def test_refused_before_the_slow_work(name: str, tmp_path: Path, ldmq) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "some.txt").write_text("a bear\n")
    (tmp_path / "list.json").write_text("[1]")
    before = sorted(os.listdir(tmp_path))
    options, expected = REFUSED_BEFORE_WORK[name]
    chosen = [option.replace("{tmp}", str(tmp_path)) for option in options]
    out = () if "--out" in chosen else ("--out", tmp_path / "out")
    # the model does not exist: had the command gone as far as loading it, the message would be another
    ldmq("quantize", tmp_path / "no model", *out, *chosen).is_refused(expected)
    assert sorted(os.listdir(tmp_path)) == before


def test_overwriting_the_model_itself_is_refused(tiny: Path, ldmq) -> None:
    ldmq("quantize", tiny, "--out", tiny, "--overwrite").is_refused("is the model itself")


UNREACHABLE = {"sqnr>=200dB": "dB short", "size<=0.01x": "cannot be met"}


@pytest.mark.parametrize("target", UNREACHABLE)
def test_unreachable_target_says_by_how_much(target: str, tiny: Path, prompts: Path, tmp_path: Path, ldmq) -> None:
    common = ("--prompts", prompts, "--steps", 2, "--target", target)
    result = ldmq("quantize", tiny, "--out", tmp_path / "q", *common)
    result.is_refused(UNREACHABLE[target], target)
    assert os.listdir(tmp_path) == []


def test_plan_naming_a_missing_layer(tiny: Path, quantized: Path, tmp_path: Path, ldmq) -> None:
    plan = _plan_with_missing_layer(quantized, tmp_path / "plan.json")
    result = ldmq("quantize", tiny, "--out", tmp_path / "q", "--plan", plan)
    result.is_refused("down_blocks.9.nothing", "ldmq plan")


def test_plan_for_another_model(tiny: Path, quantized: Path, tmp_path: Path, ldmq) -> None:
    plan = _edited_plan(quantized, tmp_path / "plan.json", fingerprint="0" * 16)
    result = ldmq("quantize", tiny, "--out", tmp_path / "q", "--plan", plan)
    result.is_refused("another", "plan again")
    assert not (tmp_path / "q").exists()


def test_quantized_model_is_not_quantized_again(quantized: Path, tmp_path: Path, ldmq) -> None:
    ldmq("quantize", quantized, "--out", tmp_path / "q").is_refused("quantized already", "original")


def test_existing_output_survives_a_refusal_and_a_failure(tiny: Path, quantized: Path, tmp_path: Path, ldmq) -> None:
    old = shutil.copytree(quantized, tmp_path / "q")
    ldmq("quantize", tiny, "--out", old).is_refused("not empty", "--overwrite")
    plan = _plan_with_missing_layer(quantized, tmp_path / "plan.json")
    assert ldmq("quantize", tiny, "--out", old, "--overwrite", "--plan", plan).code == 2
    assert sorted(os.listdir(old)) == sorted(os.listdir(quantized))


def test_sample_and_compare_refuse_what_they_cannot_do(tiny: Path, prompts: Path, tmp_path: Path, ldmq) -> None:
    ldmq("sample", tiny, "-o", tmp_path / "a.png").is_refused("needs a prompt")
    ldmq("sample", tiny, "a bear", "-o", tmp_path).is_refused("is a folder")
    ldmq("sample", tiny, "a bear", "-o", tmp_path / "a.txt").is_refused("a.txt", "pictures are written as .png, .jpg")
    ldmq("compare", tiny, tiny, "--prompts", tmp_path / "none.txt").is_refused("no such file")


def test_demo_refuses_a_foreign_folder(tmp_path: Path, ldmq) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    ldmq("demo", "--out", tmp_path).is_refused("no earlier demo wrote it", "--out")
    assert os.listdir(tmp_path) == ["thesis.tex"]
    assert MARKER not in os.listdir(tmp_path)


def test_a_file_of_another_kind_is_named_for_what_it_is(
    quantized: Path, profile_file: Path, tmp_path: Path, ldmq
) -> None:
    out = ("-o", tmp_path / "p.json")
    ldmq("plan", quantized / "plan.json", *out).is_refused("plan.json: is a plan, a profile is expected; `ldmq profile")
    ldmq("quantize", "emoji-sd", "--out", tmp_path / "q", "--plan", profile_file).is_refused("is a profile, a plan is")


def test_a_plan_for_speed_needs_times(profile_file: Path, tmp_path: Path, ldmq) -> None:
    out = ("-o", tmp_path / "p.json")
    ldmq("plan", profile_file, "--target", "speed>=1.5x", *out).is_refused("needs times measured on this device")


def test_a_report_needs_what_quantizing_stored(tiny: Path, quantized: Path, tmp_path: Path, ldmq) -> None:
    out = ("-o", tmp_path / "r.html")
    ldmq("report", tiny, *out).is_refused("has no stored plan and report")
    ldmq("report", quantized, "--float", tmp_path / "none", *out).is_refused("no such folder")
    ldmq("report", quantized, "--float", quantized, *out).is_refused("is quantized already")
    assert os.listdir(tmp_path) == []


def test_damaged_profile_is_refused(tmp_path: Path, ldmq) -> None:
    (tmp_path / "profile.json").write_text('{"format_version": 1}')
    ldmq("plan", tmp_path / "profile.json", "-o", tmp_path / "plan.json").is_refused("missing keys")
