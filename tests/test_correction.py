"""The stage that corrects the worst layers: two gates, every trial told, the float model left alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_ldmq import Recording, calibrate, make_plan, quantize, verify
from diffusers_ldmq import correction as stage
from diffusers_ldmq.artifacts import Calibration
from diffusers_ldmq.correction import DEFAULT, apply_everywhere, correct, held_out_batches
from diffusers_ldmq.corrections import CORRECTIONS, LayerInputs
from diffusers_ldmq.errors import CalibrationError, LDMQError, RecordingError
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.metrics import Power
from diffusers_ldmq.quantization import quantized_for_now
from diffusers_ldmq.selections import TDAC
from diffusers_ldmq.specs import LayerState

DenoiserOf = Callable[[str], Any]
Recordings = Callable[[str], Recording]
Given = tuple[Any, Calibration, Recording]

WORST = ("up_blocks.2.attentions.0.transformer_blocks.0.ff.net.2", "up_blocks.1.resnets.1.conv2")
PIXEL = ("up_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv1")


def calibrated(denoiser: Any, recording: Recording, scheme: str = "w8a8") -> Given:
    plan = make_plan(layer_table(denoiser), planner="uniform", scheme=scheme)
    return denoiser, calibrate(denoiser, plan, recording, selection="uniform", observer="minmax"), recording


@pytest.fixture
def bundled(denoiser_of: DenoiserOf, recordings: Recordings) -> Given:
    return calibrated(denoiser_of("bundled"), recordings("bundled"))


@pytest.fixture
def pixel(denoiser_of: DenoiserOf, recordings: Recordings) -> Given:
    return calibrated(denoiser_of("pixel"), recordings("pixel"))


@pytest.fixture
def member() -> Iterator[Callable[[str, Any], str]]:
    """(name, correction) -> the name, registered until the test ends."""
    added = []

    def add(name: str, correction: Any) -> str:
        CORRECTIONS.add(name, correction)
        added.append(name)
        return name

    yield add
    for name in added:
        CORRECTIONS._members.pop(name)


def test_calls_of_a_selection_without_a_name_are_given_again(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser, recording, chosen = denoiser_of("pixel"), recordings("pixel"), TDAC(strength=5.0)
    plan = make_plan(layer_table(denoiser), planner="uniform")
    calibration = calibrate(denoiser, plan, recording, selection=chosen)
    _, trials = correct(denoiser, calibration, recording, layers=PIXEL, corrections=("bias",), selection=chosen)
    assert {trial.layer for trial in trials} == set(PIXEL)
    with pytest.raises(LDMQError, match=r"unknown selection 'TDAC\(strength=5.0"):
        correct(denoiser, calibration, recording, layers=PIXEL, corrections=("bias",))


def unchanged(states: dict[str, LayerState], others: dict[str, LayerState]) -> set[str]:
    """Layers whose state is the very same object."""
    return {name for name, state in states.items() if others[name] is state}


def output_db(given: Given, calibration: Calibration, name: Any = "verify") -> float:
    with quantized_for_now(given[0], calibration):
        return verify(given[0], given[2], on=name).sqnr_db


def test_the_worst_layers_get_better_and_so_does_the_output_on_calls_nobody_saw(bundled: Given) -> None:
    denoiser, calibration, recording = bundled
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    modules = dict(denoiser.named_modules())
    new, trials = correct(denoiser, calibration, recording, layers=WORST)
    assert dict(denoiser.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    assert not any(module._forward_pre_hooks for module in modules.values())
    kept = {trial.layer for trial in trials if trial.kept}
    assert kept
    assert set(calibration.states) - unchanged(calibration.states, new.states) == kept
    assert new.plan is calibration.plan
    assert output_db(bundled, new) > output_db(bundled, calibration)


def test_every_trial_is_told_with_a_reason(bundled: Given) -> None:
    denoiser, calibration, recording = bundled
    new, trials = correct(denoiser, calibration, recording, layers=WORST)
    for name in WORST:
        told = [trial for trial in trials if trial.layer == name]
        assert [trial.correction for trial in told[: len(DEFAULT)]] == list(DEFAULT)
        assert sum(trial.kept for trial in told) <= 1
        assert len({trial.layer_db[0] for trial in told}) == 1
        for trial in told:
            assert len(trial.reason.split()) >= 4
            if trial.kept:
                assert trial.output_db is not None
                assert trial.layer_db[1] >= trial.layer_db[0] + 0.1
                assert trial.output_db[1] >= trial.output_db[0]
    skipped = next(t for t in trials if t.correction == "skip-split" and t.layer == WORST[0])
    assert (skipped.reason, skipped.layer_db[0]) == ("does not apply to this layer", skipped.layer_db[1])
    gated = [trial for trial in trials if trial.output_db is not None]
    for earlier, later in zip(gated, gated[1:], strict=False):  # each layer starts from what was kept before it
        assert later.output_db[0] == (earlier.output_db[1] if earlier.kept else earlier.output_db[0])  # pyright: ignore
    assert gated[0].output_db[0] == pytest.approx(  # pyright: ignore
        select_db(denoiser, calibration, recording)
    )
    assert select_db(denoiser, new, recording) == pytest.approx(
        max(trial.output_db[1] for trial in gated if trial.kept)  # pyright: ignore
    )


def select_db(denoiser: nn.Module, calibration: Calibration, recording: Recording) -> float:
    with quantized_for_now(denoiser, calibration):
        return stage._output_power(denoiser, held_out_batches(recording)).sqnr_db


def spoil(layer: nn.Module, state: LayerState, inputs: LayerInputs) -> LayerState:
    """Makes everything worse."""
    return replace(state, weight_scale=state.weight_scale * 1.5)


def test_a_correction_that_loses_at_the_layer_is_told_and_not_applied(pixel: Given, member: Any) -> None:
    denoiser, calibration, recording = pixel
    new, trials = correct(denoiser, calibration, recording, layers=PIXEL, corrections=[member("spoil", spoil)])
    assert unchanged(calibration.states, new.states) == set(calibration.states)
    assert [(trial.layer, trial.kept, trial.output_db) for trial in trials] == [(name, False, None) for name in PIXEL]
    assert all("layer SQNR changes by -" in trial.reason for trial in trials)


def test_a_correction_that_helps_the_layer_but_not_the_output_is_told_and_not_applied(
    bundled: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, calibration, recording = bundled
    noises = iter([1.0, 2.0, 0.5])  # before, with the first layer's correction, with the second's
    monkeypatch.setattr(stage, "_output_power", lambda *_: Power(10.0, next(noises)))
    new, trials = correct(denoiser, calibration, recording, layers=WORST, corrections=["rotate"])
    first, second = trials
    assert (first.kept, first.output_db) == (False, (10.0, pytest.approx(6.99, abs=0.01)))
    assert "output SQNR -3.010 dB: the output gets worse" in first.reason
    assert (second.kept, second.output_db) == (True, (10.0, pytest.approx(13.01, abs=0.01)))
    assert set(calibration.states) - unchanged(calibration.states, new.states) == {WORST[1]}


def test_the_next_best_is_tried_where_the_best_harms_the_output(
    bundled: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, calibration, recording = bundled
    noises = iter([1.0, 2.0, 0.5])  # before, with the best, with the second best
    monkeypatch.setattr(stage, "_output_power", lambda *_: Power(10.0, next(noises)))
    new, trials = correct(denoiser, calibration, recording, layers=WORST[:1], corrections=["rotate", "low-rank"])
    gated = sorted((trial for trial in trials if trial.output_db), key=lambda trial: -trial.layer_db[1])
    assert [trial.kept for trial in gated] == [False, True]
    assert (new.states[WORST[0]].rank > 0) == (gated[1].correction == "low-rank")


def test_corrections_keep_within_the_bytes_that_are_left(bundled: Given) -> None:
    denoiser, calibration, recording = bundled
    given = {"layers": WORST[:1], "corrections": ["low-rank"]}
    _, free = correct(denoiser, calibration, recording, **given)
    new, trials = correct(denoiser, calibration, recording, **given, most_bytes=100)
    assert free[0].kept
    assert (trials[0].kept, trials[0].output_db) == (False, None)
    assert "bytes, 100 are left" in trials[0].reason
    assert new.states == calibration.states


def test_bias_is_tried_on_top_of_the_best(bundled: Given) -> None:
    denoiser, calibration, recording = bundled
    _, trials = correct(denoiser, calibration, recording, layers=WORST[:1], corrections=["rotate", "bias"])
    assert [trial.correction for trial in trials] == ["rotate", "bias", "rotate + bias"]
    _, trials = correct(denoiser, calibration, recording, layers=WORST[:1], corrections=["rotate"])
    assert [trial.correction for trial in trials] == ["rotate"]


@pytest.mark.parametrize("scheme", ["w8a8-dyn", "w4a16", "w4a4"])
def test_other_schemes_are_corrected_too(scheme: str, denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    given = calibrated(denoiser_of("pixel"), recordings("pixel"), scheme)
    new, trials = correct(*given, layers=PIXEL)
    assert any(trial.layer_db[1] > trial.layer_db[0] for trial in trials)
    assert {state.scheme.name for state in new.states.values()} == {scheme}
    assert output_db(given, new, "select") >= output_db(given, calibration=given[1], name="select") - 0.5


def test_a_transformer_is_corrected_too(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    given = calibrated(denoiser_of("dit"), recordings("dit"))
    _, trials = correct(*given, layers=["transformer_blocks.0.ff.net.2"], corrections=["smooth", "skip-split"])
    assert [trial.reason for trial in trials if trial.correction == "skip-split"] == ["does not apply to this layer"]


def test_memory_is_bounded_by_layers_at_a_time_and_the_result_does_not_depend_on_it(
    pixel: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = stage._Stage.captured
    groups: list[list[str]] = []

    def spy(self: Any, names: list[str]) -> Any:
        groups.append(list(names))
        return captured(self, names)

    monkeypatch.setattr(stage._Stage, "captured", spy)
    whole = correct(*pixel, layers=PIXEL)[1]
    assert groups == [list(PIXEL)]
    monkeypatch.setattr(stage, "CAPTURE_BYTES", 1)
    assert correct(*pixel, layers=PIXEL)[1] == whole
    assert groups[1:] == [[name] for name in PIXEL]


def test_progress_counts_layers(pixel: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "CAPTURE_BYTES", 1)
    told: list[tuple[int, int]] = []
    correct(*pixel, layers=[*PIXEL, PIXEL[0]], progress=lambda done, whole: told.append((done, whole)))
    assert told == [(1, 2), (2, 2)]


def test_two_runs_give_the_same_trials_and_states(pixel: Given) -> None:
    first, second = (correct(*pixel, layers=PIXEL) for _ in range(2))
    assert first[1] == second[1]
    for name in PIXEL:
        left, right = first[0].states[name], second[0].states[name]
        assert left.rotation == right.rotation
        assert all(torch.equal(tensor, right.tensors()[key]) for key, tensor in left.tensors().items())


def test_one_correction_everywhere_is_not_gated(pixel: Given, member: Any) -> None:
    new = apply_everywhere(*pixel, correction=member("spoil", spoil))
    assert not unchanged(pixel[1].states, new.states)
    assert output_db(pixel, new) < output_db(pixel, pixel[1])
    smoothed = apply_everywhere(*pixel)
    assert all(state.pre_quant_scale is not None for state in smoothed.states.values())
    split = apply_everywhere(*pixel, correction="skip-split")
    changed = set(split.states) - unchanged(pixel[1].states, split.states)
    assert changed
    assert all(name.startswith("up_blocks.") and ".resnets." in name for name in changed)


class BreaksError(Exception):
    """Of a correction that fails half way."""


def test_a_correction_that_fails_leaves_the_model_as_it_was(pixel: Given, member: Any) -> None:
    def breaks(layer: nn.Module, state: LayerState, inputs: LayerInputs) -> LayerState:
        """Fails."""
        raise BreaksError

    modules = dict(pixel[0].named_modules())
    with pytest.raises(BreaksError):
        correct(*pixel, layers=PIXEL, corrections=[member("breaks", breaks)])
    assert dict(pixel[0].named_modules()) == modules
    assert not any(module._forward_pre_hooks for module in modules.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["absent"]}, "layer 'absent' is not among the .* quantized layers"),
        ({"corrections": ["magic"]}, "unknown correction 'magic'; known: bias, dilate"),
        ({"observer": "magic"}, "unknown observer 'magic'"),
    ],
)
def test_wrong_names_are_refused(options: dict[str, Any], message: str, pixel: Given) -> None:
    with pytest.raises(LDMQError, match=message):
        correct(*pixel, **{"layers": PIXEL, **options})


def test_a_layer_that_is_never_called_is_named(pixel: Given) -> None:
    denoiser, calibration, recording = pixel
    denoiser.mid_block.resnets[0].forward = lambda hidden, temb: hidden
    with pytest.raises(CalibrationError, match="'mid_block.resnets.0.conv1' was never called"):
        correct(denoiser, calibration, recording, layers=PIXEL)


def test_a_quantized_denoiser_is_refused(pixel: Given) -> None:
    quantize(pixel[0], pixel[1])
    with pytest.raises(LDMQError, match="is quantized already"):
        correct(*pixel, layers=PIXEL)


def test_held_out_calls_span_the_timesteps_and_need_their_set(recordings: Recordings) -> None:
    recording = recordings("bundled")
    batches = held_out_batches(recording)
    every = recording.only("select").timesteps()
    assert (batches[0].timestep, batches[-1].timestep) == (max(every), min(every))
    assert len(batches) <= 5
    with pytest.raises(RecordingError, match="'select'"):
        held_out_batches(recording.only("verify"))


def test_no_layers_are_no_trials(pixel: Given) -> None:
    new, trials = correct(*pixel, layers=[])
    assert trials == ()
    assert new == pixel[1]
