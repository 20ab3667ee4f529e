"""Random models that ComfyUI's own loaders recognize: SD 1.5 with fewer stages. Recognition looks at the width of the
first stage and of the context, so these stay."""

import copy
from typing import Any

import torch
from comfyui.quantizing import plan_of
from comfyui.tiny_models import SD15, fill
from torch import Tensor


def cut_config(stages: int) -> dict[str, Any]:
    """ComfyUI's settings of the U-Net. stages: 1 = 26 million parameters, 2 = 107 million."""
    return SD15 | {
        "model_channels": 320, "context_dim": 768, "num_heads": 8, "channel_mult": [1, 2][:stages],
        "num_res_blocks": [1] * stages, "transformer_depth": [1] * stages, "transformer_depth_output": [1] * 2 * stages,
    }  # fmt: skip


def cut_model(stages: int = 1, seed: int = 0) -> Any:
    """A ModelPatcher on the CPU in fp32, whose weights 16 bits hold exactly, as those of most files."""
    import comfy.model_patcher
    import comfy.supported_models

    config = comfy.supported_models.SD15(copy.deepcopy(cut_config(stages)))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=torch.device("cpu"))
    fill(model.diffusion_model, seed)
    values = model.diffusion_model.state_dict()
    model.diffusion_model.load_state_dict({name: value.half() for name, value in values.items()})
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    cpu = torch.device("cpu")
    return patcher(model, load_device=cpu, offload_device=cpu)


def quantized_cut(linear: str, conv: str, stages: int = 1) -> Any:
    """The quantized clone of `cut_model`."""
    from comfyui_nodes.native.patching import quantize_model

    model = cut_model(stages)
    return quantize_model(model, plan_of(model, linear, conv))[0]


def context(seed: int) -> list[Any]:
    """What a CLIP Text Encode node gives."""
    return [[torch.randn(1, 7, 768, generator=torch.Generator().manual_seed(seed)), {}]]


def sample_cut(model: Any, steps: int = 2) -> Tensor:
    """The final latent [1, 4, 8, 8] of a short run of ComfyUI's sampler."""
    import comfy.sample

    empty = torch.zeros(1, 4, 8, 8)
    noise = comfy.sample.prepare_noise(empty, 5)
    return comfy.sample.sample(
        model, noise, steps, 3.0, "euler", "normal", context(1), context(2), empty, disable_pbar=True, seed=5
    )


def fp32_bytes(model: Any) -> int:
    """Of the float model's denoiser."""
    return sum(value.numel() * 4 for value in model.model.diffusion_model.state_dict().values())
