"""Skip split: the two halves of a skip concatenation, whose ranges differ much, get one scale each.

Source: Q-Diffusion (arXiv 2302.04304). There each half has its own quantizer; here one factor per half brings both to
one range, which is as good and keeps a single integer product.
"""

from dataclasses import replace

import torch
from torch import nn

from ..specs import LayerState, geometry_of
from .contract import LayerInputs, least_noise, rebuild

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""Exponents of the ratio of the ranges: at 1 both halves use the whole range, and the weight carries all of it."""


def skip_split(layer: nn.Module, state: LayerState, inputs: LayerInputs) -> LayerState | None:
    """The second half of the input multiplied by (range of the first / range of the second)^t, its weight columns
    divided by it; t is the one of STRENGTHS with the least output error on the calibrating inputs.

    None where the input is no concatenation, a half is all zeros, or the scheme leaves activations in floating point.
    """
    if inputs.split is None or not state.scheme.is_integer:
        return None
    first = max(float(x[:, : inputs.split].abs().amax()) for x in inputs.calibrate)
    second = max(float(x[:, inputs.split :].abs().amax()) for x in inputs.calibrate)
    if first == 0 or second == 0:
        return None
    states = []
    for strength in STRENGTHS:
        scale = torch.ones(geometry_of(layer).in_channels, device=state.weight.device)
        scale[inputs.split :] = (first / second) ** strength
        states.append(rebuild(layer, replace(state, pre_quant_scale=scale), inputs))
    return least_noise(layer, states, inputs)
