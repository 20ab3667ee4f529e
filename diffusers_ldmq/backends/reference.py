"""Plain torch operators in floating point: slow, runs everywhere, and the oracle of every fast backend.

Integer schemes multiply integer codes held as fp32, which is exact while every partial sum stays below 2^24.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from ..affine import QParams, dequantize_weight, input_to_quantize, quantize, token_qparams, weight_codes
from ..specs import Geometry, LayerState
from .contract import Backend


class PlainLayer(NamedTuple):
    """A state as it is (4-bit codes stay packed in memory) with its layer's geometry."""

    state: LayerState
    geometry: Geometry


class Reference(Backend):
    """Runs every scheme on every device that torch knows."""

    name = "reference"
    priority = 0

    def refusal(self, state: LayerState, geometry: Geometry, device: torch.device) -> str | None:
        return None

    def pack(self, state: LayerState, geometry: Geometry, low_memory: bool = False) -> PlainLayer:
        return PlainLayer(state, geometry)

    def unpack(self, packed: PlainLayer) -> Tensor:
        return packed.state.weight

    def run(self, x: Tensor, packed: PlainLayer) -> Tensor:
        return arranged(_output(x, *packed), packed.geometry.is_conv)


def _output(x: Tensor, state: LayerState, geometry: Geometry) -> Tensor:
    if not state.scheme.is_integer:
        weight = dequantize_weight(state, torch.Size(geometry.shape)).to(x.dtype)
        return dense(x, weight, None if state.bias is None else state.bias.to(x.dtype), geometry)
    out = integer_output(x, state, geometry)
    if state.low_rank_a is not None and state.low_rank_b is not None:
        out += low_rank_output(x.float(), state.low_rank_a.float(), state.low_rank_b.float(), geometry)
    if state.bias is not None:
        out += output_vector(state.bias.float(), geometry)
    return out.to(x.dtype)


def arranged(out: Tensor, is_conv: bool) -> Tensor:
    """The same values in the strides that a layer's output always has: a Conv2d's is channels_last."""
    batched = is_conv and out.dim() == 4
    return out.contiguous(memory_format=torch.channels_last if batched else torch.contiguous_format)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Linear or Conv2d of this geometry in floating point."""
    if not geometry.is_conv:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)


def low_rank_output(x: Tensor, a: Tensor, b: Tensor, geometry: Geometry) -> Tensor:
    """(x A^T) B^T, for a convolution one with r outputs and then a 1x1 one. a: [r, K], b: [N, r], all of x's dtype."""
    first = dense(x, a.reshape(-1, *geometry.shape[1:]), None, geometry)
    return F.conv2d(first, b[:, :, None, None]) if geometry.is_conv else F.linear(first, b)


def dense_gradient(grad: Tensor, weight: Tensor, shape: torch.Size, geometry: Geometry) -> Tensor:
    """Gradient of `dense` with respect to its input of this `shape`, arranged like an output."""
    if not geometry.is_conv:
        return arranged(grad @ weight, is_conv=False)
    g = geometry
    found = conv2d_input(shape, weight, grad, g.stride, g.padding, g.dilation, g.groups)  # pyright: ignore
    return arranged(found, is_conv=True)


def output_vector(value: Tensor, geometry: Geometry) -> Tensor:
    """A vector over output channels [N] shaped to broadcast against the output."""
    return value.reshape(-1, 1, 1) if geometry.is_conv else value


def integer_output(x: Tensor, state: LayerState, geometry: Geometry) -> Tensor:
    """Scaled integer accumulators, without bias, in fp32. x: [..., K] or [B, C, h, w], any float dtype."""
    assert state.scheme.activation is not None
    x = input_to_quantize(x, state, geometry.is_conv)
    qparams = input_qparams(x, state, geometry)
    codes = quantize(x, qparams, state.scheme.activation).float().sub_(qparams.zero_point)
    weight = weight_codes(state, torch.Size(geometry.shape)).float()
    accumulators = dense(codes, weight, None, geometry)
    return accumulators.mul_(qparams.scale).mul_(output_vector(state.weight_scale, geometry))


def input_qparams(x: Tensor, state: LayerState, geometry: Geometry) -> QParams:
    """The calibrated QParams of a static scheme (scalars), or those of each row or image of x."""
    assert state.scheme.activation is not None
    if state.input_scale is None or state.input_zero_point is None:
        return token_qparams(x, state.scheme.activation, geometry.is_conv)
    return QParams(state.input_scale, state.input_zero_point)
