"""What to feed a pipeline while it is recorded: captions, labels or seeds, or the user's own file."""

import inspect
import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from .errors import RecordingError

IMAGE_ARGUMENTS = ("image", "mask_image", "control_image", "video")
IMAGES = 32
"""Images to record where the user names none; they are dealt to three sets."""
LEAST_CALLS = 4
"""Calls that three disjoint sets need at least: two to calibrate, one to select, one to verify."""


def default_inputs(
    pipe: Any, prompts: Sequence[str] | None = None, *, steps: int | None = None, seed: int = 0, batch: int = 8
) -> list[dict[str, Any]]:
    """`__call__` arguments for recording `pipe`, at most `batch` images a call, seeds counting up from `seed`.

    Text pipelines get `prompts` (default: 32 captions of ours), class-conditional ones random labels, others seeds.
    Raises RecordingError for a pipeline that needs images, for prompts where the pipeline takes none, and for what is
    no list of prompts.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    needed = needed_images(pipe)
    if needed:
        raise RecordingError(
            f"{type(pipe).__name__} needs {' and '.join(needed)}; pass --inputs FILE.jsonl (or `inputs=`), one object "
            f"of its arguments per line, pictures as paths beside that file"
        )
    if prompts is not None and "prompt" not in accepted:
        raise RecordingError(f"{type(pipe).__name__} takes no prompts; leave --prompts out")
    every = _values(pipe, prompts if prompts is None else entries_of("prompts", prompts, (str,)), seed)
    common = {"num_inference_steps": steps} if steps and "num_inference_steps" in accepted else {}
    batch = max(1, min(batch, len(every) // LEAST_CALLS))
    calls = [every[i : i + batch] for i in range(0, len(every), batch)]
    return [{**_argument(accepted, chunk), **common, "seed": seed + index * batch} for index, chunk in enumerate(calls)]


def entries_of(name: str, given: Any, kinds: tuple[type, ...] = (str, dict)) -> list[Any]:
    """What was given to be recorded, as a list of entries that all are of one of `kinds`; one entry stands for a list
    of it, so that nobody's prompt is taken letter by letter. Raises RecordingError, naming the entry, for others."""
    example = '["a red apple", "a blue boat"]' if kinds == (str,) else '[{"prompt": "a red apple"}]'
    if isinstance(given, kinds):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping)):
        raise RecordingError(f"{name} is of type {type(given).__name__}, expected a list such as {example}")
    entries = list(given)
    if not entries:
        raise RecordingError(f"{name} is empty; give a list such as {example}, or leave it out")
    kind = next((kind for kind in kinds if isinstance(entries[0], kind)), kinds[0])
    for number, entry in enumerate(entries):
        if not isinstance(entry, kind):
            raise RecordingError(
                f"{name}[{number}] is {str(entry)[:40]!r} ({type(entry).__name__}); expected {kind.__name__} in "
                f"every place, as in {example}"
            )
    return entries


def needed_images(pipe: Any) -> list[str]:
    """Names of the picture arguments that the pipeline cannot do without."""
    accepted = inspect.signature(pipe.__call__).parameters
    named = re.search("Img2Img|Inpaint|Control|Upscale|SuperResolution|Depth2Img|Pix2Pix|Adapter", type(pipe).__name__)
    required = [name for name in IMAGE_ARGUMENTS if name in accepted]
    return [name for name in required if named or accepted[name].default is inspect.Parameter.empty]


def _values(pipe: Any, prompts: Sequence[str] | None, seed: int) -> list[Any]:
    """One entry per image: a caption, a label, or nothing."""
    accepted = inspect.signature(pipe.__call__).parameters
    if "prompt" in accepted:
        return list(prompts) if prompts is not None else captions()
    if "class_labels" in accepted:
        classes = class_count(pipe)
        return random.Random(seed).choices(range(classes), k=IMAGES)
    return [None] * IMAGES


def _argument(accepted: Any, chunk: list[Any]) -> dict[str, Any]:
    if "prompt" in accepted:
        return {"prompt": chunk}
    if "class_labels" in accepted:
        return {"class_labels": chunk}
    return {"batch_size": len(chunk)}


def class_count(pipe: Any) -> int:
    """Classes that a class-conditional pipeline was trained on, as its denoiser says; 1000 where it does not."""
    denoiser = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    config = getattr(denoiser, "config", {})
    return int(config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 1000)


def captions() -> list[str]:
    """The 32 captions that come with the package."""
    text = resources.files("diffusers_ldmq").joinpath("captions.txt").read_text(encoding="utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """One prompt per non-empty line. Raises RecordingError if the file is absent, unreadable or empty."""
    prompts = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not prompts:
        raise RecordingError(f"{path}: the prompt file is empty; write one prompt per line")
    return prompts


def read_inputs(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """One JSON object of the pipeline's `__call__` arguments per line; 'image', 'mask_image' and 'control_image' are
    paths inside the file's folder.

    Raises RecordingError naming the line that is no object, or the picture that is missing or outside the folder.
    """
    entries = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as cause:
            raise RecordingError(f"{path}, line {number}: not valid JSON ({cause})") from None
        if not isinstance(entry, dict):
            raise RecordingError(f"{path}, line {number}: expected an object of arguments, found {line[:40]}")
        entries.append({key: _loaded(Path(path), key, value) for key, value in entry.items()})
    if not entries:
        raise RecordingError(f"{path}: the inputs file is empty; write one JSON object of arguments per line")
    return entries


def _text(path: str | os.PathLike[str]) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecordingError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as cause:
        raise RecordingError(f"{path}: cannot be read as UTF-8 text ({cause})") from None


def _loaded(source: Path, key: str, value: Any) -> Any:
    if key not in IMAGE_ARGUMENTS:
        return value
    if isinstance(value, list):
        return [_loaded(source, key, item) for item in value]
    folder = source.resolve().parent
    picture = (folder / str(value)).resolve()
    if not picture.is_relative_to(folder):
        raise RecordingError(f"{source}: picture {value!r} is outside the file's folder; put it beside the file")
    try:
        with Image.open(picture) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        raise RecordingError(f"{source}: picture {value!r} does not exist beside the file") from None
    except (OSError, UnidentifiedImageError) as cause:
        raise RecordingError(f"{source}: picture {value!r} cannot be opened ({cause})") from None
