"""What each stage learns: the modules it trains and the loss of a batch."""

import copy
import math
from typing import Any

import torch
from captioned_images import CaptionedImages, TrainingError
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from pipeline_parts import (
    NOISE,
    PIXELS,
    TIMES,
    TOKENS,
    Workspace,
    new_autoencoder,
    new_text_encoder,
    new_tokenizer,
    new_unet,
)
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from training_loop import Settings, log

ENCODE_BATCH = 32  # pictures at once where no gradient is kept
LATENT_NOISE = 0.02  # in latent standard deviations: the decoder will see the UNet's latents, not exact ones
KL_WEIGHT = 2e-6
NOISING: Any = DDPMScheduler(**NOISE, num_train_timesteps=TIMES)


def chosen_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(f"device {name} cannot be used here: use auto, cpu or cuda") from error


def fast_autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where the hardware multiplies it natively, otherwise float32: emulated bfloat16 is slower."""
    if device.type == "cpu":
        features = getattr(torch.cpu, "get_capabilities", dict)()
        native = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=native)


def picture_loss(drawn: Tensor, picture: Tensor) -> Tensor:
    """Absolute, squared and edge error of [n, 3, h, w]; the edge term keeps outlines sharp."""
    error = drawn.float() - picture
    across = (error[..., 1:] - error[..., :-1]).abs().mean()
    down = (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * (across + down)


@torch.no_grad()
def encode_all(vae: Any, data: CaptionedImages) -> Tensor:
    """Every picture's mean latents, unscaled: float32 [N, 4, 16, 16] on the autoencoder's device."""
    means = [
        vae.encode(data.images(slice(start, start + ENCODE_BATCH)).to(vae.device)).latent_dist.mean
        for start in range(0, len(data.captions), ENCODE_BATCH)
    ]
    return torch.cat(means)


@torch.no_grad()
def reconstruction_psnr(vae: Any, data: CaptionedImages) -> float:
    """Peak signal-to-noise ratio in dB of encoding and decoding, over all pixels of all pictures."""
    latents, squared = encode_all(vae, data), 0.0
    for start in range(0, len(latents), ENCODE_BATCH):
        rows = slice(start, start + ENCODE_BATCH)
        drawn = vae.decode(latents[rows]).sample.clamp(-1, 1).cpu()
        squared += (drawn - data.images(rows)).square().sum(dtype=torch.float64).item()
    return -10 * math.log10(squared / data.pixels.numel() / 4)


class AutoencoderTask:
    """Encoder and decoder together."""

    pixels = PIXELS  # side of a picture

    def __init__(self, workspace: Workspace, data: CaptionedImages, settings: Settings) -> None:
        self.data, self.count = data, len(data.captions)
        self.device = chosen_device(settings.device)
        vae = workspace.load("vae") if workspace.find("vae") else self._fresh(settings)
        self.trained = vae.to(self.device, memory_format=torch.channels_last)
        self.autocast = fast_autocast(self.device)

    def _fresh(self, settings: Settings) -> Any:
        return new_autoencoder(settings.width, self.pixels)

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        pictures = self.data.images(rows).to(self.device, memory_format=torch.channels_last)
        with self.autocast:
            latents = self.trained.encode(pictures).latent_dist
            drawn = self.trained.decode(latents.sample(generator)).sample
        return picture_loss(drawn, pictures) + KL_WEIGHT * latents.kl().mean()

    def parts(self, average: nn.Module) -> dict[str, Any]:
        """The averaged autoencoder, with the factor that gives its latents unit variance."""
        vae: Any = average
        vae.register_to_config(scaling_factor=1 / encode_all(vae, self.data).std().item())
        log.info("vae: PSNR %.2f dB", reconstruction_psnr(vae, self.data))
        return {"vae": vae}


class DecoderTask:
    """The decoder alone, on the latents of a finished encoder."""

    def __init__(self, workspace: Workspace, data: CaptionedImages, settings: Settings) -> None:
        self.data, self.count = data, len(data.captions)
        self.device = chosen_device(settings.device)
        self.vae = workspace.load("vae").to(self.device, memory_format=torch.channels_last)
        self.trained = nn.ModuleDict({"decoder": self.vae.decoder, "post_quant_conv": self.vae.post_quant_conv})
        self.latents = encode_all(self.vae, data)
        self.spread = LATENT_NOISE * self.latents.std()
        self.autocast = fast_autocast(self.device)
        log.info("decoder: PSNR %.2f dB before", reconstruction_psnr(self.vae, data))

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        pictures = self.data.images(rows).to(self.device, memory_format=torch.channels_last)
        latents = self.latents[rows.to(self.device)]
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        with self.autocast:
            drawn = self.vae.decode(latents + self.spread * noise).sample
        return picture_loss(drawn, pictures)

    def parts(self, average: nn.Module) -> dict[str, Any]:
        """The autoencoder with the averaged decoder."""
        vae = copy.deepcopy(self.vae)
        vae.load_state_dict(average.state_dict(), strict=False)  # all but the encoder
        log.info("decoder: PSNR %.2f dB after", reconstruction_psnr(vae, self.data))
        return {"vae": vae}


def noised(latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Each row of latents [n, 4, 16, 16] at a random diffusion time; also the noise that is in it and the times [n]."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    times = torch.randint(TIMES, (len(latents),), generator=generator).to(latents.device)
    return NOISING.add_noise(latents, noise, times), noise, times


class DenoiserTask:
    """UNet and text encoder together: predict the noise in a picture's latents from its caption."""

    def __init__(self, workspace: Workspace, data: CaptionedImages, settings: Settings) -> None:
        self.count, self.dropout = len(data.captions), settings.dropout
        self.device = chosen_device(settings.device)
        vae = workspace.load("vae").to(self.device)
        self.latents = encode_all(vae, data) * vae.config.scaling_factor
        has = workspace.find
        self.tokenizer = workspace.load("tokenizer") if has("tokenizer") else new_tokenizer(data.captions)
        unet = workspace.load("unet") if has("unet") else new_unet(settings.width)
        self.text_encoder: Any = new_text_encoder(settings.width, self.tokenizer)
        if has("text_encoder"):
            self.text_encoder = workspace.load("text_encoder")
        unet.to(memory_format=torch.channels_last)
        # With heads this narrow, plain matrix products train a quarter faster than the fused attention.
        unet.set_attn_processor(AttnProcessor())
        self.unet = unet
        both = {"unet": self.unet, "text_encoder": self.text_encoder}
        self.trained = nn.ModuleDict(both).to(self.device).train()
        self.tokens, self.no_tokens = self._tokens(data.captions), self._tokens([""])[0]
        self.autocast = fast_autocast(self.device)

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        latents = self.latents[rows.to(self.device)].contiguous(memory_format=torch.channels_last)
        tokens = self.tokens[rows]
        tokens[torch.rand(len(rows), generator=generator) < self.dropout] = self.no_tokens
        noisy, noise, times = noised(latents, generator)
        with self.autocast:
            caption = self.text_encoder(tokens.to(self.device))[0]
            predicted = self.unet(noisy, times, caption).sample
        return mse_loss(predicted.float(), noise)

    def parts(self, average: nn.Module) -> dict[str, Any]:
        """The averaged UNet and text encoder, and the tokenizer."""
        unet, text_encoder = average.get_submodule("unet"), average.get_submodule("text_encoder")
        return {"unet": unet, "text_encoder": text_encoder, "tokenizer": self.tokenizer}

    def _tokens(self, captions: list[str]) -> Tensor:
        """Token ids, int64 [n, 24]; longer captions are cut."""
        options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
        return self.tokenizer(captions, **options).input_ids
