"""Pipelines on disk: any diffusers pipeline loaded in one line or refused in one, a quantized one saved completely."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from .checkpoints import SIDE_FILES, known
from .companions import recast, refuse_unsavable
from .errors import LDMQError, RecordingError
from .families import find_denoiser, uncompiled
from .fusing import is_fused
from .hub_errors import HUB_ERRORS, hub_refusal
from .job import forget_path
from .layers import quantized_layers
from .output import folder_beside
from .quantization import STORAGE_DTYPE, stored
from .serialization import write_json
from .settings import Outcome


def load_pipeline(
    model: str | os.PathLike[str],
    *,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    device: str | None = None,
    kind: type[DiffusionPipeline] = DiffusionPipeline,
    **options: Any,
) -> DiffusionPipeline:
    """The pipeline in a local folder or under a hub id. options: of DiffusionPipeline.from_pretrained; kind: the
    pipeline's class (default: the one that model_index.json names).

    Raises LDMQError in one line if it cannot be had.
    """
    text = known(model)
    try:
        pipe = kind.from_pretrained(text, dtype=dtype, **options)
    except LDMQError:
        raise
    except (*HUB_ERRORS, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as cause:
        told = None if os.path.exists(text) else hub_refusal(cause)
        if told is not None:
            raise LDMQError(f"{text}: {told}") from cause
        reason = " ".join(str(cause).split())
        raise LDMQError(f"{text}: cannot be loaded as a diffusers pipeline ({reason[:300]})") from cause
    find_denoiser(pipe)
    return pipe if device is None else pipe.to(device)


def denoiser_loader(
    model: str | os.PathLike[str], device: str | None = None, **options: Any
) -> Callable[[], nn.Module]:
    """A function that loads the model's float denoiser anew, for plans that must be raised after quantizing.

    options: of DiffusionPipeline.from_pretrained."""

    def load() -> nn.Module:
        return find_denoiser(load_pipeline(model, dtype=torch.float32, device=device, **options))[1]

    return load


def save_pipeline(
    pipe: Any, folder: str | os.PathLike[str], *, outcome: Outcome | None = None, overwrite: bool = False
) -> None:
    """Write the quantized pipeline as an ordinary diffusers folder, with plan.json, report.json and profile.json.

    Complete or not at all. Raises OutputError if `folder` is not empty (unless `overwrite`) or cannot be written.
    """
    with folder_beside(folder, overwrite=overwrite) as beside:
        with as_saved(pipe):
            pipe.save_pretrained(beside)
        if outcome is not None:
            write_side_files(beside, outcome)


def write_side_files(folder: Path, source: Any) -> None:
    """Plan, report and profile, attributes of `source`, as JSON files in an existing folder; what is None is left
    out, and removed where an earlier model left it."""
    for name in SIDE_FILES:
        artifact = getattr(source, name)
        if artifact is not None:
            write_json(folder / f"{name}.json", artifact)
        else:
            (folder / f"{name}.json").unlink(missing_ok=True)


def still_true(pipe: Any, artifacts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a pipeline's plan, report and profile that speak of its denoiser as it is now."""
    try:
        plan, denoiser = artifacts.get("plan"), find_denoiser(pipe)[1]
    except RecordingError:  # it was taken out of the pipeline
        return {}
    # inside an adapter layer a layer goes by another name
    now = {name.removesuffix(".base_layer"): layer for name, layer in quantized_layers(denoiser).items()}
    if not now or (plan is not None and plan.quantized() != {name: layer.scheme.name for name, layer in now.items()}):
        return {}
    return {name: value for name, value in artifacts.items() if name != "report" or not is_fused(denoiser)}


@contextmanager
def as_saved(pipe: Any) -> Iterator[None]:
    """While open, the other components are as they are best saved: without paths of this machine, and in the dtype that
    loads best.

    diffusers' models load in fp32 unless told: those whose fp32 values 16 bits hold exactly (they came from such files)
    are written in 16. transformers' models load as they were saved, so these are written in fp32: a 16-bit text encoder
    between models loaded in fp32 cannot be sampled from.
    """
    refuse_unsavable(pipe)
    configured = [part for part in _parts(pipe) if isinstance(part, ConfigMixin)]
    configs = [part._internal_dict for part in configured]
    changed = list(_better_dtypes(pipe))
    try:
        for part in configured:
            forget_path(part)
        for model, _, dtype in changed:
            recast(model, dtype)
        yield
    finally:
        for part, config in zip(configured, configs, strict=True):
            part._internal_dict = config
        for model, dtype, _ in changed:
            recast(model, dtype)


def _parts(pipe: Any) -> list[Any]:
    """The components, of compiled ones what is inside: that is what diffusers saves."""
    return [uncompiled(component) for component in pipe.components.values()]


def _better_dtypes(pipe: Any) -> Iterator[tuple[Any, torch.dtype, torch.dtype]]:
    """(model, its dtype, the one to save it in) where these differ."""
    for model in _parts(pipe):
        quantized = getattr(model, "is_quantized", False) and not isinstance(model, PreTrainedModel)
        if not isinstance(model, nn.Module) or quantized:
            continue
        now = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        if isinstance(model, PreTrainedModel) and now != torch.float32:
            yield model, now, torch.float32
        elif isinstance(model, ModelMixin) and now == torch.float32 and _fits_16_bits(model):
            yield model, now, STORAGE_DTYPE


def _fits_16_bits(model: ModelMixin) -> bool:
    return all(stored("", value).dtype != torch.float32 for value in model.state_dict().values())
