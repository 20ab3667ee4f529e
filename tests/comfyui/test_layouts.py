"""Our integers in comfy-kitchen's QuantizedTensor. Needs comfy-kitchen, no ComfyUI."""

import dataclasses
from typing import Any

import pytest
import torch
from comfy_kitchen import tensor as kitchen
from torch import Tensor

from comfyui_nodes.native import layouts
from diffusers_ldmq.affine import dequantize_weight, hadamard
from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.errors import CalibrationError, LDMQError
from diffusers_ldmq.metrics import Power
from diffusers_ldmq.specs import LayerState, parse_scheme

SHAPES = {"linear": (6, 10), "odd": (5, 7), "conv": (8, 4, 3, 3)}
SCHEMES = ["w8a16", "w4a16", "w4a16-g4"]


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)


def state_of(shape: tuple[int, ...], scheme: str) -> LayerState:
    layer = torch.nn.Module()
    layer.register_buffer("weight", weight_of(shape))
    layer.register_buffer("bias", None)
    return layer_state("layer", layer, parse_scheme(scheme), None)


def corrected(shape: tuple[int, ...]) -> LayerState:
    """A smoothed and rotated state with a low-rank branch."""
    generator = torch.Generator().manual_seed(4)
    state = state_of(shape, "w8a16")
    return dataclasses.replace(
        state,
        pre_quant_scale=torch.rand(shape[1], generator=generator) + 0.5,
        rotation=2,
        low_rank_a=torch.randn(2, shape[1:].count(1) or torch.Size(shape[1:]).numel(), generator=generator) * 0.1,
        low_rank_b=torch.randn(shape[0], 2, generator=generator) * 0.1,
    )


@pytest.fixture(params=[(shape, scheme) for shape in SHAPES.values() for scheme in SCHEMES], ids=str)
def wrapped(request: pytest.FixtureRequest) -> Any:
    shape, scheme = request.param
    return layouts.wrap(state_of(shape, scheme), shape, torch.float32)


def db(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.double(), other.double()
    return Power(float(reference.square().sum()), float((reference - other).square().sum())).sqnr_db


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES.values())
def test_a_wrapped_state_is_the_float_weight_to_the_eye_and_its_codes_in_memory(
    shape: tuple[int, ...], scheme: str
) -> None:
    state = state_of(shape, scheme)
    tensor = layouts.wrap(state, shape, torch.float16)
    assert (tuple(tensor.shape), tensor.dtype) == (shape, torch.float16)
    assert tensor.nbytes == state.weight.nbytes
    assert tensor.dequantize().dtype == torch.float16
    exact = layouts.wrap(state, shape, torch.float32).dequantize()
    assert torch.equal(exact, dequantize_weight(state, torch.Size(shape)))
    assert layouts.bits_of(tensor) == parse_scheme(scheme).weight.bits  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES.values())
def test_quantizing_gives_the_codes_that_calibration_gives(shape: tuple[int, ...], scheme: str) -> None:
    state = state_of(shape, scheme)
    spec: Any = parse_scheme(scheme).weight
    codes, params = layouts.LAYOUTS[spec.bits].quantize(weight_of(shape), group_size=spec.group_size)
    assert torch.equal(codes, state.weight)
    assert torch.equal(params.scale, state.weight_scale)


def test_quantizing_again_what_was_dequantized_changes_nothing(wrapped: Any) -> None:
    again = wrapped.requantize_from_float(wrapped.dequantize(), scale=wrapped._params.scale, stochastic_rounding=5)
    assert torch.equal(again._qdata, wrapped._qdata)
    assert torch.equal(again._params.scale, wrapped._params.scale)
    assert again._params.group_size == wrapped._params.group_size


def test_a_scale_that_is_recalculated_covers_a_wider_weight(wrapped: Any) -> None:
    weight = wrapped.dequantize() * 3
    assert db(weight, wrapped.requantize_from_float(weight, scale="recalculate").dequantize()) > 15
    assert db(weight, wrapped.requantize_from_float(weight, scale=wrapped._params.scale).dequantize()) < 15


