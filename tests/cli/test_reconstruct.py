"""`ldmq quantize --reconstruct`: what it says, what it leaves, and that an interrupted one goes on."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from diffusers_ldmq import reconstruction
from diffusers_ldmq.learning import LearningSettings
from diffusers_ldmq.terminal import Stages

BRIEF = replace(
    reconstruction.QUICK, learning=LearningSettings(iterations=3, batch=4), samples=4, together=2, together_samples=8
)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A quick preset for tests; and interrupts work also in the background of a shell."""
    monkeypatch.setitem(reconstruction.PRESETS, "quick", BRIEF)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def common(tiny: Path, prompts: Path, out: Path) -> tuple:
    options = ("--planner", "uniform", "--scheme", "w4a8", "--prompts", prompts, "--steps", 2, "--dtype", "float32")
    return ("quantize", tiny, "--out", out, *options, "--reconstruct", "quick")


def test_it_is_told_saved_and_leaves_nothing_else(tiny: Path, prompts: Path, tmp_path: Path, ldmq) -> None:
    result = ldmq(*common(tiny, prompts, tmp_path / "q"), "--json")
    assert result.code == 0
    units = json.loads(result.out)["reconstruction"]
    assert any(unit["kept"] for unit in units)
    report = json.loads((tmp_path / "q" / "report.json").read_text())
    assert report["reconstruction"] == units
    assert "finished parts are kept in" in result.err
    assert os.listdir(tmp_path) == ["q"]


def test_the_same_command_goes_on_after_an_interrupt(
    tiny: Path, prompts: Path, tmp_path: Path, ldmq, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ldmq(*common(tiny, prompts, tmp_path / "whole"), "--json")
    usual = Stages.__call__

    def interrupted(self: Stages, name: str, done: int, all_of_it: int) -> None:
        usual(self, name, done, all_of_it)
        if name == "reconstruct" and done > 10:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Stages, "__call__", interrupted)
        ldmq(*common(tiny, prompts, tmp_path / "q")).is_interrupted()
    assert sorted(os.listdir(tmp_path)) == [".q.reconstruction", "whole"]
    resumed = ldmq(*common(tiny, prompts, tmp_path / "q"), "--json")
    assert "going on with what it holds" in resumed.err
    assert json.loads(resumed.out)["reconstruction"] == json.loads(whole.out)["reconstruction"]
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["q", "whole"]


def test_going_on_with_other_settings_is_refused_by_name(
    tiny: Path, prompts: Path, tmp_path: Path, ldmq, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Stages.__call__

    def interrupted(self: Stages, name: str, done: int, all_of_it: int) -> None:
        usual(self, name, done, all_of_it)
        if name == "reconstruct":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Stages, "__call__", interrupted)
        ldmq(*common(tiny, prompts, tmp_path / "q")).is_interrupted()
    other = ldmq(*common(tiny, prompts, tmp_path / "q"), "--seed", 7)
    other.is_refused("settings.seed = 0", "name another folder, or delete")


def test_an_unknown_setting_is_refused_at_once(tiny: Path, tmp_path: Path, ldmq) -> None:
    ldmq("quantize", tiny, "--out", tmp_path / "q", "--reconstruct", "slow").is_refused("'slow'", "none, quick, full")
