"""torch.compile on quantized denoisers: one graph, the same numbers, one compilation for all blocks alike."""

import copy
import gc
import pickle
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, WanTransformer3DModel
from peft import LoraConfig
from tiny_pipelines import text_unet
from torch import Tensor, nn
from torch._dynamo.utils import counters

from diffusers_ldmq import Recording, affine
from diffusers_ldmq.backends import BACKENDS
from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.calls import Batch, forward, repeated, run
from diffusers_ldmq.compiled import new_handle, run_compiled
from diffusers_ldmq.demo import demo_model
from diffusers_ldmq.errors import BackendError
from diffusers_ldmq.layers import QuantizedLayer, quantize_layer, quantized_layers
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.specs import SCHEMES, LayerState, parse_scheme

Recordings = Callable[[str], Recording]
Mixed = Callable[[str], Any]
DATA_FREE = ("w8a16", "w8a8-dyn", "w4a16")
OPERATORS = torch.ops.diffusers_ldmq


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs were compiled in this test."""
    return counters["stats"]["unique_graphs"]


def use(denoiser: nn.Module, backend: str) -> nn.Module:
    """Every layer on that backend, or on the best one where it refuses."""
    for layer in quantized_layers(denoiser).values():
        if BACKENDS[backend].refusal(layer.state(), layer.geometry, torch.device("cpu")) is None:
            layer.use_backend(backend)
    assert backend in {layer.backend_name for layer in quantized_layers(denoiser).values()}
    return denoiser


def made(layer: Any, scheme: str, x: Tensor) -> QuantizedLayer:
    """The layer in a scheme, its static range that of x."""
    parsed = parse_scheme(scheme)
    if not parsed.is_static or parsed.activation is None:
        return quantize_layer(layer, layer_state("layer", layer, parsed, None))
    assert parsed.weight is not None
    qparams = affine.affine_qparams(x.min(), x.max(), parsed.activation)
    codes, scale = affine.quantize_weight(
        layer.weight, affine.weight_qparams(layer.weight, parsed.weight), parsed.weight
    )
    return quantize_layer(layer, LayerState(parsed, codes, scale, layer.bias.detach(), *qparams))


def made_conv(scheme: str = "w8a8") -> tuple[QuantizedLayer, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 7, 5)
    return made(nn.Conv2d(6, 8, 3, padding=1, stride=2, groups=2), scheme, x), x


def made_linear(scheme: str = "w8a8") -> tuple[QuantizedLayer, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 33)
    return made(nn.Linear(33, 12), scheme, x), x


MADE = {"linear": made_linear, "conv": made_conv}


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_denoiser_compiles_into_one_graph_with_the_same_bits(
    backend: str, kind: str, mixed_denoiser: Mixed, recordings: Recordings
) -> None:
    denoiser = use(mixed_denoiser(kind), backend)
    recording = recordings(kind)
    batches = [recording.batch(call) for call in recording.calls[:2]]
    truths = [run(denoiser, batch) for batch in batches]
    denoiser.compile(backend="aot_eager", fullgraph=True)
    for batch, truth in zip(batches, truths, strict=True):
        assert torch.equal(run(denoiser, batch), truth)
    assert graphs() == 1


def test_a_layer_that_never_ran_is_packed_by_the_compiled_call(mixed_denoiser: Mixed, recordings: Recordings) -> None:
    denoiser, recording = mixed_denoiser("pixel"), recordings("pixel")
    twin = copy.deepcopy(denoiser)
    denoiser.compile(backend="aot_eager", fullgraph=True)
    first, second = (recording.batch(call) for call in recording.calls[:2])
    assert torch.equal(run(denoiser, first), run(twin, first))
    assert all(layer._pack is not None for layer in quantized_layers(denoiser).values())
    # packing swaps tensors; that must not look like another model
    assert torch.equal(run(denoiser, second), run(twin, second))
    assert graphs() == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_keeps_the_numbers(mixed_denoiser: Mixed, recordings: Recordings) -> None:
    """Inductor asserts the strides that the fake kernels promise; a resnet has convolutions and a linear layer."""
    denoiser, recording = mixed_denoiser("pixel"), recordings("pixel")
    block = denoiser.mid_block.resnets[0]
    assert {type(layer).__name__ for layer in quantized_layers(block).values()} == {"QuantLinear", "QuantConv2d"}
    batch = recording.batch(recording.calls[0])
    truth = run(denoiser, batch)
    block.compile(fullgraph=True)
    assert sqnr(truth, run(denoiser, batch)) > 60
    assert graphs() == 1


def tiny_wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=32,
    ).eval()


def quantize_blocks(denoiser: nn.Module) -> None:
    """The blocks' Linear layers in data-free schemes, another one at the same place of the next block."""
    linears = [(n, m) for n, m in denoiser.named_modules() if type(m) is nn.Linear and "blocks." in n]
    for index, (name, layer) in enumerate(linears):
        scheme = parse_scheme(DATA_FREE[index % len(DATA_FREE)])
        denoiser.set_submodule(name, quantize_layer(layer, layer_state(name, layer, scheme, None)))


