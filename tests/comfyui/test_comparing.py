"""Two MODELs side by side, on a real ComfyUI."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.test_capture import KINDS, sampling
from comfyui.test_measuring import everything, untouched
from comfyui.tiny_models import conditioning, latent, lora, sample, sqnr, tiny_model


def compared(a: Any, b: Any, kind: str = "sd15", progress: Any = None) -> Any:
    from comfyui_nodes.native.comparing import compare_models

    given = conditioning(kind), conditioning(kind, 2), latent(kind)
    return compare_models(a, b, *given, sampling(), progress)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_and_its_quantized_version(kind: str, comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import quantize_model

    model = tiny_model(kind)
    quantized, _ = quantize_model(model, everything(model, "w8a8-dyn"))
    latents = sample(model, kind), sample(quantized, kind)
    told: list[tuple[int, int]] = []
    found = compared(model, quantized, kind, lambda *pair: told.append(pair))
    assert all(map(torch.equal, found.latents, latents))
    assert found.latent_db == pytest.approx(sqnr(*latents), abs=0.01)
    assert found.timesteps == tuple(sorted(found.timesteps, reverse=True))
    assert len(found.timesteps) == 3
    assert min(found.curve_db()) == found.worst()[1] < found.output_db < max(found.curve_db())
    assert 15 < found.output_db < 60
    assert told == sorted(told)
    assert told[-1] == (1000, 1000)
    assert torch.equal(sample(model, kind), latents[0])
    assert torch.equal(sample(quantized, kind), latents[1])
    assert untouched(model)


def test_the_first_step_has_the_same_inputs_in_both(comfy: ModuleType) -> None:
    """There the recorded inputs are those that the second MODEL has anyway."""
    from comfyui_nodes.native.patching import quantize_model
    from comfyui_nodes.native.recorder import Recorder

    model = tiny_model()
    quantized, _ = quantize_model(model, everything(model, "w8a16"))
    found = compared(model, quantized)
    outputs = []
    for each in (model, quantized):
        from comfyui_nodes.native import capture

        recorder = Recorder()
        recorder.start("verify", 0, 1)
        with capture.listening(each, recorder.wrap) as clone:
            scene = capture.checked_scene(each, conditioning(), conditioning(seed=2), latent())
            capture.sample(clone, scene, sampling(), first_step=True)
        recording = recorder.result()
        outputs.append(recording.tensors[recording.calls[0].output])
    assert found.curve_db()[0] == pytest.approx(sqnr(*outputs), abs=0.01)


def test_a_model_and_itself_are_the_same(comfy: ModuleType) -> None:
    model = tiny_model()
    found = compared(model, model.clone())
    assert (found.latent_db, found.output_db) == (math.inf, math.inf)


def test_two_loras_of_one_model(comfy: ModuleType) -> None:
    import comfy.sd

    model, name = tiny_model(), "input_blocks.1.0.in_layers.2"
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora(model, [name], 0.5), 1.0, 0.0)
    found = compared(model, patched)
    assert found.latent_db == pytest.approx(sqnr(sample(model), sample(patched)), abs=0.01)
    assert found.output_db < 60


def test_models_of_different_kinds_are_refused(comfy: ModuleType) -> None:
    from diffusers_ldmq.errors import LDMQError

    with pytest.raises(LDMQError, match="the first MODEL is a UNetModel, the second a Flux"):
        compared(tiny_model(), tiny_model("flux"))
    with pytest.raises(LDMQError, match=r"differ in \d+ layers \(.*connect a MODEL and its quantized version"):
        compared(tiny_model(), tiny_model("sdxl"))


def test_a_second_model_that_gives_nan_is_refused(comfy: ModuleType) -> None:
    from diffusers_ldmq.errors import LDMQError

    good, bad = tiny_model(), tiny_model()
    before = sample(good)
    bad.model.diffusion_model.out[2].weight.data.fill_(torch.nan)
    with pytest.raises(LDMQError, match="the second MODEL gives NaN or Inf at timestep 999"):
        compared(good, bad)
    assert torch.equal(sample(good), before)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_both_models_are_the_same_after_an_interrupt(part: float, comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import quantize_model

    model = tiny_model()
    quantized, _ = quantize_model(model, everything(model, "w8a8-dyn"))
    before = sample(model), sample(quantized)
    management: Any = comfy.model_management

    def stop(done: int, total: int) -> None:
        if done >= part * total:
            raise management.InterruptProcessingException

    with pytest.raises(management.InterruptProcessingException):
        compared(model, quantized, progress=stop)
    assert torch.equal(sample(model), before[0])
    assert torch.equal(sample(quantized), before[1])
    assert untouched(model)
