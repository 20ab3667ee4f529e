"""What is done to a calibration before it is used: the worst layers corrected, all rounding learned."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from .artifacts import Calibration, Profile, Reconstructed, Trial
from .calls import Recording
from .correction import correct
from .planners import Target, plan_bytes, predict
from .progress import StageProgress
from .reconstruction import fitted, reconstruct
from .selections import Selection, find_selection, first_step
from .settings import Settings, corrections_of, reconstruction_of
from .tables import LayerTable


@dataclass(frozen=True, slots=True, eq=False)
class Improved:
    """A calibration, and what was tried on it."""

    calibration: Calibration
    trials: tuple[Trial, ...]
    reconstruction: tuple[Reconstructed, ...]


def improves(settings: Settings) -> bool:
    """True if something is to be done to a calibration."""
    return settings.corrections != "none" or settings.reconstruction != "none"


def sample_selection(settings: Settings) -> str | Selection:
    """What chooses the samples that are recorded and learned from: as for calibration, but learning needs all steps."""
    chosen = reconstruction_of(settings.reconstruction)
    first_only = find_selection(settings.calibration) is first_step
    return chosen.selection if chosen is not None and first_only else settings.calibration


@dataclass(frozen=True, slots=True, eq=False)
class Improver:
    """Corrects and reconstructs as the settings ask; fields as in closed_loop.Job."""

    recording: Recording
    table: LayerTable
    profile: Profile | None
    settings: Settings
    target: Target | None
    told: StageProgress

    def improve(self, denoiser: nn.Module, calibration: Calibration, memory: Path | None) -> Improved:
        """The calibration corrected, then reconstructed; memory as there. Raises as correct and reconstruct."""
        calibration, trials = self._corrected(denoiser, calibration)
        chosen = reconstruction_of(self.settings.reconstruction)
        if chosen is None:
            return Improved(calibration, trials, ())
        chosen, told = replace(chosen, seed=self.settings.seed, selection=sample_selection(self.settings)), self.told
        chosen = fitted(chosen, self.recording)
        if memory is not None:  # plans may be raised: each has its own
            schemes = json.dumps(calibration.plan.quantized(), sort_keys=True)
            memory = memory / hashlib.sha256(schemes.encode()).hexdigest()[:8]
        calibration, units = reconstruct(
            denoiser,
            calibration,
            self.recording,
            chosen,
            memory=memory,
            progress=lambda done, whole: told("reconstruct", done, whole),
        )
        return Improved(calibration, trials, units)

    def _corrected(self, denoiser: nn.Module, calibration: Calibration) -> tuple[Calibration, tuple[Trial, ...]]:
        names, told = corrections_of(self.settings.corrections), self.told
        if not names or self.profile is None:
            return calibration, ()
        effects, schemes = predict(self.profile).total, calibration.plan.quantized()
        ranked = sorted(schemes, key=lambda name: -effects[name].get(schemes[name], 0.0))
        limit = self.target.byte_limit(self.table) if self.target else None
        if self.target is not None and self.target.min_integer_share is not None:
            names = tuple(name for name in names if name != "low-rank")  # its branch is float work
        return correct(
            denoiser,
            calibration,
            self.recording,
            layers=ranked[: self.settings.corrected_layers],
            corrections=names,
            selection=self.settings.calibration,
            most_bytes=None if limit is None else max(limit - plan_bytes(self.table, schemes), 0),
            progress=lambda done, whole: told("correct", done, whole),
        )
