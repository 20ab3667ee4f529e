"""Learning the rounding of a MODEL's weights block by block, on what its own sampler asks of it (EDA-DM)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusers_ldmq.artifacts import Calibration, Plan, Reconstructed
from diffusers_ldmq.cache import is_on, place_for_reconstruction
from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.calls import InMemory, Recording
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.families import family_of
from diffusers_ldmq.progress import Progress
from diffusers_ldmq.reconstruction import ReconstructionSettings, fitted, reconstruct
from diffusers_ldmq.reconstruction_memory import identity_of
from diffusers_ldmq.recording import Middle, with_reference
from diffusers_ldmq.serialization import to_json
from diffusers_ldmq.settings import reconstruction_of
from diffusers_ldmq.specs import LayerState, Scheme

from .capture import Sampling, Scene, checked_scene
from .measuring import MOST_IMAGES, PARTS, RECORDED, Share, measuring, record_runs
from .patching import KnownRange, check_plan, refuse_unfit_model, runnable, source_layers
from .ranges import InputRanges
from .recorder import OPTIONS


@dataclass(frozen=True, slots=True, eq=False)
class Learning:
    """What is learned from. Arguments as their nodes give them; preset: 'quick' or 'full'; sampling: as KSampler's."""

    preset: str
    positive: Any
    negative: Any
    latent: Any
    sampling: Sampling


def reconstruct_model(
    model: Any, plan: Plan, ranges: InputRanges | None, learning: Learning, progress: Progress | None = None
) -> tuple[dict[str, LayerState], tuple[Reconstructed, ...]]:
    """(layer name -> state with learned rounding, what every block gained). The MODEL stays as it is; what is learned
    is kept under the Hugging Face cache, so that the same again is a load and a stopped one goes on.

    ranges: as for quantize_model. Raises LDMQError for a MODEL with LoRAs or patches, for inputs that cannot be sampled
    and where a copy in fp32 does not fit, PlanError for a plan of another model, CalibrationError where a block cannot
    be learned.
    """
    chosen = reconstruction_of(learning.preset)
    if chosen is None:
        return {}, ()
    _refuse_unconnected(learning)
    refuse_unfit_model(model)
    _refuse_patches(model)
    check_plan(plan, source_layers(model), ranges)
    schemes, _ = runnable(plan, ranges)
    scene = checked_scene(model, learning.positive, learning.negative, learning.latent)
    scene = scene.times(_copies(scene, chosen, learning.sampling))
    runs = (("calibrate", learning.sampling.from_noise(), False),)
    denoiser, recording = record_runs(model, scene, runs, Share(progress, 0, RECORDED))
    _refuse_narrow(denoiser)
    told = Share(progress, RECORDED, PARTS)
    with measuring(denoiser, told), _without_options(denoiser):
        with torch.no_grad():
            recording = _with_features(_plain(recording), denoiser)
            states = _states(denoiser, schemes, ranges)
        calibration = Calibration(plan, states, "", "", 0, 0, 0)
        settings = fitted(replace(chosen, seed=learning.sampling.seed % 2**32), recording)
        memory = _memory(denoiser, states, recording, settings)
        learned, units = reconstruct(denoiser, calibration, recording, settings, memory=memory, progress=told)
    return {name: state.to(torch.device("cpu")) for name, state in learned.states.items()}, units


def _refuse_unconnected(learning: Learning) -> None:
    given = {"positive": learning.positive, "negative": learning.negative, "latent_image": learning.latent}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise LDMQError(
            f"reconstruct is {learning.preset}, which learns from what the MODEL is asked for while it samples: "
            f"connect {', '.join(missing)} as to LDM-Q Calibrate, or set reconstruct to none"
        )


def _refuse_patches(model: Any) -> None:
    """Raise LDMQError for a MODEL that computes more than its file's weights do: blocks are learned on their own."""
    if model.patches or getattr(model, "hook_patches", None):
        raise LDMQError(
            "reconstruct learns from the MODEL as its file has it, and this one has a LoRA: connect the loader's MODEL "
            "to LDM-Q Quantize and put the LoRA after it, or set reconstruct to none"
        )
    options = model.model_options.get(OPTIONS, {})
    patched = [name for name in ("patches", "patches_replace") if options.get(name)]
    if patched:
        raise LDMQError(
            "reconstruct learns block by block, and another node has patched the inside of blocks of this MODEL "
            "(IP-Adapter, ...): connect the loader's MODEL to LDM-Q Quantize and put that node after it, or set "
            "reconstruct to none"
        )


def _refuse_narrow(denoiser: nn.Module) -> None:
    dtype = next(denoiser.parameters()).dtype
    if dtype != torch.float32:
        size = sum(parameter.numel() for parameter in denoiser.parameters()) * 4 / 1e9
        raise LDMQError(
            f"reconstruct needs a copy of the {type(denoiser).__name__} in float32 ({size:.1f} GB and what it "
            f"computes), and there is room for one in {str(dtype).removeprefix('torch.')} only; close other programs, "
            f"start ComfyUI with --cpu, or set reconstruct to none"
        )


def _copies(scene: Scene, settings: ReconstructionSettings, sampling: Sampling) -> int:
    """How often each image of the latent is sampled, so that there are the samples that the preset asks for."""
    wanted = math.ceil(settings.samples / (scene.images * sampling.steps))
    return max(1, min(wanted, MOST_IMAGES // scene.images))


def _plain(recording: Recording) -> Recording:
    """The recording with empty options: what is in them (which conditioning a row is, its sigma) serves patches, and
    calls of different steps can only be run together where they are equal."""
    nothing = InMemory({})
    calls = [replace(call, constants={**call.constants, OPTIONS: nothing}) for call in recording.calls]
    return replace(recording, calls=tuple(calls))


@contextmanager
def _without_options(denoiser: nn.Module) -> Iterator[None]:
    """While open, ComfyUI's options, into which denoisers write where they are, do not reach the blocks: what blocks
    are given is kept and compared from call to call."""
    kinds = family_of(denoiser).units

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        kept = tuple({} if isinstance(value, dict) else value for value in args)
        return kept, {name: {} if isinstance(value, dict) else value for name, value in kwargs.items()}

    with ExitStack() as hooks:
        for module in denoiser.modules():
            if any(kind.__name__ in kinds for kind in type(module).__mro__):
                hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


def _with_features(recording: Recording, denoiser: nn.Module) -> Recording:
    """The recording with the outputs and the features of the float copy, by which steps are chosen."""
    middle, calls = Middle(denoiser), recording.calls
    handle = middle.listen()
    try:
        recording = with_reference(recording, denoiser, lambda done, whole: middle.keep(calls[done - 1].step))
    finally:
        handle.remove()
    return replace(recording, features=middle.features())


def _states(denoiser: nn.Module, schemes: Mapping[str, Scheme], ranges: InputRanges | None) -> dict[str, LayerState]:
    known = ranges.ranges if ranges is not None else {}
    found = {}
    for name, scheme in schemes.items():
        observer = KnownRange(*known[name]) if scheme.is_static else None
        found[name] = layer_state(name, denoiser.get_submodule(name), scheme, observer)
    return found


def _memory(
    denoiser: nn.Module, states: Mapping[str, LayerState], recording: Recording, settings: ReconstructionSettings
) -> Path | None:
    """Where this very reconstruction keeps its blocks; None where nothing is kept."""
    if not is_on():
        return None
    identity = json.dumps(to_json(identity_of(denoiser, states, recording, settings)), sort_keys=True)
    return place_for_reconstruction(f"reconstructions/{hashlib.sha256(identity.encode()).hexdigest()[:32]}")
