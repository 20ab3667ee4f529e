"""Scales of all layers learned together at the denoiser's output: what it gains, what it leaves alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_ldmq import Recording, calibrate, make_plan, verify
from diffusers_ldmq.activations import ActivationStore
from diffusers_ldmq.artifacts import TOGETHER, Calibration
from diffusers_ldmq.errors import CalibrationError
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.finishing import all_together
from diffusers_ldmq.learning import LearningSettings, UnitLearner, frozen
from diffusers_ldmq.metrics import Power
from diffusers_ldmq.quantization import quantized_for_now
from diffusers_ldmq.reconstruction import ReconstructionSettings, reconstruct
from diffusers_ldmq.stacking import stacked
from diffusers_ldmq.units import in_place

DenoiserOf = Callable[[str], Any]
Recordings = Callable[[str], Recording]
LEARNING = LearningSettings(iterations=12, batch=8)
BRIEF = ReconstructionSettings(replace(LEARNING, iterations=2, batch=4), samples=6, selection="uniform", together=6)
FREE = ("weight_scale", "bias", "input_scale")
"""Tensors that may change; all others stay bit for bit."""


@pytest.fixture
def given(denoiser_of: DenoiserOf, recordings: Recordings) -> tuple[Any, Calibration, Recording]:
    denoiser, recording = denoiser_of("bundled"), recordings("bundled")
    table = layer_table(denoiser)
    kept = tuple(info.name for info in table.layers if not info.name.startswith(("down_blocks", "mid_block")))
    plan = make_plan(table, planner="uniform", scheme="w4a8", keep_float=kept)
    return denoiser, calibrate(denoiser, plan, recording, selection="uniform", observer="mse"), recording


def learner_of(
    given: tuple[Any, Calibration, Recording], learning: LearningSettings = LEARNING, budget: int = 2**31
) -> UnitLearner:
    denoiser, calibration, recording = given
    batches = list(stacked(recording.only("calibrate").batches(), 16))
    with ActivationStore.open(budget) as store:
        return all_together(denoiser, calibration.states, batches, learning, store, torch.Generator().manual_seed(0))


def reached(denoiser: Any, calibration: Calibration, recording: Recording) -> float:
    with quantized_for_now(denoiser, calibration):
        return verify(denoiser, recording).sqnr_db


def test_scales_gain_at_the_output_on_calls_that_were_not_seen_and_codes_stay(
    given: tuple[Any, Calibration, Recording],
) -> None:
    denoiser, calibration, recording = given
    found = learner_of(given).learn()
    assert found.after < found.before
    changed = set[str]()
    for name, state in calibration.states.items():
        for part, value in state.tensors().items():
            if not torch.equal(value, found.states[name].tensors()[part]):
                changed.add(part)
    assert changed == set(FREE)
    better = replace(calibration, states=found.states)
    assert reached(denoiser, better, recording) > reached(denoiser, calibration, recording) + 0.1


def test_a_small_budget_means_few_rows_at_once_and_the_same_gradients(
    given: tuple[Any, Calibration, Recording],
) -> None:
    denoiser, rows, found = given[0], torch.arange(6), list[torch.Tensor]()
    for budget, at_once in ((2**31, LEARNING.batch), (1, 1)):
        learner = learner_of(given, budget=budget)
        assert learner.rows_at_once == at_once
        with frozen(denoiser), in_place(denoiser, learner.layers):
            loss = learner.accumulate(rows, push=0.0, progress=0.0)
        assert loss > 0
        vectors = [vector for layer in learner.layers.values() for vector in layer.vectors()]
        found.append(torch.cat([vector.grad.flatten() for vector in vectors if vector.grad is not None]))
    # float convolutions round as their batch wants it, and a few inputs fall into another step
    assert Power.between(*found).sqnr_db > 25


@pytest.mark.parametrize("kind", ["pixel", "dit"])
def test_it_comes_last_and_is_remembered(
    kind: str, denoiser_of: DenoiserOf, recordings: Recordings, tmp_path: Path
) -> None:
    denoiser, recording = denoiser_of(kind), recordings(kind)
    plan = make_plan(layer_table(denoiser), planner="uniform", scheme="w4a8")
    start = calibrate(denoiser, plan, recording, selection="uniform", observer="mse")
    told: list[tuple[int, int]] = []
    found, units = reconstruct(
        denoiser, start, recording, BRIEF, memory=tmp_path / "memory", progress=lambda *now: told.append(now)
    )
    assert [unit.unit for unit in units].index(TOGETHER) == len(units) - 1
    assert units[-1].layers == len(start.states) == sum(unit.layers for unit in units[:-1])
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]
    told.clear()
    again, figures = reconstruct(
        denoiser, start, recording, BRIEF, memory=tmp_path / "memory", progress=lambda *now: told.append(now)
    )
    assert (figures, told) == (units, [])
    for name, state in found.states.items():
        assert all(torch.equal(value, again.states[name].tensors()[part]) for part, value in state.tensors().items())


@pytest.mark.parametrize("change", [{"together": 0}, {"learning": replace(BRIEF.learning, vector_rate=0.0)}])
def test_without_it_blocks_are_all(change: dict[str, Any], denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    plan = make_plan(layer_table(denoiser), planner="uniform", scheme="w4a8")
    start = calibrate(denoiser, plan, recording, selection="uniform", observer="mse")
    _, units = reconstruct(denoiser, start, recording, replace(BRIEF, **change))
    assert TOGETHER not in [unit.unit for unit in units]


@pytest.mark.parametrize("change", [{"together": -1}, {"together_samples": 0}])
def test_settings_that_make_no_sense_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(CalibrationError, match=next(iter(change))):
        replace(BRIEF, **change)


def test_a_loss_that_is_not_finite_names_all_layers(given: tuple[Any, Calibration, Recording]) -> None:
    learner = learner_of(given, replace(LEARNING, vector_rate=1e30))
    with pytest.raises(CalibrationError, match=f"{TOGETHER}.*vector_rate"):
        learner.learn()
