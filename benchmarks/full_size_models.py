"""The papers' models at their full size with random weights, as diffusers' pipelines, and what the papers say of them.

LDM-4 and LDM-8 are unconditional (`LDMPipeline`). diffusers has no pipeline for the class-conditional LDM-4: its U-Net
attends to one embedding of the class, so here it is Stable Diffusion's pipeline given one token per picture. Texts of
SD 1.5 are given as embeddings too, because only denoiser and autoencoder are measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)


@dataclass(frozen=True, slots=True)
class FullSize:
    """A model. make: its pipeline with random weights; autoencoder: the component's name; tokens: (number, width) of
    its condition, None without one; paper_mb: MB that the paper gives for (fp32, W8A8, W4A8)."""

    title: str
    make: Callable[[], Any]
    autoencoder: str
    tokens: tuple[int, int] | None
    paper_mb: tuple[float, float, float]


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def _levels(*widths: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 2,
        "sample_size": 256,
    }


def _vq_f4() -> VQModel:
    return VQModel(latent_channels=3, num_vq_embeddings=8192, **_levels(128, 256, 512))


def _kl_f8() -> AutoencoderKL:
    return AutoencoderKL(latent_channels=4, **_levels(128, 256, 512, 512))


def ldm4() -> LDMPipeline:
    """LSUN-Bedrooms: VQ-f4, 64 x 64 x 3 latents; as CompVis/ldm-celebahq-256."""
    unet = UNet2DModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(224, 448, 672, 896),
        layers_per_block=2,
        attention_head_dim=32,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * 3),
        up_block_types=(*["AttnUpBlock2D"] * 3, "UpBlock2D"),
    )
    return LDMPipeline(vqvae=_vq_f4(), unet=unet, scheduler=_scheduler())


def ldm8() -> LDMPipeline:
    """LSUN-Churches: KL-f8, 32 x 32 x 4 latents. Its 8 heads per layer are heads of 24 channels here, because this
    class knows only one width for all; the number of weights is the same."""
    unet = UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(192, 384, 384, 768, 768),
        layers_per_block=2,
        attention_head_dim=24,
        down_block_types=(*["AttnDownBlock2D"] * 4, "DownBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", *["AttnUpBlock2D"] * 4),
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
    )
    autoencoder: Any = _kl_f8()  # LDMPipeline is written for both kinds, its signature names one
    return LDMPipeline(vqvae=autoencoder, unet=unet, scheduler=_scheduler())


def ldm4_class() -> StableDiffusionPipeline:
    """ImageNet (cin256): VQ-f4, 64 x 64 x 3 latents, cross attention to one embedding of the class, one head."""
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(192, 384, 576, 960),
        layers_per_block=2,
        attention_head_dim=1,  # this class means the number of heads
        cross_attention_dim=512,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
    )
    return _with_embeddings(unet, _vq_f4())


def sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: the class's own defaults but these."""
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return _with_embeddings(unet, _kl_f8())


def _with_embeddings(unet: UNet2DConditionModel, autoencoder: Any) -> StableDiffusionPipeline:
    nothing: Any = None
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=nothing,
        tokenizer=nothing,
        unet=unet,
        scheduler=_scheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=nothing,
        feature_extractor=nothing,
        requires_safety_checker=False,
    )


MODELS = {
    "ldm4": FullSize("LDM-4, VQ-f4, unconditional (Bedroom)", ldm4, "vqvae", None, (1317.4, 330.1, 165.5)),
    "ldm8": FullSize("LDM-8, KL-f8, unconditional (Church)", ldm8, "vqvae", None, (1514.5, 379.5, 190.3)),
    "ldm4-class": FullSize("LDM-4, VQ-f4, classes (ImageNet)", ldm4_class, "vae", (1, 512), (1824.6, 457.1, 229.2)),
    "sd15": FullSize("SD 1.5, KL-f8, text (COCO)", sd15, "vae", (77, 768), (4112.5, 1029.7, 515.9)),
}


def call_inputs(model: FullSize, number: int) -> dict[str, Any]:
    """`__call__` arguments of one picture of 256 x 256 in two steps, guided where there is a condition."""
    if model.tokens is None:
        return {"batch_size": 1, "num_inference_steps": 2}
    generator = torch.Generator().manual_seed(number)
    condition, empty = torch.randn(2, 1, *model.tokens, generator=generator)
    return {
        "prompt_embeds": condition,
        "negative_prompt_embeds": empty,
        "guidance_scale": 3.0,
        "num_inference_steps": 2,
        "height": 256,
        "width": 256,
    }


def drawn(pipe: Any, model: FullSize) -> torch.Tensor:
    """One picture, decoded. float [1, 3, 256, 256]."""
    arguments = call_inputs(model, 99) | {"generator": torch.Generator().manual_seed(7)}
    if model.tokens is None:
        return torch.as_tensor(pipe(**arguments, output_type="np").images).permute(0, 3, 1, 2)
    latents = pipe(**arguments, output_type="latent").images
    with torch.no_grad():  # a VQModel's decode does not take all arguments that this pipeline gives
        return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
