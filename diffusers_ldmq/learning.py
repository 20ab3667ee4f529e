"""Learn one unit's rounding: the soft weights and the steps of its layers, against what the float unit gives.

loss = block + gamma * sum of its layers' (all but the last registered one, whose output is the block's or close to it),
each the squared error over its target's mean energy (EDA-DM, fine-grained block reconstruction).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .activations import UnitRows
from .calls import evaluating, flatten, unflatten
from .errors import CalibrationError
from .metrics import energy
from .rounding import Drops, LearnedLayer
from .specs import LayerState
from .units import Unit, in_place

WARM_UP = 0.2
"""Share of the iterations in which the rounding may stay undecided."""
SHARPNESS = (20.0, 2.0)
"""Exponent of the push to a decision after the warm-up and at the end (AdaRound, section 3.2)."""
JUDGED_ROWS = 64
"""Rows on which a unit is judged before and after, evenly from all."""


@dataclass(frozen=True, slots=True)
class LearningSettings:
    """How one unit learns.

    iterations, batch: steps, and rows in each; gamma: weight of the layers' losses, 0 = block alone;
    block: weight of the block's own loss, 0 = layers alone; weight_rate, step_rate: Adam's rates of the rounding logits
    and of the steps' logarithms, falling to 0 along a cosine; drop: share of inputs that stay unrounded (QDrop);
    mix: share of the unit's input that comes from the float run; rounding: 'straight', every weight is rounded up or
    down all along and the gradient passes straight through (no gap to close at the end), or 'soft', it lies between the
    two while it is learned (AdaRound); decide: weight of the push of a soft rounding to a decision, relative to the
    loss of rounding to nearest; 0 as EDA-DM's released code.
    """

    iterations: int = 500
    batch: int = 32
    gamma: float = 0.8
    block: float = 1.0
    weight_rate: float = 3e-2
    step_rate: float = 1e-3
    drop: float = 0.5
    mix: float = 0.5
    rounding: Literal["straight", "soft"] = "straight"
    decide: float = 1.0


@dataclass(frozen=True, slots=True)
class Learned:
    """A unit after learning. before: relative squared error of the block's output, rounded to nearest; soft: with the
    learned rounding still undecided; after: decided, as it will run (kept only where it is less than before)."""

    states: dict[str, LayerState]
    before: float
    soft: float
    after: float


class UnitLearner:
    """Learns the layers of one unit in their places in the denoiser, which is otherwise unchanged."""

    def __init__(
        self,
        denoiser: nn.Module,
        unit: Unit,
        rows: UnitRows,
        states: dict[str, LayerState],
        settings: LearningSettings,
        generator: torch.Generator,
    ) -> None:
        self.denoiser, self.unit, self.rows, self.settings, self.generator = denoiser, unit, rows, settings, generator
        self.states, self.device = states, next(iter(states.values())).weight.device
        self.drops, self.mixing = Drops(settings.drop, generator), Drops(settings.mix, generator)
        straight = settings.rounding == "straight"
        self.layers = {
            name: LearnedLayer(denoiser.get_submodule(name), states[name], self.drops, straight=straight)
            for name in unit.layers
        }
        self.targets = {} if unit.is_layer or settings.gamma == 0 else {n: rows.layers[n] for n in unit.layers[:-1]}
        self.sensitivity: Tensor | None = None
        self.energies = {key: _energy(value) for key, value in {**rows.outputs, **self.targets}.items()}

    def loss(self, rows: Tensor, *, mixed: bool) -> Tensor:
        """The loss of some rows, int64 [n]. mixed: part of the input comes from the float run."""
        for layer in self.layers.values():
            layer.seen.clear()
        outputs = self._outputs(rows, mixed)
        block = self._block_error(outputs, rows)
        loss = self.settings.block * block if self.targets else block
        for name, target in self.targets.items():
            if self.layers[name].seen:
                loss = loss + self.settings.gamma * self._error(name, self.layers[name].seen[0], target[rows])
        return loss

    def _outputs(self, rows: Tensor, mixed: bool) -> dict[str, Tensor]:
        flat = self.rows.arguments(rows, self.mixing.mask if mixed else None)
        given = unflatten({p: v.to(self.device) if isinstance(v, Tensor) else v for p, v in flat.items()})
        positions = sorted((key for key in given if key.startswith("#")), key=lambda key: int(key[1:]))
        args = [given.pop(key) for key in positions]
        output = self.denoiser.get_submodule(self.unit.name)(*args, **given)
        flat = flatten(output) if isinstance(output, (tuple, list, dict)) else {"": output}
        return {path: value for path, value in flat.items() if isinstance(value, Tensor)}

    def _error(self, key: str, found: Tensor, target: Tensor) -> Tensor:
        """Squared error over the target's mean energy."""
        return (found.float() - target.to(found.device).float()).square().sum() / (len(target) * self.energies[key])

    def _block_error(self, outputs: dict[str, Tensor], rows: Tensor) -> Tensor:
        """Of the unit's outputs; weighted by what its elements matter, where that is known (mean 1)."""
        if self.sensitivity is not None and list(outputs) == [""]:
            target = self.rows.outputs[""][rows].to(self.device)
            error = (outputs[""].float() - target.float()).square() * self.sensitivity.to(self.device)
            return error.sum() / (len(rows) * self.energies[""])
        return torch.stack([self._error(p, out, self.rows.outputs[p][rows]) for p, out in outputs.items()]).sum()

    def learn(self, told: Callable[[int], None] | None = None) -> Learned:
        """told: called with the iterations done. Raises CalibrationError, naming the unit, for a loss that is not
        finite."""
        with in_place(self.denoiser, self.layers), evaluating(self.denoiser):
            before = self._judge(decided=True)
            self._optimise(before, told)
            soft, after = self._judge(decided=False), self._judge(decided=True)
        better = {name: layer.hardened() for name, layer in self.layers.items()} if after < before else self.states
        return Learned(better, before, soft, after)

    def _optimise(self, before: float, told: Callable[[int], None] | None) -> None:
        chosen, layers = self.settings, list(self.layers.values())
        steps = [layer.log_step for layer in layers if layer.log_step is not None]
        groups = [{"params": [layer.rounding for layer in layers], "lr": chosen.weight_rate}]
        groups += [{"params": steps, "lr": chosen.step_rate}] if steps and chosen.step_rate else []
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, chosen.iterations)
        for iteration in range(chosen.iterations):
            rows = torch.randint(self.rows.count, (min(chosen.batch, self.rows.count),), generator=self.generator)
            with torch.enable_grad():
                loss = self.loss(rows, mixed=True)
                undecided = self._undecided(iteration / chosen.iterations)
                optimizer.zero_grad()
                (loss if undecided is None else loss + chosen.decide * before * undecided).backward()
            if not torch.isfinite(loss):
                raise CalibrationError(
                    f"reconstructing {self.unit.name!r}: the loss is {float(loss)} in iteration {iteration}; lower "
                    f"the learning rates (weight_rate {chosen.weight_rate:g}, step_rate {chosen.step_rate:g})"
                )
            optimizer.step()
            schedule.step()
            if told is not None:
                told(iteration + 1)

    def _undecided(self, progress: float) -> Tensor | None:
        """How undecided the layers are, from the warm-up on ever more sharply told; their mean."""
        if progress < WARM_UP or not self.settings.decide or self.settings.rounding == "straight":
            return None
        start, end = SHARPNESS
        part = (progress - WARM_UP) / (1 - WARM_UP)
        sharpness = end + 0.5 * (start - end) * (1 + math.cos(part * math.pi))
        return torch.stack([layer.undecided(sharpness) for layer in self.layers.values()]).mean()

    @torch.no_grad()
    def _judge(self, *, decided: bool) -> float:
        """Relative squared error of the unit's output behind quantized layers, nothing dropped or mixed."""
        share, self.drops.share = self.drops.share, 0.0
        for layer in self.layers.values():
            layer.decided = decided
        rows = torch.linspace(0, self.rows.count - 1, min(self.rows.count, JUDGED_ROWS)).round().long()
        error = 0.0
        for part in rows.split(self.settings.batch):
            outputs = self._outputs(part, mixed=False)
            errors = [float(self._error(p, out, self.rows.outputs[p][part])) for p, out in outputs.items()]
            error += sum(errors) * len(part)
        self.drops.share = share
        for layer in self.layers.values():
            layer.decided = False
            layer.seen.clear()
        return error / len(rows)


def _energy(target: Tensor) -> float:
    """Mean energy of a row, never zero."""
    return max(energy(target) / len(target), torch.finfo(torch.float32).tiny)
