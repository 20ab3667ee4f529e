"""Every registered backend against the oracle, for every scheme and geometry that it does not refuse."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusers_ldmq import affine
from diffusers_ldmq.backends import BACKENDS, choose_backend, cpu_kind, fast_dtype, refusals
from diffusers_ldmq.backends.codes import NativeStep, TorchStep, input_step
from diffusers_ldmq.backends.native import native_status
from diffusers_ldmq.errors import BackendError, LDMQError
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.specs import SCHEMES, Geometry, LayerState, geometry_of, parse_scheme

CPU = torch.device("cpu")
QUANTIZED = [*(name for name in SCHEMES if name != "float"), "w4a8-dyn", "w4a4-dyn", "w4a16-g16", "w4a16-g7"]
FOUR_BIT = [name for name in QUANTIZED if name.startswith("w4")]
# against the oracle; bf16 and fp16 outputs differ by their own rounding
LEAST_DB = {torch.float32: 100.0, torch.bfloat16: 40.0, torch.float16: 60.0, torch.float64: 100.0}


@dataclass(frozen=True)
class Case:
    layer: nn.Linear | nn.Conv2d
    shape: tuple[int, ...]


torch.manual_seed(0)
CASES = {
    "linear": Case(nn.Linear(32, 24), (2, 7, 32)),
    "linear odd": Case(nn.Linear(37, 5, bias=False), (3, 37)),
    "linear one row": Case(nn.Linear(16, 8), (1, 16)),
    "linear no rows": Case(nn.Linear(16, 8), (0, 16)),
    "linear four dimensions": Case(nn.Linear(8, 8), (2, 3, 4, 8)),
    "conv": Case(nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 7)),
    "conv odd": Case(nn.Conv2d(5, 7, 3, padding=1, bias=False), (1, 5, 6, 6)),
    "conv stride": Case(nn.Conv2d(8, 8, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "conv dilation": Case(nn.Conv2d(8, 8, 3, padding=2, dilation=2), (2, 8, 9, 9)),
    "conv groups": Case(nn.Conv2d(8, 12, 3, padding=1, groups=2), (2, 8, 6, 6)),
    "conv depthwise": Case(nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 6, 6)),
    "conv 1x1": Case(nn.Conv2d(16, 24, 1), (2, 16, 5, 5)),
    "conv 1x1 stride": Case(nn.Conv2d(16, 24, 1, stride=2), (2, 16, 5, 5)),
    "conv 1x5": Case(nn.Conv2d(8, 8, (1, 5), padding=(0, 2)), (2, 8, 5, 5)),
    "conv many pixels": Case(nn.Conv2d(4, 2, 3, padding=1), (2, 4, 12, 12)),
    "conv one pixel": Case(nn.Conv2d(8, 8, 3, padding=1), (2, 8, 1, 1)),
    "conv no images": Case(nn.Conv2d(8, 8, 3, padding=1), (0, 8, 4, 4)),
    "conv 1x1 no images": Case(nn.Conv2d(8, 8, 1), (0, 8, 4, 4)),
}


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Once with the compiled passes (where they can be built), once without."""
    monkeypatch.setenv("LDMQ_NATIVE", str(int(request.param)))
    native_status.cache_clear()
    if request.param and native_status().library is None:
        pytest.skip(native_status().reason)
    yield request.param
    native_status.cache_clear()


def quantized(layer: nn.Linear | nn.Conv2d, name: str, x: Tensor, smooth: bool = False) -> LayerState:
    """Min-max state of a layer, its static range taken from x."""
    scheme, weight = parse_scheme(name), layer.weight.detach()
    assert scheme.weight is not None
    pre = torch.rand(geometry_of(layer).in_channels) + 0.5 if smooth else None
    codes, scale = affine.quantize_weight(weight, affine.weight_qparams(weight, scheme.weight), scheme.weight)
    bias = None if layer.bias is None else layer.bias.detach()
    state = LayerState(scheme, codes, scale, bias, pre_quant_scale=pre)
    if not scheme.is_static or scheme.activation is None:
        return state
    low, high = (x.min(), x.max()) if x.numel() else (torch.tensor(-1.0), torch.tensor(3.0))
    qparams = affine.affine_qparams(low, high, scheme.activation)
    return replace(state, input_scale=qparams.scale, input_zero_point=qparams.zero_point)


def skip_refused(reason: str | None) -> None:
    """Skip what a backend refuses, but only for a reason that is meant: any other refusal is a part gone missing."""
    if reason is not None:
        assert "VNNI" in reason
        pytest.skip(reason)


def outputs(name: str, state: LayerState, geometry: Geometry, x: Tensor, low_memory: bool = False) -> Tensor:
    """What the backend makes of x. Skips the test if it refuses."""
    reason = BACKENDS[name].refusal(state, geometry, CPU)
    skip_refused(reason)
    return BACKENDS[name].run(x, BACKENDS[name].pack(state, geometry, low_memory))