def wan_inputs(rows: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(rows, 4, 2, 8, 8, generator=generator),
        "timestep": torch.full((rows,), 5),
        "encoder_hidden_states": torch.randn(rows, 8, 16, generator=generator),
    }


@torch.no_grad()
def test_repeated_blocks_compile_once_whatever_their_schemes() -> None:
    denoiser = tiny_wan()
    quantize_blocks(denoiser)
    places = [[layer.scheme.name for layer in quantized_layers(block).values()] for block in denoiser.blocks]
    assert len(places) == 4
    assert places[0] != places[1]
    x = wan_inputs()
    truth = denoiser(**x).sample
    denoiser.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(denoiser(**x).sample, truth)
        assert torch.equal(denoiser(**x).sample, truth)
    assert graphs() == 1


@torch.no_grad()
def test_a_unets_repeated_blocks_compile_as_often_as_the_float_ones() -> None:
    """Once for each width: seven blocks of three widths."""
    x = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500)}
    found: list[int] = []
    for quantized in (False, True):
        torch._dynamo.reset()
        counters.clear()
        unet = UNet2DConditionModel.from_pretrained(demo_model(), subfolder="unet").eval()
        if quantized:
            quantize_blocks(unet)
        inputs = {**x, "encoder_hidden_states": torch.randn(2, 16, unet.config["cross_attention_dim"])}
        truth = unet(**inputs).sample
        unet.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.equal(unet(**inputs).sample, truth)
        found.append(graphs())
    assert found == [3, 3]


def test_batches_of_any_size_share_a_graph(mixed_denoiser: Mixed, recordings: Recordings) -> None:
    denoiser, recording = mixed_denoiser("pixel"), recordings("pixel")
    twin = copy.deepcopy(denoiser)
    denoiser.compile(backend="eager", fullgraph=True, dynamic=True)
    batch = recording.batch(recording.calls[0])
    for times in (1, 2, 5):
        larger = repeated(batch, times)
        assert torch.equal(run(denoiser, larger), run(twin, larger))
    assert graphs() == 1


@pytest.mark.parametrize("shape", [(1, 6, 7, 5), (3, 6, 4, 9), (2, 6, 12, 12)], ids=str)
def test_convolutions_of_any_size_share_a_graph(shape: tuple[int, ...]) -> None:
    layer, x = made_conv()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x), layer(x))
    other = torch.randn(shape)
    assert torch.equal(compiled(other), layer(other))
    assert graphs() == (2 if 1 in shape else 1)  # a single row is always a graph of its own


def traced(x: Tensor, layer: Any) -> Tensor:
    return run_compiled(x, layer._handle, layer.geometry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES[1:])
@pytest.mark.parametrize("shape", list(MADE))
def test_the_operators_keep_torchs_contract(shape: str, scheme: str, dtype: torch.dtype) -> None:
    """Schema, fake kernel (shape, dtype, strides), gradient and dynamic shapes, as torch checks them."""
    layer, x = MADE[shape](scheme)
    x = x.to(dtype).requires_grad_()
    g, handle = layer.geometry, layer._handle
    if not g.is_conv:
        torch.library.opcheck(OPERATORS.linear.default, (x, handle, g.shape[0]))
    for layout in (torch.contiguous_format, torch.channels_last) if g.is_conv else ():
        arranged = x.detach().contiguous(memory_format=layout).requires_grad_()  # pyright: ignore
        torch.library.opcheck(OPERATORS.conv2d.default, (arranged, handle, g.shape, g.stride, g.padding, g.dilation))
    grad = torch.randn_like(layer(x)).detach()
    tests = ("test_schema", "test_faketensor")
    arguments = (grad, handle, list(x.shape), g.is_conv)
    torch.library.opcheck(OPERATORS.input_gradient.default, arguments, test_utils=tests)


