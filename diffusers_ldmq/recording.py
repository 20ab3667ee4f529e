"""Stage 1: run the pipeline's own sampling with a hook on the denoiser and keep its calls."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .calls import Call, Recording, evaluating, flatten, run, tensor_key
from .errors import LDMQError, RecordingError
from .families import family_of, find_denoiser, refuse_compiled
from .progress import Progress
from .selections import Selection, find_selection, first_step

logger = logging.getLogger(__name__)

SHARES = ("calibrate", "calibrate", "select", "verify")
"""Half of the inputs calibrate, a quarter selects, a quarter verifies."""


class _Enough(Exception):  # noqa: N818  (a signal, not an error)
    """Ends a pipeline call whose remaining steps nobody needs."""


def record_calls(
    pipe: Any,
    inputs: Sequence[dict[str, Any]],
    *,
    selection: str | Selection = "first-step",
    seed: int = 0,
    progress: Progress | None = None,
) -> Recording:
    """Record the denoiser calls of pipeline calls, one per entry of `inputs` (keyword arguments of `__call__`).

    The inputs are dealt to three disjoint sets; with fewer than four, each is repeated with fresh seeds.
    An entry's 'seed' (default: counts up from `seed`, past those that other entries have) seeds the noise of its
    images. With selection 'first-step' the calibrating runs end after the first step; with one that looks at features
    ('tdac') those of the first calibrating run are kept.

    Raises LDMQError for an unknown selection, RecordingError if the pipeline has no known denoiser or a compiled one,
    an argument cannot be recorded, or the denoiser's output holds NaN or Inf.
    """
    if not inputs:
        raise RecordingError("no inputs to record; pass at least one dict of the pipeline's __call__ arguments")
    refuse_compiled(pipe)
    _, denoiser = find_denoiser(pipe)
    chosen = find_selection(selection)
    jobs = _deal(list(inputs), seed)
    recorder = _Recorder(denoiser, Middle(denoiser) if getattr(chosen, "needs_features", False) else None)
    for number, (name, kwargs) in enumerate(jobs):
        if name == "calibrate" and "strength" in inspect.signature(pipe.__call__).parameters:
            kwargs = {**kwargs, "strength": 1.0}  # image-to-image: calibration sees the noisiest timestep
        recorder.start(name, number, image_count(kwargs), first_only=name == "calibrate" and chosen is first_step)
        with recorder.listening(), evaluating(denoiser):
            _call(pipe, kwargs)
        if progress:
            progress(number + 1, len(jobs))
    return recorder.result()


def with_reference(recording: Recording, denoiser: nn.Module, progress: Progress | None = None) -> Recording:
    """The recording with the outputs that this denoiser gives: the float one's where a quantized one was recorded, an
    fp32 one's where 16 bits would hide what quantizing does."""
    tensors, calls = dict(recording.tensors), []
    for done, call in enumerate(recording.calls):
        output = run(denoiser, recording.batch(call))
        key = tensor_key(output)
        tensors[key] = output
        calls.append(replace(call, output=key))
        if progress is not None:
            progress(done + 1, len(recording.calls))
    return replace(recording, calls=tuple(calls), tensors=tensors)


def try_one_step(pipe: Any, inputs: dict[str, Any]) -> Recording:
    """Sample until the first step is over and give its calls. Raises RecordingError if the pipeline cannot do even
    that, as when its components' dtypes do not fit each other."""
    _, denoiser = find_denoiser(pipe)
    recorder = _Recorder(denoiser)
    recorder.start("calibrate", 0, image_count(inputs), first_only=True)
    with recorder.listening(), torch.no_grad():
        _call(pipe, {"seed": 0, **inputs})
    return recorder.result()