@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "smoothed"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.usefixtures("native")
def test_every_backend_agrees_with_the_oracle(backend: str, scheme: str, case: str, smooth: bool):
    torch.manual_seed(0)
    layer, geometry = CASES[case].layer, geometry_of(CASES[case].layer)
    x = torch.randn(CASES[case].shape) + 0.5  # one-sided enough for a zero point
    state = quantized(layer, scheme, x, smooth)
    for dtype in (torch.float32, torch.bfloat16):
        truth = outputs("reference", state, geometry, x.to(dtype))
        for low_memory in (False, True):
            out = outputs(backend, state, geometry, x.to(dtype), low_memory)
            assert (out.dtype, out.shape) == (dtype, layer(x).shape)
            if out.numel():
                layout = torch.channels_last if geometry.is_conv else torch.contiguous_format
                assert out.is_contiguous(memory_format=layout)
                assert sqnr(truth, out) > LEAST_DB[dtype]


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_the_oracle_agrees_with_the_float_layer(scheme: str):
    torch.manual_seed(0)
    least = 12.0 if "4" in scheme else 35.0
    for case in (CASES["linear"], CASES["conv"], CASES["conv groups"]):
        x = torch.randn(case.shape)
        state = quantized(case.layer, scheme, x)
        assert sqnr(case.layer(x), outputs("reference", state, geometry_of(case.layer), x)) > least


