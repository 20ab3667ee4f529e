"""One quantized layer in ComfyUI's hands: patched, moved, copied, listed, offloaded."""

import copy
import dataclasses
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.tiny_models import sqnr
from torch import Tensor, nn

from diffusers_ldmq.affine import QParams, dequantize_weight
from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.errors import CalibrationError, LDMQError
from diffusers_ldmq.layers import quantize_layer
from diffusers_ldmq.observers import Observer
from diffusers_ldmq.specs import QuantSpec, geometry_of, parse_scheme

SCHEMES = ["w8a16", "w8a8", "w8a8-dyn", "w4a16", "w4a16-g16", "w4a8", "w4a8-dyn", "w4a4"]
CASES = [(kind, scheme) for kind in ("linear", "conv") for scheme in SCHEMES]


class Known(Observer):
    def update(self, x: Tensor) -> None: ...

    def merge(self, other: Any) -> None: ...

    def qparams(self, spec: QuantSpec) -> QParams:
        return QParams(torch.tensor(4.0 / spec.qmax), torch.tensor(3, dtype=torch.int32))


def float_layer(kind: str, bias: bool = True) -> Any:
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(32, 16, bias=bias)
    return nn.Conv2d(16, 8, 3, stride=2, padding=1, groups=2, bias=bias)


def input_of(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (2, 5, 32) if kind == "linear" else (2, 16, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def made(kind: str, scheme: str, dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    from comfyui_nodes.native.layer import LDMQLayer

    source = float_layer(kind, bias)
    state = layer_state("layer", source, parse_scheme(scheme), Known())
    return LDMQLayer(state, geometry_of(source), dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_it_computes_what_the_librarys_layer_computes(kind: str, scheme: str, bias: bool, comfy: ModuleType) -> None:
    source = float_layer(kind, bias)
    expected = quantize_layer(source, layer_state("layer", source, parse_scheme(scheme), Known()))
    layer, x = made(kind, scheme, bias=bias), input_of(kind)
    assert torch.equal(layer(x), expected(x))
    assert layer.scheme.name == scheme
    assert layer.backend_name == expected.backend_name
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_it_is_a_leaf_with_a_weight_and_a_bias(kind: str, scheme: str, comfy: ModuleType) -> None:
    import comfy.model_management

    layer, source = made(kind, scheme, torch.float16), float_layer(kind)
    assert not list(layer.children())
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        name: tuple(p.shape) for name, p in source.named_parameters()
    }
    layer(input_of(kind))
    found = layer.state_dict()
    assert list(found) == ["weight", "bias"]
    assert (found["weight"].dtype, tuple(found["weight"].shape)) == (torch.float16, tuple(source.weight.shape))
    assert found["weight"].nbytes == layer.state().weight.nbytes
    assert comfy.model_management.module_size(layer) == layer.state().weight.nbytes + layer.bias.nbytes


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_converting_and_setting_are_inverses(kind: str, scheme: str, comfy: ModuleType) -> None:
    layer, x = made(kind, scheme), input_of(kind)
    before, original = layer(x), layer.weight
    weight = layer.convert_weight(original.to(torch.float32, copy=True), inplace=True)
    assert torch.equal(weight, dequantize_weight(layer.state(), torch.Size(layer.geometry.shape)))
    assert layer.convert_weight(weight) is weight
    returned = layer.set_weight(weight + 0.1, seed=3, return_weight=True)
    assert torch.equal(layer(x), before)
    assert sqnr(weight + 0.1, returned.dequantize()) > 35
    layer.set_weight(weight + 0.1, inplace_update=False, seed=3)
    assert layer.scheme.weight.bits == 8
    assert not torch.equal(layer(x), before)
    layer.weight = nn.Parameter(original, requires_grad=False)  # what ComfyUI kept in its backup
    assert layer.scheme.name == scheme
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_patch_lands_in_the_layers_own_coordinates(kind: str, comfy: ModuleType) -> None:
    from comfyui_nodes.native.layer import LDMQLayer

    source = float_layer("linear") if kind == "linear" else nn.Conv2d(16, 8, 3, padding=1)
    state = layer_state("layer", source, parse_scheme("w8a16"), None)
    channels = source.weight.shape[1]
    corrected = dataclasses.replace(
        state,
        pre_quant_scale=torch.rand(channels) + 0.5,
        rotation=4,
        low_rank_a=torch.randn(2, source.weight[0].numel()) * 0.05,
        low_rank_b=torch.randn(source.weight.shape[0], 2) * 0.05,
    )
    layer, x = LDMQLayer(corrected, geometry_of(source), torch.float32), input_of(kind)
    delta = 0.05 * torch.randn(source.weight.shape)
    weight = layer.convert_weight(layer.weight)
    dense = nn.functional.linear if kind == "linear" else lambda *args: nn.functional.conv2d(*args, padding=1)
    assert sqnr(dense(x, weight, source.bias), layer(x)) > 60
    layer.set_weight(weight + delta)
    assert sqnr(dense(x, weight + delta, source.bias), layer(x)) > 35


@pytest.mark.parametrize(("scheme", "patched"), [("w8a8", "w8a8-dyn"), ("w4a8", "w8a8-dyn"), ("w8a16", "w8a16")])
def test_a_calibrated_range_rests_while_a_patch_is_in_the_weight(scheme: str, patched: str, comfy: ModuleType) -> None:
    layer, x = made("linear", scheme), input_of("linear")
    before, range_, original = layer(x), layer.state().input_scale, layer.weight
    layer.set_weight(layer.convert_weight(original) * 2)
    assert (layer.scheme.name, layer.state().input_scale) == (patched, None)
    moved = layer.weight.to("cpu", copy=True)  # what ComfyUI does when it offloads a loaded layer
    twin = copy.deepcopy(layer)
    layer.weight = nn.Parameter(moved, requires_grad=False)
    for other in (layer, twin):
        assert other.scheme.name == patched
        other.weight = nn.Parameter(original, requires_grad=False)
        assert (other.scheme.name, other.state().input_scale) == (scheme, range_)
        assert torch.equal(other(x), before)
    returned = layer.set_weight(layer.convert_weight(original) * 2, return_weight=True)
    layer.weight = nn.Parameter(returned, requires_grad=False)
    assert layer.scheme.name == patched


def test_setting_a_bias_is_heard(comfy: ModuleType) -> None:
    layer, x = made("linear", "w8a8-dyn"), input_of("linear")
    before = layer(x)
    layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)
    assert torch.allclose(layer(x), before + 1, atol=1e-5)
    assert layer.state_dict()["bias"].shape == (16,)


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_copies_and_casts(kind: str, scheme: str, comfy: ModuleType) -> None:
    layer, x = made(kind, scheme), input_of(kind)
    before = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), before)
    twin.set_weight(torch.zeros(layer.geometry.shape))
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.to("cpu")(x), before)
    half = copy.deepcopy(layer).to(torch.float16)
    assert half.weight.dtype == half.bias.dtype == torch.float16
    assert half.state().weight_scale.dtype == torch.float32
    assert torch.equal(half.state().weight, layer.state().weight)
    other = made(kind, scheme)
    other.set_weight(torch.zeros(layer.geometry.shape))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), before)


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_codes_are_released_after_the_first_call_and_come_back(kind: str, scheme: str, comfy: ModuleType) -> None:
    layer, x = made(kind, scheme), input_of(kind)
    codes = layer.state().weight.clone()
    layer(x)
    listed: Any = dict(layer.named_parameters())["weight"]
    assert listed._qdata.untyped_storage().nbytes() <= max(1, 2 * listed._qdata.element_size())
    assert torch.equal(layer.state().weight, codes)
    assert torch.equal(layer.weight._qdata, codes)
    listed = dict(layer.named_parameters())["weight"]
    assert torch.equal(listed._qdata, codes)


