"""The whole job in one call: record, profile, plan, calibrate, quantize, verify, and again with a higher plan where a
target was missed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .allocator import give_back
from .artifacts import Calibration, Plan, Profile, Report
from .calibration import calibrate, check_plan
from .calls import Recording
from .errors import LDMQError, PlanError, RecordingError
from .families import find_denoiser, layer_table
from .planners import Target, parse_target, plan_bytes
from .planning import kept_layers, make_plan, meets_size, raise_plan
from .plugin import attach
from .profiling import ProfileSettings, profile_sqnr
from .progress import StageProgress as Progress
from .quantization import quantize, quantized_for_now, refuse_unfit
from .recording import record_calls, try_one_step
from .verification import verify

MARGIN_DB = 0.25
"""What a plan must spare beyond the gap between the sets once it has missed its target."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to do. keep_float: 'default', 'none' or comma-separated names; plan: given instead of planned;
    dtype: of the float rest and the layers' outputs (default: as loaded); seed: of the first recorded image."""

    planner: str = "hybrid"
    scheme: str = "w8a8"
    calibration: str = "first-step"
    observer: str = "minmax-affine"
    keep_float: str = "default"
    target: str | None = None
    plan: Plan | None = None
    dtype: torch.dtype | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Everything the job measured and decided. profile: None where none was needed."""

    recording: Recording
    profile: Profile | None
    plan: Plan
    report: Report


def quantize_pipeline(
    pipe: Any,
    inputs: Sequence[dict[str, Any]],
    settings: Settings | None = None,
    *,
    reload: Callable[[], nn.Module] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Record, profile, plan, calibrate, quantize and verify; the pipe's denoiser is quantized in place.

    The pipe should be float, best fp32. A target is met on the 'select' set first and then checked on 'verify'; if
    that misses it, the plan is raised and the job repeated with the float denoiser that `reload` gives.
    Raises PlanError, saying by how much, if the target is missed for good, and LDMQError for unusable input; the
    pipe's denoiser may then be quantized already: load the pipe again.
    """
    settings = settings or Settings()
    told: Progress = progress or (lambda stage, done, whole: None)
    name, denoiser = find_denoiser(pipe)
    refuse_unfit(denoiser)
    target = parse_target(settings.target) if settings.target else None
    table = layer_table(denoiser)
    kept_layers(table, settings.keep_float)
    if settings.plan is not None:
        check_plan(settings.plan, denoiser)
    recording = record_calls(
        pipe, inputs, selection=settings.calibration, seed=settings.seed, progress=_stage(told, "record")
    )
    profile = _profile(denoiser, recording, settings, target, told)
    plan = settings.plan or _plan(profile or table, settings)
    if target is not None and not meets_size(plan, table, target):
        least = plan_bytes(table, plan.quantized())
        raise PlanError(
            f"target {target.text!r} is missed by the plan given, which takes {least / 1e6:.1f} MB; plan again"
        )
    job = _Job(recording, profile, settings, target, told)
    outcome = job.run(denoiser, job.raised_on_select(denoiser, plan))
    while not (short := _short(target, outcome.report)) <= 0:
        plan = raise_plan(outcome.plan, profile) if profile else None
        if reload is None or plan is None:
            raise PlanError(
                f"target {settings.target!r} is missed by {short:.1f} dB on held-out calls "
                f"({outcome.report.sqnr_db:.1f} dB measured); lower the target or choose another --scheme or --dtype"
            )
        denoiser = reload()
        gap = outcome.plan.reasons["measured_on_select_db"] - outcome.report.sqnr_db
        outcome = job.run(denoiser, job.raised_on_select(denoiser, plan, margin=max(gap, 0.0) + MARGIN_DB))
    pipe.register_modules(**{name: denoiser})
    attach(denoiser)
    for part in (pipe, denoiser):
        _forget_path(part)
    if settings.dtype is not None:
        _cast_others(pipe, name, settings.dtype)
        _refuse_unusable(pipe, inputs[0], settings.dtype)
    return outcome


