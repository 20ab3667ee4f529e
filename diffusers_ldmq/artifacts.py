"""What stages hand to each other: frozen dataclasses, JSON or safetensors on disk, each with a format_version."""

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .errors import PlanError
from .metrics import Power, total
from .serialization import from_json, read_json, to_json, write_json
from .specs import LayerState, parse_scheme
from .tables import LayerTable

FORMAT_VERSION = 1
TOGETHER = "all layers together"
"""Stands for a unit where the scales of all were learned at the denoiser's output."""


@dataclass(frozen=True, slots=True)
class LayerNoise:
    """Relative noise of one layer on the float run's own input, per profiled timestep.

    signal: [T] power of the layer's float output; noise: scheme -> [T] power of its error under that scheme.
    The key 'w8a16' is weight noise alone, 'a8' activation noise alone (weight left float).
    own: scheme -> [T] noise power that this layer alone causes at the denoiser's output (its own effect).
    """

    name: str
    signal: tuple[float, ...]
    noise: dict[str, tuple[float, ...]]
    own: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def power(self, scheme: str) -> Power:
        """Signal and noise power over all profiled timesteps."""
        return Power(sum(self.signal), sum(self.noise[scheme]))


@dataclass(frozen=True, slots=True)
class BlockCurve:
    """Accumulated noise at the denoiser's output as group after group of blocks is quantized.

    groups: names of the blocks that each of the G points adds, in execution order; signal: [T] power of the float
    output; noise: [G][T]. Direction 'forward': row g = groups 0..g in `scheme` (in its dynamic twin where the static
    range is bad, see planners.low_precision), the rest float; 'backward': row g = groups g.. in `scheme`.
    part: 'weight' = weights alone rounded, 'activation' = inputs alone.
    """

    scheme: str
    signal: tuple[float, ...]
    noise: tuple[tuple[float, ...], ...]
    groups: tuple[tuple[str, ...], ...]
    direction: str = "forward"
    part: str = "both"

    def nsr(self) -> list[float]:
        """[G] noise-to-signal power N_g over all profiled timesteps."""
        signal = sum(self.signal)
        return [sum(row) / signal for row in self.noise]


