"""Real diffusers pipelines with random weights, small enough that two steps take a fraction of a second.

`MAKERS` maps a name to a function that makes the pipeline (the same weights every time), `INPUTS` to four sets of
`__call__` arguments to record it with, `picture` draws. Of a pipeline's own tensors none is all zero where diffusers
starts it at zero, so that every layer has an effect on the output.
"""

import string
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    LDMTextToImagePipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from PIL import Image
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffusers_ldmq.demo import demo_model

CHANNELS = (16, 32)
TEXT = 32
"""Width of every text encoder."""


def finished(pipe: Any) -> Any:
    """The pipeline, ready to be used in a test: no progress bar, no tensor of zeros where weights should be."""
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
            _wake(component)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _wake(model: nn.Module) -> None:
    """Random values for the output projections and modulations that diffusers starts at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.1)


def clip_tokenizer() -> CLIPTokenizer:
    """The bundled model's."""
    return CLIPTokenizer.from_pretrained(demo_model(), subfolder="tokenizer")


def clip(kind: Any = CLIPTextModel) -> Any:
    """A text encoder for `clip_tokenizer`, with a projection to TEXT where `kind` has one."""
    tokenizer: Any = clip_tokenizer()
    config = CLIPTextConfig(
        hidden_size=TEXT,
        intermediate_size=2 * TEXT,
        projection_dim=TEXT,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config)


def t5_tokenizer() -> T5Tokenizer:
    """One token per letter."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -2.0) for letter in "▁" + string.ascii_letters + string.digits]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=32)


def t5(width: int = TEXT) -> T5EncoderModel:
    """A text encoder for `t5_tokenizer`."""
    config = T5Config(vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2)
    return T5EncoderModel(config)


def levels(*widths: int, sample_size: int = 16) -> dict[str, Any]:
    """The shape of an autoencoder with those channels; every level but the last halves the picture."""
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "norm_num_groups": 4,
        "sample_size": sample_size,
    }


def vae(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    """Pictures twice as wide as their latents."""
    return AutoencoderKL(latent_channels=latent_channels, **levels(8, 16), **config)


def text_unet(in_channels: int = 4, **config: Any) -> UNet2DConditionModel:
    """A text-conditioned U-Net for latents of 8 x 8."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": in_channels,
        "out_channels": 4,
        "block_out_channels": CHANNELS,
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": TEXT,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**settings | config)


def plain_unet(sample_size: int = 8, channels: int = 3) -> UNet2DModel:
    """An unconditional U-Net."""
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
    )


def ddim() -> DDIMScheduler:
    """As Stable Diffusion's own: nothing is clipped."""
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _stable_diffusion(kind: Any, unet: UNet2DConditionModel, **more: Any) -> Any:
    return kind(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **more,
    )


def tiny_sd() -> Any:
    """Stable Diffusion, text to image."""
    torch.manual_seed(0)
    return finished(_stable_diffusion(StableDiffusionPipeline, text_unet()))


def tiny_img2img() -> Any:
    """Stable Diffusion, image to image."""
    torch.manual_seed(0)
    return finished(_stable_diffusion(StableDiffusionImg2ImgPipeline, text_unet()))


def tiny_inpaint() -> Any:
    """Stable Diffusion, inpainting: 9 input channels."""
    torch.manual_seed(0)
    return finished(_stable_diffusion(StableDiffusionInpaintPipeline, text_unet(in_channels=9)))


def tiny_controlnet() -> Any:
    """Stable Diffusion with a ControlNet."""
    torch.manual_seed(0)
    unet = text_unet()
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    return finished(_stable_diffusion(StableDiffusionControlNetPipeline, unet, controlnet=controlnet))


def tiny_sdxl() -> Any:
    """Stable Diffusion XL: two text encoders, sizes as a condition."""
    torch.manual_seed(0)
    unet = text_unet(
        cross_attention_dim=2 * TEXT,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT,
    )
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=ddim(),  # pyright: ignore[reportArgumentType]
        add_watermarker=False,
    )
    return finished(pipe)


def tiny_pixart() -> Any:
    """PixArt-Sigma."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        num_attention_heads=3,
        attention_head_dim=8,
        caption_channels=TEXT,
        cross_attention_dim=24,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )
    pipe = PixArtSigmaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae(),
        transformer=transformer,
        scheduler=ddim(),  # pyright: ignore[reportArgumentType]
    )
    return finished(pipe)


def tiny_sd3() -> Any:
    """Stable Diffusion 3: three text encoders, flow matching."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        caption_projection_dim=32,
        joint_attention_dim=2 * TEXT,
        pooled_projection_dim=2 * TEXT,
        pos_embed_max_size=16,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(CLIPTextModelWithProjection),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(CLIPTextModelWithProjection),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(2 * TEXT),
        tokenizer_3=t5_tokenizer(),  # pyright: ignore[reportArgumentType]
    )
    return finished(pipe)


