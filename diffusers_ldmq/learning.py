"""Learn one unit's rounding: the soft weights and the steps of its layers, against what the float unit gives.

loss = block + gamma * sum of its layers' (all but the last registered one, whose output is the block's or close to it),
each the squared error over its target's mean energy (EDA-DM, fine-grained block reconstruction).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .activations import UnitRows
from .calls import InMemory, evaluating, unflatten
from .errors import CalibrationError
from .layers import QuantizedLayer, quantize_layer
from .metrics import energy
from .rounding import Drops, LearnedLayer, Rounding
from .specs import LayerState
from .units import Unit, in_place, output_tensors

WARM_UP = 0.2
"""Share of the iterations in which the rounding may stay undecided."""
SHARPNESS = (20.0, 2.0)
"""Exponent of the push to a decision after the warm-up and at the end (AdaRound, section 3.2)."""
HELD_OUT = 8
"""Every so many rows one is not learned from: a unit is judged on these, because blocks overfit (EDA-DM)."""


@dataclass(frozen=True, slots=True)
class LearningSettings:
    """How one unit learns.

    iterations, batch: steps, and rows in each; gamma: weight of the layers' losses, 0 = block alone;
    block: weight of the block's own loss, 0 = layers alone; weight_rate, step_rate, vector_rate: Adam's rates of the
    rounding logits, of the logarithms of input scales, and of weight scales (their logarithms) and biases, falling to 0
    along a cosine; 0 = not learned; drop: share of inputs that stay unrounded (QDrop);
    mix: share of the unit's input that comes from the float run; rounding: 'straight', every weight is rounded up or
    down all along and the gradient passes straight through (no gap to close at the end), or 'soft', it lies between the
    two while it is learned (AdaRound), or 'settled', it stays as it is; decide: weight of the push of a soft rounding
    to a decision, relative to the loss of rounding to nearest; 0 as EDA-DM's released code.
    """

    iterations: int = 300
    batch: int = 32
    gamma: float = 0.8
    block: float = 1.0
    weight_rate: float = 3e-2
    step_rate: float = 1e-3
    vector_rate: float = 5e-3
    drop: float = 0.0
    mix: float = 0.0
    rounding: Rounding = "straight"
    decide: float = 1.0

    def __post_init__(self) -> None:
        checks = {
            "iterations": self.iterations >= 1,
            "batch": self.batch >= 1,
            "gamma": self.gamma >= 0,
            "block": self.block >= 0 and self.block + self.gamma > 0,
            "weight_rate": self.weight_rate > 0,
            "step_rate": self.step_rate >= 0,
            "vector_rate": self.vector_rate >= 0,
            "drop": 0 <= self.drop <= 1,
            "mix": 0 <= self.mix <= 1,
            "rounding": self.rounding in get_args(Rounding),
            "decide": self.decide >= 0,
        }
        for name, holds in checks.items():
            if not holds:
                raise CalibrationError(
                    f"{name}={getattr(self, name)!r} cannot be learned with; rounding is one of "
                    f"{', '.join(get_args(Rounding))}, drop and mix are shares, counts start at 1, weights and rates "
                    f"at 0 (block and gamma not both 0)"
                )


@dataclass(frozen=True, slots=True)
class Learned:
    """A unit after learning. Relative squared errors of its output on rows that were not learned from: before, with the
    states that were given; soft, as learned (undecided where rounding is soft); after, as it will run. The states are
    the learned ones only where `after` is less than `before`."""

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
        self.layers = {
            name: LearnedLayer(denoiser.get_submodule(name), states[name], self.drops, rounding=settings.rounding)
            for name in unit.layers
        }
        for name, layer in self.layers.items():
            if name in rows.layers:
                layer.spread = _energy(rows.layers[name]) ** 0.5 / rows.layers[name][0].numel() ** 0.5
        self.targets = self._layer_targets()
        self.sensitivity: dict[str, Tensor] = {}
        self.rows_at_once = settings.batch  # of one pass; fewer need less memory and give the same
        self.energies = {key: _energy(value) for key, value in {**rows.outputs, **self.targets}.items()}
        every = torch.arange(rows.count)
        held_out = every % HELD_OUT == HELD_OUT - 1
        self.learned_rows, self.judged_rows = every[~held_out], every[held_out] if held_out.any() else every

    def _layer_targets(self) -> dict[str, Tensor]:
        """Outputs of the float layers that have a loss of their own: all but the last, which the block's loss sees."""
        if self.unit.is_layer or self.settings.gamma == 0:
            return {}
        names = self.unit.layers[:-1] if self.settings.block else self.unit.layers
        return {name: self.rows.layers[name] for name in names if name in self.rows.layers}

    def loss(self, rows: Tensor, *, mixed: bool) -> Tensor:
        """The loss of some rows, int64 [n]. mixed: part of the input comes from the float run."""
        outputs = self._outputs(rows, mixed)
        block = self._block_error(outputs, rows, weighted=True)
        loss = self.settings.block * block if self.targets else block
        for name, target in self.targets.items():
            if self.layers[name].seen:
                loss = loss + self.settings.gamma * self._error(name, self.layers[name].seen[0], target[rows])
        return loss

    def _outputs(self, rows: Tensor, mixed: bool) -> dict[str, Tensor]:
        for layer in self.layers.values():
            layer.seen.clear()
        flat = self.rows.arguments(rows, self.mixing.mask if mixed else None)
        given = unflatten({path: self._placed(value) for path, value in flat.items()})
        positions = sorted((key for key in given if key.startswith("#")), key=lambda key: int(key[1:]))
        args = [given.pop(key) for key in positions]
        found = output_tensors(self.denoiser.get_submodule(self.unit.name)(*args, **given))
        return {path: found[path] for path in self.rows.outputs}

    def _placed(self, value: Any) -> Any:
        """An argument as one call takes it."""
        if isinstance(value, InMemory):
            return value.fresh()
        return value.to(self.device) if isinstance(value, Tensor) else value

    def _error(self, key: str, found: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Squared error over the target's mean energy; weight: of the elements of one row, mean 1."""
        error = (found.float() - target.to(found.device).float()).square()
        error = error if weight is None else error * weight.to(found.device)
        return error.sum() / (len(target) * self.energies[key])

    def _block_error(self, outputs: dict[str, Tensor], rows: Tensor, *, weighted: bool) -> Tensor:
        """Of the unit's outputs together. weighted: by what their elements matter, where that is known."""
        weights = self.sensitivity if weighted else {}
        errors = [self._error(p, out, self.rows.outputs[p][rows], weights.get(p)) for p, out in outputs.items()]
        return torch.stack(errors).sum()

    def learn(self, told: Callable[[int], None] | None = None) -> Learned:
        """told: called with the iterations done. Raises CalibrationError, naming the unit, for a loss that is not
        finite."""
        with evaluating(self.denoiser):
            before = self._judge(self._quantized(self.states))
            with in_place(self.denoiser, self.layers):
                self._optimise(before, told)
            soft = self._judge(self.layers)
            states = {name: layer.hardened() for name, layer in self.layers.items()}
            after = self._judge(self._quantized(states))
        return Learned(states if after < before else self.states, before, soft, after)

    def _quantized(self, states: dict[str, LayerState]) -> dict[str, QuantizedLayer]:
        return {name: quantize_layer(self.denoiser.get_submodule(name), state) for name, state in states.items()}

    def _optimise(self, before: float, told: Callable[[int], None] | None) -> None:
        chosen, optimizer = self.settings, self._optimizer()
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, chosen.iterations)
        for iteration in range(chosen.iterations):
            picked = torch.randint(len(self.learned_rows), (chosen.batch,), generator=self.generator)
            rows = self.learned_rows[picked]
            optimizer.zero_grad()
            loss = self.accumulate(rows, chosen.decide * before, iteration / chosen.iterations)
            if not math.isfinite(loss):
                raise CalibrationError(
                    f"reconstructing {self.unit.label!r}: the loss is {loss} in iteration {iteration}; lower the "
                    f"learning rates (weight_rate {chosen.weight_rate:g}, step_rate {chosen.step_rate:g}, vector_rate "
                    f"{chosen.vector_rate:g})"
                )
            optimizer.step()
            schedule.step()
            if told is not None:
                told(iteration + 1)

    def _optimizer(self) -> torch.optim.Optimizer:
        layers, chosen = list(self.layers.values()), self.settings
        learned = {
            "rounding": ([layer.rounding for layer in layers], chosen.weight_rate),
            "steps": ([layer.log_step for layer in layers], chosen.step_rate),
            "vectors": ([vector for layer in layers for vector in layer.vectors()], chosen.vector_rate),
        }
        groups = [([each for each in found if each is not None], rate) for found, rate in learned.values()]
        return torch.optim.Adam([{"params": found, "lr": rate} for found, rate in groups if found and rate])

    @torch.enable_grad()
    def accumulate(self, rows: Tensor, push: float, progress: float) -> float:
        """Adds the gradients of some rows, int64 [n], a few at a time; returns their loss. push: weight of the
        rounding's undecidedness; progress: share of the iterations that are done."""
        whole = 0.0
        for part in rows.split(self.rows_at_once):
            loss, undecided = self.loss(part, mixed=True), self._undecided(progress)
            share = len(part) / len(rows)
            (share * (loss if undecided is None else loss + push * undecided)).backward()
            whole += share * loss.item()
        return whole

    def _undecided(self, progress: float) -> Tensor | None:
        """How undecided the layers are, from the warm-up on ever more sharply told; their mean."""
        if progress < WARM_UP or not self.settings.decide or self.settings.rounding != "soft":
            return None
        start, end = SHARPNESS
        part = (progress - WARM_UP) / (1 - WARM_UP)
        sharpness = end + 0.5 * (start - end) * (1 + math.cos(part * math.pi))
        return torch.stack([layer.undecided(sharpness) for layer in self.layers.values()]).mean()

    @torch.no_grad()
    def _judge(self, layers: Mapping[str, nn.Module]) -> float:
        """Relative squared error of the unit's output with these layers, behind quantized ones, on rows that are not
        learned from; nothing is dropped or mixed."""
        share, self.drops.share = self.drops.share, 0.0
        error = 0.0
        with in_place(self.denoiser, layers):
            for rows in self.judged_rows.split(self.rows_at_once):
                outputs = self._outputs(rows, mixed=False)
                error += float(self._block_error(outputs, rows, weighted=False)) * len(rows)
        self.drops.share = share
        for layer in self.layers.values():
            layer.seen.clear()
        return error / len(self.judged_rows)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """The module with parameters that get no gradients while the context is open."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _energy(target: Tensor) -> float:
    """Mean energy of a row, never zero."""
    return max(energy(target) / len(target), torch.finfo(torch.float32).tiny)
