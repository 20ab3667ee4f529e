"""How much every element of a unit's output matters to the denoiser's: the diagonal of a Hessian.

BRECQ (arXiv 2102.05426, equation 10) weighs a block's squared error by the squared gradient of the final loss at its
output. The loss is the denoiser's squared output error; its gradient at the float model is J^T e, with e what rounding
to nearest does to the output, so that one backward pass that starts from e serves all units.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Batch, evaluating, forward, parts, run
from .noise import differentiable
from .units import Unit, hooked, in_place

ROWS = 8
"""Rows of one backward pass, which keeps more of the denoiser than a call does."""


def output_sensitivity(
    denoiser: nn.Module, units: Sequence[Unit], batches: Sequence[Batch], quantized: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """Unit -> mean over rows of the squared gradient at its output, fp32 of one row's shape, mean 1.

    quantized: the layers that make the output error, by name. Units whose output is no single tensor are left out.
    """
    sums: dict[str, Tensor] = {}
    for batch in (part for whole in batches for part in parts(whole, ROWS)):
        exact = run(denoiser, batch)
        with in_place(denoiser, quantized):
            error = run(denoiser, batch) - exact
        _add_squares(denoiser, units, batch, error, sums)
    means = {name: total.mean() for name, total in sums.items()}
    return {name: total / means[name] for name, total in sums.items() if means[name] > 0}


def _add_squares(
    denoiser: nn.Module, units: Sequence[Unit], batch: Batch, error: Tensor, sums: dict[str, Tensor]
) -> None:
    def watching(name: str) -> Callable[..., Tensor | None]:
        def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
            if not isinstance(output, Tensor):
                return None
            if not output.requires_grad:  # nothing before this unit is differentiated
                output = output.detach().requires_grad_()
            output.register_hook(lambda gradient: _add(sums, name, gradient))
            return output

        return watch

    hooks = {unit.name: watching(unit.name) for unit in units}
    with hooked(denoiser, hooks), differentiable(denoiser), evaluating(denoiser), torch.enable_grad():
        output = forward(denoiser, batch)
        output.backward(error.to(output))


def _add(sums: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    squares = gradient.detach().float().square().sum(0).cpu()
    sums[name] = squares + sums[name] if name in sums else squares
