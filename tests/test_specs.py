"""Scheme names, tensor shapes, geometry."""

import pytest
import torch
from torch import nn

from diffusers_ldmq.errors import BackendError, LDMQError
from diffusers_ldmq.specs import (
    SCHEMES,
    Geometry,
    LayerState,
    QuantSpec,
    check_state,
    geometry_of,
    parse_scheme,
    tensor_specs,
)


@pytest.mark.parametrize("name", [*SCHEMES, "w4a16-g64", "w4a16-g1"])
def test_a_scheme_keeps_its_name(name: str):
    assert parse_scheme(name).name == name


@pytest.mark.parametrize(
    "name", ["", "w8", "W8A8", "w8a4", "w8a8-g64", "w4a16-g0", "w4a16-g", "w8a16-dyn", "w16a16", "w8a8 ", 8, None]
)
def test_anything_else_is_refused_with_the_known_names(name: str):
    with pytest.raises(LDMQError, match="use one of float, w8a16"):
        parse_scheme(name)


def test_what_schemes_say_about_a_layer():
    static, dynamic, weights = (parse_scheme(name) for name in ("w8a8", "w8a8-dyn", "w4a16-g64"))
    assert (static.is_static, static.is_dynamic, static.is_integer) == (True, False, True)
    assert (dynamic.is_static, dynamic.is_dynamic, dynamic.is_integer) == (False, True, True)
    assert (weights.is_static, weights.is_dynamic, weights.is_integer) == (False, False, False)
    assert weights.weight == QuantSpec(4, "group", 64)
    assert parse_scheme("float").is_float
    assert not static.is_float


@pytest.mark.parametrize(
    ("spec", "limits"),
    [
        (QuantSpec(8, "channel"), (-127, 127)),
        (QuantSpec(8, "token"), (-127, 127)),
        (QuantSpec(8, "tensor"), (-128, 127)),
        (QuantSpec(4, "channel"), (-8, 7)),
        (QuantSpec(4, "tensor"), (-8, 7)),
    ],
)
def test_code_limits(spec: QuantSpec, limits: tuple[int, int]):
    assert (spec.qmin, spec.qmax) == limits


def test_tensor_specs_of_a_grouped_convolution():
    conv = Geometry((6, 3, 3, 3), groups=2)
    specs = tensor_specs(parse_scheme("w4a8"), conv)
    assert {name: (spec.shape, spec.dtype, spec.required) for name, spec in specs.items()} == {
        "bias": ((6,), None, False),
        "weight": ((6, 14), torch.uint8, True),  # 27 columns, two a byte
        "weight_scale": ((6,), torch.float32, True),
        "pre_quant_scale": ((6,), torch.float32, False),
        "input_scale": ((), torch.float32, True),
        "input_zero_point": ((), torch.int32, True),
    }
    grouped = tensor_specs(parse_scheme("w4a16-g10"), Geometry((5, 32)))
    assert (grouped["weight_scale"].shape, grouped["weight"].shape) == ((5, 4), (5, 16))
    assert "input_scale" not in grouped


def good_state() -> LayerState:
    return LayerState(parse_scheme("w8a16"), torch.zeros(4, 6, dtype=torch.int8), torch.ones(4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"bias": torch.zeros(4, dtype=torch.bfloat16)}, None),
        ({"bias": torch.zeros(5)}, r"'bias' of a w8a16 layer must be floating \[4\]; found torch.float32 \[5\]"),
        ({"weight": torch.zeros(4, 6)}, r"'weight' .* must be torch.int8 \[4, 6\]; found torch.float32"),
        ({"weight_scale": torch.ones(4).half()}, "'weight_scale' .* must be torch.float32"),
        ({"input_scale": torch.ones(())}, "has no tensor 'input_scale'"),
        ({"scheme": parse_scheme("w8a8")}, "needs the tensor 'input_scale'"),
    ],
)
def test_check_state_names_what_does_not_fit(changes: dict, message: str | None):
    state = LayerState(**{"scheme": good_state().scheme, **good_state().tensors(), **changes})
    if message is None:
        check_state(state, Geometry((4, 6)))
        return
    with pytest.raises(LDMQError, match=message):
        check_state(state, Geometry((4, 6)))


@pytest.mark.parametrize(
    ("layer", "geometry"),
    [
        (nn.Linear(6, 4), Geometry((4, 6))),
        (nn.Conv2d(4, 6, 3), Geometry((6, 4, 3, 3))),
        (nn.Conv2d(4, 6, (3, 5), 2, 1, 2, 2), Geometry((6, 2, 3, 5), (2, 2), (1, 1), (2, 2), 2)),
        (nn.Conv2d(4, 6, (3, 5), padding="same", dilation=2), Geometry((6, 4, 3, 5), (1, 1), (2, 4), (2, 2))),
        (nn.Conv2d(4, 6, 3, padding="valid"), Geometry((6, 4, 3, 3))),
    ],
    ids=str,
)
def test_geometry_of_a_layer(layer: nn.Module, geometry: Geometry):
    assert geometry_of(layer) == geometry


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode 'circular' cannot be quantized"),
        (nn.Conv2d(4, 4, 2, padding="same"), "'same' padding differs between sides"),
        (nn.Conv1d(4, 4, 3), "only nn.Linear and nn.Conv2d can be quantized; found Conv1d"),
    ],
    ids=str,
)
def test_layers_without_a_geometry_are_refused(layer: nn.Module, reason: str):
    with pytest.raises(BackendError, match=reason):
        geometry_of(layer)
