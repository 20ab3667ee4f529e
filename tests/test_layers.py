"""QuantLinear and QuantConv2d: float layers until they hold integers; packing that nobody notices."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from diffusers_ldmq import affine
from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.errors import BackendError, LDMQError
from diffusers_ldmq.layers import QuantConv2d, QuantizedLayer, QuantLinear, quantize_layer, quantized_layers
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.specs import SCHEMES, LayerState, parse_scheme

QUANTIZED = [*(name for name in SCHEMES if name != "float"), "w4a16-g16"]
FLOATS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(33, 12), (2, 5, 33)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 5, 5)),
    "conv 1x1": (lambda: nn.Conv2d(6, 8, 1, bias=False), (2, 6, 5, 5)),
}
Made = tuple[nn.Module, QuantizedLayer, Tensor]


def state_of(layer: Any, name: str, zero_point: int = -5) -> LayerState:
    scheme = parse_scheme(name)
    assert scheme.weight is not None
    codes, scale = affine.quantize_weight(
        layer.weight, affine.weight_qparams(layer.weight, scheme.weight), scheme.weight
    )
    bias = None if layer.bias is None else layer.bias.detach()
    if not scheme.is_static or scheme.activation is None:
        return LayerState(scheme, codes, scale, bias)
    step = torch.tensor(6.0 / 2**scheme.activation.bits)
    return LayerState(scheme, codes, scale, bias, step, torch.tensor(zero_point, dtype=torch.int32))


def make(kind: str, scheme: str) -> Made:
    """(float layer, its quantized one, an input)."""
    torch.manual_seed(0)
    layer, shape = FLOATS[kind][0](), FLOATS[kind][1]
    return layer, quantize_layer(layer, state_of(layer, scheme)), torch.randn(shape)


@pytest.fixture(params=QUANTIZED)
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(FLOATS))
def made(request: pytest.FixtureRequest, scheme: str) -> Made:
    return make(request.param, scheme)


def stands_in(layer: QuantizedLayer) -> bool:
    weight = layer._parameters["weight"]
    return weight is not None and weight.untyped_storage().nbytes() == 1


def bytes_of(layer: nn.Module) -> bytes:
    return save(layer.state_dict())


def test_the_constructors_are_the_parents_and_layers_are_float_until_loaded():
    for kind, parent, arguments in (
        (QuantLinear, nn.Linear, {"in_features": 5, "out_features": 3, "bias": False}),
        (QuantConv2d, nn.Conv2d, {"in_channels": 4, "out_channels": 2, "kernel_size": 3, "padding": "same"}),
    ):
        torch.manual_seed(0)
        layer = kind(**arguments)
        torch.manual_seed(0)
        plain = parent(**arguments)
        x = torch.randn((2, 5) if parent is nn.Linear else (2, 4, 5, 5))
        assert torch.equal(layer(x), plain(x))
        assert isinstance(layer, parent)
        assert layer.scheme.is_float
        assert layer.backend_name is None
        assert "scheme" not in repr(layer)
        assert list(layer.half().state_dict()) == list(plain.state_dict())
        assert layer.weight.dtype == torch.float16
        with pytest.raises(LDMQError, match="not quantized"):
            layer.state()


def test_a_quantized_layer_shows_what_runs_it():
    _, layer, x = make("conv", "w8a8")
    before = repr(layer)
    layer(x)
    assert repr(layer) == before
    assert f"scheme=w8a8, backend={layer.backend_name}" in before
    layer.use_backend("reference")
    assert layer.backend_name == "reference"
    assert "backend=reference" in repr(layer)
    with pytest.raises(LDMQError, match="unknown backend"):
        layer.use_backend("warp")


def test_bias_comes_first_and_scales_are_buffers_g15_g16(made: Made):
    """Pipelines read the dtype of the first parameter; model.dtype and offloading look at parameters only."""
    _, layer, _ = made
    names = [name for name, _ in layer.named_parameters()]
    assert names == (["weight"] if layer.bias is None else ["bias", "weight"])
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert set(layer.state_dict()) - set(names) == {name for name, _ in layer.named_buffers()}


def test_packing_releases_the_codes_and_nobody_notices(made: Made):
    original, layer, x = made
    codes = layer.state().weight.clone()
    before = bytes_of(layer)
    out = layer(x)
    assert stands_in(layer)
    assert (layer.weight.shape, layer.weight.dtype) == (codes.shape, codes.dtype)
    assert bytes_of(layer) == before
    assert torch.equal(layer.state().weight, codes)
    assert torch.equal(layer(x), out)
    assert stands_in(layer)
    dense = layer.dequantize()
    assert type(dense) is type(original)
    assert sqnr(original(x), dense(x)) > (12 if layer.weight.dtype == torch.uint8 else 40)


def test_copies_and_pickles_hold_codes(made: Made):
    _, layer, x = made
    out = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        assert not stands_in(other)
        assert bytes_of(other) == bytes_of(layer)
        assert torch.equal(other(x), out)
    assert stands_in(layer)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)


def test_a_layer_packed_in_inference_mode_works_outside_of_it(made: Made):
    _, layer, x = made
    with torch.inference_mode():
        out = layer(x)
    assert torch.equal(layer(x), out)
    assert torch.equal(copy.deepcopy(layer)(x), out)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("packed", [False, True], ids=["fresh", "packed"])
def test_casting_changes_the_bias_only(made: Made, packed: bool):
    _, layer, x = made
    if packed:
        layer(x)
    before = {name: tensor.clone() for name, tensor in layer.state().tensors().items()}
    for cast in (
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: nn.Sequential(m).to("cpu", torch.float64)[0],
        lambda m: m.type(torch.float32),
        lambda m: m.to(memory_format=torch.channels_last),
    ):
        cast(layer)
        for name, tensor in layer.state().tensors().items():
            assert tensor.is_contiguous()
            assert name == "bias" or (tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]))
        assert layer(x).dtype == x.dtype


def change_scale_in_place(layer: Any) -> None:
    layer.weight_scale.mul_(2)


def assign_scale(layer: Any) -> None:
    layer.weight_scale = layer.weight_scale * 2


def assign_buffer_directly(layer: Any) -> None:
    layer._buffers["weight_scale"] = layer._buffers["weight_scale"] * 2


def swap_data(layer: Any) -> None:
    layer.weight_scale.data = layer.weight_scale.data * 2


def assign_weight(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.state().weight.flip(0), requires_grad=False)


def assign_parameter_directly(layer: Any) -> None:
    layer._parameters["weight"] = nn.Parameter(layer.state().weight.flip(0), requires_grad=False)


def swap_weight_data(layer: Any) -> None:
    layer.weight.data = layer.state().weight.flip(0)


def load_a_state(layer: Any) -> None:
    tensors = layer.state().tensors()
    layer.load_state(LayerState(layer.scheme, **{**tensors, "weight": tensors["weight"].flip(0)}))


def load_a_state_dict(layer: Any) -> None:
    tensors = layer.state_dict()
    layer.load_state_dict({**tensors, "weight": tensors["weight"].flip(0)})


def load_a_state_dict_by_assignment(layer: Any) -> None:
    tensors = layer.state_dict()
    layer.load_state_dict({**tensors, "weight": tensors["weight"].flip(0)}, assign=True)


def give_a_pre_quant_scale(layer: Any) -> None:
    layer.register_buffer("pre_quant_scale", torch.full((layer.geometry.in_channels,), 2.0))


@pytest.mark.parametrize(
    "change",
    [
        change_scale_in_place,
        assign_scale,
        assign_buffer_directly,
        swap_data,
        assign_weight,
        assign_parameter_directly,
        swap_weight_data,
        load_a_state,
        load_a_state_dict,
        load_a_state_dict_by_assignment,
        give_a_pre_quant_scale,
    ],
)
def test_a_stale_pack_is_impossible(made: Made, change: Callable[[Any], None]):
    _, layer, x = made
    old = layer(x)
    change(layer)
    new = layer(x)
    assert not torch.equal(new, old)
    fresh = copy.deepcopy(layer)
    assert torch.equal(fresh(x), new)
    assert bytes_of(fresh) == bytes_of(layer)


def test_a_stand_in_that_somebody_copied_is_still_no_weight(made: Made):
    """Group offloading moves `.data` to and fro, which turns the stand-in into a real tensor."""
    _, layer, x = made
    out, before = layer(x), bytes_of(layer)
    weight = layer.get_parameter("weight")
    weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    assert bytes_of(layer) == before
    assert torch.equal(layer(x), out)
    assert stands_in(layer)


def test_float_weights_do_not_load_into_codes(made: Made):
    original, layer, x = made
    out = layer(x)
    with pytest.raises(RuntimeError, match="codes expected, found torch.float32; quantize it first"):
        layer.load_state_dict(original.state_dict(), strict=False)
    assert torch.equal(layer(x), out)


def test_a_checkpoint_fills_a_prepared_layer_on_meta(made: Made):
    original, layer, x = made
    tensors = layer.state_dict()
    kind = type(layer)
    for assign in (True, False):
        fresh = kind.from_float(original, layer.state()) if not assign else copy.deepcopy(layer).to("meta")
        fresh.prepare(layer.scheme, set(tensors))
        assert {k: (v.shape, v.dtype) for k, v in fresh.state_dict().items()} == {
            k: (v.shape, v.dtype) for k, v in tensors.items()
        }
        fresh.load_state_dict(tensors, assign=assign)
        assert torch.equal(fresh(x), layer(x))
    with pytest.raises(LDMQError, match="found weight$"):
        copy.deepcopy(layer).prepare(layer.scheme, {"weight"})
    with pytest.raises(LDMQError, match="found .*zebra"):
        copy.deepcopy(layer).prepare(layer.scheme, {*tensors, "zebra"})


def test_from_float_leaves_the_float_layer_and_keeps_its_surroundings():
    original = nn.Conv2d(4, 4, 3, padding=1).eval()
    calls: list[str] = []
    handle = original.register_forward_hook(lambda *_: calls.append("hook"))
    original.note = "kept"  # pyright: ignore
    weight = original.weight.clone()
    layer = quantize_layer(original, state_of(original, "w8a8"))
    layer(torch.randn(1, 4, 5, 5))
    assert calls == ["hook"]
    assert layer.note == "kept"
    assert not layer.training
    handle.remove()
    layer(torch.randn(1, 4, 5, 5))
    assert calls == ["hook"]
    assert torch.equal(original.weight, weight)
    assert type(original) is nn.Conv2d


def test_what_cannot_be_quantized_says_so():
    linear, conv = nn.Linear(4, 4), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    with pytest.raises(LDMQError, match=r"'weight' .* must be torch.int8 \[4, 4, 3, 3\]; found torch.int8 \[4, 4\]"):
        quantize_layer(nn.Conv2d(4, 4, 3), state_of(linear, "w8a16"))
    with pytest.raises(BackendError, match="padding_mode 'reflect'"):
        quantize_layer(conv, state_of(conv, "w8a16"))
    with pytest.raises(LDMQError, match="QuantConv2d cannot replace Linear"):
        QuantConv2d.from_float(linear, state_of(linear, "w8a16"))
    linear.forward = lambda x: x  # pyright: ignore
    with pytest.raises(LDMQError, match="remove the hooks"):
        quantize_layer(linear, state_of(linear, "w8a16"))


def test_gradients_reach_the_input_as_in_the_float_layer(made: Made):
    _, layer, x = made
    x.requires_grad_()
    out = layer(x)
    with torch.no_grad():
        assert torch.equal(out, layer(x))
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    truth = x.detach().clone().requires_grad_()
    (layer.dequantize()(truth) * weights).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, truth.grad, atol=1e-4)  # pyright: ignore


def test_dequantize_takes_the_compute_dtype():
    _, layer, x = make("conv", "w8a8")
    layer.to(torch.bfloat16)
    assert layer.dequantize()(x.bfloat16()).dtype == torch.bfloat16
    assert layer.dequantize(torch.float64).weight.dtype == torch.float64
    assert layer.dequantize().padding == (1, 1)


def test_small_tensors_let_go_of_a_mapped_file(tmp_path: Any):
    _, layer, x = make("linear", "w8a8")
    save_file({**layer.state_dict(), "other": torch.zeros(1000, 1000)}, tmp_path / "file.safetensors")
    tensors = {k: v for k, v in load_file(tmp_path / "file.safetensors").items() if k != "other"}
    layer.load_state_dict(tensors, assign=True)
    mapped = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    layer(x)
    held = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    assert all(tensor.data_ptr() != mapped[name] for name, tensor in held.items())


def test_threads_share_a_layer():
    _, layer, x = make("conv", "w8a8")
    truth, results = copy.deepcopy(layer)(x), []
    threads = [threading.Thread(target=lambda: results.append(layer(x))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, truth) for result in results)


def test_quantized_layers_are_listed_by_name():
    linear = nn.Linear(3, 3)
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": quantize_layer(linear, state_of(linear, "w8a8"))})
    model["c"] = QuantLinear(2, 2)
    assert list(quantized_layers(model)) == ["b"]


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-dyn", "w4a16"])
@pytest.mark.parametrize("where", ["made", "filled", "copied"])
def test_layers_made_in_inference_mode_work_in_it_and_outside(scheme: str, where: str) -> None:
    """ComfyUI runs everything in inference mode, also loading."""
    torch.manual_seed(0)
    source, x = nn.Linear(8, 4), torch.randn(3, 8)
    state = layer_state("layer", source, parse_scheme(scheme), None)
    expected = quantize_layer(source, state)(x)
    with torch.inference_mode():
        made = quantize_layer(source, layer_state("layer", source, parse_scheme(scheme), None))
        if where == "filled":
            made.load_state_dict({name: value.clone() for name, value in made.state_dict().items()}, assign=True)
        if where == "copied":
            made = copy.deepcopy(made)
        assert torch.equal(made(x), expected)
        assert torch.equal(made.state().weight, state.weight)
        made = made.to("cpu")
        assert torch.equal(made(x), expected)
    assert torch.equal(made(x), expected)
    assert torch.equal(copy.deepcopy(made)(x), expected)
    made.load_state(state)
    assert torch.equal(made(x), expected)