@pytest.mark.parametrize("shape", [(6, 8), (8, 4, 3, 3)])
def test_corrections_are_undone_and_redone(shape: tuple[int, ...]) -> None:
    state = corrected(shape)
    tensor = layouts.wrap(state, shape, torch.float32)
    own = tensor.dequantize()
    assert torch.equal(own, dequantize_weight(state, torch.Size(shape)))
    plain = layouts.wrap(state_of(shape, "w8a16"), shape, torch.float32).dequantize()
    assert db(own, plain) < 10  # the corrections do something
    again = tensor.requantize_from_float(own)
    assert db(own, again.dequantize()) > 35
    assert state.pre_quant_scale is not None
    assert torch.equal(again._params.pre_quant_scale, state.pre_quant_scale)
    assert again._params.rotation == 2
    assert hadamard(2).shape == (2, 2)


def test_moving_and_copying_keep_the_codes_and_change_the_logical_dtype(wrapped: Any) -> None:
    for other in (wrapped.to("cpu", copy=True), wrapped.clone(), wrapped.detach(), wrapped.contiguous()):
        assert torch.equal(other.dequantize(), wrapped.dequantize())
    half = wrapped.to(torch.float16)
    assert (half.dtype, half._qdata.dtype) == (torch.float16, wrapped._qdata.dtype)
    assert half._params.scale.dtype == torch.float32
    meta = wrapped.to("meta")
    assert meta._qdata.is_meta
    assert meta._params.scale.is_meta


def test_a_copy_written_in_place_is_the_other_weight(wrapped: Any) -> None:
    target = torch.empty_like(wrapped)
    target.copy_(wrapped)
    assert torch.equal(target.dequantize(), wrapped.dequantize())


@pytest.mark.parametrize("shape", [(6, 8), (8, 4, 3, 3)])
def test_taking_apart_and_putting_together_keeps_corrections(shape: tuple[int, ...]) -> None:
    tensor = layouts.wrap(corrected(shape), shape, torch.float32)
    names, context = tensor.__tensor_flatten__()
    parts = {name: getattr(tensor, name) for name in names}
    again = type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())
    assert torch.equal(again.dequantize(), tensor.dequantize())
    assert len(parts) == 5
    moved = tensor.to("meta")
    assert all(getattr(moved._params, name).is_meta for name in ("scale", *layouts.EXTRAS))


def test_a_state_dict_names_every_tensor() -> None:
    shape = (6, 8)
    found = layouts.wrap(corrected(shape), shape, torch.float32).state_dict("layer.weight")
    names = ["", "_scale", "_pre_quant_scale", "_low_rank_a", "_low_rank_b"]
    assert list(found) == [f"layer.weight{name}" for name in names]
    plain = layouts.wrap(state_of(shape, "w4a16"), shape, torch.float32).state_dict("w")
    assert {name: value.dtype for name, value in plain.items()} == {"w": torch.uint8, "w_scale": torch.float32}


def test_an_operation_that_no_layout_knows_gets_floats(wrapped: Any) -> None:
    assert torch.equal(wrapped + 1, wrapped.dequantize() + 1)


def test_a_patched_weight_gets_8_bits_whatever_the_layer_had(wrapped: Any) -> None:
    weight = wrapped.dequantize() + 0.01 * weight_of(tuple(wrapped.shape))
    patched = layouts.requantized(weight, wrapped, bits=8)
    assert layouts.bits_of(patched) == 8
    assert db(weight, patched.dequantize()) > 38


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.full((6, 10), torch.nan), CalibrationError, "NaN or Inf"),
        (torch.zeros(6, 9), LDMQError, r"shape \[6, 9\] was given to a layer of shape \[6, 10\]"),
    ],
)
def test_a_weight_that_does_not_fit_is_refused(weight: Tensor, error: type[Exception], message: str) -> None:
    tensor = layouts.wrap(state_of((6, 10), "w8a16"), (6, 10), torch.float32)
    with pytest.raises(error, match=message):
        layouts.requantized(weight, tensor, bits=8)


def test_other_tensors_are_not_taken_for_ours() -> None:
    foreign = kitchen.QuantizedTensor.from_float(torch.randn(16, 16), "TensorWiseINT8Layout")
    assert layouts.bits_of(foreign) is None
    assert layouts.bits_of(torch.zeros(2)) is None
