"""Thousands of pictures of a pipeline in a folder: an interrupted run goes on and gives the same files."""

import hashlib
import inspect
import itertools
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import SchedulerMixin
from PIL import Image
from torch import Tensor, nn

from .calls import tensor_key
from .errors import EvaluationError, LDMQError
from .inputs import class_count
from .output import file_beside, refuse_folder
from .picture_sets import PictureSet, pixels_of
from .progress import Progress
from .sampling import Sampling, sample_arrays
from .serialization import from_json, read_json, write_json

SETTINGS = "samples.json"
"""What the folder's pictures were drawn with, beside them."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """What decides the pictures of a folder. model: digest of all weights and of the scheduler; subjects: what picture
    k shows is number k modulo their count, None = the pipeline takes neither prompt nor label."""

    pipeline: str
    model: str
    sampling: Sampling
    subjects: tuple[str | None, ...]
    format_version: int = 1


def sample_images(
    pipe: Any,
    folder: str | os.PathLike[str],
    count: int,
    sampling: Sampling,
    subjects: Sequence[str | None] | None = None,
    *,
    progress: Progress | None = None,
) -> PictureSet:
    """Draw pictures 0 .. count - 1 into `folder` as 000000.png, ...; those that are there already stay.

    Picture k depends on the seed `sampling.seed` + k and on its subject only. Subjects (default: those of
    `subjects_of`) are taken in turn. A later call with a larger count adds to the folder.

    Raises EvaluationError for a folder with other files or with pictures drawn otherwise, naming what differs, for a
    batch larger than the count, for NaN, and where the pipeline cannot draw that.
    """
    if count < 1 or not 1 <= sampling.batch <= count:
        raise EvaluationError(f"{count} pictures in batches of {sampling.batch}: give a count, and a batch up to it")
    folder = Path(folder)
    turn = tuple(subjects) if subjects is not None else subjects_of(pipe)
    if not turn:
        raise EvaluationError("no subjects to draw; give at least one prompt or label, or leave them out")
    _claim(folder, Drawn(type(pipe).__name__, model_digest(pipe), sampling, turn))
    names = [f"{k:06d}.png" for k in range(count)]
    for start in range(0, count, sampling.batch):
        chunk = names[start : start + sampling.batch]
        # drawn in whole batches: the same kernels, the same bits
        if not all((folder / name).is_file() for name in chunk):
            _draw(pipe, folder, chunk, start, Drawn("", "", sampling, turn))
        if progress:
            progress(start + len(chunk), count)
    with Image.open(folder / names[0]) as first:
        return PictureSet(folder, tuple(names), first.size)


def _draw(pipe: Any, folder: Path, names: Sequence[str], start: int, drawn: Drawn) -> None:
    """Draw one batch of pictures, the first of them number `start`."""
    chunk = list(itertools.islice(itertools.cycle(drawn.subjects), start, start + len(names)))
    given = drawn.sampling
    one = Sampling(
        given.steps, given.guidance, given.seed + start, len(chunk), given.negative, given.width, given.height
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # numpy's about NaN, which is refused below
            arrays = sample_arrays(pipe, chunk, one)
    except LDMQError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError) as cause:
        reason = " ".join(str(cause).split())[:300]
        raise EvaluationError(f"{type(pipe).__name__} cannot draw {str(chunk)[:100]}: {reason}") from cause
    for name, pixels in zip(names, pixels_of(arrays, range(start, start + len(names))), strict=True):
        if not (folder / name).is_file():  # one from an earlier call's last, smaller batch stays
            with file_beside(folder / name) as beside:
                Image.fromarray(pixels).save(beside, format="PNG")


def subjects_of(pipe: Any, prompts: Sequence[str] | None = None) -> tuple[str | None, ...]:
    """What to draw in turn: the prompts given; else every class of a class-conditional pipeline; else nothing in
    particular. Raises EvaluationError for a text pipeline without prompts, and for prompts where none are taken."""
    accepted = inspect.signature(pipe.__call__).parameters
    name = type(pipe).__name__
    if prompts is not None:
        if not {"prompt", "class_labels"} & accepted.keys():
            raise EvaluationError(f"{name} takes neither prompts nor labels; leave --prompts out")
        return tuple(prompts)
    if "prompt" in accepted:
        raise EvaluationError(f"{name} draws from text; give prompts (--prompts FILE, one per line)")
    return tuple(str(label) for label in range(class_count(pipe))) if "class_labels" in accepted else (None,)


def steps_of(pipe: Any, sampling: Sampling) -> int | None:
    """Sampling steps: those asked for, or the pipeline's own; None where it has no such setting."""
    own = inspect.signature(pipe.__call__).parameters.get("num_inference_steps")
    return sampling.steps or (None if own is None else int(own.default))


def model_digest(pipe: Any) -> str:
    """Hash of every weight of the pipeline, in its dtype, and of its scheduler's configuration."""
    digest = hashlib.sha256()
    for name, component in sorted(pipe.components.items()):
        if isinstance(component, nn.Module):
            digest.update(f"{name} {type(component).__name__}".encode())
            for key, value in component.state_dict().items():
                if isinstance(value, Tensor):
                    digest.update(f"{key} {_key(name, value)}".encode())
        elif isinstance(component, SchedulerMixin):
            config: Any = component
            told = {key: value for key, value in config.config.items() if not key.startswith("_")}
            digest.update(f"{name} {type(component).__name__} {json.dumps(told, sort_keys=True, default=str)}".encode())
    return digest.hexdigest()[:16]


def _key(component: str, value: Tensor) -> str:
    if value.is_meta:
        raise EvaluationError(f"{component}: its weights are offloaded and cannot be told; draw with it on one device")
    return tensor_key(value.detach().cpu())


def _claim(folder: Path, drawn: Drawn) -> None:
    """Write the settings into a new folder, or compare them with an earlier run's."""
    path = folder / SETTINGS
    if path.is_file():
        earlier = from_json(Drawn, read_json(path, EvaluationError), EvaluationError, SETTINGS)
        difference = _difference(earlier, drawn)
        if difference:
            raise EvaluationError(f"{folder}: holds pictures drawn otherwise: {difference}; choose another folder")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise EvaluationError(f"{folder}: holds other files and no {SETTINGS}; choose an empty or a new folder")
    refuse_folder(folder, overwrite=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, drawn)


def _difference(earlier: Drawn, now: Drawn) -> str | None:
    """The first setting that differs, in words."""
    names = [
        ("the pipeline", "pipeline"),
        ("the model's weights or scheduler", "model"),
        ("the format", "format_version"),
    ]
    pairs = [(told, getattr(earlier, name), getattr(now, name)) for told, name in names]
    fields = ("steps", "guidance", "seed", "batch", "negative", "width", "height")
    pairs += [(name, getattr(earlier.sampling, name), getattr(now.sampling, name)) for name in fields]
    for told, before, asked in pairs:
        if before != asked:
            return f"{told} was {before}, now {asked}"
    if earlier.subjects != now.subjects:
        return f"the prompts or labels were {str(list(earlier.subjects))[:60]}, now {str(list(now.subjects))[:60]}"
    return None
