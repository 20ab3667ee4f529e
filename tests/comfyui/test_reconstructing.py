"""Reconstruction of a MODEL, on a real ComfyUI: what it brings, that it goes on after a stop, and what it refuses."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.quantizing import plan_of
from comfyui.test_capture import KINDS, sampling
from comfyui.test_measuring import Stopped, calibrated, untouched
from comfyui.tiny_models import conditioning, latent, lora, sample, tiny_model
from huggingface_hub import constants

from diffusers_ldmq import cache, reconstruction
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.learning import LearningSettings

ITERATIONS = 3
BRIEF = replace(reconstruction.QUICK, learning=LearningSettings(iterations=ITERATIONS, batch=8), samples=8)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quick preset for tests."""
    monkeypatch.setitem(reconstruction.PRESETS, "quick", BRIEF)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, turned on."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(cache.SWITCH)
    return tmp_path / "home" / "ldmq" / "reconstructions"


def learning(kind: str = "sd15", **changes: Any) -> Any:
    from comfyui_nodes.native.reconstructing import Learning

    given = Learning("quick", conditioning(kind), conditioning(kind, 2), latent(kind), sampling(steps=4))
    return replace(given, **changes)


def reconstructed(model: Any, plan: Any, ranges: Any = None, kind: str = "sd15", progress: Any = None) -> Any:
    from comfyui_nodes.native.reconstructing import reconstruct_model

    return reconstruct_model(model, plan, ranges, learning(kind), progress)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_learned_rounding_is_nearer_to_the_float_one(
    kind: str, comfy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfyui_nodes.native.comparing import compare_models
    from comfyui_nodes.native.patching import quantize_model

    monkeypatch.setitem(reconstruction.PRESETS, "quick", replace(BRIEF, learning=LearningSettings(12, 8)))
    model = tiny_model(kind)
    before = sample(model, kind)
    plan = plan_of(model, "w4a8", "w4a8")
    ranges = calibrated(model, plan, kind, "uniform")
    states, units = reconstructed(model, plan, ranges, kind)
    assert states.keys() == plan.quantized().keys()
    assert sum(unit.layers for unit in units) == len(states)
    assert sum(unit.kept for unit in units) > len(units) / 2
    plain, _ = quantize_model(model, plan, ranges)
    learned, told = quantize_model(model, plan, ranges, learned=states)
    assert "w4a8" in told
    given = (conditioning(kind), conditioning(kind, 2), latent(kind), sampling(steps=4, seed=9))
    nearer, than = (compare_models(model, quantized, *given).output_db for quantized in (learned, plain))
    assert nearer > than + 0.3, "in dB at the output, at another seed than it was learned from"
    assert torch.equal(sample(model, kind), before)
    assert untouched(model)


def test_without_a_calibration_dynamic_layers_learn(comfy: ModuleType) -> None:
    model = tiny_model("flux")
    states, units = reconstructed(model, plan_of(model, "w4a8", "w4a8"), kind="flux")
    assert {state.scheme.name for state in states.values()} == {"w4a8-dyn"}
    assert any(unit.kept for unit in units)


def test_a_stopped_one_goes_on_and_a_finished_one_is_loaded(comfy: ModuleType, home: Path) -> None:
    model = tiny_model("sd3")
    plan, before = plan_of(model, "w4a16", "w4a16"), sample(model, "sd3")

    def stop(done: int, total: int) -> None:
        if list(home.glob("*/unit-0001.safetensors")):
            raise Stopped

    with pytest.raises(Stopped):
        reconstructed(model, plan, kind="sd3", progress=stop)
    assert torch.equal(sample(model, "sd3"), before)
    assert untouched(model)
    assert len(list(home.glob("*/unit-*.safetensors"))) == 2
    kept = {path: path.stat().st_mtime_ns for path in home.rglob("*.safetensors")}
    resumed = reconstructed(model, plan, kind="sd3")
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items()), "what was finished is not learned again"
    told: list[int] = []
    again = reconstructed(model, plan, kind="sd3", progress=lambda done, total: told.append(done))
    assert len(list(home.iterdir())) == 1
    undisturbed = _without_memory(model, plan)
    for states, units in (again, undisturbed):
        assert units == resumed[1]
        for name, state in resumed[0].items():
            assert all(torch.equal(value, states[name].tensors()[key]) for key, value in state.tensors().items())


