"""QuantLinear and QuantConv2d, and how models get and list them."""

from typing import TypeVar

import torch
from torch import nn

from .affine import dequantize_weight
from .quantized_layer import QuantizedLayer
from .specs import LayerState

__all__ = ["QuantConv2d", "QuantLinear", "QuantizedLayer", "quantize_layer", "quantized_layers"]


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


F = TypeVar("F", nn.Linear, nn.Conv2d)


def _filled(layer: F, source: QuantizedLayer, dtype: torch.dtype | None) -> F:
    state = source.state()
    dtype = dtype or (torch.float32 if state.bias is None else state.bias.dtype)
    weight = dequantize_weight(state, torch.Size(source.geometry.shape)).to(dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if state.bias is not None:
        layer.bias = nn.Parameter(state.bias, requires_grad=False)
    return layer.train(source.training)
