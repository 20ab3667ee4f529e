"""Our integers as layouts of comfy-kitchen's QuantizedTensor, which is how ComfyUI moves, patches and counts them.

A weight of ours is more than codes and scales: the codes may stand for a smoothed or rotated weight, or for what a
low-rank branch leaves of it. So the parameters carry all of that, and `dequantize` gives the weight in the layer's own
coordinates, which is what a LoRA is added to.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_kitchen.tensor import BaseLayoutParams, QuantizedLayout, QuantizedTensor, register_layout_class
from torch import Tensor

from diffusers_ldmq.affine import QParams, dequantize_weight, quantize_weight, weight_to_quantize
from diffusers_ldmq.calibration import weight_scales
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.specs import LayerState, Scheme, parse_scheme

EXTRAS = ("pre_quant_scale", "low_rank_a", "low_rank_b")
"""Tensors of a LayerState that change what its codes stand for."""


@dataclass(frozen=True)
class LDMQParams(BaseLayoutParams):
    """scale: fp32 [N] or [N, groups]; orig_dtype, orig_shape: of the float weight; group_size: inputs that share a
    scale, 0 = all of a row; patched: it was requantized from floats, as with a LoRA in it, so that it is not what its
    layer was calibrated with; the rest as in LayerState."""

    group_size: int = 0
    pre_quant_scale: Tensor | None = None
    rotation: int = 0
    low_rank_a: Tensor | None = None
    low_rank_b: Tensor | None = None
    patched: bool = False

    def _tensor_fields(self) -> list[str]:
        return ["scale", *(name for name in EXTRAS if getattr(self, name) is not None)]


class LDMQLayout(QuantizedLayout):
    """What the two layouts share. `bits` is theirs."""

    Params = LDMQParams
    bits: int

    @classmethod
    def scheme(cls, group_size: int) -> Scheme:
        """The weight-only scheme of these integers."""
        return parse_scheme(f"w{cls.bits}a16" + (f"-g{group_size}" if group_size else ""))

    @classmethod
    def quantize(cls, tensor: Tensor, scale: Any = None, **options: Any) -> tuple[Tensor, LDMQParams]:
        """(codes, parameters) of a float weight [N, K] or [N, C/groups, kh, kw].

        scale: fp32 as in LDMQParams; anything else = found from the weight. options: fields of LDMQParams; ComfyUI's
        own (stochastic_rounding, inplace_ops) are ignored, for rounding is to nearest. Raises CalibrationError for NaN.
        """
        known = {name: value for name, value in options.items() if name in ("group_size", "rotation", *EXTRAS)}
        params = LDMQParams(torch.empty(0), tensor.dtype, tuple(tensor.shape), **known)
        spec = cls.scheme(params.group_size).weight
        assert spec is not None
        weight = weight_to_quantize(tensor, cls._state(torch.empty(0), params))
        if isinstance(scale, Tensor):
            grouped = scale.reshape(weight.shape[0], -1, 1).float()
            qparams = QParams(grouped, torch.zeros_like(grouped, dtype=torch.int32))
        else:
            qparams = weight_scales(weight, spec)
        codes, found = quantize_weight(weight, qparams, spec)
        return codes, replace(params, scale=found)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: LDMQParams) -> Tensor:
        """The weight in the layer's own coordinates: params.orig_dtype, params.orig_shape."""
        return dequantize_weight(cls._state(qdata, params), torch.Size(params.orig_shape)).to(params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: QuantizedTensor) -> tuple[Tensor, ...]:
        """(codes, scale)."""
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: LDMQParams) -> dict[str, Tensor]:
        """Every tensor, by what its name adds to the weight's."""
        extras = {f"_{name}": getattr(params, name) for name in EXTRAS if getattr(params, name) is not None}
        return {"": qdata, "_scale": params.scale, **extras}

    @classmethod
    def requantize_kwargs(cls, qtensor: QuantizedTensor) -> dict[str, Any]:
        """What requantizing must keep."""
        return {name: getattr(qtensor._params, name) for name in ("group_size", "rotation", *EXTRAS)}

    @classmethod
    def _state(cls, qdata: Tensor, params: LDMQParams) -> LayerState:
        extras = {name: getattr(params, name) for name in EXTRAS}
        return LayerState(cls.scheme(params.group_size), qdata, params.scale, rotation=params.rotation, **extras)


class LDMQInt8Layout(LDMQLayout):
    """int8 codes in the weight's own shape."""

    bits = 8


class LDMQInt4Layout(LDMQLayout):
    """uint8 [N, ceil(K/2)]: two codes a byte of the flattened rows, low nibble first."""

    bits = 4


LAYOUTS = {8: LDMQInt8Layout, 4: LDMQInt4Layout}
for _layout in LAYOUTS.values():
    register_layout_class(_layout.__name__, _layout)


def wrap(
    state: LayerState, shape: tuple[int, ...], dtype: torch.dtype, qdata: Tensor | None = None, patched: bool = False
) -> QuantizedTensor:
    """A state's weight as ComfyUI sees it, sharing its tensors. shape, dtype: of the float weight; qdata: another
    tensor of codes instead of the state's; patched: as in LDMQParams."""
    assert state.scheme.weight is not None
    extras: dict[str, Any] = {name: getattr(state, name) for name in EXTRAS}
    group = state.scheme.weight.group_size
    extras |= {"group_size": group, "rotation": state.rotation, "patched": patched}
    params = LDMQParams(state.weight_scale, dtype, tuple(shape), **extras)
    return QuantizedTensor(state.weight if qdata is None else qdata, LAYOUTS[state.scheme.weight.bits].__name__, params)


def bits_of(weight: Tensor) -> int | None:
    """Bits of a weight in one of our layouts; None for every other tensor."""
    if not isinstance(weight, QuantizedTensor):
        return None
    return next((bits for bits, layout in LAYOUTS.items() if weight._layout_cls == layout.__name__), None)


def requantized(weight: Tensor, like: QuantizedTensor, bits: int) -> QuantizedTensor:
    """A float weight in the layout of `bits`, standing for the same coordinates as `like`, marked as patched.

    Raises LDMQError if the shapes differ, CalibrationError for NaN or Inf.
    """
    if tuple(weight.shape) != tuple(like.shape):
        raise LDMQError(f"a weight of shape {list(weight.shape)} was given to a layer of shape {list(like.shape)}")
    options = LDMQLayout.requantize_kwargs(like)
    options = options if bits == 4 else options | {"group_size": 0}
    moved = {name: value.to(weight.device) for name, value in options.items() if isinstance(value, Tensor)}
    codes, params = LAYOUTS[bits].quantize(weight, **(options | moved))
    return QuantizedTensor(codes, LAYOUTS[bits].__name__, replace(params, orig_dtype=like.dtype, patched=True))