def tiny_flux() -> Any:
    """Flux: packed latents, double and single stream blocks."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        pooled_projection_dim=TEXT,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae(1, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),  # pyright: ignore[reportArgumentType]
        transformer=transformer,
    )
    return finished(pipe)


def tiny_ldm_uncond() -> Any:
    """Unconditional latent diffusion with a VQ autoencoder."""
    torch.manual_seed(0)
    vqvae = VQModel(latent_channels=3, num_vq_embeddings=32, **levels(8, 16))
    return finished(LDMPipeline(vqvae=vqvae, unet=plain_unet(), scheduler=ddim()))


def tiny_ldm_text() -> Any:
    """Latent diffusion with a BERT text encoder, text to image. The pipeline divides heights by 8 whatever the
    autoencoder does."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    config = LDMBertConfig(
        vocab_size=len(tokenizer),
        encoder_layers=2,
        encoder_ffn_dim=64,
        encoder_attention_heads=2,
        head_dim=8,
        d_model=TEXT,
        pad_token_id=len(tokenizer) - 1,
    )
    pipe = LDMTextToImagePipeline(
        vqvae=AutoencoderKL(**levels(8, 8, 8, 8, sample_size=32)),
        bert=LDMBertModel(config),
        tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
        unet=text_unet(sample_size=4),
        scheduler=ddim(),
    )
    return finished(pipe)


def tiny_dit() -> Any:
    """A class-conditional diffusion transformer."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=1000,  # the pipeline's null label is 1000
    )
    with torch.no_grad():
        for parameter in transformer.parameters():  # the output projection starts at zero
            parameter.add_(torch.randn_like(parameter) * 0.02)
    autoencoder = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipe = DiTPipeline(transformer, autoencoder, DDIMScheduler())  # pyright: ignore[reportArgumentType]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pixel() -> Any:
    """An unconditional pixel pipeline with DDIM's fewer steps."""
    torch.manual_seed(0)
    pipe = DDPMPipeline(plain_unet(), DDIMScheduler())  # pyright: ignore[reportArgumentType]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_ddim() -> Any:
    """Unconditional, in pixels, DDIM's own pipeline."""
    torch.manual_seed(0)
    return finished(DDIMPipeline(plain_unet(), DDIMScheduler()))


def tiny_ddpm() -> Any:
    """Unconditional, in pixels, DDPM's own pipeline and scheduler."""
    torch.manual_seed(0)
    return finished(DDPMPipeline(plain_unet(), DDPMScheduler()))


def drawing(seed: int, size: int = 16) -> Image.Image:
    """A picture of that many pixels a side, another one for every seed."""
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mask(size: int = 16) -> Image.Image:
    """The left half is to be painted."""
    values = np.zeros((size, size), dtype=np.uint8)
    values[:, : size // 2] = 255
    return Image.fromarray(values)


PROMPTS = ("red apple", "blue whale", "green tree", "yellow star", "black cat", "white dove", "grey wolf", "pink pig")


def _texts(**common: Any) -> list[dict[str, Any]]:
    return [{"prompt": list(PROMPTS[i : i + 2]), "num_inference_steps": 2, **common} for i in range(0, 8, 2)]


def _pictured(argument: str, **common: Any) -> list[dict[str, Any]]:
    """One prompt and one picture a call."""
    return [
        {"prompt": PROMPTS[i], argument: drawing(i), "num_inference_steps": 2, "guidance_scale": 3.0, **common}
        for i in range(4)
    ]


_SMALL = {"height": 16, "width": 16}

MAKERS: dict[str, Callable[[], Any]] = {
    "controlnet": tiny_controlnet,
    "ddim": tiny_ddim,
    "ddpm": tiny_ddpm,
    "dit": tiny_dit,
    "flux": tiny_flux,
    "img2img": tiny_img2img,
    "inpaint": tiny_inpaint,
    "ldm-text": tiny_ldm_text,
    "ldm-uncond": tiny_ldm_uncond,
    "pixart": tiny_pixart,
    "sd": tiny_sd,
    "sd3": tiny_sd3,
    "sdxl": tiny_sdxl,
}
"""Name -> a fresh pipeline with the same weights every time."""

INPUTS: dict[str, list[dict[str, Any]]] = {
    "controlnet": _pictured("image"),
    "ddim": [{"batch_size": 2, "num_inference_steps": 2}] * 4,
    "ddpm": [{"batch_size": 2, "num_inference_steps": 2}] * 4,
    "dit": [{"class_labels": [i, i + 1], "num_inference_steps": 2} for i in range(4)],
    "flux": _texts(**_SMALL, max_sequence_length=16),
    "img2img": _pictured("image", strength=0.8),
    "inpaint": _pictured("image", mask_image=mask(), **_SMALL),
    "ldm-text": _texts(guidance_scale=3.0),
    "ldm-uncond": [{"batch_size": 2, "num_inference_steps": 2}] * 4,
    "pixart": _texts(**_SMALL, use_resolution_binning=False, clean_caption=False, max_sequence_length=16),
    "sd": _texts(guidance_scale=3.0),
    "sd3": _texts(**_SMALL, max_sequence_length=16),
    "sdxl": _texts(**_SMALL),
}
"""Name -> four sets of `__call__` arguments to record it with."""


def picture(pipe: Any, name: str, seed: int = 0) -> torch.Tensor:
    """What the pipeline draws for the first of its inputs. float [B, H, W, C], 0 to 1."""
    arguments = dict(INPUTS[name][0])
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**arguments, generator=torch.Generator().manual_seed(seed), output_type="np").images
    return torch.as_tensor(np.asarray(made))
