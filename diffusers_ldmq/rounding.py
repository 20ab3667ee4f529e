"""A layer whose rounding is learned: which way each weight is rounded, and how wide a step its input is rounded to.

Sources: AdaRound (arXiv 2004.10568, section 3.2) for the weights, LSQ (arXiv 1902.08153, section 2) for the step sizes,
QDrop (arXiv 2203.05740) for leaving single inputs unrounded while learning; EDA-DM (arXiv 2401.04585) learns all at
once; EfficientQAT (arXiv 2407.11062) the scales alone of weights whose codes stay.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .affine import (
    QParams,
    input_to_quantize,
    qdq,
    quantize_weight,
    token_qparams,
    weight_codes,
    weight_rows,
    weight_to_quantize,
)
from .backends.reference import dense, low_rank_output, output_vector
from .specs import LayerState, geometry_of

Rounding = Literal["straight", "soft", "settled"]
"""How the rounding of weights behaves while it is learned: every weight is rounded up or down and the gradient passes
straight through; it lies between the two (AdaRound); it stays what it is."""
STRETCH = 0.1
"""The sigmoid is stretched by so much beyond 0 and 1 and clipped, so that it reaches both (AdaRound, equation 23)."""


@dataclass(slots=True)
class Drops:
    """Which single inputs stay unrounded in an iteration (QDrop). A pool of random decisions is made once, and every
    use begins at another place of it: drawing millions anew in every iteration would cost as much as the layer.

    share: of the inputs that stay as they are, 0..1.
    """

    share: float
    generator: torch.Generator
    pool: Tensor | None = None

    def mask(self, x: Tensor) -> Tensor | None:
        """True where x stays as it is: bool, shape of x; None where nothing does."""
        if self.share <= 0:
            return None
        if self.pool is None or self.pool.numel() < 2 * x.numel():
            self.pool = torch.empty(4 * x.numel(), dtype=torch.bool).bernoulli_(self.share, generator=self.generator)
        start = int(torch.randint(self.pool.numel() - x.numel() + 1, (), generator=self.generator))
        return self.pool[start : start + x.numel()].reshape(x.shape).to(x.device)


class LearnedLayer(nn.Module):
    """Stands in a Linear's or Conv2d's place while its rounding is learned; `weight` is the float one.

    rounding: fp32 [N, groups, group_size], the logits of rounding up, None where it is settled: the state's codes stay;
    log_step: fp32 [], of a static input scale;
    log_gain: fp32 [N, groups, 1], by what the weight scales grow; shift: fp32 [N], what the bias grows by, in units of
    the output's `spread`, None where there is no bias. Both cost nothing at run time.
    seen: the outputs of the forwards since it was emptied; decided: run with every weight rounded up or down;
    straight: the same while learning, with the gradient of the soft rounding.
    """

    def __init__(self, layer: nn.Module, state: LayerState, drops: Drops, *, rounding: Rounding = "soft") -> None:
        super().__init__()
        weight, spec = layer.weight, state.scheme.weight
        assert isinstance(weight, Tensor)
        assert spec is not None
        self.state, self.drops, self.spec, self.geometry = state, drops, spec, geometry_of(layer)
        self.weight, self.bias = weight.detach(), None if state.bias is None else state.bias.detach()
        self.scale = state.weight_scale.detach().float().reshape(self.weight.shape[0], -1, 1)
        if rounding == "settled":
            self.floor, self.rounding = weight_rows(weight_codes(state, self.weight.shape), spec), None
        else:
            scaled = weight_rows(weight_to_quantize(self.weight, state), spec) * self.scale.reciprocal()
            self.floor = scaled.floor()
            self.rounding = nn.Parameter(_logit(scaled - self.floor))
        static = state.input_scale
        self.log_step = nn.Parameter(static.detach().log()) if static is not None else None
        self.log_gain = nn.Parameter(torch.zeros_like(self.scale))
        self.shift = None if self.bias is None else nn.Parameter(torch.zeros_like(self.bias, dtype=torch.float32))
        self.spread = 1.0
        self.seen: list[Tensor] = []
        self.decided, self.straight = False, rounding == "straight"

    def upwards(self) -> Tensor:
        """How far every weight is rounded up, 0..1: fp32, shape of `rounding` (AdaRound, equation 23); 0 or 1 where it
        is decided, or straight, then with the gradient of what it would be otherwise (STE); 0 where it is settled."""
        if self.rounding is None:
            return torch.zeros(())
        decided = (self.rounding >= 0).float()
        if self.decided:
            return decided
        soft = _rectified(self.rounding)
        return soft + (decided - soft).detach() if self.straight else soft

    def soft_weight(self) -> Tensor:
        """The weight that the present rounding stands for: fp32, the layer's shape, in integer coordinates."""
        codes = (self.floor + self.upwards()).clamp(self.spec.qmin, self.spec.qmax)
        rows = (codes * (self.scale * self.log_gain.exp())).flatten(1)
        return rows[:, : self.geometry.columns].reshape(self.geometry.shape)

    def vectors(self) -> list[nn.Parameter]:
        """What is learned of every output channel."""
        return [self.log_gain] if self.shift is None else [self.log_gain, self.shift]

    def _bias(self) -> Tensor | None:
        return None if self.bias is None or self.shift is None else self.bias.float() + self.spread * self.shift

    def forward(self, x: Tensor) -> Tensor:
        """Output of the rounded layer in x.dtype; x as the layer gets it."""
        out = dense(self._input(x), self.soft_weight(), None, self.geometry)
        if self.state.low_rank_a is not None and self.state.low_rank_b is not None:
            a, b = self.state.low_rank_a.float(), self.state.low_rank_b.float()
            out = out + low_rank_output(x.float(), a, b, self.geometry)
        bias = self._bias()
        if bias is not None:
            out = out + output_vector(bias, self.geometry)
        self.seen.append(out)
        return out.to(x.dtype)

    def _input(self, x: Tensor) -> Tensor:
        x, spec = input_to_quantize(x, self.state, self.geometry.is_conv).float(), self.state.scheme.activation
        if spec is None:
            return x
        if self.log_step is None or self.state.input_zero_point is None:
            # straight through the rounding: a range that is found in every call is not learned
            qparams = token_qparams(x.detach(), spec, self.geometry.is_conv)
            return x + (qdq(x.detach(), qparams, spec) - x.detach())
        zero = float(self.state.input_zero_point)
        range_ = (spec.qmin - zero, spec.qmax - zero)
        return _StepRounding.apply(x, self.log_step, range_, self.drops.mask(x))  # pyright: ignore[reportReturnType]

    def undecided(self, sharpness: float) -> Tensor:
        """1 - |2h - 1|^sharpness, mean over the weights: 0 where every weight is rounded up or down (AdaRound,
        equation 24)."""
        return (1 - (2 * self.upwards() - 1).abs().pow(sharpness)).mean()

    @torch.no_grad()
    def hardened(self) -> LayerState:
        """The state with every weight rounded the way it leans, and the learned scales and bias."""
        step = self.state.input_scale if self.log_step is None else self.log_step.detach().exp()
        scale = (self.scale * self.log_gain.exp()).reshape(self.state.weight_scale.shape)
        bias = self._bias()
        bias = None if bias is None or self.bias is None else bias.to(self.bias.dtype)
        return replace(self.state, weight=self._codes(), weight_scale=scale, bias=bias, input_scale=step)

    def _codes(self) -> Tensor:
        """Every weight rounded the way it leans, as states hold it."""
        if self.rounding is None:
            return self.state.weight
        codes = self.floor + (self.rounding >= 0)
        rows = (codes.clamp(self.spec.qmin, self.spec.qmax) * self.scale).flatten(1)[:, : self.geometry.columns]
        qparams = QParams(self.scale, torch.zeros_like(self.scale, dtype=torch.int32))
        return quantize_weight(rows.reshape(self.geometry.shape), qparams, self.spec)[0]


