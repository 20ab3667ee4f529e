"""What a card can say of a saved pipeline: what stands in its folder, the base model's license, pictures drawn now."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from yaml import YAMLError

from .artifacts import Plan
from .card import Card, License, Samples
from .checkpoints import is_hub_id, original_name, quantized_components, side_files, stored_denoiser
from .demo import MODEL, demo_prompts
from .errors import LDMQError
from .families import find_denoiser, fingerprint, quantizable_layers
from .hub_errors import HUB_ERRORS, hub_refusal, is_missing_file
from .inputs import default_inputs, entries_of, needed_images
from .manifest import checked_entries
from .progress import StageProgress
from .sampling import Sampling, sample_pictures

logger = logging.getLogger(__name__)

IMAGES = 4
"""Pictures on a card where the user says nothing."""


@dataclass(frozen=True, slots=True)
class Told:
    """What the user adds to the card. base_model: owner/name (default: as stored); license: its identifier (default:
    the base model's); prompts, images: what to draw (0 = nothing); original: the float pipeline, to draw beside."""

    base_model: str | None = None
    license: str | None = None
    prompts: Sequence[str] | None = None
    images: int = IMAGES
    original: Any = None
    sampling: Sampling = Sampling()  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        if self.base_model is not None and not is_hub_id(self.base_model):
            raise LDMQError(f"base model {self.base_model!r}: is no hub id such as owner/name")
        if self.images < 0:
            raise LDMQError(f"images is {self.images}, expected 0 or more")


def card_of(
    folder: str | os.PathLike[str], repo_id: str, told: Told, *, token: Any = None, online: bool = True
) -> Card:
    """The card of a saved pipeline, yet without pictures. online: the base model's license may be asked of the hub.

    Raises LDMQError if the folder holds no checkpoint of ours.
    """
    pipeline, component, config = stored_denoiser(folder)
    others = tuple(name for name in quantized_components(folder) if name != component)
    found = side_files(folder)
    quantized = {name: entry["scheme"] for name, entry in checked_entries(config.get("layers")).items()}
    planned = found["plan"].layers if found["plan"] else quantized
    base = told.base_model or _stored_base(folder)
    return Card(
        repo_id=repo_id,
        pipeline=pipeline,
        component=component,
        others=others,
        layers={name: quantized.get(name, "float") for name in planned},
        dtype=str(config.get("compute_dtype", "float32")),
        base_model=base,
        license=License(told.license) if told.license else _inherited(base, token, online),
        **found,
    )


def _stored_base(folder: str | os.PathLike[str]) -> str | None:
    name = original_name(folder)
    if name and is_hub_id(name):
        return name
    logger.warning("the card names no base model, because the folder does not say one of the hub; give --base-model")
    return None


def _inherited(base: str | None, token: Any, online: bool) -> License | None:
    """The license that the base model's card names; None, and the user is told, where it cannot be read."""
    if base is None:
        logger.warning("the card names no license, because its base model is not known; give --license")
        return None
    try:
        data = ModelCard.load(hf_hub_download(base, "README.md", token=token, local_files_only=not online)).data
        found = data.get("license")
    except (*HUB_ERRORS, ValueError, YAMLError) as cause:
        why = _why_no_card(cause) if online else "a dry run does not ask the hub"
        logger.warning("the card names no license: that of %s was not found (%s); give --license", base, why)
        return None
    if not found:
        logger.warning("the card names no license, because the card of %s names none; give --license", base)
        return None
    link = data.get("license_link")
    if link and "://" not in link:  # a file of that repository
        link = f"https://huggingface.co/{base}/blob/main/{link}"
    return License(found, data.get("license_name"), link)


def _why_no_card(cause: Exception) -> str:
    if is_missing_file(cause):
        return "it has no card"
    return hub_refusal(cause) or "its card cannot be read"


def draw_samples(pipe: Any, told: Told, plan: Plan | None, *, progress: StageProgress | None = None) -> Samples | None:
    """Pictures for the card; None where none are wanted or the pipeline cannot draw them from words alone.

    Raises LDMQError for prompts that the pipeline cannot use, and for an original that is another model.
    """
    if not told.images and told.prompts is None:
        return None
    if needed_images(pipe):
        logger.warning("the card shows no pictures: %s starts from a picture", type(pipe).__name__)
        return None
    pipes = {"quantized": pipe}
    if told.original is not None:
        denoiser = find_denoiser(told.original)[1]
        if plan is not None and fingerprint(quantizable_layers(denoiser)) != plan.fingerprint:
            raise LDMQError(f"the float {type(denoiser).__name__} has other layers than this model; give its original")
        pipes = {"float": told.original, **pipes}
    given = None if told.prompts is None else entries_of("prompts", told.prompts, (str,))
    subjects = given or _subjects(pipe)[: told.images]
    pictures = {}
    for role, drawn in pipes.items():
        counter = _stage(progress, f"sample {role}") if progress else None
        pictures[role] = sample_pictures(drawn, subjects, told.sampling, progress=counter)
    captions = tuple(subject or f"picture {number + 1}" for number, subject in enumerate(subjects))
    return Samples(pictures, captions, _how(told.sampling))


def _subjects(pipe: Any) -> list[str | None]:
    """What to draw where the user says nothing: captions of ours, labels, or nothing but seeds."""
    if Path(str(pipe.config.get("_name_or_path") or "")).name == MODEL:
        return list(demo_prompts())
    first = default_inputs(pipe)[0]
    found = first.get("prompt") or first.get("class_labels") or [None] * 8
    return [None if subject is None else str(subject) for subject in found]


def _how(sampling: Sampling) -> str:
    steps = "the pipeline's own number of steps" if sampling.steps is None else f"{sampling.steps} steps"
    guidance = "" if sampling.guidance is None else f", guidance {sampling.guidance:g}"
    return f"{steps}{guidance}, seeds from {sampling.seed} on"


def _stage(progress: StageProgress, name: str) -> Callable[[int, int], None]:
    return lambda done, whole: progress(name, done, whole)
