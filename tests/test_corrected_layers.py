"""Layers with a rotation or a low-rank branch: the same in every backend, saved, copied, cast; LoRA on top of them."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from diffusers_ldmq import affine
from diffusers_ldmq.backends import BACKENDS
from diffusers_ldmq.backends.native import native_status
from diffusers_ldmq.corrections import LayerInputs
from diffusers_ldmq.corrections.contract import rebuild
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.layers import QuantizedLayer, quantize_layer
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.specs import SCHEMES, Geometry, LayerState, check_state, geometry_of, parse_scheme

CPU = torch.device("cpu")
QUANTIZED = [*SCHEMES[1:], "w4a16-g16"]


@dataclass(frozen=True)
class Case:
    layer: Callable[[], nn.Linear | nn.Conv2d]
    shape: tuple[int, ...]
    rotation: int


CASES = {
    "linear": Case(lambda: nn.Linear(96, 40), (2, 7, 96), 32),
    "linear no rows": Case(lambda: nn.Linear(32, 20), (0, 32), 16),
    "conv": Case(lambda: nn.Conv2d(32, 40, 3, padding=1), (2, 32, 6, 5), 16),
    "conv 1x1": Case(lambda: nn.Conv2d(64, 40, 1, bias=False), (2, 64, 5, 5), 64),
    "conv stride": Case(lambda: nn.Conv2d(32, 40, 3, stride=2, padding=1), (1, 32, 7, 7), 2),
    "conv groups": Case(lambda: nn.Conv2d(32, 12, 3, padding=1, groups=2), (2, 32, 6, 6), 16),
    "conv no images": Case(lambda: nn.Conv2d(32, 40, 3), (0, 32, 6, 6), 16),
}


def changed(layer: nn.Module, scheme: str, x: Tensor, what: str, rotation: int = 16) -> LayerState:
    """State of a layer with a smoothing scale, a rotation, a low-rank branch or all of them ('all')."""
    geometry, parsed = geometry_of(layer), parse_scheme(scheme)
    generator = torch.Generator().manual_seed(1)
    state = LayerState(parsed, torch.zeros(0), torch.zeros(0))
    if what in ("scale", "all"):
        state = replace(state, pre_quant_scale=torch.rand(geometry.in_channels, generator=generator) + 0.5)
    if what in ("rotation", "all"):
        state = replace(state, rotation=rotation)
    if what in ("branch", "all") and geometry.groups == 1:
        a = torch.randn(3, geometry.columns, generator=generator) * 0.1
        state = replace(state, low_rank_a=a, low_rank_b=torch.randn(geometry.shape[0], 3, generator=generator) * 0.1)
    return rebuild(layer, state, LayerInputs((x,) if x.numel() else (torch.ones(1),), "minmax-affine"))


def make(case: str, scheme: str, what: str) -> tuple[nn.Module, LayerState, Tensor]:
    torch.manual_seed(0)
    layer = CASES[case].layer()
    x = torch.randn(CASES[case].shape) + 0.5
    if not x.numel():
        full = torch.randn(1, *CASES[case].shape[1:])
        return layer, changed(layer, scheme, full, what, CASES[case].rotation), x
    return layer, changed(layer, scheme, x, what, CASES[case].rotation), x


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Once with the compiled passes (where they can be built), once without."""
    monkeypatch.setenv("LDMQ_NATIVE", str(int(request.param)))
    native_status.cache_clear()
    yield
    native_status.cache_clear()


@pytest.mark.parametrize("what", ["scale", "rotation", "branch", "all"])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.usefixtures("native")
def test_every_backend_agrees_with_the_oracle_and_with_the_float_layer(scheme: str, case: str, what: str) -> None:
    layer, state, x = make(case, scheme, what)
    geometry = geometry_of(layer)
    check_state(state, geometry)
    oracle = BACKENDS["reference"]
    for name, backend in BACKENDS.items():
        if (reason := backend.refusal(state, geometry, CPU)) is not None:
            assert "VNNI" in reason, name
            continue
        packed = backend.pack(state, geometry)
        assert torch.equal(backend.unpack(packed), state.weight)
        for dtype, least in ((torch.float32, 90), (torch.bfloat16, 38)):
            given = x.to(dtype)
            for arranged in (given, given.to(memory_format=torch.channels_last) if x.dim() == 4 else given):
                out = backend.run(arranged, packed)
                truth = oracle.run(arranged, oracle.pack(state, geometry))
                assert (out.dtype, out.shape) == (dtype, layer(x).shape)
                assert out.numel() == 0 or sqnr(truth, out) > least
    if x.numel():
        least = 10 if "4" in scheme else 30
        assert sqnr(layer(x), oracle.run(x, oracle.pack(state, geometry))) > least


