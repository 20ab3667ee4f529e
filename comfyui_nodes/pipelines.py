"""The Diffusers route: a whole pipeline loaded, quantized where asked for, sampled and saved. Needs no ComfyUI."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from diffusers_ldmq import Plan, QuantizedLDMPipeline
from diffusers_ldmq.backends import fast_dtype
from diffusers_ldmq.checkpoints import stored_config
from diffusers_ldmq.demo import MODEL
from diffusers_ldmq.errors import LDMQError, PlanError
from diffusers_ldmq.families import find_denoiser, uncompiled
from diffusers_ldmq.folders import load_pipeline, save_pipeline
from diffusers_ldmq.inspection import describe
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.progress import Progress, StageProgress
from diffusers_ldmq.sampling import Sampling, sample_pictures
from diffusers_ldmq.summary import mb, reconstruction_told

from .interrupting import interruptible, told_of_saving
from .memory import is_out_of_memory
from .presets import Preset
from .previews import previewer_of

Check = Callable[[], None]
"""Raises where the user has asked to stop."""
Steps = Callable[[int, int, Image.Image | None], None]
"""Called with (done, all, picture so far) after each step."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedPipeline:
    """What goes over the PIPELINE socket. pipe: diffusers' own, float or quantized; name: as it was asked for; device:
    where it computes; note: what else there is to say of how it was made."""

    pipe: Any
    name: str
    device: str = "cpu"
    note: str = ""


@dataclass(frozen=True, slots=True)
class Order:
    """What to load. model: folder, hub id or the bundled model's word; preset: None to load a float model as it is;
    target: goes before the preset's, '' for that one; plan: goes before the preset; calibration: name of a selection;
    reconstruction: as in Settings; steps: of the sampling that is measured; dtype: a name, or 'auto'."""

    model: str
    preset: Preset | None
    target: str = ""
    plan: Plan | None = None
    calibration: str = "first-step"
    reconstruction: str = "none"
    steps: int = 20
    dtype: str = "auto"
    device: str = "cpu"

    def options(self) -> dict[str, Any]:
        """Keywords of every way to load. Of the files only safetensors are read."""
        return {"device": self.device, "use_safetensors": True}

    def quantizing(self) -> dict[str, Any]:
        """Keywords of QuantizedLDMPipeline.from_pretrained that quantize."""
        given: dict[str, Any] = {
            "calibration": self.calibration,
            "reconstruction": self.reconstruction,
            "steps": self.steps,
            "target": self.target or None,
        }
        if self.plan is not None:
            return {**given, "plan": self.plan}
        assert self.preset is not None
        return {**given, "plan": "budget", "scheme": self.preset.scheme, "target": self.target or self.preset.target}


@dataclass(frozen=True, slots=True)
class Wish:
    """What to draw. prompt: text, or a class label; width, height: pixels, 0 = the pipeline's own; count: pictures,
    the seeds counting up."""

    prompt: str
    negative: str
    steps: int
    cfg: float
    seed: int
    width: int = 0
    height: int = 0
    count: int = 1


def load(order: Order, told: StageProgress, check: Check) -> LoadedPipeline:
    """The pipeline on its device, quantized if asked for; a quantized checkpoint is loaded as it is.

    Raises LDMQError for what cannot be loaded or quantized, and for a target, plan or reconstruction with nothing to
    quantize.
    """
    told("loading", 0, 1)
    note = ""
    with torch.inference_mode(False), torch.no_grad(), interruptible(check):
        quantized = stored_config(order.model) is not None
        _refuse_unused(order, quantized)
        if quantized:
            pipe = QuantizedLDMPipeline.from_pretrained(order.model, **order.options())
        elif order.preset is None and order.plan is None:
            pipe = load_pipeline(order.model, dtype=_dtype(order), **order.options())
        else:
            pipe, note = _quantized(order, told)
    pipe.set_progress_bar_config(disable=True)
    told("loading", 1, 1)
    return LoadedPipeline(pipe, order.model, order.device, note)