@dataclass(frozen=True, slots=True)
class _Job:
    """What stays the same while plans are tried."""

    recording: Recording
    profile: Profile | None
    settings: Settings
    target: Target | None
    told: Progress

    def calibrated(self, denoiser: nn.Module, plan: Plan) -> Calibration:
        chosen = self.settings
        return calibrate(
            denoiser,
            plan,
            self.recording,
            selection=chosen.calibration,
            observer=chosen.observer,
            progress=_stage(self.told, "calibrate"),
        )

    def raised_on_select(self, denoiser: nn.Module, plan: Plan, margin: float = 0.0) -> Plan:
        """The plan, raised until an SQNR target holds on the 'select' set with a margin in dB to spare: other calls
        and the compute dtype may cost that much. Raises PlanError if the target itself cannot be met."""
        if self.target is None or self.target.min_sqnr_db is None:
            return plan
        while True:
            with quantized_for_now(denoiser, self.calibrated(denoiser, plan)):
                report = verify(denoiser, self.recording, on="select", progress=_stage(self.told, "check target"))
            short = _short(self.target, report)
            raised = raise_plan(plan, self.profile) if self.profile else None
            if short + margin <= 0 or (raised is None and short <= 0):
                reasons = {**plan.reasons, "measured_on_select_db": report.sqnr_db}
                return replace(plan, reasons=reasons, target=self.target.text)
            if raised is None:
                raise PlanError(
                    f"target {self.target.text!r} cannot be met: the best plan reaches {report.sqnr_db:.1f} dB, "
                    f"{short:.1f} dB short; lower the target"
                )
            plan = raised

    def run(self, denoiser: nn.Module, plan: Plan) -> Outcome:
        """Calibrate, quantize in place and verify."""
        give_back()
        facts = self._quantized(denoiser, plan)
        give_back()
        report = verify(denoiser, self.recording, progress=_stage(self.told, "verify"))
        return Outcome(self.recording, self.profile, plan, replace(report, calibration=facts))

    def _quantized(self, denoiser: nn.Module, plan: Plan) -> dict[str, Any]:
        """Facts of the calibration; the plain codes it held end here, so that only the packed ones live on."""
        calibration = self.calibrated(denoiser, plan)
        quantize(denoiser, calibration, dtype=self.settings.dtype, progress=_stage(self.told, "quantize"))
        return {
            "selection": calibration.selection,
            "observer": calibration.observer,
            "samples": calibration.samples,
            "forward_calls": calibration.forward_calls,
            "sampler_calls": calibration.sampler_calls,
        }


def _short(target: Target | None, report: Report) -> float:
    """By how many dB an SQNR target is missed; 0 or less where it holds or there is none."""
    return 0.0 if target is None or target.min_sqnr_db is None else target.min_sqnr_db - report.sqnr_db


def _stage(told: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, whole: told(stage, done, whole)


def _profile(
    denoiser: nn.Module, recording: Recording, settings: Settings, target: Target | None, told: Progress
) -> Profile | None:
    """A profile where the planner or a target that may need raising wants one."""
    if settings.planner == "uniform" and target is None or settings.plan is not None and target is None:
        return None
    kept = kept_layers(layer_table(denoiser), settings.keep_float)
    wanted = ProfileSettings(
        scheme=settings.scheme, selection=settings.calibration, observer=settings.observer, keep_float=kept
    )
    return profile_sqnr(denoiser, recording, wanted, progress=_stage(told, "profile"))


def _plan(source: Any, settings: Settings) -> Plan:
    return make_plan(
        source, settings.target, planner=settings.planner, scheme=settings.scheme, keep_float=settings.keep_float
    )


def _refuse_unusable(pipe: Any, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    """Verification replays calls at the right dtype; only sampling shows that a pipeline makes others."""
    try:
        try_one_step(pipe, inputs)
    except RecordingError as cause:
        raise LDMQError(f"{type(pipe).__name__} cannot sample in {dtype}; choose float32 ({cause})") from cause


def _cast_others(pipe: Any, denoiser_name: str, dtype: torch.dtype) -> None:
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module) and name != denoiser_name:
            component.to(dtype)


def _forget_path(part: Any) -> None:
    """Of a local source folder only its name is kept: what is shared should not tell the user's paths."""
    source = str(part.config.get("_name_or_path") or "")
    if source and Path(source).exists():
        part.register_to_config(_name_or_path=Path(source).resolve().name)
