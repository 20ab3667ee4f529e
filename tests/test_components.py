"""Pipelines built of others' components share them, and say which names there are."""

from typing import Any

import pytest
import torch
from diffusers import (
    PipelineQuantizationConfig,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tiny_pipelines import MAKERS, picture
from torch import nn

from diffusers_ldmq import LDMQConfig
from diffusers_ldmq.components import assembled, refuse_quantization_config, shared_copy
from diffusers_ldmq.errors import LDMQError

NAMES = ["scheduler", "text_encoder", "unet", "vae"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    """A tiny Stable Diffusion; tests must not change it."""
    return MAKERS["sd"]()


def test_components_are_shared_and_options_kept_there_and_back(pipe: Any) -> None:
    there = assembled(StableDiffusionImg2ImgPipeline, pipe, {})
    assert all(there.components[name] is part for name, part in pipe.components.items())
    assert there.config["requires_safety_checker"] is False
    back = assembled(StableDiffusionPipeline, there, {})
    assert type(back) is StableDiffusionPipeline
    assert torch.equal(picture(back, "sd"), picture(pipe, "sd"))


def test_a_component_given_by_name_takes_its_place(pipe: Any) -> None:
    other = MAKERS["sd"]().vae
    made = assembled(StableDiffusionPipeline, pipe, {"vae": other})
    assert made.vae is other
    assert pipe.vae is not other
    assert made.unet is pipe.unet


def test_an_option_the_class_does_not_know_comes_back(pipe: Any) -> None:
    control = assembled(StableDiffusionControlNetPipeline, pipe, {"controlnet": MAKERS["controlnet"]().controlnet})
    xl = MAKERS["sdxl"]()
    xl.register_to_config(force_zeros_for_empty_prompt=False)
    plain = assembled(StableDiffusionPipeline, xl, {"safety_checker": None})
    assert plain.config["_force_zeros_for_empty_prompt"] is False
    more = {name: xl.components[name] for name in ("text_encoder_2", "tokenizer_2")}
    assert assembled(StableDiffusionXLPipeline, plain, more).config["force_zeros_for_empty_prompt"] is False
    assert "_controlnet" not in assembled(StableDiffusionPipeline, control, {}).config


def test_an_unknown_component_name_is_refused(pipe: Any) -> None:
    with pytest.raises(LDMQError, match=r"takes no keyword 'uent'.*StableDiffusionPipeline has no such component"):
        assembled(StableDiffusionPipeline, pipe, {"uent": pipe.unet})


def test_a_component_that_nobody_has_is_asked_for(pipe: Any) -> None:
    with pytest.raises(LDMQError, match=r"ControlNetPipeline needs controlnet, .*from_pipe\(pipe, controlnet="):
        assembled(StableDiffusionControlNetPipeline, pipe, {})


def test_a_shared_copy_has_the_same_memory_and_a_life_of_its_own() -> None:
    module: Any = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    module.append(module[0])  # tied layers stay tied
    weight = module[0].weight.detach().clone()
    copied: Any = shared_copy(module)
    assert copied[2] is copied[0]
    assert copied[0] is not module[0]
    assert copied[0].weight.data_ptr() == module[0].weight.data_ptr()
    assert copied[1].running_mean.data_ptr() == module[1].running_mean.data_ptr()
    copied.to(torch.bfloat16)
    copied[0] = nn.Identity()
    assert module[0].weight.dtype == torch.float32
    assert torch.equal(module[0].weight, weight)


def test_a_quantization_config_that_names_no_component_of_the_model_is_refused() -> None:
    config = PipelineQuantizationConfig(quant_mapping={"uent": LDMQConfig("w8a16")})  # pyright: ignore[reportArgumentType]
    message = "names a component 'uent', which model lacks; it has scheduler, text_encoder, unet, vae"
    with pytest.raises(LDMQError, match=message):
        refuse_quantization_config("model", NAMES, config)


def test_a_quantization_config_for_the_denoiser_is_refused_and_for_others_is_not() -> None:
    config = PipelineQuantizationConfig(quant_mapping={"unet": LDMQConfig("w8a16")})  # pyright: ignore[reportArgumentType]
    with pytest.raises(LDMQError, match="names 'unet', the denoiser, .*plan=, scheme= or target="):
        refuse_quantization_config("model", NAMES, config)
    refuse_quantization_config("model", NAMES, None)
    other = PipelineQuantizationConfig(quant_mapping={"vae": LDMQConfig("w8a16")})  # pyright: ignore[reportArgumentType]
    refuse_quantization_config("model", NAMES, other)


def test_one_config_for_all_components_names_the_denoiser_too() -> None:
    config = object.__new__(PipelineQuantizationConfig)  # of a backend that need not be installed
    config.quant_mapping, config.components_to_quantize = None, None  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(LDMQError, match="names 'unet', the denoiser"):
        refuse_quantization_config("model", NAMES, config)


def test_a_bare_config_is_refused_with_what_to_pass() -> None:
    with pytest.raises(LDMQError, match="is a LDMQConfig; a pipeline takes a PipelineQuantizationConfig"):
        refuse_quantization_config("model", NAMES, LDMQConfig("w8a16"))