@pytest.mark.parametrize("shape", list(MADE))
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_eager_outputs_have_the_strides_that_compilers_are_promised(shape: str, backend: str) -> None:
    """Or whatever comes after a layer would compute in another order once compiled."""
    for scheme in SCHEMES[1:]:
        layer, x = MADE[shape](scheme)
        if BACKENDS[backend].refusal(layer.state(), layer.geometry, x.device) is not None:
            continue
        layer.use_backend(backend)
        layouts = (x, x.contiguous(memory_format=torch.channels_last)) if x.dim() == 4 else (x,)
        for arranged in layouts:
            promised, out = traced(arranged.to("meta"), layer), layer(arranged)
            assert (out.shape, out.stride(), out.dtype) == (promised.shape, promised.stride(), promised.dtype)


def gradients(denoiser: Any, batch: Batch) -> dict[str, Tensor]:
    """Of every floating input and every parameter that is trained."""
    denoiser.zero_grad()
    inputs = {
        key: value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch.kwargs.items()
    }
    forward(denoiser, Batch(inputs, batch.output, batch.timestep)).square().mean().backward()
    trained = {name: p.grad for name, p in denoiser.named_parameters() if p.grad is not None}
    return {**{k: v.grad for k, v in inputs.items() if isinstance(v, Tensor) and v.grad is not None}, **trained}


def test_gradients_through_the_compiled_denoiser_are_the_eager_ones(
    mixed_denoiser: Mixed, recordings: Recordings
) -> None:
    denoiser, recording = mixed_denoiser("pixel"), recordings("pixel")
    batch = recording.batch(recording.calls[0])
    truth = gradients(denoiser, batch)
    denoiser.compile(backend="aot_eager", fullgraph=True)
    found = gradients(denoiser, batch)
    assert found.keys() == truth.keys()
    assert "sample" in truth
    assert all(torch.equal(truth[name], found[name]) for name in truth)
    assert graphs() == 1


def quantized_text_unet() -> Any:
    """Stable Diffusion's kind of U-Net: linears in all data-free schemes, convolutions in the 8-bit ones."""
    torch.manual_seed(0)
    unet = text_unet().eval()
    for index, (name, layer) in enumerate(
        [(n, m) for n, m in unet.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    ):
        schemes = DATA_FREE if isinstance(layer, nn.Linear) else DATA_FREE[:2]
        scheme = parse_scheme(schemes[index % len(schemes)])
        unet.set_submodule(name, quantize_layer(layer, layer_state(name, layer, scheme, None)))
    return unet


def test_a_lora_that_comes_after_compiling_is_heard_trained_and_gone_again() -> None:
    denoiser = quantized_text_unet()
    twin = copy.deepcopy(denoiser)
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500)}
    batch = Batch({**inputs, "encoder_hidden_states": torch.randn(2, 5, 32)}, inputs["sample"], 500.0)
    plain = run(twin, batch)
    denoiser.mid_block.compile(backend="eager", fullgraph=True)
    assert torch.equal(run(denoiser, batch), plain)
    for model in (denoiser, twin):
        torch.manual_seed(0)
        targets = ["to_q", "ff.net.2", "conv1"]
        model.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets))
    truth = gradients(twin, batch)
    found = gradients(denoiser, batch)
    assert found.keys() == truth.keys()
    assert all(torch.equal(truth[name], found[name]) for name in truth)
    kinds = {type(m.base_layer).__name__ for m in denoiser.modules() if hasattr(m, "base_layer")}
    assert kinds == {"QuantLinear", "QuantConv2d"}
    assert sum("lora" in name for name in truth) > 20
    assert torch.equal(run(denoiser, batch), run(twin, batch))
    assert sqnr(plain, run(denoiser, batch)) < 30
    denoiser.delete_adapters("default")
    assert torch.equal(run(denoiser, batch), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", list(MADE))
def test_casting_after_compiling_is_followed(shape: str, dtype: torch.dtype) -> None:
    layer, x = MADE[shape]()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x)
    layer.to(dtype)
    twin = copy.deepcopy(layer)
    assert torch.equal(compiled(x.to(dtype)), twin(x.to(dtype)))
    assert compiled(x.to(dtype)).dtype == dtype


