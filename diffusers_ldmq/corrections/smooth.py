"""Smoothing: part of the difficulty of quantizing the input moves into the weight, channel by channel.

Source: SmoothQuant (arXiv 2211.10438); applied to a few measured layers only, because done everywhere it wrecks latent
diffusion models (DMQ, arXiv 2507.12933).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..specs import LayerState, geometry_of
from .contract import LayerInputs, channel_absmax, least_noise, rebuild

ALPHAS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85)
"""How much of the difficulty moves: 0 = none, 1 = all of it."""
FLOOR = 1e-5
"""Maxima are clamped here, so that a dead channel gets a finite factor."""


def smooth(layer: nn.Module, state: LayerState, inputs: LayerInputs) -> LayerState | None:
    """Input channels divided by s_c = max|X_c|^alpha / max|W_c|^(1 - alpha), weight columns multiplied by it; alpha is
    the one of ALPHAS with the least output error on the calibrating inputs."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    seen = _input_absmax(inputs.calibrate, isinstance(layer, nn.Conv2d)).to(weight.device).clamp_min(FLOOR)
    held = channel_absmax(weight, geometry_of(layer).groups).clamp_min(FLOOR)
    scales = [held ** (1 - alpha) / seen**alpha for alpha in ALPHAS]
    states = [rebuild(layer, replace(state, pre_quant_scale=scale), inputs) for scale in scales]
    return least_noise(layer, states, inputs)


def _input_absmax(inputs: tuple[Tensor, ...], is_conv: bool) -> Tensor:
    """Largest magnitude in each input channel: fp32 [C]."""
    rows = (x.detach().float().movedim(1 if is_conv else -1, -1).flatten(0, -2) for x in inputs)
    return torch.stack([x.abs().amax(0) for x in rows]).amax(0)
