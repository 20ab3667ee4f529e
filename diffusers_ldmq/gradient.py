"""How gradients pass a layer of integers: straight through the rounding."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .backends.reference import dense_gradient
from .specs import Geometry


def straight_through(
    x: Tensor, forward: Callable[[Tensor], Tensor], weight: Callable[[], Tensor], geometry: Geometry
) -> Tensor:
    """forward(x), whose gradient is that of the float layer with this weight: rounding is taken as the identity
    (the straight-through estimator). weight: gives fp32 of the geometry's shape, asked for only in the backward pass.
    """
    return cast(Tensor, _StraightThrough.apply(x, forward, weight, geometry))


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that the surrounding torch.autocast gives to float layers; fp64 stays, as it does there."""
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(x.device.type))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, forward, ctx.weight, ctx.geometry = args
        ctx.shape = x.shape
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return dense_gradient(grad, ctx.weight().to(grad.dtype), ctx.shape, ctx.geometry), None, None, None
