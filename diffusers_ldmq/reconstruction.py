"""Stage 4c: learn the rounding of weights and the steps of activations, block by block, so that every block gives what
the float one gives, then all scales together, so that the denoiser does.

Source: fine-grained block reconstruction of EDA-DM (arXiv 2401.04585), loss = block + gamma * its layers. Ours: every
loss is relative to its target's energy, so that one gamma serves all models; one forward per iteration, because the
layers' targets are kept; weights are rounded all along, so that what was learned is what runs.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from .activations import ActivationStore, UnitRows, gather_exact, windows, with_rounded
from .artifacts import Calibration, Reconstructed
from .calibration import check_plan
from .calls import Batch, Recording
from .errors import CalibrationError
from .finishing import all_together
from .layers import QuantizedLayer, quantize_layer
from .learning import Learned, LearningSettings, UnitLearner, frozen
from .metrics import sqnr_db
from .progress import Progress
from .quantization import refuse_unfit
from .reconstruction_memory import ReconstructionMemory, identity_of
from .selections import Selection, find_selection, selection_name
from .sensitivity import output_sensitivity
from .specs import LayerState, check_state, geometry_of
from .stacking import stacked
from .units import Unit, find_units

ROWS = 32
"""Rows of one run of the denoiser, about."""


@dataclass(frozen=True, slots=True)
class ReconstructionSettings:
    """How to reconstruct. learning: of every unit; samples: of the recording's calibrating set; selection: which;
    weighting: of a block's error, 'plain' as EDA-DM's released code or 'hessian' as BRECQ's; together: iterations in
    which the scales of all layers are learned at the denoiser's output after that, 0 or a vector_rate of 0 = none;
    together_samples: for these, as far as there are so many; memory_bytes: activations held in memory, beyond which
    they lie in files."""

    learning: LearningSettings = field(default_factory=LearningSettings)
    samples: int = 256
    selection: str | Selection = "normal"
    weighting: Literal["plain", "hessian"] = "plain"
    seed: int = 0
    together: int = 160
    together_samples: int = 1024
    memory_bytes: int = 2**31

    def __post_init__(self) -> None:
        if self.samples < 1 or self.memory_bytes < 0 or self.weighting not in ("plain", "hessian"):
            raise CalibrationError(
                f"samples={self.samples}, memory_bytes={self.memory_bytes}, weighting={self.weighting!r}: expected at "
                f"least one sample, no negative budget and the weighting 'plain' or 'hessian'"
            )
        if self.together < 0 or self.together_samples < 1:
            raise CalibrationError(
                f"together={self.together}, together_samples={self.together_samples}: expected no negative number of "
                f"iterations and at least one sample"
            )

    @property
    def finishes(self) -> bool:
        """True where all layers are learned together after their blocks."""
        return self.together > 0 and self.learning.vector_rate > 0


def fitted(settings: ReconstructionSettings, recording: Recording) -> ReconstructionSettings:
    """The settings with as many samples as there are steps at least, and batches no larger than what was recorded."""
    calibrating = recording.only("calibrate")
    rows = sum(recording.tensors[call.output].shape[0] for call in calibrating.calls)
    every = len(calibrating.samples())
    steps = len(calibrating.timesteps())
    samples, together = (min(max(n, steps), every) for n in (settings.samples, settings.together_samples))
    batch = max(1, min(settings.learning.batch, rows * samples // every))
    learning = replace(settings.learning, batch=batch)
    return replace(settings, samples=samples, together_samples=together, learning=learning)


QUICK = ReconstructionSettings(LearningSettings(iterations=120), samples=128, together=40, together_samples=512)
"""For minutes."""
FULL = ReconstructionSettings()
"""For results."""
PRESETS = {"quick": QUICK, "full": FULL}


def reconstruct(
    denoiser: nn.Module,
    calibration: Calibration,
    recording: Recording,
    settings: ReconstructionSettings | None = None,
    *,
    memory: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> tuple[Calibration, tuple[Reconstructed, ...]]:
    """The calibration with learned weight codes and scales, and what every unit gained, then (TOGETHER) all of them at
    the output. The denoiser is the float one, best in fp32, and unchanged afterwards; corrections that the states have
    stay.

    A unit that learning made no better keeps its states. memory: a folder in which finished units are kept, so that an
    interrupted reconstruction goes on; the result is the same. Weights and inputs must be recorded at all steps
    (record_calls with another selection than 'first-step').

    Raises CalibrationError for unusable settings or samples and, naming the unit, a loss that is not finite (what was
    finished before stays in `memory`); CheckpointError for a memory of another model, recording or other settings;
    OutputError for a full disk; LDMQError for a denoiser that is quantized already.
    """
    settings = settings or FULL
    refuse_unfit(denoiser)
    check_plan(calibration.plan, denoiser)
    for name, state in calibration.states.items():
        check_state(state, geometry_of(denoiser.get_submodule(name)))
    batches = calibrating_batches(recording, settings)
    units = find_units(denoiser, calibration.states, batches[0])
    job = _Job(denoiser, recording, batches, settings, calibration.states, units)
    told = replace(settings, selection=selection_name(settings.selection))
    kept = ReconstructionMemory(None)
    if memory is not None:
        kept = ReconstructionMemory.at(memory, identity_of(denoiser, calibration.states, recording, told))
    states, figures = dict(calibration.states), list[Reconstructed]()
    with frozen(denoiser):
        for new, found in job.learned(kept, progress):
            states |= new
            figures.append(found)
    return replace(calibration, states=states), tuple(figures)


def calibrating_batches(recording: Recording, settings: ReconstructionSettings) -> list[Batch]:
    """The chosen samples of the calibrating set, about ROWS rows a batch. Raises CalibrationError where they are fewer
    than the steps or than the rows of an iteration."""
    steps = len(recording.only("calibrate").timesteps())
    if settings.samples < steps:
        raise CalibrationError(
            f"samples={settings.samples} is less than the {steps} steps of the recording; take at least one of each"
        )
    batches = _picked_batches(recording, settings, settings.samples)
    rows = sum(batch.output.shape[0] for batch in batches)
    if settings.learning.batch > rows:
        raise CalibrationError(
            f"an iteration takes batch={settings.learning.batch} rows, more than the {rows} rows of the "
            f"samples; record more inputs or lower the batch"
        )
    return batches


def _picked_batches(recording: Recording, settings: ReconstructionSettings, samples: int) -> list[Batch]:
    calibrating = recording.only("calibrate")
    picked = list(find_selection(settings.selection)(calibrating, samples))
    if not picked:
        raise CalibrationError(f"the selection {selection_name(settings.selection)!r} chose no sample at all")
    return list(stacked(calibrating.batches(picked), ROWS))


@dataclass(slots=True)
class _Job:
    """Everything that stays the same from unit to unit. folder: where activations beyond the budget lie, None = where
    the system keeps such files; learned_states, before: of the units that are finished, and their quantized layers."""

    denoiser: nn.Module
    recording: Recording
    batches: list[Batch]
    settings: ReconstructionSettings
    states: dict[str, LayerState]
    units: Sequence[Unit]
    folder: Path | None = None
    learned_states: dict[str, LayerState] = field(default_factory=dict)
    before: dict[str, nn.Module] = field(default_factory=dict)

    def learned(
        self, memory: ReconstructionMemory, progress: Progress | None
    ) -> Iterator[tuple[dict[str, LayerState], Reconstructed]]:
        """(states, figures) of unit after unit, then of all together, remembered or learned now."""
        yield from self._units_learned(memory, progress)
        if self.settings.finishes:
            yield self._learned_together(memory, progress)

    def _cost(self) -> int:
        """Iterations of units that one of all together costs: it has half as many rows."""
        return max(1, len(self.units) // 2)

    def _whole(self) -> int:
        """Iterations in all."""
        together = self.settings.together * self._cost() if self.settings.finishes else 0
        return len(self.units) * self.settings.learning.iterations + together

    def _units_learned(
        self, memory: ReconstructionMemory, progress: Progress | None
    ) -> Iterator[tuple[dict[str, LayerState], Reconstructed]]:
        whole, first = self._whole(), 0
        for index, unit in enumerate(self.units):  # what is remembered comes before all that is not
            found = memory.load(index, unit, self.states, self.denoiser)
            if found is None:
                break
            first = index + 1
            self._put(found[0])
            yield found
        if first == len(self.units):
            return
        self.folder = memory.folder
        sensitivity = self._sensitivity()
        for index, rows in self._rows(first):
            done = index * self.settings.learning.iterations
            told = (lambda n, done=done: progress(done + n, whole)) if progress else None
            found = self._learner(index, rows, sensitivity).learn(told)
            figures = figures_of(self.units[index], found)
            memory.save(index, found.states, figures)
            self._put(found.states)
            yield found.states, figures

    def _learned_together(
        self, memory: ReconstructionMemory, progress: Progress | None
    ) -> tuple[dict[str, LayerState], Reconstructed]:
        index, unit, settings = len(self.units), Unit("", tuple(self.states)), self.settings
        found = memory.load(index, unit, self.states, self.denoiser)
        if found is not None:
            return found
        batches = _picked_batches(self.recording, settings, self._samples_together())
        learning = replace(settings.learning, iterations=settings.together)
        whole, cost = self._whole(), self._cost()
        done = whole - settings.together * cost
        told = (lambda n: progress(done + n * cost, whole)) if progress else None
        with ActivationStore.open(settings.memory_bytes, memory.folder) as store:
            dice = self._generator(index)
            learned = all_together(self.denoiser, self.learned_states, batches, learning, store, dice).learn(told)
        figures = figures_of(unit, learned)
        memory.save(index, learned.states, figures)
        return learned.states, figures

    def _samples_together(self) -> int:
        return min(self.settings.together_samples, len(self.recording.only("calibrate").samples()))

    def _rows(self, first: int) -> Iterator[tuple[int, UnitRows]]:
        """(index, rows) of the units from `first` on, whose activations lie in memory as many at a time as fit."""
        count, half = sum(batch.output.shape[0] for batch in self.batches), self.settings.memory_bytes // 2
        index = first
        for window in windows(self.denoiser, self.units[first:], self.batches[0], count, half):
            with ActivationStore.open(self.settings.memory_bytes, self.folder) as store:
                exact = gather_exact(self.denoiser, window, self.batches, store)
                for unit in window:
                    rows = exact.pop(unit.name)
                    with store.passing():
                        yield index, with_rounded(rows, self.denoiser, unit, self.batches, self.before, store)
                    index += 1

    def _learner(self, index: int, rows: UnitRows, sensitivity: dict[str, dict[str, Tensor]]) -> UnitLearner:
        unit = self.units[index]
        states = {name: self.states[name] for name in unit.layers}
        learner = UnitLearner(self.denoiser, unit, rows, states, self.settings.learning, self._generator(index))
        learner.sensitivity = sensitivity.get(unit.name, {})
        return learner

    def _generator(self, index: int) -> torch.Generator:
        """A unit's own, so that it learns the same whether or not those before it were learned in this process."""
        return torch.Generator().manual_seed(1_000_003 * self.settings.seed + index)

    def _sensitivity(self) -> dict[str, dict[str, Tensor]]:
        if self.settings.weighting == "plain":
            return {}
        return output_sensitivity(self.denoiser, self.units, self.batches, self._quantized(self.states))

    def _quantized(self, states: dict[str, LayerState]) -> dict[str, QuantizedLayer]:
        return {name: quantize_layer(self.denoiser.get_submodule(name), state) for name, state in states.items()}

    def _put(self, states: dict[str, LayerState]) -> None:
        self.learned_states |= states
        self.before |= self._quantized(states)


def figures_of(unit: Unit, learned: Learned) -> Reconstructed:
    """What a unit gained, in dB at its own output."""
    before, soft, after = (sqnr_db(1.0, error) for error in (learned.before, learned.soft, learned.after))
    return Reconstructed(unit.label, len(unit.layers), before, soft, after, learned.after < learned.before)
