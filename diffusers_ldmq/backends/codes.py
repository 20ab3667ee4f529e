"""Passes around integer kernels on CPU: input -> u8 codes, accumulators -> output, codes -> weight, 4 bit -> codes.

Each exists twice, compiled (native.py) and in torch operators, and both give the same numbers. u8 codes are
the signed codes plus 128. A NaN in the input becomes some valid code in a static scheme; in a dynamic one its
row or image gets the scale NaN, and with it the output.
"""

import ctypes
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..affine import per_channel, symmetric_scale, token_qparams, unpack_int4
from ..specs import Geometry, LayerState
from .native import Quantizer, native_status

# Adding 1.5 * 2^23 leaves no fraction bits, so the addition itself rounds half to even (the number is even),
# and the sum's low byte is the integer. One pass instead of round, add, convert.
ROUNDER = 1.5 * 2**23
KINDS = {torch.float32: 0, torch.bfloat16: 1}
PARTS = 16  # an image's maximum is found in so many pieces


class InputStep(Protocol):
    """Turns one layer's input into u8 codes; a convolution's come out channels_last."""

    def static(self, x: Tensor) -> Tensor:
        """Codes with the calibrated scale. x: float [..., K] or [B, C, h, w] -> u8 of that shape."""
        ...

    def dynamic(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(codes, scale: fp32 [..., 1] per row or [B, 1, 1, 1] per image)."""
        ...

    def scaled(self, accumulators: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """accumulators * scale + bias as `dtype`. accumulators: fp32, dense; overwritten."""
        ...

    def weight(self, codes: Tensor, scale: Tensor, dtype: torch.dtype, group: Tensor | None = None) -> Tensor:
        """Float weight of int8 codes [N, K] or channels_last [N, C, kh, kw] (strides are kept) and fp32 scale [N], or
        [N, groups] with `group`, int32 [K]: which of them each column has, columns as they lie in memory."""
        ...

    def unpacked(self, packed: Tensor, geometry: Geometry, transposed: bool = False) -> Tensor:
        """int8 codes [N, K] (or [K, N]) of 4-bit ones as LayerState packs them: uint8 [N, ceil(K/2)]. K runs over
        [kh, kw, C], the order of channels_last."""
        ...


def input_step(state: LayerState, geometry: Geometry) -> InputStep:
    """The compiled step if it could be built, else the one in torch operators."""
    library = native_status().library
    return TorchStep(state, geometry) if library is None else NativeStep(state, geometry, library)


def in_channels_last(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """[N, kh*kw*C] as a channels_last view [N, C, kh, kw] of this `shape`."""
    return rows.reshape(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)


def _sizes(geometry: Geometry, transposed: bool) -> tuple[int, int]:
    rows, columns = geometry.shape[0], geometry.columns
    return (columns, rows) if transposed else (rows, columns)


class TorchStep:
    """InputStep in torch operators."""

    def __init__(self, state: LayerState, geometry: Geometry) -> None:
        self.is_conv = geometry.is_conv
        self.spec = state.scheme.activation
        self.pre = state.pre_quant_scale
        if self.pre is not None:
            self.pre = self.pre.float().reshape(-1, 1, 1) if self.is_conv else self.pre.float()
        self.zero = 128
        if state.input_scale is not None and state.input_zero_point is not None and self.spec is not None:
            self.reciprocal = state.input_scale.float().reciprocal().item()
            zero_point = int(state.input_zero_point)
            self.zero = zero_point + 128
            self.low, self.high = float(self.spec.qmin - zero_point), float(self.spec.qmax - zero_point)

    def static(self, x: Tensor) -> Tensor:
        x = self._arranged(x)
        scaled = x * self.reciprocal if x.dtype == torch.float32 else x.float().mul_(self.reciprocal)
        return self._codes(scaled, self.low, self.high)

    def dynamic(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.spec is not None
        x = self._arranged(x)
        scale = token_qparams(x, self.spec, self.is_conv).scale
        return self._codes(x.float() * scale.reciprocal(), float(self.spec.qmin), float(self.spec.qmax)), scale

    def scaled(self, accumulators: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        out = accumulators.mul_(scale)
        if bias is not None:
            out = out.add_(bias.reshape(-1, 1, 1) if self.is_conv else bias)
        return out.to(dtype)

    def weight(self, codes: Tensor, scale: Tensor, dtype: torch.dtype, group: Tensor | None = None) -> Tensor:
        if group is None:
            return codes.to(torch.float32).mul_(per_channel(scale, codes)).to(dtype)
        factors = scale.index_select(1, group)
        if self.is_conv:
            factors = in_channels_last(factors, codes.shape)
        return codes.to(torch.float32).mul_(factors).to(dtype)

    def unpacked(self, packed: Tensor, geometry: Geometry, transposed: bool = False) -> Tensor:
        codes = unpack_int4(packed, geometry.columns).reshape(*geometry.shape[:2], -1)
        return (codes.permute(2, 1, 0) if transposed else codes.mT).reshape(_sizes(geometry, transposed))

    def _arranged(self, x: Tensor) -> Tensor:
        if self.is_conv:
            x = x.contiguous(memory_format=torch.channels_last)
        return x if self.pre is None else x.float() * self.pre

    def _codes(self, scaled: Tensor, low: float, high: float) -> Tensor:
        rounded = scaled.clamp_(low, high).add_(ROUNDER)
        return rounded.view(torch.int32).to(torch.uint8).add_(self.zero)


class NativeStep:
    """InputStep in C."""

    def __init__(self, state: LayerState, geometry: Geometry, library: ctypes.CDLL) -> None:
        self.library, self.is_conv, self.columns = library, geometry.is_conv, geometry.in_channels
        self.pre = None if state.pre_quant_scale is None else state.pre_quant_scale.float().contiguous()
        spec = self.spec = state.scheme.activation
        if spec is None:
            return
        reciprocal, zero = 0.0, 128
        if state.input_scale is not None and state.input_zero_point is not None:
            reciprocal = state.input_scale.float().reciprocal().item()
            zero += int(state.input_zero_point)
        pre = None if self.pre is None else self.pre.data_ptr()
        self.highest = float(spec.qmax)
        self.quantizer = Quantizer(pre, reciprocal, zero, spec.qmin + 128, spec.qmax + 128, self.columns)
        self.constants = ctypes.addressof(self.quantizer)

    def static(self, x: Tensor) -> Tensor:
        return self._codes(x, None)

    def dynamic(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_conv:
            scale = self._image_scale(x)
            return self._codes(x, scale), scale
        kind = KINDS.get(x.dtype)
        x = x.contiguous() if kind is not None else x.float().contiguous()
        out = torch.empty(x.shape, dtype=torch.uint8)
        scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32)
        self.library.ldmq_quantize_tokens(
            self.constants, x.data_ptr(), kind or 0, out.data_ptr(), scale.numel(), scale.data_ptr(),
            self.highest, torch.get_num_threads(),
        )  # fmt: skip
        return out, scale

    def scaled(self, accumulators: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        kind = KINDS.get(dtype, 0)
        out = accumulators if kind == 0 else torch.empty_like(accumulators, dtype=dtype)
        columns = accumulators.shape[1 if self.is_conv else -1]
        rows = accumulators.numel() // columns if columns else 0
        self.library.ldmq_scale_rows(
            accumulators.data_ptr(), out.data_ptr(), kind, rows, columns, scale.data_ptr(),
            rows // scale.numel() if scale.numel() else 1, None if bias is None else bias.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out.to(dtype)

    def weight(self, codes: Tensor, scale: Tensor, dtype: torch.dtype, group: Tensor | None = None) -> Tensor:
        out = torch.empty_like(codes, dtype=dtype if dtype in KINDS else torch.float32)
        rows = codes.shape[0]
        self.library.ldmq_dequantize_rows(
            codes.data_ptr(), out.data_ptr(), KINDS[out.dtype], rows, codes.numel() // rows, scale.data_ptr(),
            scale.numel() // rows, None if group is None else group.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out.to(dtype)

    def unpacked(self, packed: Tensor, geometry: Geometry, transposed: bool = False) -> Tensor:
        out = torch.empty(_sizes(geometry, transposed), dtype=torch.int8)
        rows, channels = geometry.shape[:2]
        unpack = self.library.ldmq_unpack_columns if transposed else self.library.ldmq_unpack_rows
        unpack(
            packed.contiguous().data_ptr(), out.data_ptr(), rows, channels, geometry.columns // channels,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def _codes(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """scale: None = the static one, else fp32, one per image."""
        kind = KINDS.get(x.dtype)
        if kind is None:
            x, kind = x.float(), 0
        factors = None if scale is None else scale.data_ptr()
        threads = torch.get_num_threads()
        if not self.is_conv:
            x = x.contiguous()
            out = torch.empty(x.shape, dtype=torch.uint8)
            rows = x.numel() // self.columns
            self.library.ldmq_quantize_rows(
                self.constants, x.data_ptr(), kind, out.data_ptr(), rows, factors, 1, threads
            )
            return out
        images, _, height, width = x.shape
        out = torch.empty(x.shape, dtype=torch.uint8, memory_format=torch.channels_last)
        pixels = height * width
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        if not channels_last and x.is_contiguous():
            self.library.ldmq_quantize_planes(
                self.constants, x.data_ptr(), kind, out.data_ptr(), images, pixels, factors, threads
            )
            return out
        x = x if channels_last else x.contiguous(memory_format=torch.channels_last)
        self.library.ldmq_quantize_rows(
            self.constants, x.data_ptr(), kind, out.data_ptr(), images * pixels, factors, pixels, threads
        )
        return out

    def _image_scale(self, x: Tensor) -> Tensor:
        """x: [B, C, h, w] -> fp32 [B, 1, 1, 1]."""
        assert self.spec is not None
        kind = KINDS.get(x.dtype)
        dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
        if self.pre is not None or kind is None or not dense:
            smoothed = x.float() if self.pre is None else x.float() * self.pre.reshape(-1, 1, 1)
            return token_qparams(smoothed, self.spec, True).scale
        partial = torch.empty(x.shape[0], PARTS, 1, 1, dtype=torch.float32)
        self.library.ldmq_absmax(
            x.data_ptr(), kind, x.shape[0], x[0].numel() if x.shape[0] else 0, partial.data_ptr(), PARTS,
            torch.get_num_threads(),
        )  # fmt: skip
        return symmetric_scale(partial.amax(dim=1, keepdim=True), self.spec)
