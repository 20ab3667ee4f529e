"""Bias correction: the mean of the quantization error goes into the bias, at no cost when the model runs.

Source: data-free quantization through weight equalization and bias correction (arXiv 1906.04721), with measured means.
"""

from dataclasses import replace

from torch import Tensor, nn

from ..specs import LayerState
from .contract import LayerInputs, mean_error


def bias(layer: nn.Module, state: LayerState, inputs: LayerInputs) -> LayerState | None:
    """The state with its mean output error per channel subtracted from the bias, which a layer without one gets."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    error = mean_error(layer, state, inputs)
    held = -error if state.bias is None else state.bias.float() - error
    return replace(state, bias=held.to(weight.dtype if state.bias is None else state.bias.dtype))
