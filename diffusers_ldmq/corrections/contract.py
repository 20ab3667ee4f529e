"""The contract of a correction: it gives one layer other integers that stand for the same float layer, only better."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..affine import input_to_quantize, quantize_weight, weight_to_quantize
from ..calibration import input_qparams, weight_scales
from ..errors import CalibrationError
from ..layers import quantize_layer
from ..metrics import Power, total
from ..observers import OBSERVERS
from ..specs import LayerState


@dataclass(frozen=True, slots=True, eq=False)
class LayerInputs:
    """What a correction knows of a layer's surroundings.

    calibrate: the layer's inputs in a float run of calibrating calls, float [..., K] or [B, C, h, w] each;
    observer: name in OBSERVERS of what derives static input ranges; split: of a skip concatenation, channels of its
    first half, None where the input is none.
    """

    calibrate: tuple[Tensor, ...]
    observer: str
    split: int | None = None


Correction = Callable[[nn.Module, LayerState, LayerInputs], LayerState | None]
"""(float layer, its present state, inputs) -> its new state of the same scheme; None = does not apply to this layer.

Neither argument is changed. Raises CalibrationError if the layer's weight or inputs hold NaN or Inf.
"""


def rebuild(layer: nn.Module, state: LayerState, inputs: LayerInputs) -> LayerState:
    """Codes, weight scales and the static input range that belong to the float layer under the state's scheme,
    pre_quant_scale, rotation and low-rank branch. The bias is the float layer's again.

    Raises CalibrationError for NaN or Inf.
    """
    spec = state.scheme.weight
    assert spec is not None
    weight = weight_to_quantize(_weight(layer), state)
    codes, scale = quantize_weight(weight, weight_scales(weight, spec), spec)
    observer = OBSERVERS[inputs.observer]()
    if state.scheme.is_static:
        for x in inputs.calibrate:
            observer.update(input_to_quantize(x, state, isinstance(layer, nn.Conv2d)))
    qparams, bias = input_qparams(observer, state.scheme), layer.bias
    return replace(
        state,
        weight=codes,
        weight_scale=scale,
        bias=bias.detach().clone() if isinstance(bias, Tensor) else None,
        input_scale=qparams.scale if qparams else None,
        input_zero_point=qparams.zero_point if qparams else None,
    )


def output_power(layer: nn.Module, state: LayerState, inputs: tuple[Tensor, ...]) -> Power:
    """Signal and noise power at the layer's own output: the float layer against `state`, on the same inputs."""
    quantized = quantize_layer(layer, state)
    with torch.no_grad():
        return total([Power.between(_call(layer, x), _call(quantized, x)) for x in inputs])


def least_noise(layer: nn.Module, states: list[LayerState], inputs: LayerInputs) -> LayerState | None:
    """The state with the least noise at the layer's output on the calibrating inputs; the first of equals, None of
    no states. Raises CalibrationError where there are no inputs."""
    if not inputs.calibrate:
        raise CalibrationError("a correction needs calibrating inputs of the layer; record calls that reach it")
    return min(states, key=lambda state: output_power(layer, state, inputs.calibrate).noise, default=None)


def mean_error(layer: nn.Module, state: LayerState, inputs: LayerInputs) -> Tensor:
    """Mean over rows, images and pixels of (quantized - float) output: fp32 [N]."""
    quantized = quantize_layer(layer, state)
    errors, count = torch.zeros((), dtype=torch.float64), 0
    with torch.no_grad():
        for x in inputs.calibrate:
            error = (_call(quantized, x).float() - _call(layer, x).float()).movedim(1 if x.dim() == 4 else -1, -1)
            error = error.flatten(0, -2).double()
            errors, count = errors.to(error.device) + error.sum(0), count + error.shape[0]
    return (errors / max(count, 1)).float()


def channel_absmax(weight: Tensor, groups: int) -> Tensor:
    """Largest magnitude in each input channel of a weight [N, C/groups, ...]: fp32 [C]."""
    grouped = weight.detach().float().abs().unflatten(0, (groups, -1)).flatten(3) if weight.dim() > 2 else None
    if grouped is None:
        return weight.detach().float().abs().amax(0)
    return grouped.amax((1, 3)).flatten()


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    # the class's own forward, past hooks that whoever looks at the layer has registered
    return layer.forward(x)
