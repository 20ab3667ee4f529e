"""Training on top of integers: what reaches the input and the adapters, and that an adapter learns."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image, ImageDraw
from torch import Tensor, nn

from diffusers_ldmq import LDMQConfig, Recording
from diffusers_ldmq.calls import Batch, forward
from diffusers_ldmq.demo import demo_model
from diffusers_ldmq.gradient import autocast, straight_through
from diffusers_ldmq.layers import QuantConv2d, QuantLinear, quantized_layers
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.specs import geometry_of

STEPS = 20
PICTURES = {"red grid": "red", "green grid": "green", "blue grid": "blue", "black grid": "black"}
"""Caption -> colour of what the bundled model has never seen."""


def grid(colour: str) -> Tensor:
    """A picture of coloured lines on white: fp32 [3, 64, 64] in -1..1."""
    picture = Image.new("RGB", (64, 64), "white")
    draw = ImageDraw.Draw(picture)
    for at in range(4, 64, 12):
        draw.line([(at, 0), (at, 63)], fill=colour, width=3)
        draw.line([(0, at), (63, at)], fill=colour, width=3)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def lesson() -> Batch:
    """Noised latents of the pictures at four timesteps, what their captions say, and the noise as the output."""
    pipe = DiffusionPipeline.from_pretrained(demo_model(), torch_dtype=torch.float32)
    pixels = torch.stack([grid(colour) for colour in PICTURES.values()])
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([100, 300, 500, 700])
    text = pipe.encode_prompt(list(PICTURES), "cpu", 1, False)[0]
    noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
    return Batch({"sample": noisy, "timestep": timesteps, "encoder_hidden_states": text}, noise, 0.0)


def quantized_unet(scheme: str) -> UNet2DConditionModel:
    config: Any = LDMQConfig(scheme)
    return UNet2DConditionModel.from_pretrained(demo_model(), subfolder="unet", quantization_config=config)


def losses(denoiser: nn.Module, batch: Batch) -> list[float]:
    """Of twenty steps of AdamW on everything that wants gradients."""
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    found: list[float] = []
    for _ in range(STEPS):
        loss = nn.functional.mse_loss(forward(denoiser, batch), batch.output)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-dyn"])
def test_twenty_steps_of_lora_lower_the_loss_of_the_quantized_model(scheme: str) -> None:
    denoiser = quantized_unet(scheme)
    torch.manual_seed(0)
    denoiser.requires_grad_(False)
    denoiser.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"]))
    bases = {type(m.base_layer) for m in denoiser.modules() if hasattr(m, "base_layer")}
    assert bases == {QuantLinear, QuantConv2d}
    codes = {name: layer.state().weight.clone() for name, layer in quantized_layers(denoiser).items()}
    found = losses(denoiser, lesson())
    assert found[-1] < 0.25 * found[0], found
    # only the adapters learned
    for name, layer in quantized_layers(denoiser).items():
        assert torch.equal(layer.state().weight, codes[name])
    adapters = {name: p for name, p in denoiser.named_parameters() if ".lora_" in name}
    assert {p for p in denoiser.parameters() if p.requires_grad} == set(adapters.values())
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapters.values())
    assert all(bool(p.any()) for name, p in adapters.items() if "lora_B" in name)  # they start at zero


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_gradients_reach_the_inputs_nearly_as_in_the_float_model(checkpointing: bool) -> None:
    """8-bit rounding moves them as little as it moves the output."""
    batch, found = lesson(), []
    for denoiser in (UNet2DConditionModel.from_pretrained(demo_model(), subfolder="unet"), quantized_unet("w8a16")):
        denoiser.train()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        inputs = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in batch.kwargs.items()}
        nn.functional.mse_loss(denoiser(**inputs).sample, batch.output).backward()
        found.append((inputs["sample"].grad, inputs["encoder_hidden_states"].grad))
    for truth, gradient in zip(*found, strict=True):
        assert sqnr(truth, gradient) > 20


def test_gradients_reach_the_inputs_through_every_scheme(
    kind: str, mixed_denoiser: Callable[[str], Any], recordings: Callable[[str], Recording]
) -> None:
    denoiser, recording = mixed_denoiser(kind), recordings(kind)
    batch = recording.batch(recording.calls[0])
    inputs = {
        key: value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in batch.kwargs.items()
    }
    forward(denoiser, Batch(inputs, batch.output, batch.timestep)).sum().backward()
    wanted = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
    reached = {key for key, value in wanted.items() if value.grad is not None and bool(value.grad.isfinite().all())}
    assert reached >= wanted.keys() & {"sample", "hidden_states", "encoder_hidden_states"}
    assert all(bool(wanted[key].grad.any()) for key in reached)  # pyright: ignore


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2)], ids=str)
def test_the_gradient_is_that_of_the_float_layer_whatever_forward_does(layer: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn((5, 6) if isinstance(layer, nn.Linear) else (2, 6, 5, 5), requires_grad=True)
    asked: list[str] = []

    def weight() -> Tensor:
        asked.append("weight")
        return layer.weight.detach()

    out = straight_through(x, lambda value: layer(value).round(), weight, geometry_of(layer))
    assert not asked  # only the backward pass needs it
    direction = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, direction)
    (truth,) = torch.autograd.grad(layer(x), x, direction)
    assert torch.allclose(found, truth, atol=1e-6)


def test_autocast_gives_the_dtype_that_float_layers_get() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            for x in (torch.randn(2, 3), torch.randn(2, 3).bfloat16(), torch.randn(2, 3).double()):
                if x.dtype != torch.float64:
                    assert autocast(x).dtype == nn.functional.linear(x, torch.randn(4, 3)).dtype == dtype
                else:
                    assert autocast(x).dtype == torch.float64
