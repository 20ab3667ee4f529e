"""Integer Linear and Conv2d on CPU through torch's oneDNN operators.

Activations are u8 (signed codes + 128): with s8 ones oneDNN falls back to its slow reference code. Zero
points cost nothing there and padding is exact with any of them. Only the packed weight lives on.

4-bit weights become int8 codes -8..7 when they are packed and are like 8-bit ones from then on. With low_memory they
stay 4 bit and become codes in every call. Prepacking those takes longer than the call itself (7 ns a weight), so they
go in plain order to the linear kernel, which is as fast with that; convolutions do so over patches of their input.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..affine import hadamard, pack_int4, rotate
from ..specs import Geometry, LayerState
from .codes import InputStep, in_channels_last, input_step
from .contract import Backend
from .cpu import has_vnni
from .patches import output_pixels, patches
from .reference import dense, low_rank_output

_OPERATORS = ("qlinear_pointwise", "qlinear_prepack", "qconv2d_pointwise", "qconv_prepack")
_OUTPUTS = (torch.float32, torch.bfloat16)  # fp16 works for linears only
_MANY_PIXELS = 16
"""Pixels per output channel from which on prepacking in every call is little beside the convolution, and patches much
memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Surroundings:
    """What a corrected layer does around its integers. pre: fp32, shaped to broadcast against the input.

    matrix: Hadamard, fp32 [b, b]; a, b: the low-rank branch, compute dtype [r, K] and [N, r].
    """

    is_conv: bool
    pre: Tensor | None
    matrix: Tensor | None
    a: Tensor | None
    b: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class IntegerLayer:
    """A layer in oneDNN's form. weight: its packed (opaque) tensor, empty in a FourBitLayer; zero_point: in the u8
    domain."""

    geometry: Geometry
    around: Surroundings
    step: InputStep
    bits: int
    weight: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    bias: Tensor | None
    scale: float
    zero_point: int
    is_dynamic: bool
    as_linear: bool  # a 1x1 convolution is a Linear over pixels
    in_patches: bool = False  # as any convolution is over patches


@dataclass(frozen=True, slots=True, eq=False)
class CodesLayer:
    """A weight-only layer: plain int8 codes (a convolution's in channels_last), made float in every call.

    group: int32 [K], which of its row's scales each code has, as they lie in memory; None where there is one.
    """

    geometry: Geometry
    around: Surroundings
    step: InputStep
    bits: int
    codes: Tensor
    weight_scale: Tensor
    group: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class FourBitLayer:
    """A layer that takes as little memory as its file: codes uint8 [N, ceil(K/2)], and all else of it in `layer`."""

    codes: Tensor
    layer: IntegerLayer | CodesLayer


Packed = IntegerLayer | CodesLayer | FourBitLayer