def _rectified(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * (1 + 2 * STRETCH) - STRETCH).clamp(0, 1)


def _logit(share: Tensor) -> Tensor:
    """Inverse of _rectified for 0 <= share < 1."""
    return -torch.log((1 + 2 * STRETCH) / (share + STRETCH) - 1)


class _StepRounding(torch.autograd.Function):
    """x rounded to multiples of exp(log_step) within a range of multiples; gradients as LSQ has them, the step's with
    respect to its logarithm, so that one learning rate serves every layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_step: Tensor, limits: tuple[float, float], kept: Tensor | None) -> Tensor:
        step = log_step.exp()
        scaled = x.float() * step.reciprocal()
        inside = (scaled >= limits[0]) & (scaled <= limits[1])
        codes = scaled.round().clamp_(*limits)
        # the error of a code in steps is what the output moves by when the step grows
        error = torch.where(inside, codes - scaled, codes)
        if kept is not None:
            inside, error = inside | kept, error.masked_fill_(kept, 0)
        rounded = codes.mul_(step)
        ctx.save_for_backward(inside, error, step)
        return rounded if kept is None else torch.where(kept, x.float(), rounded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, error, step = ctx.saved_tensors
        (grad,) = grads
        return grad * inside, (grad * error).sum() * step, None, None
