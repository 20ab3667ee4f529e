"""Writes v1/: a tiny quantized denoiser with every scheme once, an input, and its output on the reference backend.

Run by hand, once per format version, never by the tests: an old folder must stay what an old version wrote.
    python tests/golden/make.py
"""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from safetensors.torch import save_file

from diffusers_ldmq import Plan, calibrate, quantize, record_calls
from diffusers_ldmq.artifacts import LayerChoice
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.plugin import attach
from diffusers_ldmq.specs import SCHEMES

FOLDER = Path(__file__).parent / "v1"


def main() -> None:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
    )
    pipe = DDPMPipeline(unet, DDIMScheduler())  # pyright: ignore[reportArgumentType]
    pipe.set_progress_bar_config(disable=True)
    recording = record_calls(pipe, [{"batch_size": 2, "num_inference_steps": 2}] * 4)
    table = layer_table(unet)
    schemes = (*SCHEMES, "w4a16-g8")
    layers = {
        info.name: LayerChoice(schemes[index % len(schemes)], "in turn") for index, info in enumerate(table.layers)
    }
    plan = Plan(table.denoiser, table.fingerprint, "golden", layers)
    quantize(unet, calibrate(unet, plan, recording, observer="minmax-affine"))
    attach(unet)
    unet.save_pretrained(FOLDER)
    for layer in quantized_layers(unet).values():
        layer.use_backend("reference")
    sample, timestep = torch.randn(2, 3, 8, 8), torch.tensor([900, 10])
    with torch.no_grad():
        output = unet(sample, timestep).sample.contiguous()
    save_file({"sample": sample, "timestep": timestep, "output": output}, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
