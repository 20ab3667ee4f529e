"""QuantizedLDMPipeline: any diffusers pipeline with a quantized denoiser, computed or loaded; and pipelines on disk."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import nn
from transformers import PreTrainedModel

from .artifacts import Plan, Profile, Report
from .demo import MODEL, demo_captions, demo_model
from .errors import CheckpointError, LDMQError
from .families import FAMILIES, find_denoiser
from .inputs import default_inputs
from .job import Outcome, Progress, Settings, quantize_pipeline
from .output import folder_beside
from .planners import PLANNERS
from .plugin import NAME, stored
from .quantization import STORAGE_DTYPE
from .serialization import read_json, write_json

__all__ = [
    "Outcome",
    "QuantizedLDMPipeline",
    "Settings",
    "load_pipeline",
    "quantize_pipeline",
    "save_pipeline",
]


def _known(model: str | os.PathLike[str]) -> str:
    """The model's name, the bundled model's folder for its word. Raises LDMQError unless it is a pipeline folder or
    looks like a hub id."""
    text = os.fspath(model)
    if text == MODEL and not Path(text).exists():
        return os.fspath(demo_model())
    path = Path(text)
    if path.exists():
        if not (path / "model_index.json").is_file():
            raise LDMQError(f"{text}: is no diffusers pipeline folder (it has no model_index.json)")
    elif text.startswith((".", "/", "~")) or text.count("/") != 1 or "\\" in text:
        raise LDMQError(f"{text}: no such folder; give a local pipeline folder or a hub id such as owner/name")
    return text


def load_pipeline(
    model: str | os.PathLike[str], *, dtype: torch.dtype | None = None, device: str | None = None
) -> DiffusionPipeline:
    """The pipeline in a local folder or under a hub id. Raises LDMQError in one line if it cannot be had."""
    text = _known(model)
    try:
        pipe = DiffusionPipeline.from_pretrained(text, dtype=dtype)
    except LDMQError:
        raise
    except (OSError, ValueError, LookupError, TypeError, HfHubHTTPError, AttributeError, ImportError) as cause:
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


SIDE_FILES: dict[str, Any] = {"plan": Plan, "report": Report, "profile": Profile}
"""What stands beside the components in a folder that `save_pipeline` wrote."""


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

        plan: a planner's name ('hybrid', 'uniform'), a Plan or a path to one; default 'hybrid'. inputs: prompts, or
        dicts of `__call__` arguments, to record (default: captions of ours). settings: everything else; its planner,
        plan and target give way to the arguments. kwargs: `dtype` / `torch_dtype`, `device`, `steps`, `progress`.
        Raises LDMQError; for a quantized checkpoint given `plan` or `target` it says what to load instead.
        """
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        options = _Options(**kwargs)
        if inputs is None and os.fspath(model) == MODEL:
            inputs = demo_captions()
        model = _known(model)
        config = stored_config(model)
        if config is not None:
            if plan is not None or target is not None:
                raise LDMQError(
                    f"{model}: is quantized already; leave plan and target out to load it, or give the original float "
                    f"model{_original(model)} to quantize anew"
                )
            stored = getattr(torch, str(config.get("compute_dtype", "float32")), torch.float32)
            pipe = load_pipeline(model, dtype=dtype or stored, device=options.device)
            return _dressed(pipe, **_side_files(model))
        settings = _settings(settings or Settings(), plan, target, dtype)
        pipe = load_pipeline(model, dtype=torch.float32, device=options.device)
        calls = _calls(pipe, inputs, settings, options.steps)
        outcome = quantize_pipeline(
            pipe, calls, settings, reload=denoiser_loader(model, options.device), progress=options.progress
        )
        return _dressed(pipe, plan=outcome.plan, report=outcome.report, profile=outcome.profile)

    def save_pretrained(self, folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As the pipeline's own, plus plan.json, report.json and profile.json. Plain diffusers opens the folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in SIDE_FILES:  # first, so that push_to_hub=True takes them along
            artifact = getattr(self, name)
            if artifact is not None:
                write_json(Path(folder) / f"{name}.json", artifact)
        with saved_dtypes(self):
            super().save_pretrained(folder, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class shares its base's name, so it is rebuilt, never looked up
        return _restored, (type(self).__mro__[2], dict(vars(self)))


class _Options:
    """The rarer keyword arguments of from_pretrained."""

    def __init__(self, device: str | None = None, steps: int | None = None, progress: Progress | None = None) -> None:
        self.device, self.steps, self.progress = device, steps, progress


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
    elif plan is not None and os.fspath(plan) in PLANNERS:
        settings = replace(settings, planner=os.fspath(plan))
    elif plan is not None:
        settings = replace(settings, plan=Plan.load(plan))
    return replace(settings, target=target or settings.target, dtype=dtype or settings.dtype)


def _calls(pipe: Any, inputs: Any, settings: Settings, steps: int | None) -> list[dict[str, Any]]:
    if inputs is not None and not all(isinstance(entry, str) for entry in inputs):
        return list(inputs)
    return default_inputs(pipe, inputs, steps=steps, seed=settings.seed)


def denoiser_loader(model: str | os.PathLike[str], device: str | None = None) -> Callable[[], nn.Module]:
    """A function that loads the model's float denoiser anew, for plans that must be raised after quantizing."""

    def load() -> nn.Module:
        return find_denoiser(load_pipeline(model, dtype=torch.float32, device=device))[1]

    return load


def stored_config(model: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The denoiser's quantization_config of a checkpoint of ours; None for a float model.

    Raises LDMQError if there is no such model.
    """
    model = _known(model)
    index_file = _file(model, "model_index.json")
    index = read_json(index_file, CheckpointError) if index_file else {}
    for component in {name for _, family in FAMILIES.items() for name in family.components} & set(index):
        path = _file(model, f"{component}/config.json")
        data = read_json(path, CheckpointError) if path else {}
        config = data.get("quantization_config") if isinstance(data, dict) else None
        if isinstance(config, dict) and config.get("quant_method") == NAME:
            return config
    return None


def _side_files(model: str | os.PathLike[str]) -> dict[str, Any]:
    paths = {name: _file(model, f"{name}.json") for name in SIDE_FILES}
    return {name: SIDE_FILES[name].load(path) if path else None for name, path in paths.items()}


def _file(model: str | os.PathLike[str], name: str) -> Path | None:
    """A file of a local folder or a hub repository; None if it has none."""
    if Path(model).exists():
        path = Path(model) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(os.fspath(model), name))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError) as cause:
        reason = " ".join(str(cause).split())
        raise LDMQError(f"{model}: no such folder, and it cannot be had from the hub ({reason[:200]})") from cause
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as cause:
        reason = " ".join(str(cause).split())
        raise LDMQError(f"{model}: the hub cannot be reached ({reason[:200]})") from cause


def _original(model: str | os.PathLike[str]) -> str:
    path = _file(model, "model_index.json")
    data = read_json(path, CheckpointError) if path else {}
    name = data.get("_name_or_path") if isinstance(data, dict) else None
    return f" ({name})" if name else ""
