"""Pictures of unfinished latents: decoded where the autoencoder is small, else by the linear map that fits it best."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

SMALL_AUTOENCODER = 5_000_000
"""Parameters up to which decoding costs less than a step; TAESD has half of them."""
FIT_SIDE = 128
"""Pixels of the picture that the linear map is fitted to."""
FAILURES = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, AttributeError, AssertionError)
"""What autoencoders of other kinds (video, audio, other argument names) raise: no preview, never the end of a run.
ComfyUI's interrupt is none of them."""


@dataclass(frozen=True, slots=True, eq=False)
class Previewer:
    """Latents of one kind of pipeline -> picture. decoder: the autoencoder itself, else None; colours: fp32 [C + 1, 3],
    RGB of each latent channel and of the offset, else None; with neither, the latents are pixels."""

    decoder: Any = None
    colours: Tensor | None = None

    def __call__(self, latents: Tensor) -> Image.Image | None:
        """The first of the latents [B, C, h, w] as a picture; None where they are shaped otherwise (packed) or cannot
        be decoded."""
        if latents.ndim != 4 or not torch.isfinite(latents[:1]).all():
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():
                pixels = self._pixels(latents[:1].detach().clone())
            return None if pixels is None else _picture(pixels)
        except FAILURES:
            return None

    def _pixels(self, latents: Tensor) -> Tensor | None:
        """RGB [1, 3, H, W], about -1..1."""
        if self.decoder is not None:
            return self.decoder.decode(_unscaled(self.decoder, latents.to(self.decoder.dtype)), return_dict=False)[0]
        if self.colours is None:
            return latents if latents.shape[1] == 3 else None
        if latents.shape[1] != len(self.colours) - 1:
            return None
        colours = self.colours.to(latents.device)
        return torch.einsum("bchw,cr->brhw", latents.float(), colours[:-1]) + colours[-1].view(1, 3, 1, 1)


def previewer_of(pipe: Any) -> Previewer | None:
    """What shows the pipeline's latents; None where nothing can."""
    autoencoder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if autoencoder is None:
        return Previewer()
    if not hasattr(autoencoder, "config") or not hasattr(autoencoder, "encode"):
        return None
    try:
        if sum(p.numel() for p in autoencoder.parameters()) <= SMALL_AUTOENCODER:
            return Previewer(decoder=autoencoder)
        colours = _fitted_colours(autoencoder)
    except FAILURES:
        return None
    return None if colours is None else Previewer(colours=colours)


def _fitted_colours(autoencoder: nn.Module) -> Tensor | None:
    """The linear map from latent channels to colours that fits one soft random picture best, fp32 [C + 1, 3]; None for
    autoencoders of something else than pictures."""
    noise = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture = F.interpolate(noise, size=(FIT_SIDE, FIT_SIDE), mode="bicubic").clamp(-1, 1)
    weight = next(autoencoder.parameters())
    with torch.inference_mode(False), torch.no_grad():
        made: Any = autoencoder.encode(picture.to(weight))  # pyright: ignore[reportCallIssue]
    latents = _latents_of(made)
    if latents is None or latents.ndim != 4 or not torch.isfinite(latents).all():
        return None
    latents = _scaled(autoencoder, latents).float().cpu()
    rows = latents.flatten(2)[0].T
    wanted = F.adaptive_avg_pool2d(picture, (latents.shape[-2], latents.shape[-1])).flatten(2)[0].T
    return torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], dim=1), wanted).solution


def _latents_of(made: Any) -> Tensor | None:
    """What an encode gave: a posterior (KL), `latents` (VQ, TAESD) or `latent` (AutoencoderDC)."""
    posterior = getattr(made, "latent_dist", None)
    if posterior is not None:
        return posterior.mode()
    return next((found for name in ("latents", "latent") if (found := getattr(made, name, None)) is not None), None)


def _scaled(autoencoder: Any, latents: Tensor) -> Tensor:
    """What the autoencoder gives as the denoiser takes it."""
    shift, factor = _scaling(autoencoder)
    return (latents - shift) * factor


def _unscaled(autoencoder: Any, latents: Tensor) -> Tensor:
    shift, factor = _scaling(autoencoder)
    return latents / factor + shift


def _scaling(autoencoder: Any) -> tuple[float, float]:
    config = autoencoder.config
    return float(config.get("shift_factor") or 0.0), float(config.get("scaling_factor") or 1.0)


def _picture(pixels: Tensor) -> Image.Image:
    values = ((pixels[0].float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).contiguous().numpy(), "RGB")