class CpuOneDNN(Backend):
    """Schemes with integer activations run integer kernels; for the others the weight is made float for the duration of
    a call."""

    name = "cpu_onednn"
    priority = 10

    def refusal(self, state: LayerState, geometry: Geometry, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on CPU, not on {device.type}"
        if not state.scheme.is_integer:
            return None
        missing = [name for name in _OPERATORS if not hasattr(torch.ops.onednn, name)]
        if missing or not torch.backends.mkldnn.is_available():
            return f"this build of torch lacks torch.ops.onednn.{missing[0] if missing else '*'}"
        if not has_vnni():
            return "this CPU has no VNNI: u8 x s8 products would saturate in int16"
        return None

    def pack(self, state: LayerState, geometry: Geometry, low_memory: bool = False) -> Packed:
        layer = _weightless(state, geometry)
        if layer.bits == 8:
            return _filled(layer, state.weight)
        if low_memory:
            # a copy: the original may be part of a mapped file, which it would keep in memory
            return FourBitLayer(state.weight.clone(), layer)
        return _filled(layer, _unpacked(state.weight, layer))

    def unpack(self, packed: Packed) -> Tensor:
        if isinstance(packed, FourBitLayer):
            return packed.codes
        if isinstance(packed, CodesLayer):
            codes = packed.codes.contiguous()
        else:
            codes = packed.weight.to_dense()
            if packed.as_linear or not packed.geometry.is_conv:
                codes = codes.t()  # qlinear_prepack holds [K, N]
            codes = codes.reshape(packed.geometry.shape).contiguous()
        return pack_int4(codes.flatten(1)) if packed.bits == 4 else codes

    def run(self, x: Tensor, packed: Packed) -> Tensor:
        layer = packed.layer if isinstance(packed, FourBitLayer) else packed
        if isinstance(layer, IntegerLayer):
            _check_input(x, layer.geometry)
        if isinstance(packed, FourBitLayer):
            layer = _for_this_call(packed, x)
        around = layer.around
        if isinstance(layer, CodesLayer):
            out = _weight_only(x, layer)
        else:
            out = _integer(_turned(x, around), layer, x.dtype if x.dtype in _OUTPUTS else torch.float32)
            out = out if out.dtype == x.dtype else out.to(x.dtype)
        if around.a is None or around.b is None:
            return out
        return out.add_(low_rank_output(x, around.a.to(x.dtype), around.b.to(x.dtype), layer.geometry))


def _weightless(state: LayerState, geometry: Geometry) -> IntegerLayer | CodesLayer:
    """All of a layer but its codes."""
    assert state.scheme.weight is not None
    around, bits, nothing = _surroundings(state, geometry), state.scheme.weight.bits, torch.empty(0)
    bias = None if state.bias is None else state.bias.float().contiguous()
    # the quantize step multiplies by pre_quant_scale itself, unless something comes between the two
    given = state if around.pre is None else replace(state, pre_quant_scale=None)
    scale, step = state.weight_scale.contiguous(), input_step(given, geometry)
    if not state.scheme.is_integer:
        group = _group_of_columns(state.scheme.weight.group_size, geometry)
        return CodesLayer(geometry, around, step, bits, nothing, scale, group, bias)
    zero_point = 0 if state.input_zero_point is None else int(state.input_zero_point)
    return IntegerLayer(
        geometry=geometry,
        around=around,
        step=step,
        bits=bits,
        weight=nothing,
        weight_scale=scale,
        weight_zero=torch.zeros_like(scale, dtype=torch.int32),
        bias=bias,
        scale=1.0 if state.input_scale is None else float(state.input_scale),
        zero_point=zero_point + 128,
        is_dynamic=state.scheme.is_dynamic,
        as_linear=geometry.is_conv and _is_pointwise(geometry),
    )


def _filled(layer: IntegerLayer | CodesLayer, codes: Tensor) -> IntegerLayer | CodesLayer:
    """The layer with int8 codes of its own, in the order that its kernels want."""
    if isinstance(layer, IntegerLayer):
        return replace(layer, weight=_packed_weight(codes, layer.geometry, layer.as_linear))
    layout = torch.channels_last if layer.geometry.is_conv else torch.contiguous_format
    return replace(layer, codes=codes.clone(memory_format=layout))


def _unpacked(packed: Tensor, layer: IntegerLayer | CodesLayer) -> Tensor:
    """4-bit codes as int8 of the layer's shape, a convolution's in channels_last."""
    codes = layer.step.unpacked(packed, layer.geometry)
    return in_channels_last(codes, layer.geometry.shape) if layer.geometry.is_conv else codes


def _for_this_call(packed: FourBitLayer, x: Tensor) -> IntegerLayer | CodesLayer:
    """The layer with codes that live no longer than the call."""
    layer, geometry = packed.layer, packed.layer.geometry
    if isinstance(layer, CodesLayer):
        return replace(layer, codes=_unpacked(packed.codes, layer))
    is_linear = layer.as_linear or not geometry.is_conv
    if not is_linear and (geometry.groups > 1 or output_pixels(x, geometry) > _MANY_PIXELS * geometry.shape[0]):
        return _filled(layer, _unpacked(packed.codes, layer))
    plain = layer.step.unpacked(packed.codes, geometry, transposed=True).to_mkldnn()
    return replace(layer, weight=plain, in_patches=not is_linear)


def _group_of_columns(size: int, geometry: Geometry) -> Tensor | None:
    """Group of every column of a row, columns in the order of channels_last; None without groups."""
    if not size:
        return None
    group = torch.arange(geometry.columns, dtype=torch.int32) // size
    return group.reshape(geometry.shape[1], -1).t().flatten()


def _surroundings(state: LayerState, geometry: Geometry) -> Surroundings:
    matrix = hadamard(state.rotation, state.weight.device) if state.rotation else None
    pre = state.pre_quant_scale if matrix is not None or not state.scheme.is_integer else None
    if pre is not None and geometry.is_conv:
        pre = pre.reshape(-1, 1, 1)
    return Surroundings(geometry.is_conv, pre, matrix, state.low_rank_a, state.low_rank_b)


def _turned(x: Tensor, around: Surroundings) -> Tensor:
    """x scaled, in its own dtype, and rotated, which makes it fp32."""
    if around.matrix is None:
        return x if around.pre is None else x * around.pre.to(x.dtype)
    x = x.float() if around.pre is None else x.float() * around.pre
    return rotate(x, around.matrix, 1 if around.is_conv else -1)


def _integer(x: Tensor, layer: IntegerLayer, dtype: torch.dtype) -> Tensor:
    """Output of the integer kernels, with bias, as `dtype`."""
    if not layer.is_dynamic:
        return _multiply(layer.step.static(x), layer, dtype, layer.bias)
    codes, scale = layer.step.dynamic(x)
    return layer.step.scaled(_multiply(codes, layer, torch.float32, None), scale, layer.bias, dtype)


def _multiply(codes: Tensor, layer: IntegerLayer, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """u8 codes through the integer kernel, scales applied. codes: [..., K] or channels_last [B, C, h, w]."""
    weight = (layer.weight, layer.weight_scale, layer.weight_zero, bias)
    tail = (1.0, 0, dtype, "none", [], "")
    if layer.as_linear or layer.in_patches:
        pixels = codes.permute(0, 2, 3, 1)
        if layer.in_patches:
            pixels = patches(codes, layer.geometry, layer.zero_point)
        out = torch.ops.onednn.qlinear_pointwise(pixels, layer.scale, layer.zero_point, *weight, *tail)
        # of no images the operator makes two dimensions
        return out.reshape(*pixels.shape[:3], layer.geometry.shape[0]).permute(0, 3, 1, 2)
    if not layer.geometry.is_conv:
        return torch.ops.onednn.qlinear_pointwise(codes, layer.scale, layer.zero_point, *weight, *tail)
    g = layer.geometry
    walk = (g.stride, g.padding, g.dilation, g.groups)
    return torch.ops.onednn.qconv2d_pointwise(codes, layer.scale, layer.zero_point, *weight, *walk, *tail)


def _packed_weight(weight: Tensor, geometry: Geometry, as_linear: bool) -> Tensor:
    if as_linear or not geometry.is_conv:
        # prepacking ignores strides
        return torch.ops.onednn.qlinear_prepack(weight.reshape(geometry.shape[0], -1).contiguous(), None)
    walk = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    ones = torch.ones(geometry.shape[0])
    return torch.ops.onednn.qconv_prepack(weight.contiguous(), ones, 1.0, 128, *walk, None)


def _weight_only(x: Tensor, layer: CodesLayer) -> Tensor:
    weight = layer.step.weight(layer.codes, layer.weight_scale, x.dtype, layer.group)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return dense(_turned(x, layer.around).to(x.dtype), weight, bias, layer.geometry)


def _is_pointwise(geometry: Geometry) -> bool:
    plain = geometry.stride == (1, 1) and geometry.padding == (0, 0) and geometry.groups == 1
    return plain and geometry.shape[2:] == (1, 1)


def _check_input(x: Tensor, geometry: Geometry) -> None:
    """The compiled step reads raw memory: nothing but the right shape may reach it."""
    if geometry.is_conv and x.dim() != 4:
        raise RuntimeError(f"a quantized convolution expects [B, C, h, w]; found shape {list(x.shape)}")
    channels = x.shape[1 if geometry.is_conv else -1]
    if channels != geometry.in_channels:
        raise RuntimeError(f"expected {geometry.in_channels} input channels; found shape {list(x.shape)}")
