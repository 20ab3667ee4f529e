"""QuantizedLDMPipeline: any diffusers pipeline with a quantized denoiser, computed or loaded; and pipelines on disk."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from .artifacts import Plan, Profile, Report
from .checkpoints import (
    HUB_OPTIONS,
    SAVING_OPTIONS,
    SIDE_FILES,
    known,
    original_name,
    refuse_unknown,
    side_files,
    stored_config,
)
from .demo import MODEL, demo_captions
from .errors import LDMQError
from .families import find_denoiser
from .hub_errors import HUB_ERRORS, hub_refusal
from .inputs import default_inputs
from .job import Outcome, Progress, Settings, quantize_pipeline
from .output import folder_beside
from .planners import PLANNERS
from .quantization import STORAGE_DTYPE, stored
from .serialization import write_json

SETTINGS = tuple(field.name for field in fields(Settings) if field.name not in ("plan", "target", "dtype"))
"""Keywords of from_pretrained that are fields of Settings."""
__all__ = [
    "Outcome",
    "QuantizedLDMPipeline",
    "Settings",
    "load_pipeline",
    "quantize_pipeline",
    "save_pipeline",
]


def load_pipeline(
    model: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str | None = None, **options: Any
) -> DiffusionPipeline:
    """The pipeline in a local folder or under a hub id. options: of DiffusionPipeline.from_pretrained.

    Raises LDMQError in one line if it cannot be had.
    """
    text = known(model)
    try:
        pipe = DiffusionPipeline.from_pretrained(text, dtype=dtype, **options)
    except LDMQError:
        raise
    except (*HUB_ERRORS, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as cause:
        told = None if Path(text).exists() else hub_refusal(cause)
        if told is not None:
            raise LDMQError(f"{text}: {told}") from cause
        reason = " ".join(str(cause).split())
        raise LDMQError(f"{text}: cannot be loaded as a diffusers pipeline ({reason[:300]})") from cause
    find_denoiser(pipe)
    return pipe if device is None else pipe.to(device)


def save_pipeline(
    pipe: Any, folder: str | os.PathLike[str], *, outcome: Outcome | None = None, overwrite: bool = False
) -> None:
    """Write the quantized pipeline as an ordinary diffusers folder, with plan.json, report.json and profile.json.

    Complete or not at all. Raises OutputError if `folder` is not empty (unless `overwrite`) or cannot be written.
    """
    with folder_beside(folder, overwrite=overwrite) as beside:
        with saved_dtypes(pipe):
            pipe.save_pretrained(beside)
        if outcome is not None:
            for name, artifact in (("plan", outcome.plan), ("report", outcome.report), ("profile", outcome.profile)):
                if artifact is not None:
                    write_json(beside / f"{name}.json", artifact)


@contextmanager
def saved_dtypes(pipe: Any) -> Iterator[None]:
    """While open, every other model has the dtype in which it is best saved.

    diffusers' models load in fp32 unless told: those whose fp32 values 16 bits hold exactly (they came from such files)
    are written in 16. transformers' models load as they were saved, so these are written in fp32: a 16-bit text encoder
    between models loaded in fp32 cannot be sampled from.
    """
    changed: list[tuple[Any, torch.dtype, torch.dtype]] = []
    for model in pipe.components.values():
        if not isinstance(model, torch.nn.Module) or getattr(model, "is_quantized", False):
            continue
        now = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        if isinstance(model, PreTrainedModel) and now != torch.float32:
            changed.append((model, now, torch.float32))
        elif isinstance(model, ModelMixin) and now == torch.float32 and _fits_16_bits(model):
            changed.append((model, now, STORAGE_DTYPE))
    try:
        for model, _, dtype in changed:
            model.to(dtype)
        yield
    finally:
        for model, dtype, _ in changed:
            model.to(dtype)


def _fits_16_bits(model: ModelMixin) -> bool:
    return all(stored("", value).dtype != torch.float32 for value in model.state_dict().values())


class QuantizedLDMPipeline:
    """A mixin over the loaded pipeline's own class: `isinstance` holds for both, everything else is the pipeline's.

    Made by `from_pretrained` only. plan, report, profile: what was decided and measured (None where not stored).
    """

    plan: Plan | None = None
    report: Report | None = None
    profile: Profile | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        plan: str | os.PathLike[str] | Plan | None = None,
        target: str | None = None,
        *,
        inputs: Sequence[dict[str, Any]] | Sequence[str] | None = None,
        settings: Settings | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a quantized checkpoint, or load a float model and quantize it.

        plan: a planner's name ('hybrid', 'budget', 'uniform'), a Plan or a path to one; default 'hybrid'. inputs
        (or prompts): prompts, or dicts of `__call__` arguments, to record (default: captions of ours). settings:
        everything else; fields of Settings may be given as keywords too (`calibration`, `corrections`, ...) and, as
        plan and target, go before it. Other keywords: `dtype` / `torch_dtype`, `device`, `steps`, `progress`; the rest
        is DiffusionPipeline.from_pretrained's (`revision`, `variant`, `safety_checker`, ...).
        Raises LDMQError; for a quantized checkpoint given what quantizes it says what to load instead.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        asked = {name: kwargs.pop(name) for name in list(kwargs) if name in SETTINGS}
        options = _Options(kwargs)
        inputs = kwargs.pop("prompts", None) if inputs is None else inputs
        if inputs is None and os.fspath(model) == MODEL:
            inputs = demo_captions()
        model, hub = known(model), {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        refuse_unknown(model, kwargs, **hub)
        config = stored_config(model, **hub)
        if config is not None:
            original = original_name(model, **hub)
            if plan is not None or target is not None or asked:
                raise LDMQError(
                    f"{model}: is quantized already; leave {', '.join(['plan and target', *asked])} out to load it, or "
                    f"give the original float model{original and f' ({original})'} to quantize anew"
                )
            stored = getattr(torch, str(config.get("compute_dtype", "float32")), torch.float32)
            pipe = load_pipeline(model, dtype=dtype or stored, device=options.device, **kwargs)
            if original:
                pipe.register_to_config(_name_or_path=original)  # of what it was made, not where it lies now
            return _dressed(pipe, **side_files(model, **hub))
        settings = _settings(replace(settings or Settings(), **asked), plan, target, dtype)
        pipe = load_pipeline(model, dtype=torch.float32, device=options.device, **kwargs)
        calls = _calls(pipe, inputs, settings, options.steps)
        outcome = quantize_pipeline(
            pipe, calls, settings, reload=denoiser_loader(model, options.device, **kwargs), progress=options.progress
        )
        return _dressed(pipe, plan=outcome.plan, report=outcome.report, profile=outcome.profile)

    def save_pretrained(self, folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As the pipeline's own, plus plan.json, report.json and profile.json. Plain diffusers opens the folder.

        push_to_hub=True: also push it, under `repo_id` or the folder's name, with the keywords of `push_to_hub`.
        """
        pushed = None
        if kwargs.pop("push_to_hub", False):
            pushed = {name: kwargs.pop(name) for name in list(kwargs) if name not in SAVING_OPTIONS}
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in SIDE_FILES:
            artifact = getattr(self, name)
            if artifact is not None:
                write_json(Path(folder) / f"{name}.json", artifact)
        with saved_dtypes(self):
            super().save_pretrained(folder, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if pushed is not None:
            self._push(pushed.pop("repo_id", Path(folder).resolve().name), pushed, folder)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> str:
        """Upload the pipeline with its model card, plan, measurements and pictures; the address of the commit.

        private: None = as your account has it; options: `revision` (a branch, made where it is missing), `base_model`
        and `license` where the folder does not tell them, `prompts` or `images` (how many pictures to draw, default 4,
        0 for none) with `steps`, `guidance` and `seed`, `original` (the float pipeline, to draw beside), and `variant`,
        `max_shard_size` of save_pretrained. Raises LDMQError in one line for what the hub refuses.
        """
        given = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        return self._push(repo_id, {**given, **options})

    def _push(self, repo_id: str, options: dict[str, Any], folder: str | os.PathLike[str] | None = None) -> str:
        from .hub import push_pipeline  # its figures and tables load only where something is pushed

        return push_pipeline(self, repo_id, folder, **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class shares its base's name, so it is rebuilt, never looked up
        return _restored, (type(self).__mro__[2], dict(vars(self)))


class _Options:
    """The rarer keyword arguments of from_pretrained, taken out of the others."""

    def __init__(self, kwargs: dict[str, Any]) -> None:
        self.device: str | None = kwargs.pop("device", None)
        self.steps: int | None = kwargs.pop("steps", None)
        self.progress: Progress | None = kwargs.pop("progress", None)


@cache
def _quantized_class(base: type) -> type:
    """QuantizedLDMPipeline over `base`, under the base's name, by which diffusers looks pipelines up."""
    body = {"__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (QuantizedLDMPipeline, base), body)


def _dressed(pipe: Any, **artifacts: Any) -> Any:
    pipe.__class__ = _quantized_class(type(pipe))
    for name, artifact in artifacts.items():
        object.__setattr__(pipe, name, artifact)
    return pipe


def _restored(base: type, state: dict[str, Any]) -> Any:
    pipe: Any = object.__new__(_quantized_class(base))
    vars(pipe).update(state)
    return pipe


def _settings(settings: Settings, plan: Any, target: str | None, dtype: torch.dtype | None) -> Settings:
    if isinstance(plan, Plan):
        settings = replace(settings, plan=plan)
    elif plan is not None and not Path(plan).exists() and Path(plan).name == os.fspath(plan) and not Path(plan).suffix:
        PLANNERS[os.fspath(plan)]  # refuses what is neither a planner nor looks like a file
        settings = replace(settings, planner=os.fspath(plan))
    elif plan is not None:
        settings = replace(settings, plan=Plan.load(plan))
    return replace(settings, target=target or settings.target, dtype=dtype or settings.dtype)


def _calls(pipe: Any, inputs: Any, settings: Settings, steps: int | None) -> list[dict[str, Any]]:
    if inputs is not None and not all(isinstance(entry, str) for entry in inputs):
        return list(inputs)
    return default_inputs(pipe, inputs, steps=steps, seed=settings.seed)


def denoiser_loader(
    model: str | os.PathLike[str], device: str | None = None, **options: Any
) -> Callable[[], nn.Module]:
    """A function that loads the model's float denoiser anew, for plans that must be raised after quantizing.

    options: of DiffusionPipeline.from_pretrained."""

    def load() -> nn.Module:
        return find_denoiser(load_pipeline(model, dtype=torch.float32, device=device, **options))[1]

    return load
