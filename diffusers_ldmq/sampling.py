"""Pictures from any pipeline, one per prompt, each with a seed of its own."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .errors import LDMQError
from .progress import Progress
from .recording import generators


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. steps, guidance: None = the pipeline's own; seed: of the first picture, the others count up;
    batch: pictures per pipeline call."""

    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch: int = 8


def sample_pictures(
    pipe: Any, prompts: Sequence[str | None], sampling: Sampling, *, progress: Progress | None = None
) -> list[Image.Image]:
    """One picture per prompt. A prompt is text, a class label (number or name), or None where the pipeline takes
    neither; a picture does not depend on the others of its batch.

    Raises LDMQError if the pipeline cannot be used that way, naming what it takes.
    """
    accepted = inspect.signature(pipe.__call__).parameters
    options = _options(pipe, accepted, sampling)
    pictures: list[Image.Image] = []
    starts = range(0, len(prompts), sampling.batch)
    for number, start in enumerate(starts):
        chunk = prompts[start : start + sampling.batch]
        what = {**_subject(pipe, accepted, chunk), **options}
        if progress and "callback_on_step_end" in accepted:
            what["callback_on_step_end"] = _step_counter(progress, number, len(starts))
        made = pipe(**what, generator=generators(sampling.seed + start, len(chunk)))
        pictures += made.images
        if progress and "callback_on_step_end" not in accepted:
            progress(number + 1, len(starts))
    return pictures


def _options(pipe: Any, accepted: Any, sampling: Sampling) -> dict[str, Any]:
    wanted = {"num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance}
    given = {name: value for name, value in wanted.items() if value is not None}
    for name in given:
        if name not in accepted:
            raise LDMQError(f"{type(pipe).__name__} has no {name.replace('_', ' ')}; leave that option out")
    return given


def _subject(pipe: Any, accepted: Any, prompts: Sequence[str | None]) -> dict[str, Any]:
    name = type(pipe).__name__
    if "image" in accepted:
        raise LDMQError(f"{name} starts from a picture; sample it from Python, as diffusers' own documentation shows")
    if "prompt" in accepted or "class_labels" in accepted:
        if None in prompts:
            raise LDMQError(f"{name} needs {'a prompt' if 'prompt' in accepted else 'a class label'}; give one")
        if "prompt" in accepted:
            return {"prompt": list(prompts)}
        return {"class_labels": [_label(pipe, str(prompt)) for prompt in prompts]}
    if any(prompt is not None for prompt in prompts):
        raise LDMQError(f"{name} takes neither prompts nor labels; leave the prompt out")
    return {"batch_size": len(prompts)}


def _label(pipe: Any, prompt: str) -> int:
    if prompt.strip().isdigit():
        return int(prompt)
    known = getattr(pipe, "labels", None) or {}
    if prompt not in known:
        raise LDMQError(f"{type(pipe).__name__} takes class labels; {prompt!r} is neither a number nor a known name")
    return int(known[prompt])


def _step_counter(progress: Progress, number: int, calls: int) -> Callable[..., dict[str, Any]]:
    """A diffusers callback that reports steps of all pipeline calls, of which this is the `number`-th."""

    def count(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        progress(number * pipe.num_timesteps + step + 1, calls * pipe.num_timesteps)
        return values

    return count
