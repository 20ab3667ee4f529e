"""Sampling with a ComfyUI MODEL as KSampler does it, with something to do at every call of its denoiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor, nn

from diffusers_ldmq.errors import LDMQError, RecordingError
from diffusers_ldmq.progress import Progress

from ..memory import is_out_of_memory

KEY = "ldmq"
COMPILED = "torch.compile"
"""Key under which ComfyUI's TorchCompileModel adds its wrapper."""
SEEDS = 2**64

Wrap = Callable[..., Any]
"""(executor, *args, **kwargs) -> the denoiser's output; executor.class_obj is the denoiser, loaded and patched."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What KSampler is told. seed: of the noise; denoise: 1 starts from pure noise."""

    seed: int
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    denoise: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise LDMQError(f"steps is {self.steps}: nothing would be sampled; at least 1 step is needed")
        if not 0 < self.denoise <= 1:
            raise LDMQError(f"denoise is {self.denoise:g}: nothing would be sampled; choose a value in (0, 1]")
        for kind, name, known in (
            ("sampler", self.sampler, comfy.samplers.KSampler.SAMPLERS),
            ("scheduler", self.scheduler, comfy.samplers.KSampler.SCHEDULERS),
        ):
            if name not in known:
                raise LDMQError(f"this ComfyUI has no {kind} {name!r}; it has {', '.join(known)}")

    def next_seed(self) -> Sampling:
        """The same with other noise."""
        return Sampling(
            (self.seed + 1) % SEEDS, self.steps, self.cfg, self.sampler, self.scheduler, denoise=self.denoise
        )

    def from_noise(self) -> Sampling:
        """The same from pure noise on."""
        return Sampling(self.seed, self.steps, self.cfg, self.sampler, self.scheduler)


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What is sampled: conditionings and a latent as their nodes give them. latent: samples [B, C, h, w], finite."""

    positive: list[Any]
    negative: list[Any]
    latent: dict[str, Any]

    @property
    def images(self) -> int:
        """B: pictures that one run makes."""
        return int(self.latent["samples"].shape[0])

    def times(self, copies: int) -> Scene:
        """Every image of the latent so many times, each to be sampled from noise of its own."""
        kept = {key: value for key, value in self.latent.items() if key != "batch_index"}
        samples = self.latent["samples"]
        repeated = samples.repeat(copies, *(1 for _ in samples.shape[1:]))
        return Scene(self.positive, self.negative, {**kept, "samples": repeated})


def checked_scene(model: Any, positive: Any, negative: Any, latent: Any) -> Scene:
    """The scene, with the latent as this MODEL takes it. Raises LDMQError for what cannot be sampled, saying which
    node to use instead."""
    for name, conditioning in (("positive", positive), ("negative", negative)):
        _refuse_bare(name, conditioning)
    samples = latent.get("samples") if isinstance(latent, dict) else None
    if not isinstance(samples, Tensor) or getattr(samples, "is_nested", False):
        raise LDMQError(
            "the latent holds no single tensor of samples; connect Empty Latent Image or VAE Encode (latents of video "
            "with sound are not supported)"
        )
    if samples.numel() == 0:
        raise LDMQError(f"the latent is empty (shape {tuple(samples.shape)}); connect Empty Latent Image or VAE Encode")
    if not torch.isfinite(samples).all():
        raise LDMQError("the latent holds NaN or Inf; connect Empty Latent Image, or look at the VAE that encoded it")
    samples = _with_channels(model, latent)
    expected = model.get_model_object("latent_format").latent_channels
    if samples.shape[1] != expected:
        raise LDMQError(
            f"the latent has {samples.shape[1]} channels, this MODEL samples {expected}; encode the picture with the "
            f"VAE that belongs to the MODEL, or connect Empty Latent Image"
        )
    return Scene(positive, negative, {**latent, "samples": samples})


def _refuse_bare(name: str, conditioning: Any) -> None:
    """Raise LDMQError unless every entry of a conditioning carries an embedded prompt."""
    entries = conditioning if isinstance(conditioning, list) else []
    good = [isinstance(e, (list, tuple)) and len(e) > 1 and isinstance(e[0], Tensor) and e[0].numel() for e in entries]
    if not good or not all(good):
        raise LDMQError(
            f"the {name} conditioning holds no embedded prompt; connect CLIP Text Encode with the CLIP that belongs to "
            f"the MODEL"
        )


def _with_channels(model: Any, latent: dict[str, Any]) -> Tensor:
    """The latent's samples, with the channels and the size that KSampler would give an empty one."""
    fix = comfy.sample.fix_empty_latent_channels
    accepted = inspect.signature(fix).parameters
    ratios = ("downscale_ratio_spacial", "downscale_ratio_temporal")
    return fix(model, latent["samples"], **{r: latent[r] for r in ratios if r in accepted and r in latent})


