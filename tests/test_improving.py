"""Corrections and reconstruction as a job asks for them, also where a target has plans raised."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusers_ldmq import reconstruction
from diffusers_ldmq.improving import improves, sample_selection
from diffusers_ldmq.job import quantize_pipeline
from diffusers_ldmq.learning import LearningSettings
from diffusers_ldmq.settings import Settings

BRIEF = replace(
    reconstruction.QUICK,
    learning=LearningSettings(iterations=2, batch=4),
    samples=4,
    together=2,
    together_samples=8,
)


def test_what_improves_a_calibration() -> None:
    assert not improves(Settings())
    assert improves(Settings(corrections="bias"))
    assert improves(Settings(reconstruction="full"))


def test_plans_that_a_target_has_raised_are_each_reconstructed(
    make: Callable[[str], Any],
    inputs_of: Callable[[str], list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(reconstruction.PRESETS, "quick", BRIEF)
    asked = Settings(planner="uniform", scheme="w4a8", reconstruction="quick", target="sqnr>=20dB", corrections="bias")
    outcome = quantize_pipeline(make("pixel"), inputs_of("pixel"), asked, memory=tmp_path)
    assert outcome.report.sqnr_db >= 20
    assert outcome.report.reconstruction
    assert len(list(tmp_path.iterdir())) > 1  # each plan has a folder of its own


def test_learning_takes_the_samples_of_calibration_unless_those_are_of_the_first_step() -> None:
    assert sample_selection(Settings(calibration="first-step")) == "first-step"
    for calibration, expected in {"first-step": BRIEF.selection, "uniform": "uniform", "tdac": "tdac"}.items():
        assert sample_selection(Settings(calibration=calibration, reconstruction="quick")) == expected


def test_what_a_selection_looks_at_is_recorded_for_learning(
    make: Callable[[str], Any], inputs_of: Callable[[str], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reconstruction.PRESETS, "quick", BRIEF)
    asked = Settings(planner="uniform", scheme="w4a8", reconstruction="quick", calibration="tdac")
    outcome = quantize_pipeline(make("pixel"), inputs_of("pixel"), asked)
    assert outcome.recording.features is not None
    assert outcome.report.calibration["selection"] == "tdac"
    assert outcome.report.reconstruction
