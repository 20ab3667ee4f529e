"""Inputs and models that the job cannot use well: it works all the same, or says why not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_ldmq import Profile, Recording, calibrate, make_plan, profile_sqnr
from diffusers_ldmq.errors import CalibrationError, PlanError, RecordingError, VerificationError
from diffusers_ldmq.job import Settings, quantize_pipeline
from diffusers_ldmq.layers import quantized_layers

Make = Callable[[str], Any]
Inputs = Callable[[str], list[dict[str, Any]]]
Recordings = Callable[[str], Recording]
Profiles = Callable[[str], Profile]


@pytest.mark.parametrize("planner", ["budget", "hybrid"])
def test_one_input_of_one_image_and_one_step_is_enough(planner: str, make: Make) -> None:
    pipe = make("pixel")
    outcome = quantize_pipeline(pipe, [{"batch_size": 1, "num_inference_steps": 1}], Settings(planner=planner))
    assert outcome.profile is not None
    assert outcome.profile.timesteps == outcome.profile.schedule == outcome.report.timesteps
    assert len(outcome.report.timesteps) == 1
    assert outcome.report.sqnr_db > 15
    assert quantized_layers(pipe.unet)


def test_a_recording_without_calls_is_refused(denoiser_of: Make, recordings: Recordings) -> None:
    recording = replace(recordings("pixel"), calls=())
    with pytest.raises(RecordingError, match="no calls for the set 'select'; record again"):
        profile_sqnr(denoiser_of("pixel"), recording)


def test_no_inputs_and_no_steps_are_refused(make: Make) -> None:
    with pytest.raises(RecordingError, match="no inputs to record"):
        quantize_pipeline(make("pixel"), [])
    with pytest.raises(RecordingError, match="DDPMPipeline cannot be called with .*'num_inference_steps': 0"):
        quantize_pipeline(make("pixel"), [{"batch_size": 1, "num_inference_steps": 0}])


def test_nan_in_the_float_model_is_named_before_anything_is_measured(make: Make, inputs_of: Inputs) -> None:
    pipe = make("pixel")
    pipe.unet.conv_out.bias.data[0] = torch.nan
    with pytest.raises(RecordingError, match="UNet2DModel gave NaN or Inf at timestep 666 in floating point already"):
        quantize_pipeline(pipe, inputs_of("pixel"), Settings(planner="budget"))


def test_nan_that_only_the_quantized_model_gives_is_named(make: Make, inputs_of: Inputs) -> None:
    pipe = make("pixel")
    # 1e5 overflows in float16 and in nothing wider; the layer after it divides it away again
    pipe.unet.conv_norm_out.weight.data *= 1e5
    pipe.unet.conv_out.weight.data *= 1e-5
    with pytest.raises(VerificationError, match="float16 UNet2DModel gives NaN or Inf .*choose --dtype float32"):
        quantize_pipeline(
            pipe, inputs_of("pixel"), Settings(planner="uniform", keep_float="conv_out", dtype=torch.float16)
        )


@pytest.mark.parametrize("planner", ["budget", "hybrid", "uniform"])
def test_the_plan_of_another_models_profile_is_refused(
    planner: str, make: Make, inputs_of: Inputs, profiles: Profiles, recordings: Recordings, denoiser_of: Make
) -> None:
    plan = make_plan(profiles("pixel"), planner=planner)
    with pytest.raises(PlanError, match="layers that DiTTransformer2DModel lacks"):
        calibrate(denoiser_of("dit"), plan, recordings("dit"))
    with pytest.raises(PlanError, match="layers that DiTTransformer2DModel lacks"):
        quantize_pipeline(make("dit"), inputs_of("dit"), Settings(plan=plan))


def test_a_recording_of_another_model_is_refused(denoiser_of: Make, recordings: Recordings) -> None:
    with pytest.raises(RecordingError, match="is of a UNet2DModel, not of this DiTTransformer2DModel"):
        profile_sqnr(denoiser_of("dit"), recordings("pixel"))


@pytest.mark.parametrize("planner", ["budget", "hybrid", "uniform"])
def test_a_layer_that_is_never_called_is_named_and_can_be_left_out(planner: str, make: Make, inputs_of: Inputs) -> None:
    pipe = make("pixel")
    pipe.unet.mid_block.spare = nn.Linear(8, 8)
    with pytest.raises(CalibrationError, match=r"layer 'mid_block.spare' was never called .*keep it float"):
        quantize_pipeline(pipe, inputs_of("pixel"), Settings(planner=planner))
    pipe = make("pixel")
    pipe.unet.mid_block.spare = nn.Linear(8, 8)
    outcome = quantize_pipeline(
        pipe, inputs_of("pixel"), Settings(planner=planner, keep_float="mid_block.spare,conv_in,conv_out")
    )
    assert outcome.plan.layers["mid_block.spare"].scheme == "float"
    assert "mid_block.spare" not in quantized_layers(pipe.unet)


def test_a_constant_output_of_zero_is_refused_in_words(make: Make, inputs_of: Inputs) -> None:
    pipe = make("pixel")
    pipe.unet.conv_out.weight.data.zero_()
    pipe.unet.conv_out.bias.data.zero_()
    with pytest.raises(PlanError, match="output is zero everywhere; its SQNR means nothing, record other inputs"):
        quantize_pipeline(pipe, inputs_of("pixel"), Settings(planner="budget"))
