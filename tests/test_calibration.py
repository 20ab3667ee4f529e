"""Calibration: ranges are those of the recorded inputs, codes those of the weights, refusals name the layer."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusers_ldmq import Plan, Recording, calibrate, make_plan
from diffusers_ldmq.affine import dequantize_weight, unpack_int4
from diffusers_ldmq.artifacts import LayerChoice
from diffusers_ldmq.calls import run
from diffusers_ldmq.errors import CalibrationError, LDMQError, PlanError
from diffusers_ldmq.families import fingerprint, layer_table, quantizable_layers
from diffusers_ldmq.specs import check_state, geometry_of

Recordings = Callable[[str], Recording]
DenoiserOf = Callable[[str], Any]


def uniform_plan(denoiser: nn.Module, scheme: str = "w8a8") -> Plan:
    return make_plan(layer_table(denoiser), planner="uniform", scheme=scheme)


def largest_inputs(denoiser: nn.Module, recording: Recording) -> dict[str, Tensor]:
    """Layer -> largest input magnitude over a recording's calls, by hooks of our own."""
    largest: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            largest[name] = torch.maximum(largest.get(name, torch.tensor(0.0)), args[0].detach().abs().max())

        return see

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in quantizable_layers(denoiser).items()]
    for call in recording.calls:
        run(denoiser, recording.batch(call))
    for handle in handles:
        handle.remove()
    return largest


