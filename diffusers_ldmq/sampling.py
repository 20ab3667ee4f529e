"""Pictures from any pipeline, one per prompt, each with a seed of its own."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn

from .errors import LDMQError
from .families import find_denoiser
from .progress import Progress
from .recording import generators

Watch = Callable[[Tensor], None]
"""Called with the latents [B, ...] of one pipeline call as its steps go on, before `progress`."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. steps, guidance, negative, width and height (pixels): None = the pipeline's own; seed: of the
    first picture, the others count up; batch: pictures per pipeline call; negative: what no picture should show."""

    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    batch: int = 8
    negative: str | None = None
    width: int | None = None
    height: int | None = None


def sample_pictures(
    pipe: Any,
    prompts: Sequence[str | None],
    sampling: Sampling,
    *,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> list[Image.Image]:
    """One picture per prompt. A prompt is text, a class label (number or name), or None where the pipeline takes
    neither; a picture does not depend on the others of its batch.

    Raises LDMQError if the pipeline cannot be used that way, naming what it takes.
    """
    return [picture for made in _drawn(pipe, prompts, sampling, (progress, watch), "pil") for picture in made]


def sample_arrays(pipe: Any, prompts: Sequence[str | None], sampling: Sampling) -> np.ndarray:
    """The same pictures before they are rounded to 8 bits: float [n, h, w, 3], 0..1, NaN where the model gave that."""
    made = list(_drawn(pipe, prompts, sampling, (None, None), "np"))
    return np.concatenate([np.asarray(images) for images in made])


def _drawn(
    pipe: Any,
    prompts: Sequence[str | None],
    sampling: Sampling,
    told: tuple[Progress | None, Watch | None],
    output_type: str,
) -> Iterator[Any]:
    """The images of each pipeline call."""
    accepted = inspect.signature(pipe.__call__).parameters
    options = _options(pipe, accepted, sampling)
    starts = range(0, len(prompts), sampling.batch)
    for number, start in enumerate(starts):
        chunk = prompts[start : start + sampling.batch]
        what = {**_subject(pipe, accepted, chunk), **options}
        if sampling.negative is not None:
            what["negative_prompt"] = [sampling.negative] * len(chunk)
        with _Steps(number, len(starts), *told).following(pipe, what, accepted, len(chunk)):
            made = pipe(**what, generator=generators(sampling.seed + start, len(chunk)), output_type=output_type)
        yield made.images


def _options(pipe: Any, accepted: Any, sampling: Sampling) -> dict[str, Any]:
    wanted = {
        "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
        "width": sampling.width,
        "height": sampling.height,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    if sampling.negative is not None and "negative_prompt" not in accepted:
        raise LDMQError(f"{type(pipe).__name__} has no negative prompt; leave that option out")
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


@dataclass(frozen=True, slots=True)
class _Steps:
    """Tells how far the `number`-th of `calls` pipeline calls is."""

    number: int
    calls: int
    progress: Progress | None
    watch: Watch | None

    @contextmanager
    def following(self, pipe: Any, what: dict[str, Any], accepted: Any, images: int) -> Iterator[None]:
        """While open, steps of the pipeline are told: by the callback that is put into its arguments `what`, or, where
        it takes none, by the calls of its denoiser, whose first `images` rows are the latents."""
        if self.progress is None and self.watch is None:
            yield
        elif "callback_on_step_end" in accepted:
            what["callback_on_step_end"] = self._after_step
            yield
        else:
            steps = what.get("num_inference_steps") or accepted["num_inference_steps"].default
            with self._denoiser_calls(find_denoiser(pipe)[1], int(steps), images):
                yield
            self._tell(int(steps), int(steps))

    def _after_step(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if self.watch:
            self.watch(values["latents"])
        self._tell(step + 1, pipe.num_timesteps)
        return values

    @contextmanager
    def _denoiser_calls(self, denoiser: nn.Module, steps: int, images: int) -> Iterator[None]:
        made = 0

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal made
            seen = next(
                (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 2), None
            )
            if self.watch and seen is not None:
                self.watch(seen[:images])
            self._tell(min(made, steps - 1), steps)
            made += 1

        hook = denoiser.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _tell(self, done: int, steps: int) -> None:
        if self.progress:
            self.progress(self.number * steps + done, self.calls * steps)
