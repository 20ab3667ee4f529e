"""The whole job in one call: record, profile, plan, calibrate, correct, quantize, verify, until the target holds."""

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .artifacts import Profile
from .calibration import check_plan
from .calls import Recording
from .closed_loop import Job
from .companions import companions, quantize_companions, recast, refuse_upcast
from .errors import LDMQError, PlanError, RecordingError
from .families import find_denoiser, layer_table, refuse_compiled
from .improving import sample_selection
from .observers import OBSERVERS
from .planners import PLANNERS, Target, candidates, fp32_bytes, parse_target, plan_bytes
from .planning import kept_layers
from .plugin import attach
from .profiling import ProfileSettings, profile_sqnr
from .progress import StageProgress as Progress
from .quantization import refuse_unfit
from .recording import record_calls, try_one_step
from .selections import find_selection
from .settings import Outcome, Settings, corrections_of, reconstruction_of
from .specs import parse_scheme
from .tables import LayerTable
from .timing import layer_times
from .verification import floating_dtype

__all__ = ["Outcome", "Progress", "Settings", "quantize_pipeline"]


def quantize_pipeline(
    pipe: Any,
    inputs: Sequence[dict[str, Any]],
    settings: Settings | None = None,
    *,
    reload: Callable[[], nn.Module] | None = None,
    memory: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Record, profile, plan, calibrate, correct, quantize and verify; the pipe's denoiser is quantized in place.

    The pipe should be float, best fp32. A target on SQNR is met on the 'select' set first and then checked on 'verify',
    one on speed is measured against the float model in its fastest dtype; if that misses it, another plan is made and
    the job repeated with the float denoiser that `reload` gives (default: copies kept in memory, where a target needs
    them). memory: a folder that keeps what a reconstruction has finished, so that an interrupted one goes on.
    Raises PlanError, saying by how much, if the target is missed for good, and LDMQError for unusable input; the
    pipe's denoiser may then be quantized already: load the pipe again.
    """
    settings = settings or Settings()
    told: Progress = progress or (lambda stage, done, whole: None)
    name, denoiser = find_denoiser(pipe)
    refuse_compiled(pipe)
    refuse_unfit(denoiser)
    target = parse_target(settings.target) if settings.target else None
    table = layer_table(denoiser)
    kept_layers(table, settings.keep_float)
    _refuse_unknown(settings)
    if settings.plan is not None:
        check_plan(settings.plan, denoiser)
    if target is not None:
        _refuse_size(settings, table, target)
    quantize_companions(pipe, settings.components)
    refuse_upcast(pipe, settings.dtype)
    if reload is None and target is not None:
        original = deepcopy(denoiser)
        reload = lambda: deepcopy(original)  # noqa: E731
    sampled = sample_selection(settings)
    recording = record_calls(pipe, inputs, selection=sampled, seed=settings.seed, progress=_stage(told, "record"))
    profile = _profile(denoiser, recording, settings, target, told)
    times = None
    if target is not None and target.min_speedup is not None and reload is not None:
        told("time layers", 0, 1)
        batch = recording.batch(recording.only("select").calls[0])
        timed = tuple(scheme for scheme in candidates(settings.scheme) if scheme != "float")
        times = layer_times(reload, batch, timed, settings.dtype or floating_dtype(denoiser))
        told("time layers", 1, 1)
    job = Job(recording, table, profile, times, settings, target, told, None if memory is None else Path(memory))
    outcome, denoiser = job.until_met(denoiser, reload)
    pipe.register_modules(**{name: denoiser})
    attach(denoiser)
    settle(pipe, name, settings.dtype)
    if settings.dtype is not None:
        _refuse_unusable(pipe, inputs[0], settings.dtype)
    return replace(outcome, companions=companions(pipe))


def _refuse_unknown(settings: Settings) -> None:
    """Raise LDMQError for a name that nothing has, before anything slow."""
    PLANNERS[settings.planner]
    OBSERVERS[settings.observer]
    find_selection(settings.calibration)
    corrections_of(settings.corrections)
    reconstruction_of(settings.reconstruction)
    parse_scheme(settings.scheme)


def _stage(told: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, whole: told(stage, done, whole)


def _profile(
    denoiser: nn.Module, recording: Recording, settings: Settings, target: Target | None, told: Progress
) -> Profile | None:
    """A profile where the planner or a target that may need raising wants one."""
    decided = settings.planner == "uniform" or settings.plan is not None
    raisable = target is not None and target.min_sqnr_db is not None
    if decided and not raisable and not corrections_of(settings.corrections):
        return None
    kept = kept_layers(layer_table(denoiser), settings.keep_float)
    given = settings.plan.quantized().values() if settings.plan else ()
    wanted = ProfileSettings(
        scheme=settings.scheme,
        schemes=tuple(dict.fromkeys((*ProfileSettings().schemes, *given))),
        selection=settings.calibration,
        observer=settings.observer,
        keep_float=kept,
    )
    return profile_sqnr(denoiser, recording, wanted, progress=_stage(told, "profile"))


def _refuse_size(settings: Settings, table: LayerTable, target: Target) -> None:
    """Raise PlanError before anything slow for a size that the scheme cannot reach."""
    kept = kept_layers(table, settings.keep_float)
    if kept is None:
        kept = {i.name for i in table.layers if i.keep_float} if settings.planner == "hybrid" else set()
    limit = target.byte_limit(table)
    least = plan_bytes(table, {info.name: settings.scheme for info in table.layers if info.name not in kept})
    if settings.plan is None and limit is not None and least > limit:
        raise PlanError(
            f"target {target.text!r} cannot be met: the smallest {settings.scheme} plan takes {least / 1e6:.1f} MB "
            f"({least / fp32_bytes(table):.3f}x of fp32); choose a smaller scheme such as w4a8, --keep-float none or a "
            f"larger target"
        )


def _refuse_unusable(pipe: Any, inputs: dict[str, Any], dtype: torch.dtype) -> None:
    """Verification replays calls at the right dtype; only sampling shows that a pipeline makes others."""
    try:
        try_one_step(pipe, inputs)
    except RecordingError as cause:
        raise LDMQError(f"{type(pipe).__name__} cannot sample in {dtype}; choose float32 ({cause})") from cause


def settle(pipe: Any, denoiser_name: str, dtype: torch.dtype | None) -> None:
    """Make everything around a quantized denoiser fit it: other models in `dtype` (None: as they are), no paths of
    this machine in what will be saved."""
    for part in (pipe, getattr(pipe, denoiser_name)):
        forget_path(part)
    for name, component in pipe.components.items():
        if dtype is not None and isinstance(component, nn.Module) and name != denoiser_name:
            recast(component, dtype)


def forget_path(part: Any) -> None:
    """Of a local source folder only its name is kept: what is shared should not tell the user's paths."""
    source = str(part.config.get("_name_or_path") or "")
    if source and Path(source).exists():
        part.register_to_config(_name_or_path=Path(source).resolve().name)