@pytest.mark.parametrize("kind", ["pixel", "dit"], indirect=True)
def test_static_minmax_ranges_are_the_observed_magnitudes_over_127(
    kind: str, denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser, recording = denoiser_of(kind), recordings(kind)
    calibration = calibrate(denoiser, uniform_plan(denoiser), recording, observer="minmax")
    first = recording.only("calibrate").at(recording.timesteps()[:1])
    largest = largest_inputs(denoiser, first)
    assert calibration.states.keys() == largest.keys()
    for name, state in calibration.states.items():
        assert state.input_scale is not None
        assert state.input_zero_point is not None
        assert torch.equal(state.input_scale, largest[name] / 127)
        assert int(state.input_zero_point) == 0


def test_weights_are_rounded_per_output_channel(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser = denoiser_of("pixel")
    calibration = calibrate(denoiser, uniform_plan(denoiser), recordings("pixel"))
    for name, layer in quantizable_layers(denoiser).items():
        weight, state = layer.weight.detach(), calibration.states[name]
        rows = weight.flatten(1)
        scale = rows.abs().amax(1) / 127
        assert torch.equal(state.weight_scale, scale)
        assert torch.equal(state.weight.flatten(1), torch.round(rows / scale[:, None]).to(torch.int8))
        assert (dequantize_weight(state, weight.shape) - weight).flatten(1).abs().amax(1).le(0.501 * scale).all()
        assert (state.bias is None) == (layer.bias is None)
        if state.bias is not None and layer.bias is not None:
            assert torch.equal(state.bias, layer.bias)


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-g8", "w4a8", "w4a4"])
def test_four_bit_codes_are_packed_and_clipped_for_the_least_squared_error(
    scheme: str, denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser = denoiser_of("pixel")
    calibration = calibrate(denoiser, uniform_plan(denoiser, scheme), recordings("pixel"))
    for name, layer in quantizable_layers(denoiser).items():
        weight, state = layer.weight.detach(), calibration.states[name]
        check_state(state, geometry_of(layer))
        columns = weight[0].numel()
        assert state.weight.shape == (weight.shape[0], -(-columns // 2))
        codes = unpack_int4(state.weight, columns)
        assert -8 <= int(codes.min()) <= int(codes.max()) <= 7
        if scheme != "w4a16-g8":
            error = (dequantize_weight(state, weight.shape) - weight).flatten(1).square().sum(1)
            full = weight.flatten(1).abs().amax(1, keepdim=True) / 7
            unclipped = (torch.round(weight.flatten(1) / full) * full - weight.flatten(1)).square().sum(1)
            assert (error <= unclipped * (1 + 1e-5)).all()


@pytest.mark.parametrize(("selection", "calls"), [("first-step", 2), ("uniform", 4)])
def test_what_calibration_cost_is_counted(
    selection: str, calls: int, denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser = denoiser_of("pixel")
    seen = 0

    def count(*_: Any) -> None:
        nonlocal seen
        seen += 1

    denoiser.register_forward_hook(count)
    told: list[tuple[int, int]] = []
    calibration = calibrate(
        denoiser,
        uniform_plan(denoiser),
        recordings("pixel"),
        selection=selection,
        progress=lambda done, whole: told.append((done, whole)),
    )
    assert calibration.samples == 4
    assert calibration.forward_calls == seen == len(told) <= calls
    assert told[-1] == (seen, seen)
    assert calibration.sampler_calls == 6


def test_the_denoiser_is_as_before(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser = denoiser_of("pixel")
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    calibrate(denoiser, uniform_plan(denoiser), recordings("pixel"))
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())


def test_schemes_without_static_ranges_need_no_recording(denoiser_of: DenoiserOf) -> None:
    denoiser = denoiser_of("pixel")
    for scheme in ("w8a16", "w8a8-dyn", "w4a16"):
        calibration = calibrate(denoiser, uniform_plan(denoiser, scheme), None)
        assert calibration.forward_calls == calibration.samples == calibration.sampler_calls == 0
        assert all(state.input_scale is None for state in calibration.states.values())
    with pytest.raises(
        CalibrationError, match=r"51 layers have static activations \(.*choose a scheme such as w8a8-dyn"
    ):
        calibrate(denoiser, uniform_plan(denoiser), None)


def test_a_layer_that_is_never_called_is_named(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser = denoiser_of("pixel")
    denoiser.never_used = nn.Linear(4, 4)
    with pytest.raises(
        CalibrationError, match=r"layer 'never_used' was never called .*\(1 such layers\); keep it float"
    ):
        calibrate(denoiser, uniform_plan(denoiser), recordings("pixel"))
    assert not any(m._forward_pre_hooks for m in denoiser.modules())


@pytest.mark.parametrize("observer", ["minmax", "minmax-affine", "mse"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_recorded_input_that_is_not_finite_names_the_layer(
    observer: str, bad: float, denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    key = recording.calls[0].tensors["sample"]
    broken = recording.tensors[key].clone()
    broken[0, 0, 0, 0] = bad
    with pytest.raises(CalibrationError, match="layer 'conv_in': .*NaN or Inf"):
        calibrate(
            denoiser,
            replace(uniform_plan(denoiser), layers={"conv_in": LayerChoice("w8a8", "test")}),
            replace(recording, tensors={**recording.tensors, key: broken}),
            observer=observer,
        )


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16", "w4a16-g8"])
def test_a_weight_that_is_not_finite_names_the_layer(scheme: str, denoiser_of: DenoiserOf) -> None:
    denoiser = denoiser_of("pixel")
    with torch.no_grad():
        denoiser.mid_block.resnets[0].conv1.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match="layer 'mid_block.resnets.0.conv1': .*NaN or Inf"):
        calibrate(denoiser, uniform_plan(denoiser, scheme), None)


def test_a_weight_of_zeros_still_gives_positive_finite_scales(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser = denoiser_of("pixel")
    nn.init.zeros_(denoiser.conv_in.weight)
    for scheme in ("w8a8", "w4a16"):
        state = calibrate(denoiser, uniform_plan(denoiser, scheme), recordings("pixel")).states["conv_in"]
        assert torch.isfinite(state.weight_scale).all()
        assert (state.weight_scale > 0).all()
        assert not dequantize_weight(state, denoiser.conv_in.weight.shape).any()


def test_a_recording_without_calibrating_calls_is_refused(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser = denoiser_of("pixel")
    with pytest.raises(LDMQError, match="no calls for the set 'calibrate'"):
        calibrate(denoiser, uniform_plan(denoiser), recordings("pixel").only("verify"))


@pytest.mark.parametrize("argument", ["selection", "observer"])
def test_unknown_names_list_the_known_ones(argument: str, denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser = denoiser_of("pixel")
    arguments: Any = {argument: "best"}
    with pytest.raises(LDMQError, match=rf"unknown {argument} 'best'; known: "):
        calibrate(denoiser, uniform_plan(denoiser), recordings("pixel"), **arguments)


def test_another_models_plan_names_the_first_layers_this_one_lacks(denoiser_of: DenoiserOf) -> None:
    plan = uniform_plan(denoiser_of("dit"))
    with pytest.raises(
        PlanError,
        match=r"names 21 layers that UNet2DModel lacks: pos_embed.proj, \S+, \S+, \.\.\.; it was made for another",
    ):
        calibrate(denoiser_of("pixel"), plan, None)


def test_a_plan_for_other_shapes_of_the_same_names_is_refused(denoiser_of: DenoiserOf) -> None:
    denoiser = denoiser_of("pixel")
    plan = replace(uniform_plan(denoiser, "w8a16"), fingerprint="0123456789abcdef")
    own = fingerprint(quantizable_layers(denoiser))
    with pytest.raises(PlanError, match=rf"fingerprint 0123456789abcdef, this model has {own}.*plan again"):
        calibrate(denoiser, plan, None)


@pytest.mark.parametrize("layers", [{}, {"conv_in": LayerChoice("float", "test")}], ids=["empty", "float"])
def test_a_plan_that_quantizes_nothing_is_refused(layers: dict[str, LayerChoice], denoiser_of: DenoiserOf) -> None:
    denoiser = denoiser_of("pixel")
    with pytest.raises(PlanError, match="leaves every layer in floating point"):
        calibrate(denoiser, replace(uniform_plan(denoiser), layers=layers), None)