@dataclass(frozen=True, slots=True)
class Profile:
    """Where quantization noise arises. timesteps: [T] profiled ones, noisiest first; settings: how it was measured.

    curve: forward, weights and activations together; curves: the others that `ldmq profile --full` adds.
    shared: layers that read one and the same tensor and stand side by side (q, k, v), which plans treat alike.
    schedule: every timestep of the recorded run, noisiest first; the profiled ones are some of them.
    """

    table: LayerTable
    timesteps: tuple[float, ...]
    layers: tuple[LayerNoise, ...]
    curve: BlockCurve
    settings: dict[str, Any]
    shared: tuple[tuple[str, ...], ...] = ()
    schedule: tuple[float, ...] = ()
    curves: tuple[BlockCurve, ...] = ()
    format_version: int = FORMAT_VERSION

    def noise_of(self, name: str) -> LayerNoise:
        """The layer's measured noise. Raises PlanError if the profile lacks it."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise PlanError(f"the profile has no layer {name!r}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write profile.json."""
        write_json(path, self)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Profile":
        """Read profile.json. Raises PlanError if it is none."""
        data = _versioned(read_json(path, PlanError), "profile", path)
        return from_json(Profile, data, PlanError, f"{path}: profile")


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The scheme of one layer and the reason for it."""

    scheme: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Scheme per layer name, with the reason for each.

    denoiser, fingerprint: the model it was made for; planner, target: what made it;
    reasons: what the planner saw (delta_n per block, threshold, cut-off, ...); predicted_sqnr_db: at the output.
    """

    denoiser: str
    fingerprint: str
    planner: str
    layers: dict[str, LayerChoice]
    target: str | None = None
    reasons: dict[str, Any] = field(default_factory=dict)
    predicted_sqnr_db: float | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name, choice in self.layers.items():
            try:
                parse_scheme(choice.scheme)
            except ValueError as cause:
                raise PlanError(f"plan, layer {name!r}: {cause}") from None

    def quantized(self) -> dict[str, str]:
        """Layer name -> scheme of every layer that is not float."""
        return {name: choice.scheme for name, choice in self.layers.items() if choice.scheme != "float"}

    def counts(self) -> dict[str, int]:
        """Scheme -> number of layers."""
        return dict(Counter(choice.scheme for choice in self.layers.values()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write plan.json."""
        write_json(path, self)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Plan":
        """Read plan.json. Raises PlanError if it is none."""
        return Plan.from_dict(read_json(path, PlanError), str(path))

    @staticmethod
    def from_dict(data: Any, where: str = "plan") -> "Plan":
        """The plan that plan.json holds as `data`. where: what errors call it. Raises PlanError if it is none."""
        return from_json(Plan, _versioned(data, "plan", where), PlanError, f"{where}: plan")

    def to_dict(self) -> dict[str, Any]:
        """What plan.json holds."""
        return to_json(self)


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The state of every layer that the plan quantizes.

    samples: rows of recorded calls that were seen; forward_calls: denoiser calls made for it;
    sampler_calls: denoiser calls that the sampler had to make to obtain the samples.
    """

    plan: Plan
    states: dict[str, LayerState]
    selection: str
    observer: str
    samples: int
    forward_calls: int
    sampler_calls: int


@dataclass(frozen=True, slots=True)
class Trial:
    """What one correction did to one layer. correction: its name, or 'smooth + bias' for bias on top of another.

    layer_db, output_db: relative SQNR at the layer and output SQNR of the denoiser on held-out calls, (without, with)
    it; output_db is None where the model gate was not reached. kept: it is part of the calibration; reason: why, or
    why not, in words.
    """

    layer: str
    correction: str
    layer_db: tuple[float, ...]
    output_db: tuple[float, ...] | None
    kept: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Reconstructed:
    """What learning the rounding of one unit brought, as SQNR in dB of its own output behind quantized layers, on
    samples that it did not learn from.

    unit: its name, or TOGETHER; layers: how many it has; before: as it was given; soft: as learned, undecided where
    rounding is soft; after: as it runs; kept: it is better than before and part of the calibration.
    """

    unit: str
    layers: int
    before_db: float
    soft_db: float
    after_db: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Report:
    """What verification measured at the denoiser's output, on calls that nothing before it saw.

    timesteps, signal, noise: [T], one entry per recorded timestep; dtype: of the verified denoiser.
    int8_macs: share of the Linear and Conv2d multiply-accumulates that run integer x integer.
    bytes: of the denoiser's stored weights; fp32_bytes: of the same model at fp32. corrections: all that were tried;
    reconstruction: every unit whose rounding was learned;
    speedup: of a call over the float model's in its fastest dtype, where a target asked for it.
    """

    timesteps: tuple[float, ...]
    signal: tuple[float, ...]
    noise: tuple[float, ...]
    dtype: str
    schemes: dict[str, int]
    backends: dict[str, int]
    int8_macs: float
    bytes: int
    fp32_bytes: int
    calibration: dict[str, Any] = field(default_factory=dict)
    corrections: tuple[Trial, ...] = ()
    reconstruction: tuple[Reconstructed, ...] = ()
    speedup: float | None = None
    format_version: int = FORMAT_VERSION

    @property
    def sqnr_db(self) -> float:
        """Output SQNR in dB: powers summed over all recorded calls."""
        return total([Power(s, n) for s, n in zip(self.signal, self.noise, strict=True)]).sqnr_db

    def curve_db(self) -> list[float]:
        """[T] output SQNR in dB per timestep."""
        return [Power(s, n).sqnr_db for s, n in zip(self.signal, self.noise, strict=True)]

    def worst(self) -> tuple[float, float]:
        """(timestep, output SQNR in dB) of the worst timestep."""
        db, timestep = min(zip(self.curve_db(), self.timesteps, strict=True))
        return timestep, db

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write report.json."""
        write_json(path, self)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Report":
        """Read report.json. Raises PlanError if it is none."""
        return from_json(Report, _versioned(read_json(path, PlanError), "report", path), PlanError, f"{path}: report")


KINDS = {"profile": "curve", "plan": "planner", "report": "signal"}
"""What a file is -> the key that only such a file has."""
MADE_BY = {
    "profile": "`ldmq profile MODEL` makes one",
    "plan": "`ldmq plan PROFILE.json` makes one",
    "report": "`ldmq quantize` makes one",
}


def _versioned(data: Any, what: str, where: str | os.PathLike[str]) -> Any:
    """`data`, if its format_version is one that this library reads. Raises PlanError."""
    version = data.get("format_version") if isinstance(data, dict) else None
    found = next((kind for kind, key in KINDS.items() if isinstance(data, dict) and key in data), None)
    if found not in (None, what):
        raise PlanError(f"{where}: is a {found}, a {what} is expected; {MADE_BY[what]}")
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise PlanError(
            f"{where}: not a {what} that this version reads (format_version {version!r}, expected 1 to "
            f"{FORMAT_VERSION}); {MADE_BY[what]}"
        )
    return data
