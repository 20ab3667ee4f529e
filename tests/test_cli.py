"""The command line: every command once on a tiny pipeline, and the whole list of bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import (
    DanceDiffusionPipeline,
    IPNDMScheduler,
    StableDiffusionPipeline,
    UNet1DModel,
    UNet2DConditionModel,
)
from PIL import Image

from diffusers_ldmq import Plan, Profile, QuantizedLDMPipeline
from diffusers_ldmq import pipeline as pipeline_module
from diffusers_ldmq.__main__ import main
from diffusers_ldmq.artifacts import LayerChoice
from diffusers_ldmq.demo import demo_model
from diffusers_ldmq.demo.job import MARKER
from diffusers_ldmq.terminal import Stages

PROMPTS = ["red apple", "rocket", "bear", "dolphin"]


class Result(NamedTuple):
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that begins with 'error:'."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error:")]
        return line


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image folder: the bundled model with a tiny random denoiser."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(demo_model(), torch_dtype=torch.float32)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=pipe.text_encoder.config.hidden_size,
        attention_head_dim=8,
        norm_num_groups=8,
        layers_per_block=1,
    )
    pipe.register_modules(unet=unet)
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    pipe.save_pretrained(folder)
    (folder.parent / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


@pytest.fixture(scope="session")
def prompts(tiny: Path) -> Path:
    return tiny.parent / "prompts.txt"


@pytest.fixture
def ldmq(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run a command in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def quantized(tiny: Path, prompts: Path) -> Path:
    """The tiny pipeline, quantized by the command; tests must not change it."""
    out = tiny.parent / "quantized"
    with pytest.raises(SystemExit) as stop:
        main(
            ["quantize", str(tiny), "--out", str(out), "--prompts", str(prompts), "--steps", "3", "--dtype", "float32"]
        )
    assert stop.value.code == 0
    return out


@pytest.fixture(scope="session")
def profile_file(tiny: Path, prompts: Path) -> Path:
    out = tiny.parent / "profile.json"
    with pytest.raises(SystemExit) as stop:
        main(["profile", str(tiny), "-o", str(out), "--prompts", str(prompts), "--steps", "3"])
    assert stop.value.code == 0
    return out


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
    assert data["calibration"]["forward_calls"] <= len(PROMPTS)
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


def test_inputs_file_replaces_prompts(tiny: Path, tmp_path: Path, ldmq) -> None:
    lines = [json.dumps({"prompt": [name], "guidance_scale": 3.0}) for name in PROMPTS]
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
    assert [picture["prompt"] for picture in data["pictures"]] == PROMPTS
    assert data["psnr_db_worst"] <= data["psnr_db_mean"]
    assert data["ssim_worst"] <= data["ssim_mean"] <= 1
    assert Image.open(sheet).width > 4 * 190
    same = ldmq("compare", tiny, tiny, *common)
    assert same.code == 0
    assert "inf" in same.out


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
    _is_refused(result, expected)
    assert os.listdir(tmp_path) == ["in"]


def _is_refused(result: Result, *expected: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    for text in expected:
        assert text in result.error


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
    _is_refused(ldmq("quantize", tmp_path / "no model", *out, *chosen), expected)
    assert sorted(os.listdir(tmp_path)) == before


def test_overwriting_the_model_itself_is_refused(tiny: Path, ldmq) -> None:
    _is_refused(ldmq("quantize", tiny, "--out", tiny, "--overwrite"), "is the model itself")


UNREACHABLE = {"sqnr>=200dB": "dB short", "size<=0.01x": "cannot be met"}


@pytest.mark.parametrize("target", UNREACHABLE)
def test_unreachable_target_says_by_how_much(target: str, tiny: Path, prompts: Path, tmp_path: Path, ldmq) -> None:
    common = ("--prompts", prompts, "--steps", 2, "--target", target)
    result = ldmq("quantize", tiny, "--out", tmp_path / "q", *common)
    _is_refused(result, UNREACHABLE[target], target)
    assert os.listdir(tmp_path) == []


def test_plan_naming_a_missing_layer(tiny: Path, quantized: Path, tmp_path: Path, ldmq) -> None:
    plan = _plan_with_missing_layer(quantized, tmp_path / "plan.json")
    result = ldmq("quantize", tiny, "--out", tmp_path / "q", "--plan", plan)
    _is_refused(result, "down_blocks.9.nothing", "ldmq plan")


def test_plan_for_another_model(tiny: Path, quantized: Path, tmp_path: Path, ldmq) -> None:
    plan = _edited_plan(quantized, tmp_path / "plan.json", fingerprint="0" * 16)
    result = ldmq("quantize", tiny, "--out", tmp_path / "q", "--plan", plan)
    _is_refused(result, "another", "plan again")
    assert not (tmp_path / "q").exists()


def test_quantized_model_is_not_quantized_again(quantized: Path, tmp_path: Path, ldmq) -> None:
    _is_refused(ldmq("quantize", quantized, "--out", tmp_path / "q"), "quantized already", "original")


def test_existing_output_survives_a_refusal_and_a_failure(tiny: Path, quantized: Path, tmp_path: Path, ldmq) -> None:
    old = shutil.copytree(quantized, tmp_path / "q")
    _is_refused(ldmq("quantize", tiny, "--out", old), "not empty", "--overwrite")
    plan = _plan_with_missing_layer(quantized, tmp_path / "plan.json")
    assert ldmq("quantize", tiny, "--out", old, "--overwrite", "--plan", plan).code == 2
    assert sorted(os.listdir(old)) == sorted(os.listdir(quantized))


def test_sample_and_compare_refuse_what_they_cannot_do(tiny: Path, prompts: Path, tmp_path: Path, ldmq) -> None:
    _is_refused(ldmq("sample", tiny, "-o", tmp_path / "a.png"), "needs a prompt")
    _is_refused(ldmq("sample", tiny, "a bear", "-o", tmp_path), "is a folder")
    _is_refused(ldmq("compare", tiny, tiny, "--prompts", tmp_path / "none.txt"), "no such file")


def test_demo_refuses_a_foreign_folder(tmp_path: Path, ldmq) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    _is_refused(ldmq("demo", "--out", tmp_path), "no earlier demo wrote it", "--out")
    assert os.listdir(tmp_path) == ["thesis.tex"]
    assert MARKER not in os.listdir(tmp_path)


def test_damaged_profile_is_refused(tmp_path: Path, ldmq) -> None:
    (tmp_path / "profile.json").write_text('{"format_version": 1}')
    _is_refused(ldmq("plan", tmp_path / "profile.json", "-o", tmp_path / "plan.json"), "missing keys")


@pytest.mark.parametrize("stage", ["record", "profile", "calibrate", "quantize", "verify"])
def test_interrupt_at_any_stage(stage: str, tiny: Path, prompts: Path, tmp_path: Path, ldmq, monkeypatch) -> None:
    usual = Stages.__call__

    def interrupted(self: Stages, name: str, done: int, whole: int) -> None:
        usual(self, name, done, whole)
        if name == stage:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Stages, "__call__", interrupted)
    _is_interrupted(ldmq("quantize", tiny, "--out", tmp_path / "q", "--prompts", prompts, "--steps", 2))
    assert os.listdir(tmp_path) == []


def test_interrupt_while_saving_keeps_the_earlier_folder(
    tiny: Path, prompts: Path, quantized: Path, tmp_path: Path, ldmq, monkeypatch
) -> None:
    old = shutil.copytree(quantized, tmp_path / "q")
    before = (old / "plan.json").read_bytes()
    monkeypatch.setattr(pipeline_module, "write_json", lambda *_: signal.raise_signal(signal.SIGINT))
    common = ("--overwrite", "--planner", "uniform", "--prompts", prompts, "--steps", 2)
    _is_interrupted(ldmq("quantize", tiny, "--out", old, *common))
    assert os.listdir(tmp_path) == ["q"]
    assert (old / "plan.json").read_bytes() == before


def _is_interrupted(result: Result) -> None:
    assert result.code == 130
    assert "interrupted" in result.error
    assert "Traceback" not in result.err


def test_ctrl_c_from_outside(tiny: Path, prompts: Path, tmp_path: Path) -> None:
    command = ["quantize", str(tiny), "--out", str(tmp_path / "q"), "--prompts", str(prompts), "--steps", "400"]
    tell = (
        "from diffusers_ldmq.terminal import Stages; usual = Stages.__call__; "
        "Stages.__call__ = lambda self, *told: (print('go', flush=True), usual(self, *told)); "
    )
    process = subprocess.Popen(
        [sys.executable, "-c", tell + _call(command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    _is_interrupted(Result(process.returncode, "", err))
    assert os.listdir(tmp_path) == []


def test_full_disk_is_one_line_and_loses_nothing(tiny: Path, prompts: Path, quantized: Path, tmp_path: Path) -> None:
    old = shutil.copytree(quantized, tmp_path / "q")
    command = ["quantize", str(tiny), "--out", str(old), "--overwrite", "--prompts", str(prompts), "--steps", "2"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000)); "
    done = subprocess.run([sys.executable, "-c", limit + _call(command)], capture_output=True, text=True, check=False)
    _is_refused(Result(done.returncode, done.stdout, done.stderr), str(old), "could not be written")
    assert os.listdir(tmp_path) == ["q"]
    assert sorted(os.listdir(old)) == sorted(os.listdir(quantized))


def _call(command: list[str]) -> str:
    return f"from diffusers_ldmq.__main__ import main; main({command!r})"
