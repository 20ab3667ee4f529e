"""Block reconstruction on real pipelines: what it gains, that interruption changes nothing, and what it refuses."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_ldmq import Recording, calibrate, make_plan, quantize, verify
from diffusers_ldmq import reconstruction as stage
from diffusers_ldmq.artifacts import Calibration
from diffusers_ldmq.errors import CalibrationError, CheckpointError, LDMQError, PlanError
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.learning import LearningSettings
from diffusers_ldmq.quantization import quantized_for_now
from diffusers_ldmq.reconstruction import FULL, ReconstructionSettings, fitted, reconstruct

DenoiserOf = Callable[[str], Any]
Recordings = Callable[[str], Recording]
BRIEF = ReconstructionSettings(LearningSettings(iterations=6, batch=4), samples=6, selection="uniform", together=0)


def calibrated(denoiser: Any, recording: Recording, scheme: str = "w4a8") -> Calibration:
    plan = make_plan(layer_table(denoiser), planner="uniform", scheme=scheme)
    return calibrate(denoiser, plan, recording, selection="uniform", observer="mse")


@pytest.fixture
def given(kind: str, denoiser_of: DenoiserOf, recordings: Recordings) -> tuple[Any, Calibration, Recording]:
    denoiser, recording = denoiser_of(kind), recordings(kind)
    return denoiser, calibrated(denoiser, recording), recording


@pytest.fixture
def pixel(denoiser_of: DenoiserOf, recordings: Recordings) -> tuple[Any, Calibration, Recording]:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    return denoiser, calibrated(denoiser, recording), recording


def equal(one: Calibration, other: Calibration) -> bool:
    return all(
        torch.equal(value, other.states[name].tensors()[part])
        for name, state in one.states.items()
        for part, value in state.tensors().items()
    )


def test_every_layer_belongs_to_a_unit_and_the_float_model_is_left_alone(
    given: tuple[Any, Calibration, Recording],
) -> None:
    denoiser, calibration, recording = given
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    modules = dict(denoiser.named_modules())
    found, units = reconstruct(denoiser, calibration, recording, BRIEF)
    assert sum(unit.layers for unit in units) == len(calibration.states)
    assert {name: id(module) for name, module in denoiser.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert all(torch.equal(before[name], value) for name, value in denoiser.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in denoiser.parameters())
    for unit in units:
        names = [n for n in calibration.states if n == unit.unit or n.startswith(f"{unit.unit}.")]
        assert any(not torch.equal(found.states[n].weight, calibration.states[n].weight) for n in names) == unit.kept
        assert math.isfinite(unit.soft_db)
    assert not equal(found, calibration)
    quantize(denoiser, found)
    assert verify(denoiser, recording).sqnr_db > 0


def test_learning_the_trained_model_at_four_bits_gains_on_calls_it_has_not_seen(
    denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser, recording = denoiser_of("bundled"), recordings("bundled")
    table = layer_table(denoiser)
    names = [info.name for info in table.layers if info.name.startswith(("down_blocks.0", "down_blocks.1"))]
    kept = tuple(info.name for info in table.layers if info.name not in names)
    plan = make_plan(table, planner="uniform", scheme="w4a8", keep_float=kept)
    calibration = calibrate(denoiser, plan, recording, selection="uniform", observer="mse")
    learning = LearningSettings(iterations=60, batch=16)
    settings = ReconstructionSettings(learning, samples=16, selection="uniform", together=0)
    found, _ = reconstruct(denoiser, calibration, recording, settings)

    def reached(calibration: Calibration) -> float:
        with quantized_for_now(denoiser, calibration):
            return verify(denoiser, recording).sqnr_db

    assert reached(found) > reached(calibration) + 0.5


def test_an_interrupted_reconstruction_goes_on_to_the_same_result(
    pixel: tuple[Any, Calibration, Recording], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, calibration, recording = pixel
    whole, units = reconstruct(denoiser, calibration, recording, BRIEF)
    told: list[int] = []

    def stop(done: int, all_of_it: int) -> None:
        told.append(done)
        if done > 6 * BRIEF.learning.iterations:
            raise KeyboardInterrupt

    memory = tmp_path / "memory"
    with pytest.raises(KeyboardInterrupt):
        reconstruct(denoiser, calibration, recording, BRIEF, memory=memory, progress=stop)
    assert len(list(memory.glob("unit-*.safetensors"))) == 6
    assert not list(memory.glob(".*"))
    (memory / "ldmq-activations-killed").mkdir()  # a process that is killed cannot remove its own
    told.clear()
    resumed, again = reconstruct(
        denoiser, calibration, recording, BRIEF, memory=memory, progress=lambda d, a: told.append(d)
    )
    assert min(told) > 6 * BRIEF.learning.iterations
    assert not list(memory.glob("ldmq-activations-*"))
    assert equal(resumed, whole)
    assert again == units
    monkeypatch.setattr(stage, "windows", None)  # everything is remembered: nothing is gathered again
    finished, _ = reconstruct(denoiser, calibration, recording, BRIEF, memory=memory)
    assert equal(finished, whole)


def test_activations_in_files_change_nothing(pixel: tuple[Any, Calibration, Recording]) -> None:
    denoiser, calibration, recording = pixel
    whole, _ = reconstruct(denoiser, calibration, recording, BRIEF)
    spilled, _ = reconstruct(denoiser, calibration, recording, replace(BRIEF, memory_bytes=0))
    assert equal(whole, spilled)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-dyn", "w4a16", "w4a4"])
def test_other_schemes_and_the_hessian_weighting_learn_too(
    scheme: str, denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    calibration = calibrated(denoiser, recording, scheme)
    found, units = reconstruct(denoiser, calibration, recording, replace(BRIEF, weighting="hessian"))
    plain, _ = reconstruct(denoiser, calibration, recording, BRIEF)
    assert any(unit.kept for unit in units)
    assert not equal(found, plain)


def test_gamma_counts_and_layers_alone_can_be_learned(pixel: tuple[Any, Calibration, Recording]) -> None:
    denoiser, calibration, recording = pixel
    found = [
        reconstruct(denoiser, calibration, recording, replace(BRIEF, learning=replace(BRIEF.learning, **change)))[0]
        for change in ({}, {"gamma": 0.0}, {"block": 0.0})
    ]
    assert not equal(found[0], found[1])
    assert not equal(found[0], found[2])
    assert not equal(found[1], found[2])


def test_soft_rounding_leaves_a_gap_that_a_push_to_a_decision_narrows(
    pixel: tuple[Any, Calibration, Recording],
) -> None:
    denoiser, calibration, recording = pixel
    soft = replace(BRIEF.learning, rounding="soft", iterations=40, weight_rate=0.1, drop=0.0, mix=0.0, gamma=0.0)

    def gap(settings: LearningSettings) -> float:
        _, units = reconstruct(denoiser, calibration, recording, replace(BRIEF, learning=settings))
        return sum(unit.soft_db - unit.after_db for unit in units) / len(units)

    free, pushed = gap(replace(soft, decide=0.0)), gap(replace(soft, decide=1000.0))
    assert free > 3
    assert pushed < free - 1
    assert abs(gap(replace(soft, rounding="straight"))) < 0.01


def test_what_a_first_reconstruction_gave_is_only_replaced_by_better(pixel: tuple[Any, Calibration, Recording]) -> None:
    denoiser, calibration, recording = pixel
    once, _ = reconstruct(denoiser, calibration, recording, BRIEF)
    hardly = replace(BRIEF, learning=replace(BRIEF.learning, iterations=1, weight_rate=1e-9, step_rate=0.0))
    twice, units = reconstruct(denoiser, once, recording, hardly)
    assert equal(once, twice) or all(unit.after_db > unit.before_db for unit in units if unit.kept)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounding": "sofft"},
        {"drop": 7.0},
        {"gamma": -1.0},
        {"iterations": 0},
        {"batch": 0},
        {"block": 0.0, "gamma": 0.0},
    ],
)
def test_settings_that_nothing_can_be_learned_with_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match=f"{next(iter(wrong))}="):
        LearningSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"weighting": "hesian"}, {"memory_bytes": -1}])
def test_settings_of_the_stage_are_refused_likewise(wrong: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match=f"{next(iter(wrong))}="):
        ReconstructionSettings(**wrong)


def test_presets_fit_themselves_to_what_was_recorded(recordings: Recordings) -> None:
    recording = recordings("pixel")
    found = fitted(FULL, recording)
    samples = len(recording.only("calibrate").samples())
    assert found.samples == samples < FULL.samples
    assert found.learning.batch <= samples
    assert fitted(replace(FULL, samples=1), recording).samples == len(recording.timesteps())


def test_calls_that_cannot_be_learned_from_together_are_refused(
    pixel: tuple[Any, Calibration, Recording], recordings: Recordings
) -> None:
    denoiser, calibration, recording = pixel
    small = {
        key: value[..., ::2, ::2] if value.dim() == 4 and index % 2 else value
        for index, (key, value) in enumerate(recording.tensors.items())
    }
    mixed = replace(recording, tensors=small)
    with pytest.raises(CalibrationError, match="cannot be learned from together"):
        reconstruct(denoiser, calibration, mixed, BRIEF)


def test_another_models_calibration_is_refused(
    denoiser_of: DenoiserOf, pixel: tuple[Any, Calibration, Recording], recordings: Recordings
) -> None:
    _, calibration, recording = pixel
    with pytest.raises(PlanError, match="another"):
        reconstruct(denoiser_of("bundled"), calibration, recording, BRIEF)


def test_the_budget_for_activations_may_change_on_resumption(
    pixel: tuple[Any, Calibration, Recording], tmp_path: Path
) -> None:
    whole, _ = reconstruct(*pixel, BRIEF, memory=tmp_path / "memory")
    again, _ = reconstruct(*pixel, replace(BRIEF, memory_bytes=0), memory=tmp_path / "memory")
    assert equal(whole, again)


CHANGED: dict[
    str, Callable[[Any, Calibration, Recording], tuple[Any, Calibration, Recording, ReconstructionSettings]]
] = {
    "settings.learning.gamma": lambda d, c, r: (d, c, r, replace(BRIEF, learning=replace(BRIEF.learning, gamma=0.5))),
    "settings.samples": lambda d, c, r: (d, c, r, replace(BRIEF, samples=5)),
    "calibration": lambda d, c, r: (d, calibrate(d, c.plan, r, observer="minmax"), r, BRIEF),
    "recording": lambda d, c, r: (d, c, replace(r, calls=r.calls[::-1]), BRIEF),
}


@pytest.mark.parametrize("name", list(CHANGED))
def test_going_on_with_something_else_is_refused_by_name(
    name: str, pixel: tuple[Any, Calibration, Recording], tmp_path: Path
) -> None:
    reconstruct(*pixel, BRIEF, memory=tmp_path / "memory")
    with pytest.raises(CheckpointError, match=f"with {name} = "):
        reconstruct(*CHANGED[name](*pixel), memory=tmp_path / "memory")


def test_going_on_with_another_models_weights_is_refused(
    pixel: tuple[Any, Calibration, Recording], tmp_path: Path
) -> None:
    denoiser, calibration, recording = pixel
    reconstruct(denoiser, calibration, recording, BRIEF, memory=tmp_path / "memory")
    with torch.no_grad():
        denoiser.mid_block.resnets[0].conv1.weight.mul_(1.5)
    with pytest.raises(CheckpointError, match="with weights = "):
        reconstruct(denoiser, calibration, recording, BRIEF, memory=tmp_path / "memory")


@pytest.mark.parametrize("damage", ["cut", "other", "header"])
def test_a_damaged_memory_is_refused_and_says_what_to_delete(
    damage: str, pixel: tuple[Any, Calibration, Recording], tmp_path: Path
) -> None:
    reconstruct(*pixel, BRIEF, memory=tmp_path)
    first, second = tmp_path / "unit-0000.safetensors", tmp_path / "unit-0001.safetensors"
    if damage == "cut":
        first.write_bytes(first.read_bytes()[:-7])
    elif damage == "other":
        first.write_bytes(second.read_bytes())
    else:
        (tmp_path / "identity.json").write_text("[]")
    with pytest.raises(CheckpointError, match="delete"):
        reconstruct(*pixel, BRIEF, memory=tmp_path)


def test_a_folder_of_something_else_is_no_memory(pixel: tuple[Any, Calibration, Recording], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="something else"):
        reconstruct(*pixel, BRIEF, memory=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_fewer_samples_than_steps_and_a_batch_larger_than_the_samples_are_refused(
    pixel: tuple[Any, Calibration, Recording],
) -> None:
    with pytest.raises(CalibrationError, match="samples=2 is less than the 3 steps"):
        reconstruct(*pixel, replace(BRIEF, samples=2))
    with pytest.raises(CalibrationError, match=r"batch=64 rows, more than the \d+ rows"):
        reconstruct(*pixel, replace(BRIEF, learning=replace(BRIEF.learning, batch=64)))


def test_a_loss_that_is_not_finite_names_the_block_and_keeps_what_was_finished(
    pixel: tuple[Any, Calibration, Recording], tmp_path: Path
) -> None:
    denoiser, calibration, recording = pixel
    name = "mid_block.resnets.0.conv1"
    state = calibration.states[name]
    broken = replace(state, weight_scale=torch.full_like(state.weight_scale, torch.nan))
    wild = replace(calibration, states={**calibration.states, name: broken})
    with pytest.raises(CalibrationError, match=r"reconstructing 'mid_block.resnets.0': the loss is nan.* lower the"):
        reconstruct(denoiser, wild, recording, BRIEF, memory=tmp_path / "memory")
    assert (tmp_path / "memory" / "unit-0000.safetensors").exists()
    assert (tmp_path / "memory" / "identity.json").exists()


def test_a_full_disk_is_told(
    pixel: tuple[Any, Calibration, Recording], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(LDMQError, match="no space left on the disk for .* MB of activations"):
        reconstruct(*pixel, replace(BRIEF, memory_bytes=0))


def test_a_quantized_denoiser_and_a_layer_never_called_are_refused(pixel: tuple[Any, Calibration, Recording]) -> None:
    denoiser, calibration, recording = pixel
    denoiser.spare = nn.Linear(4, 4)
    plan = make_plan(layer_table(denoiser), planner="uniform", scheme="w4a16")
    with pytest.raises(CalibrationError, match="'spare' was never called"):
        reconstruct(denoiser, calibrate(denoiser, plan, None), recording, BRIEF)
    del denoiser.spare
    quantize(denoiser, calibration)
    with pytest.raises(LDMQError, match="quantized already"):
        reconstruct(denoiser, calibration, recording, BRIEF)
