"""Quantizing in place: what changes, what is refused, what comes back."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_ldmq import Plan, Recording, calibrate, make_plan, quantize
from diffusers_ldmq.artifacts import Calibration
from diffusers_ldmq.errors import LDMQError, PlanError
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.layers import QuantConv2d, QuantLinear, quantized_layers
from diffusers_ldmq.quantization import quantized_for_now, round_to_storage
from diffusers_ldmq.specs import parse_scheme

DenoiserOf = Callable[[str], Any]
MixedPlan = Callable[[Any], Plan]


@pytest.fixture
def calibrated(
    denoiser_of: DenoiserOf, mixed_plan: MixedPlan, recordings: Callable[[str], Recording]
) -> Callable[[str], tuple[Any, Calibration]]:
    """kind -> a fresh float denoiser and its calibration with every scheme."""

    def make(kind: str) -> tuple[Any, Calibration]:
        denoiser = denoiser_of(kind)
        return denoiser, calibrate(denoiser, mixed_plan(denoiser), recordings(kind))

    return make


def test_every_layer_gets_the_planned_scheme_and_the_calibrated_state(
    kind: str, calibrated: Callable[[str], tuple[Any, Calibration]]
) -> None:
    denoiser, calibration = calibrated(kind)
    assert quantize(denoiser, calibration) is denoiser
    planned = calibration.plan.quantized()
    layers = quantized_layers(denoiser)
    assert {name: layer.scheme.name for name, layer in layers.items()} == planned
    for name, layer in layers.items():
        assert type(layer) is (QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d)
        held, expected = layer.state().tensors(), calibration.states[name].tensors()
        assert held.keys() == expected.keys()
        for key in held.keys() - {"bias"}:
            assert torch.equal(held[key], expected[key])
    assert not denoiser.training


def test_the_float_rest_is_rounded_as_it_will_be_stored(calibrated: Callable[[str], tuple[Any, Calibration]]) -> None:
    denoiser, calibration = calibrated("pixel")
    before = denoiser.conv_norm_out.weight.detach().clone().add_(1e-5)
    denoiser.conv_norm_out.weight.data = before.clone()
    quantize(denoiser, calibration)
    after = denoiser.conv_norm_out.weight
    assert after.dtype == torch.float32
    assert torch.equal(after, before.half().float())
    assert not torch.equal(after, before)


def test_values_beyond_16_bits_are_left_in_32() -> None:
    large, small = nn.Linear(2, 2), nn.Linear(2, 2)
    nn.init.constant_(large.weight, 1e6 + 0.3)
    nn.init.constant_(small.weight, 1 / 3)
    round_to_storage(nn.Sequential(large, small))
    assert torch.equal(large.weight, torch.full((2, 2), 1e6 + 0.3))
    assert torch.equal(small.weight, torch.full((2, 2), 1 / 3).half().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_reaches_everything_but_codes_and_scales(
    dtype: torch.dtype, calibrated: Callable[[str], tuple[Any, Calibration]]
) -> None:
    denoiser, calibration = calibrated("pixel")
    quantize(denoiser, calibration, dtype=dtype)
    for name, value in denoiser.state_dict().items():
        if name.endswith("_scale"):
            assert value.dtype == torch.float32
        elif value.is_floating_point():
            assert value.dtype == dtype, name
    for name, layer in quantized_layers(denoiser).items():
        assert torch.equal(layer.state().weight, calibration.states[name].weight)
        assert torch.equal(layer.state().weight_scale, calibration.states[name].weight_scale)


def test_progress_counts_layers(calibrated: Callable[[str], tuple[Any, Calibration]]) -> None:
    denoiser, calibration = calibrated("dit")
    told: list[tuple[int, int]] = []
    quantize(denoiser, calibration, progress=lambda done, whole: told.append((done, whole)))
    whole = len(calibration.states)
    assert told == [(done, whole) for done in range(1, whole + 1)]


def test_quantizing_twice_is_refused(calibrated: Callable[[str], tuple[Any, Calibration]]) -> None:
    denoiser, calibration = calibrated("pixel")
    quantize(denoiser, calibration)
    with pytest.raises(LDMQError, match="UNet2DModel is quantized already; load the original model"):
        quantize(denoiser, calibration)


def test_a_model_that_another_library_quantized_is_refused(
    calibrated: Callable[[str], tuple[Any, Calibration]],
) -> None:
    denoiser, calibration = calibrated("pixel")
    denoiser.is_quantized = True
    with pytest.raises(LDMQError, match="is quantized already"):
        quantize(denoiser, calibration)


def test_a_lora_is_refused_with_the_calls_that_help(calibrated: Callable[[str], tuple[Any, Calibration]]) -> None:
    denoiser, calibration = calibrated("pixel")
    denoiser.peft_config = {"default": object()}
    with pytest.raises(LDMQError, match=r"carries a LoRA; call unload_lora_weights\(\) or fuse_lora\(\) first"):
        quantize(denoiser, calibration)
    assert not quantized_layers(denoiser)


def test_offloaded_weights_are_refused(calibrated: Callable[[str], tuple[Any, Calibration]]) -> None:
    denoiser, calibration = calibrated("pixel")
    with pytest.raises(LDMQError, match="on the meta device"):
        quantize(denoiser.to("meta"), calibration)


def test_another_models_plan_is_refused_before_anything_changes(
    calibrated: Callable[[str], tuple[Any, Calibration]], denoiser_of: DenoiserOf
) -> None:
    _, calibration = calibrated("dit")
    other = denoiser_of("pixel")
    with pytest.raises(PlanError, match=r"layers that UNet2DModel lacks: transformer_blocks\.0\.\S+, \S+, \S+, \.\.\."):
        quantize(other, calibration)
    assert not quantized_layers(other)


def test_a_calibration_for_other_shapes_is_refused(calibrated: Callable[[str], tuple[Any, Calibration]]) -> None:
    denoiser, calibration = calibrated("pixel")
    plan = replace(calibration.plan, fingerprint="0123456789abcdef")
    with pytest.raises(PlanError, match="was made for another"):
        quantize(denoiser, replace(calibration, plan=plan))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_layers_quantized_for_now_are_float_again_afterwards(
    error: type[BaseException] | None, calibrated: Callable[[str], tuple[Any, Calibration]]
) -> None:
    denoiser, calibration = calibrated("pixel")
    modules, values = dict(denoiser.named_modules()), {n: v.clone() for n, v in denoiser.state_dict().items()}
    try:
        with quantized_for_now(denoiser, calibration):
            assert quantized_layers(denoiser).keys() == calibration.states.keys()
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error
    assert all(dict(denoiser.named_modules())[name] is module for name, module in modules.items())
    assert all(torch.equal(value, values[name]) for name, value in denoiser.state_dict().items())


def test_uniform_quantization_touches_every_layer(
    denoiser_of: DenoiserOf, recordings: Callable[[str], Recording]
) -> None:
    denoiser = denoiser_of("dit")
    plan = make_plan(layer_table(denoiser), planner="uniform", scheme="w4a4")
    quantize(denoiser, calibrate(denoiser, plan, recordings("dit")))
    layers = quantized_layers(denoiser)
    assert len(layers) == len(plan.layers)
    assert {layer.scheme for layer in layers.values()} == {parse_scheme("w4a4")}