@pytest.mark.parametrize("case", ["linear", "conv", "conv 1x1", "conv groups"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dyn"])
@pytest.mark.usefixtures("native")
def test_rotated_codes_are_exactly_the_oracles(scheme: str, case: str) -> None:
    """Unit scales, fp32 output, no bias: the sums are whole numbers, and equal."""
    layer, state, x = make(case, scheme, "rotation")
    geometry = geometry_of(layer)
    units: dict[str, Any] = {"weight_scale": torch.ones_like(state.weight_scale), "bias": None}
    if state.input_scale is not None:
        units["input_scale"] = torch.ones(())
    state = replace(state, **units)
    # integers of at most 6 bits, times 16: a rotation by 4, 16 or 64 makes whole numbers of them
    x = torch.randint(-7, 8, x.shape).float() * 16
    outputs = []
    for _, backend in BACKENDS.items():
        if backend.refusal(state, geometry, CPU) is None:
            outputs.append(backend.run(x, backend.pack(state, geometry)))
    assert all(sqnr(outputs[0], out) > 120 for out in outputs)
    if scheme == "w8a8" and case != "linear":  # 32 has no whole root
        assert all(torch.equal(out, outputs[0]) for out in outputs)
        assert torch.equal(outputs[0], outputs[0].round())


def test_the_hadamard_matrix_is_natural_orthonormal_and_its_own_inverse() -> None:
    assert torch.equal(affine.hadamard(1), torch.ones(1, 1))
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(affine.hadamard(4), expected)
    for size in (2, 16, 64, 256):
        matrix = affine.hadamard(size)
        assert torch.equal(matrix, matrix.T)
        assert torch.allclose(matrix @ matrix, torch.eye(size), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 32), (3, 4, 32), (2, 32, 5, 3), (2, 32, 1, 1), (0, 32, 2, 2)])
def test_rotating_is_a_block_diagonal_product_whatever_the_layout(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, matrix = torch.randn(shape), affine.hadamard(8)
    dim = 1 if len(shape) == 4 else -1
    expected = (x.movedim(dim, -1) @ torch.block_diag(*[matrix] * 4)).movedim(-1, dim)
    for arranged in (x, x.to(memory_format=torch.channels_last)) if dim == 1 else (x,):
        turned = affine.rotate(arranged, matrix, dim)
        assert torch.allclose(turned, expected, atol=1e-5)
        if dim == 1 and x.shape[2] > 1 and x.shape[0]:
            layout = torch.channels_last if arranged is not x else torch.contiguous_format
            assert turned.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("what", ["scale", "rotation", "branch", "all"])
@pytest.mark.parametrize("case", ["linear", "conv", "conv groups"])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w8a8-dyn", "w4a16-g16"])
def test_copies_and_dequantized_layers_are_the_same_layer(scheme: str, case: str, what: str) -> None:
    layer, state, x = make(case, scheme, what)
    quantized = quantize_layer(layer, state)
    out = quantized(x)
    assert (quantized.rotation, quantized.rank) == (state.rotation, state.rank)
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):  # noqa: S301
        assert other.state().rotation == state.rotation
        assert save(other.state_dict()) == save(quantized.state_dict())
        assert torch.equal(other(x), out)
    dense = quantized.dequantize()
    assert sqnr(dense(x), out) > (100 if not state.scheme.is_integer else 30)
    x.requires_grad_()
    (quantized(x) * out).sum().backward()
    truth = x.detach().clone().requires_grad_()
    (dense(truth) * out).sum().backward()
    assert torch.allclose(x.grad, truth.grad, rtol=1e-3, atol=1e-2)  # pyright: ignore


def test_a_branch_follows_the_dtype_and_scales_do_not() -> None:
    layer, state, x = make("conv", "w8a8", "all")
    quantized = quantize_layer(layer, state)
    quantized(x)
    quantized.to(torch.bfloat16)
    held = quantized.state()
    assert {held.low_rank_a.dtype, held.low_rank_b.dtype, held.bias.dtype} == {torch.bfloat16}  # pyright: ignore
    assert torch.equal(held.pre_quant_scale, state.pre_quant_scale)  # pyright: ignore
    assert torch.equal(held.weight, state.weight)
    assert quantized(x.bfloat16()).dtype == torch.bfloat16


