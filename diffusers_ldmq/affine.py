"""All rounding arithmetic: scale and zero point, quantize, dequantize, qdq, int4 packing.

code = clamp(round(x * (1 / scale)) + zero_point, qmin, qmax);  x' = (code - zero_point) * scale, all in fp32.
The reciprocal is rounded to fp32 first and rounding is half to even: a vector unit does the same, so every backend
can produce the very same codes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import CalibrationError
from .specs import LayerState, QuantSpec

SMALLEST_SCALE = 2.0**-100  # an all-zero tensor still gets a positive scale, whose reciprocal is finite
IN_CACHE = 2**17
"""Numbers of a weight that are searched together: a round trip of so many stays in a processor's cache."""


class QParams(NamedTuple):
    """scale: fp32, positive, finite; zero_point: int32, same shape, in the code domain (0 = symmetric)."""

    scale: Tensor
    zero_point: Tensor


def symmetric_qparams(absmax: Tensor, spec: QuantSpec) -> QParams:
    """QParams that put +-absmax at the highest code. absmax: any shape -> scale, zero_point of that shape.

    Raises CalibrationError if absmax holds NaN or Inf.
    """
    if not torch.isfinite(absmax).all():
        raise CalibrationError("a tensor to quantize holds NaN or Inf; quantization needs finite values")
    scale = symmetric_scale(absmax, spec)
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32))


def symmetric_scale(absmax: Tensor, spec: QuantSpec) -> Tensor:
    """Scale that puts +-absmax at the highest code: fp32, same shape; NaN and Inf stay what they are."""
    return (absmax.float() / spec.qmax).clamp_min(SMALLEST_SCALE)


def affine_qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    """QParams whose codes cover [min(low, 0), max(high, 0)]; zero stays exactly representable.

    low, high: same shape -> scale, zero_point of that shape. Raises CalibrationError on NaN or Inf.
    """
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise CalibrationError("a tensor to quantize holds NaN or Inf; quantization needs finite values")
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    scale = ((high - low) / (spec.qmax - spec.qmin)).clamp_min(SMALLEST_SCALE)
    zero_point = (spec.qmin - torch.round(low / scale)).clamp(spec.qmin, spec.qmax)
    return QParams(scale, zero_point.to(torch.int32))


def quantize(x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """Codes of x as int8, same shape. `qparams` broadcast against x."""
    codes = (x.float() * qparams.scale.reciprocal()).round_().add_(qparams.zero_point)
    return codes.clamp_(spec.qmin, spec.qmax).to(torch.int8)


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """fp32 values of integer codes, same shape. `qparams` broadcast against the codes."""
    return (codes.float() - qparams.zero_point).mul_(qparams.scale)


def qdq(x: Tensor, qparams: QParams, spec: QuantSpec) -> Tensor:
    """x after a round trip through codes: fp32, same shape. What integer compute sees of x."""
    codes = (x.float() * qparams.scale.reciprocal()).round_().add_(qparams.zero_point).clamp_(spec.qmin, spec.qmax)
    return codes.sub_(qparams.zero_point).mul_(qparams.scale)


def per_channel(value: Tensor, like: Tensor) -> Tensor:
    """A per-output-channel vector [N] shaped to broadcast against a weight [N, ...]."""
    return value.reshape(-1, *[1] * (like.dim() - 1))


def token_qparams(x: Tensor, spec: QuantSpec, is_conv: bool | None = None) -> QParams:
    """Symmetric QParams of each row (x: [..., K] -> [..., 1]) or image (x: [B, C, h, w] -> [B, 1, 1, 1]).

    is_conv: whether x goes into a convolution; None = if it has four dimensions. A row with NaN or Inf gets a
    scale that is, so that the layer's output shows it; looking would cost every call.
    """
    is_conv = x.dim() == 4 if is_conv is None else is_conv
    dims = (1, 2, 3) if is_conv else (-1,)
    scale = symmetric_scale(x.abs().amax(dim=dims, keepdim=True), spec)
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32))


def weight_rows(weight: Tensor, spec: QuantSpec) -> Tensor:
    """A weight [N, ...] as fp32 [N, groups, group_size]; one group where the scale is per channel.

    The last group is padded with zeros where group_size does not divide K.
    """
    rows = weight.detach().reshape(weight.shape[0], -1).float()
    size = spec.group_size or rows.shape[1]
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % size))
    return rows.reshape(rows.shape[0], -1, size)


def weight_qparams(weight: Tensor, spec: QuantSpec) -> QParams:
    """Symmetric min-max QParams of a weight. [N, ...] -> [N, groups, 1]."""
    return symmetric_qparams(weight_rows(weight, spec).abs().amax(dim=-1, keepdim=True), spec)


