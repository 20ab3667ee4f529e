"""Rounding arithmetic: golden integers, round trips, error bounds."""

import math

import pytest
import torch

from diffusers_ldmq import affine
from diffusers_ldmq.errors import CalibrationError
from diffusers_ldmq.specs import LayerState, QuantSpec, parse_scheme

ACTIVATION = QuantSpec(8, "tensor")


def qparams(scale: float, zero_point: int) -> affine.QParams:
    return affine.QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))


def test_golden_codes_round_half_to_even_and_saturate():
    x = torch.tensor([-1e9, -64.5, -1.5, -0.5, -0.25, 0.0, 0.5, 1.5, 2.5, 63.25, 64.0, float("inf")])
    codes = affine.quantize(x, qparams(0.5, 1), ACTIVATION)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [-128, -128, -2, 0, 1, 1, 2, 4, 6, 127, 127, 127]  # -0.25 / 0.5 = -0.5 -> -0
    halves = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    assert affine.quantize(halves, qparams(1.0, 0), ACTIVATION).tolist() == [-2, -2, 0, 0, 2, 2]
    assert affine.quantize(halves, qparams(1.0, 3), ACTIVATION).tolist() == [1, 1, 3, 3, 5, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (0.0, 7.0), (-4.0, 0.0), (1.0, 2.0), (0.0, 0.0)])
def test_error_is_at_most_half_a_scale(low: float, high: float, dtype: torch.dtype):
    x = torch.linspace(low, high, 1001).to(dtype)
    p = affine.affine_qparams(x.min(), x.max(), ACTIVATION)
    error = (affine.qdq(x, p, ACTIVATION) - x.float()).abs().max()
    assert float(error) <= float(p.scale) * 0.5001
    assert -128 <= int(p.zero_point) <= 127


def test_qdq_is_dequantized_quantize_and_zero_is_exact():
    x = torch.randn(200)
    p = affine.affine_qparams(x.min(), x.max(), ACTIVATION)
    assert torch.equal(affine.qdq(x, p, ACTIVATION), affine.dequantize(affine.quantize(x, p, ACTIVATION), p))
    assert affine.qdq(torch.zeros(3), p, ACTIVATION).tolist() == [0, 0, 0]


def test_scales_are_positive_and_finite_whatever_comes():
    zero = affine.symmetric_qparams(torch.zeros(3), QuantSpec(8, "channel"))
    assert (zero.scale > 0).all()
    assert torch.isfinite(zero.scale.reciprocal()).all()
    for bad in (math.nan, math.inf):
        with pytest.raises(CalibrationError, match="NaN or Inf"):
            affine.symmetric_qparams(torch.tensor([1.0, bad]), ACTIVATION)
        with pytest.raises(CalibrationError, match="NaN or Inf"):
            affine.affine_qparams(torch.tensor(0.0), torch.tensor(bad), ACTIVATION)


def test_tokens_and_images_have_scales_of_their_own():
    x = torch.tensor([[1.0, -127.0], [254.0, 3.0]])
    spec = QuantSpec(8, "token")
    assert affine.token_qparams(x, spec).scale.tolist() == [[1.0], [2.0]]
    images = x.reshape(2, 2, 1, 1)
    assert affine.token_qparams(images, spec).scale.flatten().tolist() == [1.0, 2.0]
    assert affine.token_qparams(images, spec, is_conv=False).scale.shape == (2, 2, 1, 1)
    x[0, 0] = math.nan
    assert affine.token_qparams(x, spec).scale.isnan().flatten().tolist() == [True, False]


@pytest.mark.parametrize("columns", range(1, 10))
@pytest.mark.parametrize("rows", [1, 3])
def test_int4_packing_round_trips(rows: int, columns: int):
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    packed = affine.pack_int4(codes)
    assert (packed.shape, packed.dtype) == ((rows, -(-columns // 2)), torch.uint8)
    assert torch.equal(affine.unpack_int4(packed, columns), codes)


def test_int4_packing_is_low_nibble_first_with_eight_as_padding():
    packed = affine.pack_int4(torch.tensor([[-8, 7, 0]], dtype=torch.int8))
    assert packed.tolist() == [[0xF0, 0x88]]


@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3)])
@pytest.mark.parametrize("name", ["w8a16", "w4a16", "w4a16-g4", "w4a16-g32"])
def test_a_weight_comes_back_within_half_a_scale(name: str, shape: tuple[int, ...]):
    scheme, weight = parse_scheme(name), torch.randn(shape)
    assert scheme.weight is not None
    codes, scale = affine.quantize_weight(weight, affine.weight_qparams(weight, scheme.weight), scheme.weight)
    state = LayerState(scheme, codes, scale)
    error = (affine.dequantize_weight(state, weight.shape) - weight).abs()
    assert float(error.max()) <= float(scale.max()) * 0.5001


def test_pre_quant_scale_is_undone_per_group_of_a_convolution():
    weight, smooth = torch.randn(4, 2, 3, 3), torch.rand(4) + 0.5  # two groups of two channels
    held = weight / torch.cat([smooth[:2].expand(2, 2), smooth[2:].expand(2, 2)]).reshape(4, 2, 1, 1)
    scheme = parse_scheme("w8a16")
    assert scheme.weight is not None
    codes, scale = affine.quantize_weight(held, affine.weight_qparams(held, scheme.weight), scheme.weight)
    state = LayerState(scheme, codes, scale, pre_quant_scale=smooth)
    assert float((affine.dequantize_weight(state, weight.shape) - weight).abs().max()) < 0.02


@pytest.mark.parametrize("scheme", ["w4a16", "w4a16-g64"])
def test_searching_a_weight_in_parts_finds_the_same_scales(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = parse_scheme(scheme).weight
    assert spec is not None
    weight = torch.randn(37, 19, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = affine.weight_qparams_mse(weight, spec)
    monkeypatch.setattr(affine, "IN_CACHE", 5 * weight[0].numel())
    told: list[None] = []
    parts = affine.weight_qparams_mse(weight, spec, lambda: told.append(None))
    assert torch.equal(parts.scale, whole.scale)
    assert torch.equal(parts.zero_point, whole.zero_point)
    assert len(told) >= 37 // 5
