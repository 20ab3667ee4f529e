"""One adapter layer of peft's: its adapters fused into the quantized layer that it wraps, and taken out bit for bit.

At 8 bits the weight is dequantized, peft adds the adapters, and the sum is quantized again. Below 8 bits that would
erase them, because what they add is smaller than half a step, so they run beside the integers in the layer's low-rank
branch. What a layer held before is kept on its adapter layer until it is unfused, or until diffusers unloads the
adapters, which drops the adapter layer and leaves the base layer as it is, fused; it takes the memory of the original
codes meanwhile. peft is imported where it is needed: without it no model has adapter layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .affine import dequantize_weight, quantize_weight, weight_to_quantize
from .bound import Bound
from .calibration import weight_scales
from .errors import LDMQError
from .layers import QuantizedLayer, quantize_layer
from .quantized_layer import CAST
from .specs import Geometry, LayerState

Held = LayerState | dict[str, Tensor]
"""What a base layer holds: the state of a quantized one, the parameters of a float one by name."""
KEPT = "_ldmq_unfused"
"""Attribute of an adapter layer with fused adapters: what its base layer held before (Unfused)."""


FUSED = "_ldmq_fused"
"""Attribute, True, of a base layer that holds adapters; it stays when its adapter layer is dropped."""


@dataclass(frozen=True, slots=True, eq=False)
class Unfused:
    """What a base layer held before its first adapter was fused (a float layer: its parameters by name), the scale
    that each adapter was fused with, and whether that held adapters already, of an adapter layer that was dropped."""

    held: Held
    scales: dict[str, float]
    is_fused: bool = False


def is_fused(model: nn.Module) -> bool:
    """True if some layer of the model holds adapters, so that it is another model than was quantized."""
    return any(getattr(module, FUSED, False) for module in model.modules())


def is_fusible(layer: Any) -> bool:
    """True for LoRA and its kin around a Linear or Conv2d, float ones too, so that unfusing restores all of the model.
    Raises LDMQError for what cannot be fused into a quantized layer: other adapters, and one kind around another."""
    base = layer.get_base_layer()
    if not is_quantized(base):
        return base is layer.base_layer and isinstance(base, (nn.Linear, nn.Conv2d)) and hasattr(layer, "scaling")
    if base is not layer.base_layer:
        raise LDMQError("it carries adapters of two kinds; fuse the first and unload it before loading the second")
    if not hasattr(layer, "scaling"):
        raise LDMQError(f"{kind_of(layer)} adapters cannot be fused into integers; leave them attached")
    return True


def is_quantized(layer: nn.Module) -> bool:
    """True for a layer that holds integers."""
    return isinstance(layer, QuantizedLayer) and not layer.scheme.is_float


def kind_of(layer: Any) -> str:
    """peft's name of the kind of adapter: 'lora', 'lokr', ..."""
    return type(layer).__module__.split(".")[-2]


def held_by(base: Any) -> Held:
    """What a layer holds. Raises LDMQError if that is somewhere else, offloaded."""
    if any(tensor.is_meta for tensor in base.parameters()):
        raise LDMQError("its weights are offloaded; call pipe.remove_all_hooks(), fuse, and enable offloading again")
    if is_quantized(base):
        return base.state()
    return {name: value.detach().clone() for name, value in base.named_parameters(recurse=False)}


def to_fuse(layer: Any, adapter_names: list[str] | None) -> list[str]:
    """Which of the adapters asked for this layer has and holds unfused."""
    from peft.tuners.tuners_utils import check_adapters_to_merge

    available = layer._all_available_adapter_names()
    return [name for name in check_adapters_to_merge(layer, adapter_names) if name in available]


def fuse(layer: Any, now: Held, scales: dict[str, float], safe: bool, dtype: torch.dtype) -> None:
    """Put adapters that are not fused yet into the base layer of one adapter layer.

    now: what the base layer holds; scales: of these adapters, by name; dtype: of a low-rank branch where the base layer
    has no floating tensor. Raises LDMQError, ValueError or RuntimeError (peft's own) if they cannot be merged.
    """
    kept = vars(layer).get(KEPT) or Unfused(now, {}, getattr(layer.base_layer, FUSED, False))
    if isinstance(now, LayerState):
        # from the original codes, unless an adapter in them was deleted meanwhile
        intact = kept.scales.keys() <= set(layer._all_available_adapter_names())
        start, adapters = (kept.held, kept.scales | scales) if intact else (now, scales)
        assert isinstance(start, LayerState)
        layer.base_layer.load_state(_fused(layer, start, adapters, dtype))
    else:
        with _lent(layer, layer.base_layer, scales):
            layer.merge(safe_merge=safe, adapter_names=list(scales))
    layer.merged_adapters = [*layer.merged_adapters, *scales]
    _keep(layer, replace(kept, scales=kept.scales | scales))


def unfuse(layer: Any) -> None:
    """Give the base layer back what it held before the first adapter was fused, bit for bit."""
    with torch.inference_mode(False), torch.no_grad():
        restore(layer, vars(layer)[KEPT].held, None)