def _refuse_unused(order: Order, quantized: bool) -> None:
    """Raise LDMQError where a target, plan or reconstruction would change nothing."""
    if order.plan is not None:
        what = "a plan is connected"
    elif order.target:
        what = f"a target ({order.target}) is given"
    elif order.reconstruction != "none":
        what = f"a reconstruction ({order.reconstruction}) is asked for"
    else:
        return
    if quantized:
        raise LDMQError(
            f"{order.model}: is quantized already, and {what}; empty the target, disconnect the plan and set "
            "reconstruct to none to load it as it is, or name the float model that it was made of to quantize that anew"
        )
    if order.preset is None and order.plan is None:
        raise LDMQError(f"{order.model}: {what}, but quantize says no; choose Safe, Balanced or Smallest there")


def _quantized(order: Order, told: StageProgress) -> tuple[Any, str]:
    """The pipeline, and what to say where it is not as the preset says."""
    given = {**order.options(), **order.quantizing(), "dtype": _dtype(order), "progress": told}
    try:
        return QuantizedLDMPipeline.from_pretrained(order.model, **given), ""
    except PlanError:
        if order.target or order.plan is not None or given["target"] is None:
            raise
        # a preset works on every model: a size that this one cannot have gives way to the planner's own rule
        note = f"the preset's {given['target']} cannot be met by this model; planned by the planner's own rule instead"
        return QuantizedLDMPipeline.from_pretrained(order.model, **{**given, "target": None}), note


def _dtype(order: Order) -> torch.dtype:
    """Of the float parts. 'auto' is float32 for pipelines without prompts: those may draw their latents in float32
    whatever the denoiser's dtype is."""
    if order.dtype != "auto":
        return getattr(torch, order.dtype)
    if order.model == MODEL:
        return fast_dtype(order.device)
    kind: Any = getattr(diffusers, str(DiffusionPipeline.load_config(order.model).get("_class_name")), None)
    takes_text = kind is not None and "prompt" in inspect.signature(kind.__call__).parameters
    return fast_dtype(order.device) if takes_text else torch.float32


def told_of(loaded: LoadedPipeline) -> str:
    """What the pipeline is, and what to give it."""
    found = describe(loaded.pipe)
    lines = [f"{loaded.name}: {found.pipeline} with a {found.denoiser} in {found.dtype}"]
    counts = {**found.backends, **({"float": found.schemes["float"]} if "float" in found.schemes else {})}
    if found.backends:
        lines.append(f"quantized: {', '.join(f'{n} layers {name}' for name, n in counts.items())}")
        lines.append(f"{mb(found.bytes)}, {found.bytes / found.fp32_bytes:.3f}x of fp32")
    else:
        lines.append("not quantized")
    if loaded.note:
        lines.append(loaded.note)
    if found.report:
        lines.append(f"{found.report.sqnr_db:.1f} dB at the denoiser's output when it was quantized")
    if found.report and found.report.reconstruction:
        lines.append(f"rounding learned: {reconstruction_told(found.report.reconstruction)}")
    return "\n".join([*lines, f"takes {_takes(loaded.pipe)}"])


def _takes(pipe: Any) -> str:
    accepted = _accepted(pipe)
    if "image" in accepted:
        return "a picture to start from, which LDM-Q Pipeline sampler does not give it"
    if "prompt" in accepted:
        return "a prompt" if "negative_prompt" in accepted else "a prompt, no negative one"
    if "class_labels" in accepted:
        return f"a class label, a number{' or name' if getattr(pipe, 'labels', None) else ''}, in the prompt field"
    return "no prompt: leave it empty"


