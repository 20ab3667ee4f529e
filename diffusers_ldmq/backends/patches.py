"""A convolution as a Linear over patches of its input (im2col)."""

import math

from torch import Tensor
from torch.nn import functional as F

from ..specs import Geometry


def patches(x: Tensor, geometry: Geometry, padding: int) -> Tensor:
    """What every output of a convolution without groups sums over: [B, out_h, out_w, kh*kw*C] of x's dtype.

    x: channels_last [B, C, h, w]; padding: the value around it.
    """
    g, (height, width) = geometry, _output_size(x, geometry)
    pad_h, pad_w = g.padding
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad_w, pad_w, pad_h, pad_h), value=padding)
    image, row, column, channel = padded.stride()
    sizes = (len(x), height, width, *g.shape[2:], g.shape[1])
    steps = (image, row * g.stride[0], column * g.stride[1], row * g.dilation[0], column * g.dilation[1], channel)
    return padded.as_strided(sizes, steps).flatten(3)


def output_pixels(x: Tensor, geometry: Geometry) -> int:
    """How many patches there are, over all images of x: [B, C, h, w]."""
    return len(x) * math.prod(_output_size(x, geometry))


def _output_size(x: Tensor, geometry: Geometry) -> tuple[int, int]:
    g = geometry
    walk = zip(x.shape[2:], g.shape[2:], g.stride, g.padding, g.dilation, strict=True)
    height, width = ((size + 2 * pad - gap * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, gap in walk)
    return height, width
