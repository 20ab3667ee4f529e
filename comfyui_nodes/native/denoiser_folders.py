"""LDM-Q Load model on a diffusers folder or hub repository of ours: the U-Net's integers, bit for bit, in ComfyUI's own
module, so that KSampler, LoRA and ControlNet nodes work on it."""

import os
from collections.abc import Container
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from diffusers_ldmq.allocator import give_back, release_file_pages
from diffusers_ldmq.checkpoints import components_of, is_hub_id, known, stored_config
from diffusers_ldmq.errors import CheckpointError, LDMQError
from diffusers_ldmq.hub_errors import HUB_ERRORS, hub_refusal
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.packing import check_codes
from diffusers_ldmq.progress import Progress

from .diffusers_keys import PIPELINE_LOADER, check_same_computation, ldm_names
from .model_format import DTYPES, Content
from .operations import as_module_tensors, build_model

PREDICTIONS = {"epsilon": "EPS", "v_prediction": "V_PREDICTION"}
"""diffusers' words for what a denoiser predicts, and ComfyUI's."""
SCHEDULES = {"scaled_linear": "linear", "linear": "sqrt_linear", "squaredcos_cap_v2": "squaredcos_cap_v2"}
"""diffusers' words for how the noise grows, and ComfyUI's (whose 'linear' is linear in the square root)."""
_FAILURES = (*HUB_ERRORS, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError)


def load_denoiser(folder_or_repo: str | os.PathLike[str], progress: Progress | None = None) -> Any:
    """The MODEL (ModelPatcher) of the U-Net in a quantized diffusers folder or hub repository. progress: over its
    quantized layers, once diffusers has opened the files.

    Raises LDMQError if there is none, it is not quantized, or ComfyUI has no module that computes the same.
    """
    name = known(folder_or_repo)
    _check_kind(name)
    with as_module_tensors():
        model = _converted(name, progress)
    give_back()
    model.cached_patcher_init = (reload_denoiser, (name,))
    return model


def _converted(name: str, progress: Progress | None) -> Any:
    options: Any = {"subfolder": "unet", "use_safetensors": True}
    unet = _load("the U-Net", name, lambda: UNet2DConditionModel.from_pretrained(name, **options))
    layers, tensors = quantized_layers(unet), unet.state_dict()
    names = ldm_names([key for key in tensors if _is_known_to_floats(key, layers)], unet.config)
    model_type, sampling = _sampling(name)
    renamed = {layer: names[f"{layer}.weight"].removesuffix(".weight") for layer in layers}
    for done, layer in enumerate(layers.values()):
        weight = layer.get_parameter("weight")
        check_codes(weight)
        release_file_pages(weight)
        if progress:
            progress(done + 1, len(layers))
    content = Content(
        source=name,
        states={renamed[layer]: module.state() for layer, module in layers.items()},
        shapes={renamed[layer]: tuple(module.geometry.shape) for layer, module in layers.items()},
        floats={names[key]: value for key, value in tensors.items() if key.rpartition(".")[0] not in layers},
        dtype=DTYPES.get(unet.hf_quantizer.config.compute_dtype, torch.float32),
        model_type=model_type,
        sampling=sampling,
    )
    model = build_model(content)
    check_same_computation(unet, model.model.diffusion_model, names)
    return model


def _is_known_to_floats(key: str, layers: Container[str]) -> bool:
    """Whether the float model has a tensor of this name: of a quantized layer, its weight and bias."""
    owner, _, leaf = key.rpartition(".")
    return owner not in layers or leaf in ("weight", "bias")


def reload_denoiser(folder_or_repo: str, disable_dynamic: bool = False) -> Any:
    """The same MODEL once more, for ComfyUI's nodes that want one of their own; its weights are never streamed."""
    return load_denoiser(folder_or_repo)


def _check_kind(name: str) -> None:
    """Raise LDMQError unless the pipeline's denoiser is a quantized U-Net."""
    components = components_of(name)
    found = {part: kind[1] for part, kind in components.items() if part in ("unet", "transformer", "prior", "decoder")}
    if found.get("unet") != UNet2DConditionModel.__name__:
        kinds = ", ".join(str(kind) for kind in found.values()) or "none"
        why = (
            "in ComfyUI's module q, k and v are one layer, and their integers with ranges of their own cannot be joined"
            if "transformer" in found
            else "ComfyUI's module for it has other layers"
        )
        raise LDMQError(
            f"{name}: its denoiser is {kinds}; only U-Nets can be opened as a MODEL ({why}); {PIPELINE_LOADER}"
        )
    if stored_config(name) is None:
        raise LDMQError(
            f"{name}: its U-Net is not quantized; open unet/diffusion_pytorch_model.safetensors with the stock Load "
            f"Diffusion Model node and quantize it with LDM-Q Quantize, or use LDM-Q Pipeline loader"
        )


def _load(what: str, name: str, load: Any) -> Any:
    """What `load` returns; whatever diffusers or the hub raise, in one line."""
    try:
        return load()
    except (LDMQError, torch.OutOfMemoryError):
        raise
    except _FAILURES as cause:
        told = hub_refusal(cause) if is_hub_id(name) else None
        reason = told or " ".join(str(cause).split())[:300]
        raise CheckpointError(f"{name}: {what} cannot be loaded ({reason})") from cause


def _sampling(name: str) -> tuple[str, dict[str, Any]]:
    """(what the U-Net predicts, the noise schedule it was trained with), in ComfyUI's words."""
    config = _load("the scheduler's config", name, lambda: DDPMScheduler.load_config(name, subfolder="scheduler"))
    prediction, schedule = config.get("prediction_type", "epsilon"), config.get("beta_schedule", "linear")
    kind = str(config.get("_class_name"))
    unknown = prediction not in PREDICTIONS or schedule not in SCHEDULES or config.get("trained_betas") is not None
    if unknown or kind.startswith(("EDM", "FlowMatch")):
        raise CheckpointError(
            f"{name}: its scheduler is a {kind} with prediction_type {prediction!r} and beta_schedule {schedule!r}, "
            f"which ComfyUI's U-Net is not sampled with; {PIPELINE_LOADER}"
        )
    sampling: dict[str, Any] = {
        "beta_schedule": SCHEDULES[schedule],
        "linear_start": float(config.get("beta_start", 0.0001)),
        "linear_end": float(config.get("beta_end", 0.02)),
        "timesteps": int(config.get("num_train_timesteps", 1000)),
    }
    if config.get("rescale_betas_zero_snr"):
        sampling["zsnr"] = True
    return PREDICTIONS[prediction], sampling