def restore(layer: Any, held: Held, kept: Unfused | None) -> None:
    """Put `held` into the base layer; kept: what the adapter layer is to remember, None = nothing is fused."""
    _put_back(layer.base_layer, held)
    layer.merged_adapters = list(kept.scales) if kept else []
    _keep(layer, kept)


def _keep(layer: Any, kept: Unfused | None) -> None:
    """Make the adapter layer remember, and undo fusing by remembering: diffusers' pipelines, peft, and the forward of
    a layer whose adapters were disabled all call its `unmerge`."""
    before = vars(layer).pop(KEPT, None)
    vars(layer).pop("unmerge", None)
    if kept is not None:
        vars(layer).update({KEPT: kept, "unmerge": Bound(unfuse, layer)})
    if kept is not None or before is not None:
        vars(layer.base_layer)[FUSED] = kept is not None or before.is_fused


def _fused(layer: Any, start: LayerState, adapters: dict[str, float], dtype: torch.dtype) -> LayerState:
    """The state of the base layer that started as `start`, with adapters of these scales in it."""
    start = start.to(layer.base_layer.weight.device)  # it may have moved since its state was kept
    dense: Any = quantize_layer(layer.base_layer, start).dequantize(torch.float32)
    if start.bias is not None:
        dense.bias = nn.Parameter(start.bias.clone(), requires_grad=False)  # peft adds in place
    with _lent(layer, dense, adapters):
        layer.merge(adapter_names=list(adapters))
    for tensor in (dense.weight, dense.bias):
        if tensor is not None and not torch.isfinite(tensor).all():
            raise LDMQError(f"NaN or Inf in the sum with {', '.join(adapters)}; the adapter file is damaged")
    bias = None if start.bias is None else dense.bias.detach().to(start.bias.dtype)
    spec = start.scheme.weight
    assert spec is not None
    if spec.bits < 8:
        a, b = _beside(layer, start, adapters, layer.base_layer.geometry, dtype)
        return replace(start, bias=bias, low_rank_a=a, low_rank_b=b)
    weight = weight_to_quantize(dense.weight, start)
    codes, scale = quantize_weight(weight, weight_scales(weight, spec), spec)
    return replace(start, weight=codes, weight_scale=scale, bias=bias)


def _beside(
    layer: Any, start: LayerState, adapters: dict[str, float], geometry: Geometry, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """low_rank_a and low_rank_b of `start` with the adapters' own factors appended."""
    variants, factors = getattr(layer, "lora_variant", {}), getattr(layer, "lora_A", {})
    if odd := [name for name in adapters if name in variants or name not in factors]:
        raise LDMQError(f"{odd[0]} is no plain LoRA, which alone can run beside 4-bit integers; leave it attached")
    dtype = next((t.dtype for t in (start.low_rank_a, start.bias) if t is not None), dtype)
    downs = [layer.lora_A[name].weight.flatten(1) for name in adapters]
    ups = [layer.lora_B[name].weight.flatten(1) * scale for name, scale in adapters.items()]
    if start.low_rank_a is not None and start.low_rank_b is not None:
        downs, ups = [start.low_rank_a, *downs], [start.low_rank_b, *ups]
    a, b = torch.cat([t.to(dtype) for t in downs]), torch.cat([t.to(dtype) for t in ups], dim=1)
    rows, columns = geometry.shape[0], geometry.columns
    if a.shape[0] <= min(rows, columns):
        return a, b
    # more directions than a matrix of this shape has: one factor becomes the identity
    whole = (b.float() @ a.float()).to(dtype)
    unit = torch.eye(min(rows, columns), dtype=dtype, device=a.device)
    return (whole, unit) if rows <= columns else (unit, whole)


@contextmanager
def _lent(layer: Any, base: nn.Module, scales: dict[str, float]) -> Iterator[None]:
    """The adapter layer around `base`, with nothing merged and these scales; itself again when the context ends."""
    own, scaling, merged = layer.base_layer, dict(layer.scaling), layer.merged_adapters
    layer.base_layer, layer.merged_adapters = base, []
    layer.scaling.update(scales)
    try:
        yield
    finally:
        layer.base_layer, layer.merged_adapters = own, merged
        layer.scaling.update(scaling)


def _put_back(base: Any, held: Held) -> None:
    """Make the layer hold that again, on the device and in the floating dtype that it has now."""
    if isinstance(held, LayerState) and is_quantized(base):
        present = (getattr(base, name, None) for name in CAST)
        dtype = next((tensor.dtype for tensor in present if tensor is not None), None)
        floats = {name: value for name, value in held.tensors().items() if name in CAST}
        base.load_state(replace(held, **{name: value.to(dtype or value.dtype) for name, value in floats.items()}))
        return
    if isinstance(held, LayerState):  # dequantize() was called meanwhile
        values = {"weight": dequantize_weight(held, base.weight.shape), "bias": held.bias}
        held = {name: value for name, value in values.items() if value is not None}
    for name, value in held.items():
        parameter = base._parameters[name]
        parameter.data = value.to(parameter.device, parameter.dtype)