def sample(loaded: LoadedPipeline, wish: Wish, told: Steps, check: Check) -> Tensor:
    """Pictures, fp32 [count, H, W, 3] in 0..1. A guidance scale that the pipeline has no use for is left out.

    Raises LDMQError for a wish that the pipeline cannot fulfil, in the words of the sampler node.
    """
    pipe = loaded.pipe
    with torch.inference_mode(False), torch.no_grad(), interruptible(check):
        show, seen = previewer_of(pipe), []

        def progress(done: int, total: int) -> None:
            told(done, total, show(seen.pop()) if show and seen else None)

        try:
            prompts = [_prompt(pipe, wish)] * wish.count
            pictures = sample_pictures(pipe, prompts, _sampling(pipe, wish), progress=progress, watch=seen.append)
        except LDMQError:
            raise
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError) as cause:
            if is_out_of_memory(cause):
                pipe.to("cpu")
                raise
            reason = " ".join(str(cause).split())[:300]
            raise LDMQError(f"{type(pipe).__name__} cannot draw this: {reason}") from cause
    return image_tensor(pictures)


def bring_back(loaded: LoadedPipeline, make_room: Callable[[], None]) -> None:
    """Where memory ran out the pipeline was moved to the CPU: put it on its device again, after make_room()."""
    if loaded.pipe.device.type == torch.device(loaded.device).type:
        return
    make_room()
    with torch.inference_mode(False):  # or its weights would be inference tensors
        try:
            loaded.pipe.to(loaded.device)
        except RuntimeError:  # half of it is there already
            loaded.pipe.to("cpu")
            raise


def _accepted(pipe: Any) -> Any:
    return inspect.signature(pipe.__call__).parameters


def _prompt(pipe: Any, wish: Wish) -> str | None:
    """The prompt as the pipeline takes it."""
    accepted, text = _accepted(pipe), wish.prompt.strip()
    if "prompt" in accepted:
        return wish.prompt
    if text and "class_labels" not in accepted:
        raise LDMQError(f"{type(pipe).__name__} takes neither prompts nor class labels; empty the prompt field")
    return text or None


def _sampling(pipe: Any, wish: Wish) -> Sampling:
    accepted, name = _accepted(pipe), type(pipe).__name__
    if wish.negative.strip() and "negative_prompt" not in accepted:
        raise LDMQError(f"{name} takes no negative prompt; empty the negative field")
    sizes = {key: value for key, value in (("width", wish.width), ("height", wish.height)) if value}
    for key in sizes:
        if key not in accepted:
            raise LDMQError(f"{name} draws one size only; set {key} to 0")
    return Sampling(
        steps=wish.steps,
        guidance=wish.cfg if "guidance_scale" in accepted else None,
        seed=wish.seed,
        batch=4,
        negative=wish.negative if wish.negative.strip() else None,
        **sizes,
    )


def unused(loaded: LoadedPipeline) -> str:
    """What of the sampler's inputs this pipeline has no use for, in words; empty if it takes them all."""
    return "" if "guidance_scale" in _accepted(loaded.pipe) else "cfg is not used: this pipeline has no guidance scale"


def image_tensor(pictures: list[Image.Image]) -> Tensor:
    """Pictures of one size as ComfyUI's IMAGE: fp32 [B, H, W, 3] in 0..1."""
    arrays = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0 for picture in pictures]
    return torch.from_numpy(np.stack(arrays))


def save(loaded: LoadedPipeline, folder: Path, progress: Progress) -> None:
    """Write an ordinary diffusers folder, complete or not at all. progress: called before each model, never when the
    folder stands: a stop that it raises must leave none. Raises OutputError where it cannot be written."""
    parts = [uncompiled(part) for part in loaded.pipe.components.values()]
    models = [part for part in parts if isinstance(part, torch.nn.Module) and hasattr(part, "save_pretrained")]
    with told_of_saving(list({id(model): model for model in models}.values()), progress):
        if isinstance(loaded.pipe, QuantizedLDMPipeline):
            loaded.pipe.save_pretrained(folder)
        else:
            save_pipeline(loaded.pipe, folder)


def is_quantized(loaded: LoadedPipeline) -> bool:
    """Whether the pipeline's denoiser is quantized."""
    return bool(quantized_layers(find_denoiser(loaded.pipe)[1]))