def change_a(layer: Any) -> None:
    layer.low_rank_a.mul_(2)


def swap_b(layer: Any) -> None:
    layer.low_rank_b.data = layer.low_rank_b.data * 2


def rotate_otherwise(layer: Any) -> None:
    layer.load_state(replace(layer.state(), rotation=8))


def stop_rotating(layer: Any) -> None:
    layer.load_state(replace(layer.state(), rotation=0))


@pytest.mark.parametrize("change", [change_a, swap_b, rotate_otherwise, stop_rotating])
def test_a_stale_pack_is_impossible(change: Callable[[Any], None]) -> None:
    layer, state, x = make("conv", "w8a8", "all")
    quantized = quantize_layer(layer, state)
    old = quantized(x)
    change(quantized)
    new = quantized(x)
    assert not torch.equal(new, old)
    assert torch.equal(copy.deepcopy(quantized)(x), new)


def test_a_prepared_layer_takes_a_checkpoints_tensors() -> None:
    layer, state, x = make("conv", "w8a8", "all")
    quantized = quantize_layer(layer, state)
    tensors = quantized.state_dict()
    fresh: QuantizedLayer = copy.deepcopy(quantized).to("meta")
    fresh.prepare(state.scheme, set(tensors), rotation=state.rotation, rank=state.rank)
    fresh.load_state_dict(tensors, assign=True)
    assert torch.equal(fresh(x), quantized(x))
    with pytest.raises(LDMQError, match="has tensors .*; found .*low_rank_a"):
        copy.deepcopy(quantized).prepare(state.scheme, set(tensors))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "three": ({"rotation": 3}, "rotation 3: expected 0 or a power of two from 2 on that divides the 6 input channels"),
    "negative": ({"rotation": -2}, "rotation -2"),
    "one": ({"rotation": 1}, "rotation 1"),
    "does not divide": ({"rotation": 4}, "rotation 4: .* divides the 6"),
    "huge": ({"rotation": 2**70}, "rotation 1180591620717411303424"),
    "only a": ({"low_rank_b": None}, "needs the tensor 'low_rank_b'"),
    "only b": ({"low_rank_a": None}, "has no tensor 'low_rank_b'"),
    "ranks differ": ({"low_rank_b": torch.ones(4, 3)}, r"'low_rank_b' .* must be floating \[4, 2\]"),
    "integers": ({"low_rank_a": torch.ones(2, 6, dtype=torch.int8)}, "'low_rank_a' .* must be floating"),
    "one dimension": ({"low_rank_a": torch.ones(6)}, "must have two dimensions"),
    "rank above all": (
        {"low_rank_a": torch.ones(5, 6), "low_rank_b": torch.ones(4, 5)},
        "rank 5 beside a weight of shape .4, 6.: expected 0..4",
    ),
    "no rows": ({"low_rank_a": torch.ones(0, 6), "low_rank_b": torch.ones(4, 0)}, "has no tensor 'low_rank_a'"),
}


@pytest.mark.parametrize("bad", list(BAD))
def test_what_a_layer_cannot_have_is_named(bad: str) -> None:
    good = LayerState(
        parse_scheme("w8a16"),
        torch.zeros(4, 6, dtype=torch.int8),
        torch.ones(4),
        rotation=2,
        low_rank_a=torch.ones(2, 6),
        low_rank_b=torch.ones(4, 2),
    )
    check_state(good, Geometry((4, 6)))
    changes, message = BAD[bad]
    with pytest.raises(LDMQError, match=message):
        check_state(replace(good, **changes), Geometry((4, 6)))


def test_groups_are_rotated_within_themselves_and_have_no_branch() -> None:
    grouped = Geometry((8, 4, 3, 3), groups=2)
    state = LayerState(parse_scheme("w8a16"), torch.zeros(8, 4, 3, 3, dtype=torch.int8), torch.ones(8))
    check_state(replace(state, rotation=4), grouped)
    with pytest.raises(LDMQError, match="rotation 8: .* divides the 4 input channels of a group of the layer"):
        check_state(replace(state, rotation=8), grouped)
    branch = {"low_rank_a": torch.ones(1, 36), "low_rank_b": torch.ones(8, 1)}
    with pytest.raises(LDMQError, match="a convolution with groups has no low-rank branch"):
        check_state(replace(state, **branch), grouped)