def weight_qparams_mse(weight: Tensor, spec: QuantSpec, told: Callable[[], None] | None = None) -> QParams:
    """Symmetric QParams of a weight whose round trip has the least squared error per row or group, among 24 clipped
    ranges. [N, ...] -> [N, groups, 1]. told: called after every few rows, of which a large weight has many."""
    rows = weight_rows(weight, spec)
    full = weight_qparams(weight, spec)
    together = max(1, IN_CACHE // max(rows.shape[1:].numel(), 1))
    found: list[Tensor] = []
    for part, scale in zip(rows.split(together), full.scale.split(together), strict=True):
        found.append(_least_squares_scale(part, scale, spec))
        if told is not None:
            told()
    return QParams(torch.cat(found).clamp_min(SMALLEST_SCALE), full.zero_point)


def _least_squares_scale(rows: Tensor, full: Tensor, spec: QuantSpec) -> Tensor:
    best, least = full, torch.full_like(full, torch.inf)
    centre = torch.zeros((), dtype=torch.int32, device=full.device)
    for fraction in torch.linspace(1.0, 0.4, 24).tolist():
        candidate = QParams(full * fraction, centre)
        error = (qdq(rows, candidate, spec) - rows).square_().sum(dim=-1, keepdim=True)
        best = torch.where(error < least, candidate.scale, best)
        least = torch.minimum(error, least)
    return best


def quantize_weight(weight: Tensor, qparams: QParams, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(codes, weight_scale) as LayerState stores them. weight: [N, ...]; qparams: [N, groups, 1]."""
    codes = quantize(weight_rows(weight, spec), qparams, spec).flatten(1)
    codes = codes[:, : weight[0].numel()]
    scale = qparams.scale.squeeze(-1)
    scale = scale if spec.granularity == "group" else scale.squeeze(-1)
    return (pack_int4(codes) if spec.bits == 4 else codes.reshape(weight.shape).contiguous()), scale.contiguous()


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes -8..7 [N, K] -> uint8 [N, ceil(K/2)], low nibble first, codes stored +8, padding nibble 8."""
    nibbles = (torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)) + 8).to(torch.uint8)
    return (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).contiguous()


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """Inverse of pack_int4: uint8 [N, ceil(columns/2)] -> int8 codes -8..7 [N, columns]."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :columns]
    return nibbles.to(torch.int8).sub_(8)


def weight_codes(state: LayerState, shape: torch.Size) -> Tensor:
    """Integer codes of a state's weight as int8 in the float layer's `shape`, whatever the storage."""
    if state.weight.dtype == torch.uint8:
        return unpack_int4(state.weight, shape[1:].numel()).reshape(shape)
    return state.weight


def dequantize_weight(state: LayerState, shape: torch.Size) -> Tensor:
    """The weight in the layer's own coordinates: fp32 of the float layer's `shape`; rotation and pre_quant_scale
    undone, low-rank branch added."""
    codes = weight_codes(state, shape)
    scale = state.weight_scale.float()
    if scale.dim() == 2:  # per group
        size = state.scheme.weight.group_size if state.scheme.weight else 0
        scale = scale.repeat_interleave(size, dim=1)[:, : shape[1:].numel()].reshape(shape)
    else:
        scale = per_channel(scale, codes)
    weight = codes.float() * scale
    if state.rotation:
        weight = rotate(weight, hadamard(state.rotation, weight.device), 1)
    if state.pre_quant_scale is not None:
        weight = scale_inputs(weight, state.pre_quant_scale)
    return weight if not state.rank else weight + low_rank_weight(state, shape)


def low_rank_weight(state: LayerState, shape: torch.Size) -> Tensor:
    """What the low-rank branch adds to the weight: fp32 of `shape`."""
    assert state.low_rank_a is not None
    assert state.low_rank_b is not None
    return (state.low_rank_b.float() @ state.low_rank_a.float()).reshape(shape)


def weight_to_quantize(weight: Tensor, state: LayerState) -> Tensor:
    """What the codes of a float weight must stand for, given the state's low-rank branch, pre_quant_scale and
    rotation: ((W - B A) / pre_quant_scale) @ H as fp32 of the same shape. The inverse of `dequantize_weight`."""
    weight = weight.detach().float()
    if state.rank:
        weight = weight - low_rank_weight(state, weight.shape)
    if state.pre_quant_scale is not None:
        weight = scale_inputs(weight, state.pre_quant_scale.reciprocal())
    return rotate(weight, hadamard(state.rotation, weight.device), 1) if state.rotation else weight


def input_to_quantize(x: Tensor, state: LayerState, is_conv: bool) -> Tensor:
    """What becomes integers of a layer's input [..., K] or [B, C, h, w]: scaled and rotated as the state says, then
    fp32; x itself where it says neither."""
    if state.pre_quant_scale is not None:
        x = x.float() * (state.pre_quant_scale.reshape(-1, 1, 1) if is_conv else state.pre_quant_scale)
    return rotate(x.float(), hadamard(state.rotation, x.device), 1 if is_conv else -1) if state.rotation else x


def scale_inputs(weight: Tensor, factors: Tensor) -> Tensor:
    """A weight [N, C/groups, ...] with every input channel multiplied by its factor. factors: [C]."""
    # rows of a convolution's group see that group's channels only: [groups, N/groups, C/groups, ...]
    groups = factors.numel() // weight.shape[1]
    factors = factors.reshape(groups, 1, weight.shape[1], *[1] * (weight.dim() - 2))
    return (weight.unflatten(0, (groups, -1)) * factors).flatten(0, 1)


def hadamard(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Orthonormal Hadamard matrix in natural (Sylvester) order: fp32 [size, size], symmetric, its own inverse.

    size: a power of two.
    """
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


def rotate(x: Tensor, matrix: Tensor, dim: int) -> Tensor:
    """x with every block of b neighbours along `dim` multiplied by `matrix` [b, b] (symmetric); same shape.

    b must divide x.shape[dim]. A channels_last tensor stays one.
    """
    size = matrix.shape[0]
    if dim in (-1, x.dim() - 1):
        return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)
    if x.movedim(dim, -1).is_contiguous():
        return rotate(x.movedim(dim, -1), matrix, -1).movedim(-1, dim)
    return (matrix @ x.flatten(dim + 1).unflatten(dim, (-1, size))).reshape(x.shape)