def _without_memory(model: Any, plan: Any) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(cache.SWITCH, "0")
        return reconstructed(model, plan, kind="sd3")


def test_another_seed_or_plan_is_another_reconstruction(comfy: ModuleType, home: Path) -> None:
    from comfyui_nodes.native.reconstructing import reconstruct_model

    model = tiny_model("flux")
    for scheme, seed in (("w4a16", 0), ("w4a16", 1), ("w4a8-dyn", 0)):
        given = learning("flux", sampling=sampling(steps=4, seed=seed))
        reconstruct_model(model, plan_of(model, scheme, scheme), None, given)
    assert len(list(home.iterdir())) == 3


def test_comfyuis_own_interrupt_stops_it(comfy: ModuleType) -> None:
    management: Any = comfy.model_management
    model = tiny_model("flux")
    before = sample(model, "flux")

    def stop(done: int, total: int) -> None:
        if done > 0.5 * total:
            management.interrupt_current_processing()
        management.throw_exception_if_processing_interrupted()

    with pytest.raises(management.InterruptProcessingException):
        reconstructed(model, plan_of(model, "w4a8", "w4a8"), kind="flux", progress=stop)
    assert not getattr(management, "in_training", False)
    assert torch.equal(sample(model, "flux"), before)


def test_what_it_cannot_learn_from_is_refused_in_words(comfy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.sd

    from comfyui_nodes.native.reconstructing import reconstruct_model

    model = tiny_model()
    plan = plan_of(model, "w4a8", "w4a8")
    with pytest.raises(LDMQError, match="reconstruct is quick.* connect negative, latent_image as to LDM-Q Calibrate"):
        reconstruct_model(model, plan, None, learning(negative=None, latent=None))
    with pytest.raises(LDMQError, match="'slow'; use one of none, quick, full"):
        reconstruct_model(model, plan, None, learning(preset="slow"))
    with pytest.raises(LDMQError, match="made for another model"):
        reconstructed(tiny_model("flux"), plan, kind="flux")
    name = "input_blocks.1.0.in_layers.2"
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora(model, [name], 1.0), 1.0, 0.0)
    with pytest.raises(LDMQError, match=r"has a LoRA: .* put the LoRA after it, or set reconstruct to none"):
        reconstructed(patched, plan)
    adapted = model.clone()
    adapted.set_model_attn2_patch(lambda q, k, v, extra: (q, k, v))
    with pytest.raises(LDMQError, match=r"another node has patched the inside of blocks .*IP-Adapter"):
        reconstructed(adapted, plan)
    from comfyui_nodes.native import measuring

    monkeypatch.setattr(measuring, "copy_dtype", lambda denoiser, own: torch.bfloat16)
    with pytest.raises(LDMQError, match=r"needs a copy of the UNetModel in float32 .* bfloat16 only"):
        reconstructed(model, plan)
    assert untouched(model)


def test_as_many_images_are_sampled_as_the_preset_wants(comfy: ModuleType) -> None:
    from comfyui_nodes.native.capture import checked_scene
    from comfyui_nodes.native.reconstructing import _copies

    scene = checked_scene(tiny_model(), conditioning(), conditioning(seed=2), latent())
    for samples, steps, copies in ((128, 20, 7), (256, 20, 8), (256, 50, 6), (8, 20, 1)):
        assert _copies(scene, replace(BRIEF, samples=samples), sampling(steps=steps)) == copies
