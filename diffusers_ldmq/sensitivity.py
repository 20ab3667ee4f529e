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
) -> dict[str, dict[str, Tensor]]:
    """Unit -> path of its output ('' for a single one) -> mean over rows of the squared gradient there, fp32 of one
    row's shape, mean 1 over all the unit's outputs.

    quantized: the layers that make the output error, by name.
    """
    sums: dict[str, dict[str, Tensor]] = {unit.name: {} for unit in units}
    for batch in (part for whole in batches for part in parts(whole, ROWS)):
        exact = run(denoiser, batch)
        with in_place(denoiser, quantized):
            error = run(denoiser, batch) - exact
        _add_squares(denoiser, units, batch, error, sums)
    return {name: _normalised(found) for name, found in sums.items()}


def _normalised(found: dict[str, Tensor]) -> dict[str, Tensor]:
    if not found:
        return {}
    mean = torch.cat([total.flatten() for total in found.values()]).mean()
    return {path: total / mean for path, total in found.items()} if mean > 0 else {}


def _add_squares(
    denoiser: nn.Module, units: Sequence[Unit], batch: Batch, error: Tensor, sums: dict[str, dict[str, Tensor]]
) -> None:
    def watching(name: str) -> Callable[..., Any]:
        def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, Tensor):
                return _watched(output, sums[name], "")
            if not isinstance(output, (tuple, list)):
                return None
            parts = (
                _watched(value, sums[name], f"#{i}") if isinstance(value, Tensor) else value
                for i, value in enumerate(output)
            )
            return type(output)(parts)

        return watch

    hooks = {unit.name: watching(unit.name) for unit in units}
    with hooked(denoiser, hooks), differentiable(denoiser), evaluating(denoiser), torch.enable_grad():
        output = forward(denoiser, batch)
        output.backward(error.to(output))


def _watched(output: Tensor, sums: dict[str, Tensor], path: str) -> Tensor:
    """The same output, whose squared gradient is added to the sums when it comes."""
    if not output.requires_grad:  # nothing before this unit is differentiated
        output = output.detach().requires_grad_()
    output.register_hook(lambda gradient: _add(sums, path, gradient))
    return output


def _add(sums: dict[str, Tensor], path: str, gradient: Tensor) -> None:
    squares = gradient.detach().float().square().sum(0).cpu()
    sums[path] = squares + sums[path] if path in sums else squares
