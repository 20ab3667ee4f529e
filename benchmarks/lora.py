"""LoRA on quantized models: a small real adapter is trained on the bundled model, then base + LoRA in floating point is
compared with quantized + LoRA: attached, fused, and (below 8 bits) fused by requantizing, which nobody should do.

    python benchmarks/lora.py [--adapter FILE] [--out DIR]

The adapter learns to draw the model's own pictures with red and blue exchanged (rank 8, Linear and Conv2d layers, about
two minutes); a file of an earlier run is used again. All figures are in dB at the denoiser's output, powers summed over
the held-out calls of 20 steps.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import peft
import torch
import typer
from diffusers import DDPMScheduler
from diffusers.utils import logging
from measuring import RESULTS, Results, pipeline
from torch import Tensor, nn

from diffusers_ldmq import calibrate, make_plan, quantize, record_calls
from diffusers_ldmq.affine import dequantize_weight, quantize_weight, weight_to_quantize
from diffusers_ldmq.artifacts import Calibration
from diffusers_ldmq.calibration import weight_scales
from diffusers_ldmq.calls import Batch, Recording, run
from diffusers_ldmq.demo import demo_captions
from diffusers_ldmq.demo.job import GUIDANCE, STEPS
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.lora import adapter_layers
from diffusers_ldmq.metrics import Power, total
from diffusers_ldmq.plugin import attach
from diffusers_ldmq.sampling import Sampling, sample_pictures

SCHEMES = ("w8a16", "w8a8-dyn", "w8a8", "w4a16", "w4a8")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"]
RANK, RATE, BATCH, TRAINED_ON = 8, 2e-3, 16, 16
app = typer.Typer(add_completion=False)


def show(line: str) -> None:
    typer.echo(line)


def trained(file: Path, steps: int) -> None:
    """Train the adapter and save it in diffusers' format."""
    pipe = pipeline("bundled")
    captions = demo_captions()[:TRAINED_ON]
    latents, text = examples(pipe, captions)
    unet: Any = pipe.unet.requires_grad_(False).train()
    torch.manual_seed(0)
    unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    weights = [value for value in unet.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    noising: Any = DDPMScheduler.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator)
        times = torch.randint(1000, (BATCH,), generator=generator)
        guess = unet(noising.add_noise(latents[rows], noise, times), times, text[rows]).sample
        loss = nn.functional.mse_loss(guess, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            show(f"  training, step {step}: {loss.item():.4f}")
    file.parent.mkdir(parents=True, exist_ok=True)
    layers = peft.get_peft_model_state_dict(unet)
    pipe.save_lora_weights(file.parent, unet_lora_layers=layers, weight_name=file.name)


@torch.no_grad()
def examples(pipe: Any, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Latents [n, 4, 16, 16] of the model's own pictures with red and blue exchanged, and what its text encoder says of
    their captions."""
    pictures = sample_pictures(pipe, captions, Sampling(STEPS, GUIDANCE, seed=500))
    pixels = torch.stack([torch.from_numpy(np.asarray(picture).copy()) for picture in pictures])
    pixels = pixels.flip(-1).movedim(-1, 1).float() / 127.5 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    return latents, pipe.encode_prompt(captions, "cpu", 1, False)[0]


def recorded(file: Path | None) -> Recording:
    """Calls of the float model; file: with this adapter fused."""
    pipe = pipeline("bundled")
    if file is not None:
        load(pipe, file)
        pipe.fuse_lora(components=["unet"])
        pipe.unload_lora_weights()
    captions = demo_captions()[TRAINED_ON:]
    inputs = [
        {"prompt": captions[i : i + 4], "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        for i in range(0, 16, 4)
    ]
    return record_calls(pipe, inputs, selection="first-step")


def load(pipe: Any, file: Path) -> None:
    pipe.load_lora_weights(file.parent, weight_name=file.name)


def calibrated(unet: nn.Module, recording: Recording, scheme: str) -> Calibration:
    """That scheme in every layer that the family does not keep float."""
    table = layer_table(unet)
    kept = tuple(info.name for info in table.layers if info.keep_float)
    return calibrate(unet, make_plan(table, planner="uniform", scheme=scheme, keep_float=kept), recording)


def quantized(recording: Recording, scheme: str) -> Any:
    """The bundled pipeline with its U-Net in that scheme, calibrated without any adapter."""
    pipe = pipeline("bundled")
    quantize(pipe.unet, calibrated(pipe.unet, recording, scheme))
    attach(pipe.unet)
    return pipe


@contextmanager
def requantized(unet: Any) -> Iterator[None]:
    """The adapters quantized with the weight whatever the number of bits, while the context is open."""
    layers = adapter_layers(unet)
    before = {name: layer.base_layer.state() for name, layer in layers.items()}
    for name, layer in layers.items():
        state, spec = before[name], before[name].scheme.weight
        assert spec is not None
        with torch.no_grad():
            delta = layer.get_delta_weight(layer.active_adapters[0])
            weight = weight_to_quantize(dequantize_weight(state, delta.shape) + delta, state)
            codes, scale = quantize_weight(weight, weight_scales(weight, spec), spec)
        layer.base_layer.load_state(replace(state, weight=codes, weight_scale=scale))
    unet.disable_lora()
    try:
        yield
    finally:
        unet.enable_lora()
        for name, layer in layers.items():
            layer.base_layer.load_state(before[name])


def outputs(unet: nn.Module, batches: list[Batch]) -> list[Tensor]:
    return [run(unet, batch) for batch in batches]


def decibels(reference: list[Tensor], measured: list[Tensor]) -> float:
    return round(total([Power.between(r, m) for r, m in zip(reference, measured, strict=True)]).sqnr_db, 2)


def difference(one: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    return [a - b for a, b in zip(one, other, strict=True)]


def row(scheme: str, base: Recording, batches: list[Batch], file: Path) -> dict[str, Any]:
    """For one scheme: output SQNR against the float model with the same adapter (or both without), and in 'effect'
    that of what the adapter adds."""
    truth, plain = [batch.output for batch in batches], outputs(pipeline("bundled").unet, batches)
    pipe = quantized(base, scheme)
    without = outputs(pipe.unet, batches)
    load(pipe, file)
    versions = {"attached": outputs(pipe.unet, batches)}
    if scheme.startswith("w4"):
        with requantized(pipe.unet):
            versions["requantized"] = outputs(pipe.unet, batches)
    pipe.fuse_lora(components=["unet"])
    versions["fused"] = outputs(pipe.unet, batches)
    effect = difference(truth, plain)
    return {
        "adapter's own effect": decibels(truth, plain),
        "neither has the adapter": decibels(plain, without),
        "only the float one has it": decibels(truth, without),
        **{name: decibels(truth, found) for name, found in versions.items()},
        "effect": {name: decibels(effect, difference(found, without)) for name, found in versions.items()},
    }


@app.command()
def main(
    adapter: Annotated[Path, typer.Option(help="used if it is there, else trained and written")] = Path(
        "lora-benchmark/red-blue.safetensors"
    ),
    steps: Annotated[int, typer.Option(min=1, help="of training")] = 80,
    out: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Print one row per scheme."""
    logging.set_verbosity_error()  # that the adapter leaves the text encoder alone is no news
    if not adapter.exists():
        trained(adapter, steps)
    base, adapted = recorded(None), recorded(adapter)
    verifying = adapted.only("verify")
    batches = [verifying.batch(call) for call in verifying.calls]
    results = Results("lora-bundled", out)
    for scheme in SCHEMES:
        show(f"{scheme}: {results.row(scheme, lambda s=scheme: row(s, base, batches, adapter))}")


if __name__ == "__main__":
    app()
