"""A MODEL's denoiser calls as a Recording, which the stages of diffusers_ldmq replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ldmq.calls import Call, InMemory, Recording, flatten, tensor_key
from diffusers_ldmq.errors import RecordingError

from .capture import arguments, refuse_not_finite, timestep_of

OPTIONS = "transformer_options"


class Recorder:
    """A wrapper around a denoiser that keeps every call.

    make_copy: (executor, latent) -> the float copy, made at the first call; start: begins a run; wrap: the wrapper;
    result: what was recorded.
    """

    def __init__(self, make_copy: Callable[[Any, Tensor], nn.Module] | None = None) -> None:
        self.make_copy = make_copy
        self.copy: nn.Module | None = None
        self.name = ""
        self.calls: list[Call] = []
        self.tensors: dict[str, Tensor] = {}
        self.sampler_calls: dict[str, int] = {}

    def start(self, name: str, run: int, images: int) -> None:
        """Begin the run number `run` of the set `name`, which samples so many images at once."""
        self.set, self.run, self.images = name, run, images
        self.steps: dict[float, int] = {}

    def wrap(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser and keep what went in and came out."""
        if self.copy is None and self.make_copy is not None:
            self.copy = self.make_copy(executor, args[0])
        self.name = type(executor.class_obj).__name__
        with torch.inference_mode(False), torch.no_grad():
            found = arguments(executor, args, kwargs)
            flat = flatten({name: _recordable(value, name) for name, value in found.items()})
            tensors = {path: self._keep(value) for path, value in flat.items() if isinstance(value, Tensor)}
        output = executor(*args, **kwargs)
        if not isinstance(output, Tensor):
            raise RecordingError(
                f"the {self.name} gives {type(output).__name__}, one latent is expected; models that sample several "
                f"latents at once (video with sound) cannot be measured"
            )
        timestep = timestep_of(found)
        refuse_not_finite(output, timestep)
        rows = output.shape[0]
        call = Call(
            set=self.set,
            run=self.run,
            step=self.steps.setdefault(timestep, len(self.steps)),
            timestep=timestep,
            images=self.images if rows % self.images == 0 else rows,
            tensors=tensors,
            constants={path: value for path, value in flat.items() if not isinstance(value, Tensor)},
            output=self._keep(output.float()),
        )
        self.calls.append(call)
        self.sampler_calls[self.set] = self.sampler_calls.get(self.set, 0) + 1
        return output

    def _keep(self, value: Tensor) -> str:
        with torch.inference_mode(False), torch.no_grad():
            kept = value.detach().to("cpu", copy=True)
            key = tensor_key(kept)
        self.tensors.setdefault(key, kept)
        return key

    def result(self) -> Recording:
        """The finished recording. Raises RecordingError if the denoiser was never called."""
        if not self.calls:
            raise RecordingError("the MODEL's denoiser was never called while sampling; check steps and denoise")
        return Recording(self.name, tuple(self.calls), self.tensors, self.sampler_calls)


def _recordable(value: Any, path: str) -> Any:
    """An argument with everything that is neither tensor nor plain JSON marked as InMemory."""
    if path == OPTIONS:
        # replays go past wrappers, one of which is this recorder's own
        return InMemory({name: item for name, item in value.items() if name != "wrappers"}, _options_of_rows)
    if isinstance(value, dict):
        return {key: _recordable(item, f"{path}/{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_recordable(item, path) for item in value]
    plain = isinstance(value, (Tensor, bool, int, float, str)) or value is None
    return value if plain else InMemory(value)


def _options_of_rows(options: dict[str, Any], keep: Tensor, rows: int) -> dict[str, Any]:
    """ComfyUI's options for some rows of a call. Rows come conditioning by conditioning, and patches (IP-Adapter, ...)
    read from the options how many there are; for chosen rows every row is a conditioning of its own."""
    chosen = dict(options)
    for name in ("cond_or_uncond", "uuids"):
        listed = options.get(name)
        if listed and rows % len(listed) == 0:
            chosen[name] = [listed[int(row) * len(listed) // rows] for row in keep]
    for name, value in options.items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows:
            chosen[name] = value[keep.to(value.device)]
    return chosen