@pytest.mark.parametrize("zero_point", [-128, -3, 0, 127])
@pytest.mark.parametrize("case", [name for name in CASES if "no " not in name])
@pytest.mark.parametrize("low_memory", [False, True], ids=["plain", "low memory"])
@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a4"])
@pytest.mark.usefixtures("native")
def test_accumulators_are_exact_integers(backend: str, scheme: str, case: str, zero_point: int, low_memory: bool):
    """Unit scales and fp32 output show the int32 sums themselves, padding included."""
    torch.manual_seed(0)
    layer, geometry = CASES[case].layer, geometry_of(CASES[case].layer)
    state = quantized(layer, scheme, torch.randn(CASES[case].shape))
    bits = 4 if scheme == "w4a4" else 8
    zero_point = max(min(zero_point, 2 ** (bits - 1) - 1), -(2 ** (bits - 1)))
    one = torch.ones(())
    units = {"weight_scale": torch.ones_like(state.weight_scale), "bias": None, "input_scale": one}
    state = replace(state, **units, input_zero_point=torch.tensor(zero_point, dtype=torch.int32))
    x = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), CASES[case].shape).float() - zero_point
    weight = affine.weight_codes(state, torch.Size(geometry.shape)).double()
    walk = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    exact = nn.functional.conv2d(x.double(), weight, None, *walk) if geometry.is_conv else x.double() @ weight.t()
    assert torch.equal(outputs(backend, state, geometry, x, low_memory).double(), exact)


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floating_dtypes_come_back_as_they_went_in(backend: str, scheme: str, dtype: torch.dtype):
    torch.manual_seed(0)
    for case in (CASES["linear"], CASES["conv"], CASES["conv 1x1"]):
        x = torch.randn(case.shape).to(dtype)
        state, geometry = quantized(case.layer, scheme, x.float()), geometry_of(case.layer)
        out = outputs(backend, state, geometry, x)
        assert out.dtype == dtype
        assert sqnr(outputs("reference", state, geometry, x.float()), out) > 45


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dyn", "w8a16"])
@pytest.mark.usefixtures("native")
def test_strides_of_the_input_do_not_matter(backend: str, scheme: str):
    torch.manual_seed(0)
    conv, linear = CASES["conv"], CASES["linear"]
    x, rows = torch.randn(conv.shape), torch.randn(linear.shape)
    state, geometry = quantized(conv.layer, scheme, x), geometry_of(conv.layer)
    layouts = (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT)
    outs = [outputs(backend, state, geometry, layout) for layout in layouts]
    assert all(torch.allclose(out, outs[0], atol=1e-5) for out in outs)
    state, geometry = quantized(linear.layer, scheme, rows), geometry_of(linear.layer)
    strided = torch.stack([rows, rows], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.allclose(
        outputs(backend, state, geometry, strided), outputs(backend, state, geometry, rows), atol=1e-5
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_unpack_gives_the_codes_back(backend: str, scheme: str, case: str):
    layer, geometry = CASES[case].layer, geometry_of(CASES[case].layer)
    state = quantized(layer, scheme, torch.randn(CASES[case].shape))
    skip_refused(BACKENDS[backend].refusal(state, geometry, CPU))
    for low_memory in (False, True):
        codes = BACKENDS[backend].unpack(BACKENDS[backend].pack(state, geometry, low_memory))
        assert torch.equal(codes, state.weight)
        assert codes.dtype == state.weight.dtype
        assert codes.is_contiguous()


@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_only_four_bit_weights_take_less_with_low_memory(backend: str, scheme: str):
    layer, geometry = CASES["conv"].layer, geometry_of(CASES["conv"].layer)
    for name, weight in ((scheme, 1), (scheme.replace("w4", "w8").split("-g")[0], 2)):
        if name not in SCHEMES and "a4" in name:
            continue
        state = quantized(layer, name, torch.randn(CASES["conv"].shape))
        skip_refused(BACKENDS[backend].refusal(state, geometry, CPU))
        held = bytes_in(BACKENDS[backend].pack(state, geometry, low_memory=True))
        others = sum(t.nbytes for n, t in state.tensors().items() if n != "weight")
        assert weight * geometry.columns * geometry.shape[0] // 2 <= held
        assert held <= weight * geometry.columns * geometry.shape[0] // 2 + 2 * others + 4 * geometry.columns


def bytes_in(packed: object) -> int:
    """Bytes of all tensors in a packed layer, wherever they are."""
    if isinstance(packed, Tensor):
        return packed.numel() * packed.element_size()  # also of opaque ones
    parts = packed if isinstance(packed, tuple) else [getattr(packed, n) for n in getattr(packed, "__slots__", ())]
    return sum(bytes_in(part) for part in parts)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-g16", "w4a16-g7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("native")
def test_four_bit_codes_become_the_weight_of_affine(scheme: str, case: str, dtype: torch.dtype):
    """The step that `native` chooses: codes, and the float weight, bit for bit, groups ending inside of kernels."""
    geometry = geometry_of(CASES[case].layer)
    state = quantized(CASES[case].layer, scheme, torch.randn(CASES[case].shape))
    shape, step = torch.Size(geometry.shape), input_step(state, geometry)
    codes = affine.unpack_int4(state.weight, geometry.columns)
    ordered = codes.reshape(*shape[:2], -1).mT.flatten(1)
    assert torch.equal(step.unpacked(state.weight, geometry), ordered)
    assert torch.equal(step.unpacked(state.weight, geometry, transposed=True), ordered.t())
    if not geometry.is_conv:  # the identity shows the weight itself
        state, identity = replace(state, bias=None), torch.eye(geometry.in_channels, dtype=dtype)
        weight = outputs("cpu_onednn", state, geometry, identity).t()
        assert torch.equal(weight, affine.dequantize_weight(state, shape).to(dtype))


@pytest.mark.usefixtures("native")
def test_nan_shows_in_dynamic_schemes_and_stays_in_its_row(backend: str):
    """Static codes have no NaN: it becomes some code, the output is finite and other rows are as they were."""
    layer, x = CASES["linear"].layer, torch.randn(4, 32)
    broken = x.clone()
    broken[1, 3] = math.nan
    for scheme, shows in (("w8a8-dyn", True), ("w8a8", False), ("w8a16", True)):
        state, geometry = quantized(layer, scheme, x), geometry_of(layer)
        out, clean = outputs(backend, state, geometry, broken), outputs(backend, state, geometry, x)
        assert bool(out[1].isnan().all()) is shows
        assert torch.allclose(out[[0, 2, 3]], clean[[0, 2, 3]], atol=1e-5)
        assert shows or torch.isfinite(out).all()


@pytest.mark.parametrize("shape", [(9, 7), (2, 5, 3, 4), (2, 70, 9, 9), (3, 64, 1, 1), (200, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dyn", "w4a4"])
@pytest.mark.usefixtures("native")
def test_both_steps_give_the_codes_of_affine(scheme: str, shape: tuple[int, ...], dtype: torch.dtype, smooth: bool):
    torch.manual_seed(0)
    is_conv, channels = len(shape) == 4, shape[1]
    layer = nn.Conv2d(channels, 2, 1) if is_conv else nn.Linear(channels, 2)
    # halves of the scale are ties; huge values saturate
    x = torch.cat([torch.randint(-400, 400, shape) / 2, torch.randn(shape) * 1e30])[: shape[0]].to(dtype)
    state, geometry = quantized(layer, scheme, x.float(), smooth), geometry_of(layer)
    if state.scheme.is_static:
        zero_point = torch.tensor(-3, dtype=torch.int32)
        state = replace(state, input_scale=torch.tensor(1.0), input_zero_point=zero_point)
    steps: list[TorchStep | NativeStep] = [TorchStep(state, geometry)]
    if (library := native_status().library) is not None:
        steps.append(NativeStep(state, geometry, library))
    smoothed = x.float()
    if state.pre_quant_scale is not None:
        smoothed = smoothed * (state.pre_quant_scale.reshape(-1, 1, 1) if is_conv else state.pre_quant_scale)
    assert state.scheme.activation is not None
    for step in steps:
        if state.input_scale is not None and state.input_zero_point is not None:
            qparams, codes = affine.QParams(state.input_scale, state.input_zero_point), step.static(x)
        else:
            qparams = affine.token_qparams(smoothed, state.scheme.activation)
            codes, scale = step.dynamic(x)
            assert torch.equal(scale, qparams.scale)
        expected = affine.quantize(smoothed, qparams, state.scheme.activation).int() + 128
        assert torch.equal(codes.int(), expected)
        assert codes.dtype == torch.uint8
        assert not is_conv or codes.is_contiguous(memory_format=torch.channels_last)


def test_a_wrong_input_shape_is_an_error_not_a_crash(backend: str):
    for case, shape in (("linear", (2, 31)), ("conv", (2, 15, 9, 9)), ("conv", (16, 9, 9, 1, 1))):
        for scheme in ("w8a8", "w8a8-dyn", "w8a16"):
            state = quantized(CASES[case].layer, scheme, torch.randn(CASES[case].shape))
            with pytest.raises(RuntimeError):
                outputs(backend, state, geometry_of(CASES[case].layer), torch.randn(shape))


def test_the_best_backend_that_does_not_refuse_is_chosen():
    layer = CASES["linear"].layer
    geometry = geometry_of(layer)
    for name in QUANTIZED:
        state = quantized(layer, name, torch.randn(2, 32))
        able = [candidate for candidate, reason in refusals(state, geometry, CPU).items() if reason is None]
        assert choose_backend(state, geometry, CPU).name == able[0]
        assert able[-1] == "reference"  # the oracle never refuses, and is the last resort
        assert choose_backend(state, geometry, torch.device("meta")).name == "reference"


def test_a_named_backend_that_refuses_says_why():
    state = quantized(CASES["linear"].layer, "w4a8", torch.randn(2, 32))
    geometry = geometry_of(CASES["linear"].layer)
    assert choose_backend(state, geometry, CPU, "reference").name == "reference"
    assert choose_backend(state, geometry, CPU).name == "cpu_onednn"
    with pytest.raises(BackendError, match="runs on CPU, not on cuda"):
        choose_backend(state, geometry, torch.device("cuda"), "cpu_onednn")
    with pytest.raises(LDMQError, match="unknown backend 'onednn'; known: cpu_onednn"):
        choose_backend(state, geometry, CPU, "onednn")


def test_a_cpu_without_vnni_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffusers_ldmq.backends.cpu_onednn.has_vnni", lambda: False)
    geometry = geometry_of(CASES["linear"].layer)
    static = quantized(CASES["linear"].layer, "w8a8", torch.randn(2, 32))
    weights = quantized(CASES["linear"].layer, "w8a16", torch.randn(2, 32))
    assert "no VNNI" in str(refusals(static, geometry, CPU)["cpu_onednn"])
    assert refusals(weights, geometry, CPU)["cpu_onednn"] is None


@pytest.mark.parametrize(
    ("features", "kind", "dtype"),
    [
        ({"amx_tile", "avx512_vnni", "avx512_bf16"}, "AMX", torch.bfloat16),
        ({"avx512_vnni", "avx512_bf16"}, "AVX512-VNNI + AVX512-BF16", torch.bfloat16),
        ({"avx512_vnni"}, "AVX512-VNNI", torch.float32),
        ({"avx_vnni"}, "AVX-VNNI", torch.float32),
        (set(), "no VNNI", torch.float32),
    ],
)
def test_cpu_kinds(monkeypatch: pytest.MonkeyPatch, features: set[str], kind: str, dtype: torch.dtype):
    monkeypatch.setattr("diffusers_ldmq.backends.cpu.cpu_has", lambda feature: feature in features)
    assert (cpu_kind(), fast_dtype("cpu")) == (kind, dtype)


def test_without_a_compiler_torch_does_the_work_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LDMQ_NATIVE", "1")
    for compiler, reason in (("no-such-cc", "no C compiler"), ("false", "the C compiler failed")):
        monkeypatch.setenv("CC", compiler)
        native_status.cache_clear()
        with caplog.at_level(logging.INFO, logger="diffusers_ldmq"):
            assert native_status().library is None
        assert reason in native_status().reason
        assert reason in caplog.text
    native_status.cache_clear()


def test_the_library_is_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LDMQ_NATIVE", "1")
    made = []
    for _ in range(2):
        native_status.cache_clear()
        if native_status().library is None:
            pytest.skip(native_status().reason)
        made.append([(f.name, f.stat().st_mtime_ns) for f in sorted((tmp_path / "diffusers_ldmq").iterdir())])
    assert made[0] == made[1]
    assert len(made[0]) == 1
    native_status.cache_clear()
