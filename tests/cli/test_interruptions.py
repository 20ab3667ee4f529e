"""Ctrl-C and a full disk: no half-written folder, the earlier one untouched."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusers_ldmq import folders
from diffusers_ldmq.terminal import Stages


@pytest.fixture(autouse=True)
def can_be_interrupted() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which lets SIGINT be ignored there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("stage", ["record", "profile", "calibrate", "quantize", "verify"])
def test_interrupt_at_any_stage(stage: str, tiny: Path, prompts: Path, tmp_path: Path, ldmq, monkeypatch) -> None:
    usual = Stages.__call__

    def interrupted(self: Stages, name: str, done: int, whole: int) -> None:
        usual(self, name, done, whole)
        if name == stage:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Stages, "__call__", interrupted)
    ldmq("quantize", tiny, "--out", tmp_path / "q", "--prompts", prompts, "--steps", 2).is_interrupted()
    assert os.listdir(tmp_path) == []


def test_interrupt_while_saving_keeps_the_earlier_folder(
    tiny: Path, prompts: Path, quantized: Path, tmp_path: Path, ldmq, monkeypatch
) -> None:
    old = shutil.copytree(quantized, tmp_path / "q")
    before = (old / "plan.json").read_bytes()
    monkeypatch.setattr(folders, "write_json", lambda *_: signal.raise_signal(signal.SIGINT))
    common = ("--overwrite", "--planner", "uniform", "--prompts", prompts, "--steps", 2)
    ldmq("quantize", tiny, "--out", old, *common).is_interrupted()
    assert os.listdir(tmp_path) == ["q"]
    assert (old / "plan.json").read_bytes() == before


def test_ctrl_c_from_outside(tiny: Path, prompts: Path, tmp_path: Path, as_result) -> None:
    command = ["quantize", str(tiny), "--out", str(tmp_path / "q"), "--prompts", str(prompts), "--steps", "400"]
    tell = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
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
    as_result(process.returncode, "", err).is_interrupted()
    assert os.listdir(tmp_path) == []


def test_full_disk_is_one_line_and_loses_nothing(
    tiny: Path, prompts: Path, quantized: Path, tmp_path: Path, as_result
) -> None:
    old = shutil.copytree(quantized, tmp_path / "q")
    command = ["quantize", str(tiny), "--out", str(old), "--overwrite", "--prompts", str(prompts), "--steps", "2"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300000, 300000)); "
    done = subprocess.run([sys.executable, "-c", limit + _call(command)], capture_output=True, text=True, check=False)
    result = as_result(done.returncode, done.stdout, done.stderr)
    result.is_refused(str(old), "could not be written")
    assert os.listdir(tmp_path) == ["q"]
    assert sorted(os.listdir(old)) == sorted(os.listdir(quantized))


def _call(command: list[str]) -> str:
    return f"from diffusers_ldmq.__main__ import main; main({command!r})"
