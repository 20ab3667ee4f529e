"""Block Hadamard rotation: an outlier channel is spread over its neighbours, so that all of them use the int8 range.

Sources: QuaRot (arXiv 2404.00456) for linear layers, in blocks as ConvRot (arXiv 2512.03673) does; of a convolution the
input channels are rotated at every pixel.
"""

from dataclasses import replace

from torch import nn

from ..specs import LayerState, geometry_of
from .contract import LayerInputs, least_noise, rebuild

BLOCKS = (16, 64, 256)
"""A larger block spreads an outlier further and costs more: b multiply-adds per input element."""


def rotate(layer: nn.Module, state: LayerState, inputs: LayerInputs) -> LayerState | None:
    """The state in blocks of 16, 64 or 256 channels, whichever has the least output error on the calibrating inputs;
    None where none of them divides the input channels (of a group)."""
    channels = geometry_of(layer).shape[1]
    sizes = [size for size in BLOCKS if channels % size == 0]
    return least_noise(layer, [rebuild(layer, replace(state, rotation=size), inputs) for size in sizes], inputs)
