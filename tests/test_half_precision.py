"""Sixteen-bit compute: what is verified is what loads, and what is saved can be sampled from without saying a dtype."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from diffusers_ldmq.errors import LDMQError, VerificationError
from diffusers_ldmq.families import find_denoiser
from diffusers_ldmq.job import Settings, quantize_pipeline
from diffusers_ldmq.pipeline import QuantizedLDMPipeline, save_pipeline
from diffusers_ldmq.recording import try_one_step
from diffusers_ldmq.verification import verify

INPUTS: dict[str, list[dict[str, Any]]] = {
    "bundled": [{"prompt": [name], "num_inference_steps": 2} for name in ("red apple", "rocket", "dolphin", "bear")],
    "dit": [{"class_labels": [i], "num_inference_steps": 2} for i in range(4)],
}
Make = Callable[[str], Any]


@pytest.mark.parametrize("kind", sorted(INPUTS))
def test_a_bf16_checkpoint_reloads_bit_identically_and_samples_without_a_dtype(
    kind: str, make: Make, tmp_path: Path
) -> None:
    pipe = make(kind)
    outcome = quantize_pipeline(pipe, INPUTS[kind], Settings(dtype=torch.bfloat16))
    save_pipeline(pipe, tmp_path / "q", outcome=outcome)
    assert find_denoiser(pipe)[1].dtype == torch.bfloat16
    loaded = QuantizedLDMPipeline.from_pretrained(tmp_path / "q")
    again = verify(find_denoiser(loaded)[1], outcome.recording)
    assert again.dtype == "bfloat16"
    assert again.noise == outcome.report.noise
    plain = DiffusionPipeline.from_pretrained(tmp_path / "q")
    plain.set_progress_bar_config(disable=True)
    try_one_step(plain, INPUTS[kind][0])


def test_a_dtype_that_the_pipeline_cannot_sample_in_is_refused(make: Make) -> None:
    pipe = make("bundled")
    pipe.text_encoder.to = lambda dtype: pipe.text_encoder  # stays in fp32, as pipelines do that draw fp32 latents
    with pytest.raises(LDMQError, match="StableDiffusionPipeline cannot sample in torch.bfloat16; choose float32"):
        quantize_pipeline(pipe, INPUTS["bundled"], Settings(dtype=torch.bfloat16))


def test_an_output_that_is_not_finite_fails_verification(make: Make, recordings: Callable[[str], Any]) -> None:
    denoiser: Any = find_denoiser(make("pixel"))[1]
    with torch.no_grad():
        denoiser.conv_out.weight.fill_(float("inf"))
    with pytest.raises(VerificationError, match="gives NaN or Inf at timestep .* choose --dtype float32 or bfloat16"):
        verify(denoiser, recordings("pixel"))


def test_a_model_built_by_hand_gets_no_source_name(make: Make, tmp_path: Path) -> None:
    pipe = make("dit")
    outcome = quantize_pipeline(pipe, INPUTS["dit"], Settings(planner="uniform", scheme="w8a16"))
    save_pipeline(pipe, tmp_path / "q", outcome=outcome)
    for name in ("model_index.json", "transformer/config.json"):
        assert '"_name_or_path": "' not in (tmp_path / "q" / name).read_text()
