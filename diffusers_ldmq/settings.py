"""What the whole job is asked for and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .artifacts import Plan, Profile, Report
from .calls import Recording
from .companions import Companion
from .correction import DEFAULT
from .corrections import CORRECTIONS
from .data_free import PlanLike
from .errors import LDMQError
from .reconstruction import PRESETS, ReconstructionSettings
from .selections import Selection
from .tables import LayerTimes


@dataclass(frozen=True, slots=True)
class Settings:
    """What to do. calibration: which recorded steps calibrate, by name or a Selection such as TDAC(strength=5.0);
    keep_float: 'default', 'none' or comma-separated names; plan: given instead of planned;
    corrections: 'none', 'auto' (all kinds, on the layers that cause most noise) or comma-separated names;
    corrected_layers: how many of those that cause most noise are tried;
    reconstruction: learning of all rounding, block by block: 'none', 'quick' (minutes) or 'full', on samples chosen as
    for calibration, where those are of all steps;
    dtype: of the float rest and the layers' outputs (default: as loaded); seed: of the first recorded image;
    components: other models of the pipeline to quantize, name -> data-free scheme (none unless asked for)."""

    planner: str = "hybrid"
    scheme: str = "w8a8"
    calibration: str | Selection = "first-step"
    observer: str = "minmax-affine"
    keep_float: str = "default"
    corrections: str = "none"
    corrected_layers: int = 8
    reconstruction: str = "none"
    target: str | None = None
    plan: Plan | None = None
    dtype: torch.dtype | None = None
    seed: int = 0
    components: Mapping[str, PlanLike] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Everything the job measured and decided. profile: None where none was needed; times: None without a target on
    speed; companions: quantized models beside the denoiser."""

    recording: Recording
    profile: Profile | None
    plan: Plan
    report: Report
    times: LayerTimes | None = None
    companions: tuple[Companion, ...] = ()


def reconstruction_of(text: str) -> ReconstructionSettings | None:
    """Settings of 'quick' or 'full' reconstruction, None of 'none'. Raises LDMQError for others."""
    if text != "none" and text not in PRESETS:
        raise LDMQError(f"unknown reconstruction {text!r}; use one of none, {', '.join(PRESETS)}")
    return PRESETS.get(text)


def corrections_of(text: str) -> tuple[str, ...]:
    """Names of the corrections that 'none', 'auto' or a list with commas asks for. Raises LDMQError for others."""
    if text in ("none", "auto"):
        return () if text == "none" else DEFAULT
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        CORRECTIONS[name]
    return names
