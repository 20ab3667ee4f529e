"""Previews of the Diffusers route: every kind of autoencoder gives a picture or none, never an error."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL

from comfyui_nodes import previews
from comfyui_nodes.previews import previewer_of


def deep_compression() -> AutoencoderDC:
    """A tiny autoencoder of the kind that Sana has: its encode gives `latent`."""
    config: dict[str, Any] = dict(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return AutoencoderDC(**config)


def kl() -> AutoencoderKL:
    config: dict[str, Any] = dict(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    return AutoencoderKL(**config)


@pytest.mark.parametrize("make", [deep_compression, kl])
@pytest.mark.parametrize("small", [0, 5_000_000], ids=["fitted", "decoded"])
def test_previews_show_latents_of_every_autoencoder(make: Any, small: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(previews, "SMALL_AUTOENCODER", small)
    torch.manual_seed(0)
    show = previewer_of(SimpleNamespace(vae=make().eval()))
    assert show is not None
    assert (show.decoder is None) == (small == 0)
    picture = show(torch.randn(2, 4, 8, 8))
    assert picture is not None
    assert picture.size == ((8, 8) if small == 0 else (16, 16))


class Strange(torch.nn.Module):
    """An autoencoder whose encode and decode fail as `error` says, or give something unknown where it is None."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error, self.dtype, self.config = error, torch.float32, {"scaling_factor": 1.0}
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def encode(self, picture: Any) -> Any:
        if self.error is not None:
            raise self.error
        return SimpleNamespace(codes=picture)

    def decode(self, latents: Any, return_dict: bool) -> Any:
        return self.encode(latents)


@pytest.mark.parametrize("error", [AttributeError("x"), TypeError("x"), RuntimeError("x"), AssertionError(), None])
@pytest.mark.parametrize("small", [0, 5_000_000], ids=["fitted", "decoded"])
def test_an_autoencoder_that_cannot_be_used_gives_no_preview(
    error: Exception | None, small: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(previews, "SMALL_AUTOENCODER", small)
    show = previewer_of(SimpleNamespace(vae=Strange(error)))
    assert show is None if small == 0 else show is not None and show(torch.randn(1, 4, 8, 8)) is None


def test_an_interrupt_inside_a_preview_passes(monkeypatch: Any) -> None:
    class InterruptError(Exception):
        """What ComfyUI's own is in older versions."""

    monkeypatch.setattr(previews, "SMALL_AUTOENCODER", 0)
    with pytest.raises(InterruptError):
        previewer_of(SimpleNamespace(vae=Strange(InterruptError())))