def _deal(inputs: list[dict[str, Any]], seed: int) -> list[tuple[str, dict[str, Any]]]:
    """(set, keyword arguments with a 'seed') of every pipeline call; seeds given here are used only once."""
    while len(inputs) < len(SHARES):
        logger.warning("only %d input(s): repeating them with other seeds to fill three sets", len(inputs))
        inputs = inputs + [{k: v for k, v in entry.items() if k != "seed"} for entry in inputs]
    counts = [image_count(entry) for entry in inputs]
    jobs: list[tuple[str, dict[str, Any]]] = []
    next_seed = max([seed, *(e["seed"] + n for e, n in zip(inputs, counts, strict=True) if "seed" in e)])
    for index, entry in enumerate(inputs):
        entry = dict(entry)
        if "seed" not in entry:
            entry["seed"] = next_seed
            next_seed += image_count(entry)
        jobs.append((SHARES[index * len(SHARES) // len(inputs)], entry))
    return jobs


def image_count(inputs: dict[str, Any]) -> int:
    """Number of images that a pipeline call with these arguments makes.

    Raises RecordingError for counts and seeds that are no integers.
    """
    for name in ("seed", "batch_size", "num_images_per_prompt"):
        value = inputs.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise RecordingError(f"input {name!r} is {value!r}, an integer is expected")
    for name in ("prompt", "prompt_embeds", "class_labels", "image"):
        value = inputs.get(name)
        if isinstance(value, (list, tuple)):
            return len(value) * int(inputs.get("num_images_per_prompt") or 1)
        if isinstance(value, Tensor) and name != "image":
            return value.shape[0] * int(inputs.get("num_images_per_prompt") or 1)
    return int(inputs.get("batch_size") or 1) * int(inputs.get("num_images_per_prompt") or 1)


def generators(seed: int, count: int) -> list[torch.Generator]:
    """One seeded CPU generator per image, so that an image does not depend on its batch."""
    return [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]


def _call(pipe: Any, inputs: dict[str, Any]) -> None:
    kwargs = {key: value for key, value in inputs.items() if key != "seed"}
    accepted = inspect.signature(pipe.__call__).parameters
    unknown = [key for key in kwargs if key not in accepted]
    if unknown:
        raise RecordingError(f"{type(pipe).__name__} takes no argument {unknown[0]!r}; it takes {sorted(accepted)}")
    kwargs.setdefault("generator", generators(int(inputs["seed"]), image_count(inputs)))
    if "output_type" in accepted:
        kwargs.setdefault("output_type", "latent")  # what comes after the denoiser is not recorded
    try:
        pipe(**kwargs)
    except _Enough:
        if hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()
    except LDMQError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError) as cause:
        told = {key: value for key, value in inputs.items() if isinstance(value, (str, int, float, list))}
        raise RecordingError(
            f"{type(pipe).__name__} cannot be called with {str(told)[:200]}: {' '.join(str(cause).split())[:300]}"
        ) from cause


class Middle:
    """A hook on the denoiser's middle module that keeps what goes into it at every step of one run."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.name = family_of(denoiser).middle(denoiser)
        if not self.name:
            raise RecordingError(
                f"this {type(denoiser).__name__} has no middle block whose features could be recorded; choose another "
                f"selection, such as 'uniform'"
            )
        self.module = denoiser.get_submodule(self.name)
        self.latest: Tensor | None = None
        self.steps: dict[int, Tensor] = {}

    def listen(self) -> RemovableHandle:
        """Attach the hook."""
        return self.module.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, kwargs.get("hidden_states"), *kwargs.values())
        value = next((item for item in given if isinstance(item, Tensor)), None)
        if value is None or value.dim() not in (3, 4):
            shape = None if value is None else list(value.shape)
            raise RecordingError(
                f"{self.name} of the denoiser takes {shape}; pictures [B, C, h, w] or tokens [B, N, C] are expected: "
                f"choose another selection, such as 'uniform'"
            )
        value = value.detach().to("cpu", torch.float32, copy=True)
        self.latest = value if value.dim() == 4 else value.mT.unsqueeze(3).contiguous()

    def keep(self, step: int) -> None:
        """The denoiser's call is over and belongs to that step; its last call is what counts."""
        if self.latest is not None:
            self.steps[step], self.latest = self.latest, None

    def features(self) -> Tensor:
        """fp32 [steps, B, C, h, w]. B: the rows that every step has; guidance that ends early leaves the conditional
        half, which comes last."""
        rows = min((len(value) for value in self.steps.values()), default=0)
        kept = [value[-rows:] for value in self.steps.values()]
        shapes = sorted({tuple(value.shape) for value in kept})
        if len(shapes) != 1:
            found = f"changes its shape between steps: {shapes}" if shapes else "was never seen"
            raise RecordingError(
                f"what goes into the denoiser's {self.name} {found}, so steps cannot be compared; choose another "
                f"selection, such as 'uniform'"
            )
        return torch.stack(kept)


class _Recorder:
    """Hooks on a denoiser that turn its calls into a Recording. middle: keeps features of the first calibrating run."""

    def __init__(self, denoiser: nn.Module, middle: Middle | None = None) -> None:
        self.denoiser, self.middle = denoiser, middle
        self.signature = inspect.signature(denoiser.forward)
        self.calls: list[Call] = []
        self.tensors: dict[str, Tensor] = {}
        self.sampler_calls: dict[str, int] = {}

    def start(self, name: str, run: int, images: int, *, first_only: bool) -> None:
        """Begin the pipeline call number `run` of the set `name`."""
        self.set, self.run, self.images, self.first_only = name, run, images, first_only
        self.steps: dict[float, int] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep the denoiser's calls while the context is open."""
        handles = [
            self.denoiser.register_forward_pre_hook(self._before, with_kwargs=True),
            self.denoiser.register_forward_hook(self._after, with_kwargs=True),
        ]
        if self.middle is not None and not self.middle.steps:
            handles.append(self.middle.listen())
        made = len(self.calls)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if len(self.calls) == made:
            raise RecordingError(f"{type(self.denoiser).__name__} was never called by the pipeline")

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = dict(self.signature.bind(*args, **kwargs).arguments)
        bound.update(bound.pop("kwargs", {}))
        return flatten(bound)

    def _timestep(self, flat: dict[str, Any]) -> float:
        value = flat.get("timestep")
        if value is None:
            raise RecordingError(f"{type(self.denoiser).__name__} was called without a 'timestep'")
        return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = self._timestep(self._arguments(args, kwargs))
        if self.first_only and self.steps and timestep not in self.steps:
            raise _Enough

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        flat = self._arguments(args, kwargs)
        timestep = self._timestep(flat)
        result = output[0] if isinstance(output, (tuple, list)) else output.sample
        if not torch.isfinite(result).all():
            raise RecordingError(
                f"{type(module).__name__} gave NaN or Inf at timestep {timestep:g} in floating point already; "
                f"load the model in float32 or check its weights"
            )
        step = self.steps.setdefault(timestep, len(self.steps))
        if self.middle is not None:
            self.middle.keep(step)
        images = self.images if result.shape[0] % self.images == 0 else result.shape[0]
        self.calls.append(
            Call(
                set=self.set,
                run=self.run,
                step=step,
                timestep=timestep,
                images=images,
                tensors={path: self._keep(v) for path, v in flat.items() if isinstance(v, Tensor)},
                constants={path: v for path, v in flat.items() if not isinstance(v, Tensor) and path != "return_dict"},
                output=self._keep(result.float()),
            )
        )
        self.sampler_calls[self.set] = self.sampler_calls.get(self.set, 0) + 1

    def _keep(self, value: Tensor) -> str:
        value = value.detach().to("cpu", copy=True)
        key = tensor_key(value)
        self.tensors.setdefault(key, value)
        return key

    def result(self) -> Recording:
        """The finished recording."""
        features = self.middle.features() if self.middle is not None else None
        return Recording(type(self.denoiser).__name__, tuple(self.calls), self.tensors, self.sampler_calls, features)
