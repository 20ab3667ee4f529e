"""Reconstruction on the Diffusers route without a server: what it tells, stops, going on, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tiny_pipelines import tiny_sd

from comfyui_nodes.pipelines import Order, Wish, load, sample, save, told_of
from comfyui_nodes.presets import PRESETS
from diffusers_ldmq import cache, reconstruction
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.learning import LearningSettings

ITERATIONS = 3
BRIEF = replace(
    reconstruction.QUICK,
    learning=LearningSettings(iterations=ITERATIONS, batch=4),
    samples=4,
    together=2,
    together_samples=8,
)
QUIET: Any = lambda *told: None  # noqa: E731


class Stopped(BaseException):
    """As ComfyUI's interrupt is."""


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    """A tiny pipeline to be reconstructed, briefly, with the cache on and empty."""
    monkeypatch.setitem(reconstruction.PRESETS, "quick", BRIEF)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(cache.SWITCH)
    tiny_sd().save_pretrained(tmp_path / "tiny")
    smallest = PRESETS["Smallest"]
    return Order(str(tmp_path / "tiny"), smallest, reconstruction="quick", steps=2, dtype="float32")


def kept() -> list[str]:
    return sorted(path.name for path in cache.cache_folder().iterdir())


def test_a_stopped_reconstruction_goes_on_and_gives_what_an_undisturbed_one_gives(order: Order, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []
    undisturbed = load(order, lambda stage, done, whole: told.append((stage, done)), QUIET)
    first = [done for stage, done in told if stage == "reconstruct"]
    assert first[0] == 1
    assert first == sorted(first)
    (entry,) = kept()
    assert not entry.startswith("."), "what was finished on the way is gone"
    (tmp_path / "home" / "ldmq" / entry).rename(tmp_path / "elsewhere")

    def stop(stage: str, done: int, whole: int) -> None:
        if stage == "reconstruct" and done > 2 * ITERATIONS:
            raise Stopped

    with pytest.raises(Stopped):
        load(order, stop, QUIET)
    assert kept() == [f".{entry}.reconstruction"]
    told.clear()
    resumed = load(order, lambda stage, done, whole: told.append((stage, done)), QUIET)
    assert min(done for stage, done in told if stage == "reconstruct") > 2 * ITERATIONS
    assert kept() == [entry]
    wish = Wish("x", "", 2, 1.0, 0)
    assert sample(resumed, wish, QUIET, QUIET).equal(sample(undisturbed, wish, QUIET, QUIET))
    assert told_of(resumed) == told_of(undisturbed)
    assert "rounding learned: " in told_of(resumed)
    assert "blocks better, by" in told_of(resumed)


def test_a_stop_is_heard_within_one_iteration(order: Order) -> None:
    """Not only where progress is told: before every module that runs."""
    stages: list[str] = []

    def check() -> None:
        if stages and stages[-1] == "reconstruct":
            raise Stopped

    with pytest.raises(Stopped):
        load(order, lambda stage, done, whole: stages.append(stage), check)
    assert stages.count("reconstruct") == 1


def test_without_it_nothing_is_learned(order: Order) -> None:
    stages: set[str] = set()
    made = load(replace(order, reconstruction="none"), lambda stage, done, whole: stages.add(stage), QUIET)
    assert "reconstruct" not in stages
    assert "rounding learned" not in told_of(made)


def test_a_reconstruction_of_nothing_and_an_unknown_one_are_refused(order: Order, tmp_path: Path) -> None:
    with pytest.raises(LDMQError, match=r"a reconstruction \(quick\) is asked for, but quantize says no"):
        load(replace(order, preset=None), QUIET, QUIET)
    with pytest.raises(LDMQError, match="'slow'; use one of none, quick, full"):
        load(replace(order, reconstruction="slow"), QUIET, QUIET)
    save(load(replace(order, reconstruction="none"), QUIET, QUIET), tmp_path / "saved", QUIET)
    with pytest.raises(LDMQError, match="is quantized already, and a reconstruction .* set reconstruct to none"):
        load(replace(order, model=str(tmp_path / "saved")), QUIET, QUIET)