@contextmanager
def listening(model: Any, wrap: Wrap) -> Iterator[Any]:
    """A clone of the MODEL whose every denoiser call goes through `wrap`, last of all wrappers, and never through
    torch.compile. The MODEL itself is untouched; nothing holds on to `wrap` afterwards."""
    kinds = comfy.patcher_extension.WrappersMP
    clone = model.clone()
    clone.remove_wrappers_with_key(kinds.APPLY_MODEL, COMPILED)
    denoiser = model.model.diffusion_model
    kind, added = (kinds.DIFFUSION_MODEL, wrap) if _asks_wrappers(denoiser) else (kinds.APPLY_MODEL, _around(wrap))
    clone.add_wrapper_with_key(kind, KEY, added)
    try:
        yield clone
    finally:
        clone.remove_wrappers_with_key(kind, KEY)


def _asks_wrappers(denoiser: nn.Module) -> bool:
    """Whether the denoiser calls ComfyUI's wrappers itself; SD3's does not."""
    methods = [vars(cls)["forward"] for cls in type(denoiser).__mro__ if "forward" in vars(cls)]
    return any("DIFFUSION_MODEL" in method.__code__.co_names for method in methods if hasattr(method, "__code__"))


@dataclass(frozen=True, slots=True)
class _Call:
    """What a wrapper gets of a denoiser that calls none: the denoiser and its forward."""

    class_obj: nn.Module
    original: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


def _around(wrap: Wrap) -> Wrap:
    """A wrapper of the whole MODEL that puts `wrap` around its denoiser for as long as it runs."""

    def apply(executor: Any, *args: Any, **kwargs: Any) -> Any:
        denoiser = executor.class_obj.diffusion_model
        call = _Call(denoiser, denoiser.forward)
        denoiser.forward = lambda *a, **k: wrap(call, *a, **k)
        try:
            return executor(*args, **kwargs)
        finally:
            del denoiser.forward

    return apply


def sample(
    model: Any, scene: Scene, sampling: Sampling, *, first_step: bool = False, progress: Progress | None = None
) -> Tensor:
    """The latent that KSampler makes, [B, C, h, w]. first_step: end after one step of the schedule.

    Raises LDMQError if MODEL, conditioning and latent do not fit each other.
    """
    latent = scene.latent
    noise = comfy.sample.prepare_noise(latent["samples"], sampling.seed, latent.get("batch_index"))

    def told(step: int, denoised: Tensor, x: Tensor, steps: int) -> None:
        if progress is not None:
            progress(step + 1, steps)

    with explained("sampled"):
        return comfy.sample.sample(
            model,
            noise,
            sampling.steps,
            sampling.cfg,
            sampling.sampler,
            sampling.scheduler,
            scene.positive,
            scene.negative,
            latent["samples"],
            denoise=sampling.denoise,
            last_step=1 if first_step else None,
            noise_mask=latent.get("noise_mask"),
            callback=told,
            disable_pbar=True,
            seed=sampling.seed,
        )


ADVICE = {
    "sampled": "use the conditioning of the CLIP, and the latent size, that KSampler works with on this MODEL",
    "measured": "gradients do not pass something it computes with: connect the MODEL as its loader gives it, without "
    "nodes that patch it, or update ComfyUI",
}


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """What goes wrong deep inside a model as one LDMQError; out of memory, interrupts and LDMQErrors as they are.
    doing: a key of ADVICE."""
    try:
        yield
    except LDMQError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError, AssertionError) as cause:
        if is_out_of_memory(cause):
            raise
        told = " ".join(str(cause).split())[:300]
        raise RecordingError(
            f"the MODEL cannot be {doing} like this ({type(cause).__name__}: {told}); {ADVICE[doing]}"
        ) from cause


def arguments(executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A denoiser call's arguments by name, latent and timesteps first."""
    bound = inspect.signature(executor.original).bind(*args, **kwargs)
    found = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found.update(found.pop(name, {}))
    return found


def timestep_of(found: dict[str, Any]) -> float:
    """The timestep of a call, as the denoiser gets it."""
    value = list(found.values())[1]
    return float(value.flatten()[0]) if isinstance(value, Tensor) else float(value)


def refuse_not_finite(output: Tensor, timestep: float) -> None:
    """Raise RecordingError for a denoiser output with NaN or Inf."""
    if not torch.isfinite(output).all():
        raise RecordingError(
            f"the MODEL gives NaN or Inf at timestep {timestep:g} already before anything is quantized; check its "
            f"weights, or start ComfyUI with --fp32-unet or --bf16-unet"
        )