@pytest.mark.parametrize(("kind", "scheme"), CASES)
def test_functions_of_an_offloaded_layer_see_the_float_weight(kind: str, scheme: str, comfy: ModuleType) -> None:
    layer, x = made(kind, scheme), input_of(kind)
    delta, seen = 0.1 * torch.ones(layer.geometry.shape), []
    layer.weight_function = [lambda weight: seen.append(weight.dtype) or weight + delta]
    layer.bias_function = [lambda bias: bias + 1]
    out = layer(x)
    walk = layer.geometry
    weight = layer.convert_weight(layer.weight) + delta
    expected = (
        nn.functional.linear(x, weight, layer.bias + 1)
        if kind == "linear"
        else nn.functional.conv2d(x, weight, layer.bias + 1, walk.stride, walk.padding, walk.dilation, walk.groups)
    )
    assert torch.equal(out, expected)
    assert seen == [torch.float32]


def test_gradients_reach_the_input(comfy: ModuleType) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        layer = made("linear", "w8a8-dyn")
        x = input_of("linear").requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None
        assert bool(x.grad.abs().sum() > 0)


def test_an_interrupt_is_heard_in_every_layer(comfy: ModuleType) -> None:
    import comfy.model_management as management

    layer = made("linear", "w8a16")
    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        layer(input_of("linear"))
    assert layer(input_of("linear")).shape == (2, 5, 16)


def test_what_does_not_fit_is_refused_in_words(comfy: ModuleType) -> None:
    from comfy_kitchen.tensor import QuantizedTensor

    layer = made("linear", "w8a16")
    with pytest.raises(LDMQError, match=r"shape \[3, 3\] was given to a layer of shape \[16, 32\]"):
        layer.weight = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        layer.set_weight(torch.full((16, 32), torch.nan))
    with pytest.raises(LDMQError, match="LoRA hooks .* Load LoRA node"):
        layer.set_weight(torch.zeros(16, 32), inplace_update=True)
    foreign = QuantizedTensor.from_float(torch.randn(16, 32), "TensorWiseINT8Layout")
    with pytest.raises(LDMQError, match="TensorWiseINT8Layout was given to a layer of LDM-Q"):
        layer.weight = nn.Parameter(foreign, requires_grad=False)
