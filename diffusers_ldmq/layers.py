"""QuantLinear and QuantConv2d, and how models get and list them."""

import logging
from typing import Any, TypeVar

import torch
from torch import nn

from .affine import dequantize_weight
from .errors import LDMQError
from .quantized_layer import QuantizedLayer
from .specs import LayerState

__all__ = ["QuantConv2d", "QuantLinear", "QuantizedLayer", "quantize_layer", "quantized_layers", "set_low_memory"]

logger = logging.getLogger(__name__)


class QuantLinear(QuantizedLayer, nn.Linear):
    """nn.Linear that runs integer kernels once it holds a LayerState. x: [..., K], any float dtype."""

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return _filled(layer, self, dtype)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """nn.Conv2d that runs integer kernels once it holds a LayerState. x: [B, C, h, w], any float dtype."""

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Conv2d:
        walk = (self.stride, self.padding, self.dilation, self.groups)
        sizes = (self.in_channels, self.out_channels, self.kernel_size)
        layer = nn.Conv2d(*sizes, *walk, bias=self.bias is not None, device="meta")  # pyright: ignore
        return _filled(layer, self, dtype)


def quantize_layer(layer: nn.Module, state: LayerState) -> QuantizedLayer:
    """The QuantLinear or QuantConv2d that replaces `layer`. Raises as `from_float`."""
    kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    return kind.from_float(layer, state)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers of `model` that hold integers, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    return {name: layer for name, layer in found.items() if not layer.scheme.is_float}


def set_low_memory(model: Any, on: bool = True) -> None:
    """Whether layers with 4-bit weights hold them in 4 bits while they run, too: less memory, the same outputs, slower
    steps. Without it a CPU holds them in 8. May be called at any time; it is no part of what is saved.

    model: a module or a pipeline, all of whose models are meant. Raises LDMQError if no layer in it is quantized.
    """
    parts = getattr(model, "components", {"": model}).values()
    layers = [layer for part in parts if isinstance(part, nn.Module) for layer in quantized_layers(part).values()]
    if not layers:
        raise LDMQError(f"low_memory is for quantized models; the given {type(model).__name__} has no quantized layer")
    packed = [layer for layer in layers if layer.scheme.weight is not None and layer.scheme.weight.bits == 4]
    if on and not packed:
        logger.warning("low_memory changes nothing: no layer of the %s has 4-bit weights", type(model).__name__)
    for layer in packed:
        layer.use_low_memory(on)


F = TypeVar("F", nn.Linear, nn.Conv2d)


def _filled(layer: F, source: QuantizedLayer, dtype: torch.dtype | None) -> F:
    state = source.state()
    dtype = dtype or (torch.float32 if state.bias is None else state.bias.dtype)
    weight = dequantize_weight(state, torch.Size(source.geometry.shape)).to(dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if state.bias is not None:
        layer.bias = nn.Parameter(state.bias, requires_grad=False)
    return layer.train(source.training)
