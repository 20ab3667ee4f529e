"""The names of tensors in the U-Nets that people share: full size, on meta."""

from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusers_ldmq.errors import CheckpointError

SD21: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
XL: dict[str, Any] = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
}
UNETS: dict[str, dict[str, Any]] = {
    "SD15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "SD20": SD21,
    "SD21UnclipH": SD21 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
    "SDXL": XL
    | {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
    },
    "SDXLRefiner": XL
    | {
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 4,
        "attention_head_dim": [6, 12, 24, 24],
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    },
}
"""ComfyUI's name of the model -> what differs from diffusers' defaults in its U-Net's config.json."""


def unet_of(kind: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel(**UNETS[kind] | changes)


def recognized(comfy: ModuleType, tensors: dict[str, torch.Tensor]) -> Any:
    """ComfyUI's module for tensors of these names and shapes. Vectors are real: one is looked at."""
    found = {name: torch.zeros(t.shape) if t.dim() == 1 else t for name, t in tensors.items()}
    config = comfy.model_detection.model_config_from_unet(found, "")
    config.set_inference_dtype(torch.float32, None)
    return config.get_model(found, "", device=torch.device("meta"))


@pytest.mark.parametrize("kind", UNETS)
def test_every_tensor_has_its_place_and_both_compute_the_same(kind: str, comfy: ModuleType):
    from comfyui_nodes.native.diffusers_keys import check_same_computation, ldm_names

    unet = unet_of(kind)
    names = ldm_names(unet.state_dict(), unet.config)
    model = recognized(comfy, {names[name]: value for name, value in unet.state_dict().items()})
    assert type(model.model_config).__name__ == kind
    shapes = {name: value.shape for name, value in model.diffusion_model.state_dict().items()}
    assert {names[name]: value.shape for name, value in unet.state_dict().items()} == shapes
    check_same_computation(unet, model.diffusion_model, names)


def test_what_no_tensor_shows_is_compared(comfy: ModuleType):
    from comfyui_nodes.native.diffusers_keys import check_same_computation, ldm_names

    unet = unet_of("SD15")
    names = ldm_names(unet.state_dict(), unet.config)
    model = recognized(comfy, {names[name]: value for name, value in unet.state_dict().items()})
    for changes, told in (({"attention_head_dim": 4}, "heads is 4"), ({"norm_eps": 1e-3}, "eps is 0.001")):
        with pytest.raises(CheckpointError, match=told):
            check_same_computation(unet_of("SD15", **changes), model.diffusion_model, names)


def test_tensors_that_comfyui_lacks_are_named(comfy: ModuleType):
    from comfyui_nodes.native.diffusers_keys import ldm_names

    unet = unet_of("SD15")
    with pytest.raises(CheckpointError, match=r"module 'extra', tensor 'weight'.*LDM-Q Pipeline loader"):
        ldm_names([*unet.state_dict(), "extra.weight"], unet.config)
    consistency = unet_of("SD15", time_cond_proj_dim=256)
    with pytest.raises(CheckpointError, match="time_cond_proj_dim is 256"):
        ldm_names(consistency.state_dict(), consistency.config)
