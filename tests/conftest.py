"""Real pipelines, made once: the bundled trained model, and tiny random ones of other kinds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diffusers_ldmq import Profile, Recording, profile_sqnr, record_calls
from diffusers_ldmq.demo import demo_captions, demo_model
from diffusers_ldmq.families import find_denoiser

torch.set_num_threads(1)  # models this small gain nothing from more, and lose much where cores are shared
diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


def bundled() -> Any:
    """The trained text-to-image pipeline that comes with the package, in fp32."""
    pipe = DiffusionPipeline.from_pretrained(demo_model(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pixel() -> Any:
    """An unconditional pixel pipeline with random weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        layers_per_block=1,
    )
    pipe = DDPMPipeline(unet, DDIMScheduler())  # pyright: ignore[reportArgumentType]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_dit() -> Any:
    """A class-conditional diffusion transformer with random weights."""
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
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipe = DiTPipeline(transformer, vae, DDIMScheduler())  # pyright: ignore[reportArgumentType]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def few_inputs(steps: int = 4) -> list[dict[str, Any]]:
    """Four calls of two captions each: enough for three disjoint sets."""
    names = demo_captions()
    return [
        {"prompt": names[i : i + 2], "num_inference_steps": steps, "guidance_scale": 5.0} for i in range(0, 8, 2)
    ]


MAKERS: dict[str, Callable[[], Any]] = {"bundled": bundled, "pixel": tiny_pixel, "dit": tiny_dit}
INPUTS: dict[str, list[dict[str, Any]]] = {
    "bundled": few_inputs(),
    "pixel": [{"batch_size": 2, "num_inference_steps": 3}] * 4,
    "dit": [{"class_labels": [i, i + 1], "num_inference_steps": 3} for i in range(4)],
}


@pytest.fixture(params=sorted(MAKERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make() -> Callable[[str], Any]:
    """kind -> a fresh pipeline."""
    return lambda kind: MAKERS[kind]()


@pytest.fixture(scope="session")
def recordings() -> Callable[[str], Recording]:
    """kind -> its recording with every calibrating step, made once."""
    made: dict[str, Recording] = {}

    def get(kind: str) -> Recording:
        if kind not in made:
            made[kind] = record_calls(MAKERS[kind](), INPUTS[kind], selection="uniform")
        return made[kind]

    return get


@pytest.fixture(scope="session")
def profiles(recordings: Callable[[str], Recording]) -> Callable[[str], Profile]:
    """kind -> its profile, made once."""
    made: dict[str, Profile] = {}

    def get(kind: str) -> Profile:
        if kind not in made:
            made[kind] = profile_sqnr(find_denoiser(MAKERS[kind]())[1], recordings(kind))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def quantized_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, quantized by the hybrid planner and saved; tests must not change it."""
    from diffusers_ldmq.pipeline import quantize_pipeline, save_pipeline

    folder = tmp_path_factory.mktemp("checkpoint") / "quantized"
    pipe = bundled()
    outcome = quantize_pipeline(pipe, few_inputs())
    save_pipeline(pipe, folder, outcome=outcome)
    return folder
