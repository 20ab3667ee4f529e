"""Weight dilation: columns of the weight that leave room in the integer range grow into it, their inputs shrink.

Source: DilateQuant (arXiv 2409.14307), without its training. Scales of the weight stay as they are.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..affine import weight_rows
from ..errors import CalibrationError
from ..specs import LayerState, QuantSpec, geometry_of
from .contract import LayerInputs, channel_absmax, rebuild

LARGEST = 2.0**10
"""Most that a column grows: one of zeros would grow for ever."""


def dilate(layer: nn.Module, state: LayerState, inputs: LayerInputs) -> LayerState | None:
    """Column k multiplied by s_k = min over rows n of max|W_n| / |W_nk| >= 1 (max over what shares a scale), its input
    divided by it. None where every column holds some row's extreme already."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert state.scheme.weight is not None
    factors = column_room(weight.detach().float(), state.scheme.weight, geometry_of(layer).groups)
    if not (factors > 1).any():
        return None
    return rebuild(layer, replace(state, pre_quant_scale=factors.reciprocal()), inputs)


def column_room(weight: Tensor, spec: QuantSpec, groups: int) -> Tensor:
    """[C_in] factors >= 1 by which input channels of a weight [N, C/groups, ...] can grow without changing a scale.

    Raises CalibrationError for NaN or Inf.
    """
    rows = weight_rows(weight, spec)
    if not torch.isfinite(rows).all():
        raise CalibrationError("a weight to dilate holds NaN or Inf; quantization needs finite values")
    share = rows.abs() / rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    share = share.flatten(1)[:, : weight[0].numel()].reshape(weight.shape)
    return channel_absmax(share, groups).clamp_min(1 / LARGEST).reciprocal()
