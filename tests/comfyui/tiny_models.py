"""Tiny random models of ComfyUI's own classes, and what sampling them takes. ComfyUI is imported where it is needed."""

import copy
from typing import Any

import torch
from torch import Tensor

SD15 = {
    "image_size": 32, "out_channels": 4, "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None,
    "in_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1], "channel_mult": [1, 2],
    "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1,
    "use_linear_in_transformer": False, "context_dim": 16, "num_heads": 2, "num_head_channels": -1,
    "use_temporal_attention": False,
}  # fmt: skip
SDXL = SD15 | {
    "model_channels": 64, "use_linear_in_transformer": True, "adm_in_channels": 2816, "num_classes": "sequential",
    "num_heads": -1, "num_head_channels": 64,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "patch_size": 2, "depth": 4, "input_size": None, "num_patches": 64, "pos_embed_max_size": 8,
    "adm_in_channels": 2048, "qk_norm": "rms", "pos_embed_scaling_factor": None,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 256}},
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 16,
    "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 12, 12],
    "theta": 10000, "qkv_bias": True, "guidance_embed": True, "patch_size": 2, "txt_ids_dims": [],
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": ("SD15", SD15), "sdxl": ("SDXL", SDXL), "sd3": ("SD3", SD3), "flux": ("Flux", FLUX),
}  # fmt: skip
CHANNELS = {"sd15": 4, "sdxl": 4, "sd3": 16, "flux": 16}


def tiny_model(kind: str = "sd15", dtype: torch.dtype = torch.float32, seed: int = 1) -> Any:
    """A ModelPatcher on the CPU with random weights. dtype: of the weights; where it is not fp32, ComfyUI computes in
    fp32 from them (manual cast)."""
    import comfy.model_patcher
    import comfy.supported_models

    name, unet_config = MODELS[kind]
    config = getattr(comfy.supported_models, name)(copy.deepcopy(unet_config))
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    model = config.get_model({}, "", device=torch.device("cpu"))
    fill(model.diffusion_model, seed)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    cpu = torch.device("cpu")
    return patcher(model, load_device=cpu, offload_device=cpu)


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights of ordinary sizes: a matrix keeps its input's power, a norm nearly is the identity."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            values[name] = noise / tensor[0].numel() ** 0.5
        else:
            values[name] = noise * 0.1 + (1.0 if name.endswith(("weight", "scale")) else 0.0)
    module.load_state_dict(values, strict=True)


def conditioning(kind: str = "sd15", seed: int = 1) -> list[Any]:
    """What a CLIP Text Encode node gives, with random numbers in it."""
    import comfy.model_base  # noqa: F401

    width = {"sd15": 16, "sdxl": 16, "sd3": 4096, "flux": 16}[kind]
    generator = torch.Generator().manual_seed(seed)
    extra: dict[str, Any] = {}
    if kind != "sd15":
        extra["pooled_output"] = torch.randn(1, {"sdxl": 1280, "sd3": 2048, "flux": 768}[kind], generator=generator)
    return [[torch.randn(1, 7, width, generator=generator), extra]]


def latent(kind: str = "sd15", size: int = 8) -> dict[str, Tensor]:
    """What an Empty Latent Image node gives."""
    return {"samples": torch.zeros(1, CHANNELS[kind], size, size)}


def sample(model: Any, kind: str = "sd15", steps: int = 3, seed: int = 5, positive: list[Any] | None = None) -> Tensor:
    """The final latent [1, C, h, w] of a short run of ComfyUI's own sampler."""
    import comfy.sample

    empty = latent(kind)["samples"]
    noise = comfy.sample.prepare_noise(empty, seed)
    chosen = conditioning(kind) if positive is None else positive
    return comfy.sample.sample(
        model, noise, steps, 3.0, "euler", "normal", chosen, conditioning(kind, 2), empty, disable_pbar=True, seed=seed
    )


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal to noise ratio of `other` in dB."""
    noise = (reference.double() - other.double()).square().sum().clamp_min(1e-40)
    return float(10 * torch.log10(reference.double().square().sum() / noise))


def lora(model: Any, names: list[str], strength: float, rank: int = 4, seed: int = 7) -> dict[str, Tensor]:
    """A LoRA file for these layers (names inside of the denoiser), in the format that names weight keys. strength: of
    what it adds, as a share of a random weight's power."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    weights = model.model.diffusion_model.state_dict()
    for name in names:
        shape = weights[f"{name}.weight"].shape
        columns = shape[1:].numel()
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        up = torch.randn(shape[0], rank, generator=generator) / rank**0.5 * strength
        key = f"diffusion_model.{name}"
        walk = shape[2:]
        found[f"{key}.lora_down.weight"] = down.reshape(rank, shape[1], *walk) if len(walk) else down
        found[f"{key}.lora_up.weight"] = up.reshape(shape[0], rank, *[1] * len(walk))
    return found