def change_scale_in_place(layer: Any) -> None:
    layer.weight_scale.mul_(2)


def swap_data(layer: Any) -> None:
    layer.weight_scale.data = layer.weight_scale.data * 2


def assign_weight(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.state().weight.flip(0), requires_grad=False)


def load_a_state(layer: Any) -> None:
    tensors = layer.state().tensors()
    layer.load_state(LayerState(layer.scheme, **{**tensors, "weight": tensors["weight"].flip(0)}))


def load_another_scheme(layer: Any) -> None:
    layer.load_state(layer_state("layer", layer.dequantize(), parse_scheme("w4a16"), None))


def load_a_state_dict(layer: Any) -> None:
    tensors = layer.state_dict()
    layer.load_state_dict({**tensors, "weight": tensors["weight"].flip(0)}, assign=True)


def take_another_backend(layer: Any) -> None:
    layer.use_backend("reference")


@pytest.mark.parametrize(
    "change",
    [
        change_scale_in_place,
        swap_data,
        assign_weight,
        load_a_state,
        load_another_scheme,
        load_a_state_dict,
        take_another_backend,
    ],
)
@pytest.mark.parametrize("shape", list(MADE))
def test_a_stale_pack_is_impossible_after_compiling_too(shape: str, change: Callable[[Any], None]) -> None:
    layer, x = MADE[shape]()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    old = compiled(x)
    change(layer)
    new = compiled(x)
    assert torch.equal(new, copy.deepcopy(layer)(x))
    assert torch.equal(new, old) is (change is take_another_backend and torch.equal(layer(x), old))


@pytest.mark.parametrize("shape", list(MADE))
def test_under_autocast_a_layer_has_the_dtype_of_a_float_one(shape: str) -> None:
    for scheme in SCHEMES[1:]:
        layer, x = MADE[shape](scheme)
        for backend in BACKENDS:
            if BACKENDS[backend].refusal(layer.state(), layer.geometry, x.device) is not None:
                continue
            layer.use_backend(backend)
            truth = layer(x.bfloat16())
            compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(layer(x), truth)
                assert torch.equal(compiled(x), truth)
                assert layer(x.double()).dtype == torch.float64
            assert truth.dtype == torch.bfloat16


def test_copies_get_handles_of_their_own() -> None:
    layer, x = made_linear()
    copies = [copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))]  # noqa: S301
    handles = [each._handle for each in (layer, *copies)]
    assert len({int(handle) for handle in handles if handle is not None}) == 4
    truth = layer(x)
    with torch.no_grad():
        layer.get_buffer("weight_scale").mul_(2)
    assert torch.equal(traced(x, layer), layer(x))
    for each in (copies[0], copies[2]):
        assert torch.equal(traced(x, each), truth)
    again = type(layer).from_float(layer, layer.state())
    assert int(again._handle) != int(layer._handle)  # pyright: ignore


def test_a_handle_is_no_part_of_what_is_saved_or_moved() -> None:
    layer, x = made_linear()
    assert "_handle" not in layer.state_dict()
    with torch.device("meta"), torch.inference_mode():
        handle = new_handle(layer)
    assert (handle.device.type, handle.is_inference(), handle.shape, handle.dtype) == ("cpu", False, (), torch.int64)
    assert layer._handle is not None
    assert layer.to("meta")._handle.device.type == "cpu"  # pyright: ignore


def test_a_graph_whose_layer_is_gone_says_so() -> None:
    layer, x = made_linear()
    handle, geometry = layer._handle, layer.geometry
    assert handle is not None
    del layer
    gc.collect()
    with pytest.raises(BackendError, match=r"layer with handle \d+, which does not exist .* compile the model"):
        run_compiled(x, handle, geometry)


def test_an_exported_model_runs_while_its_layers_live(mixed_denoiser: Mixed) -> None:
    block = mixed_denoiser("pixel").mid_block.eval()
    x, temb = torch.randn(1, 32, 4, 4), torch.randn(1, 64)
    with torch.no_grad():
        exported = torch.export.export(block, (x, temb))
        assert torch.equal(exported.module()(x, temb), block(x, temb))
