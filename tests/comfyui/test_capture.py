"""Sampling as KSampler does, with something to do at every denoiser call, on a real ComfyUI."""

from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.tiny_models import conditioning, latent, sample, tiny_model

KINDS = ("sd15", "sdxl", "sd3", "flux")


def sampling(**changes: Any) -> Any:
    from comfyui_nodes.native.capture import Sampling

    return Sampling(**{"seed": 5, "steps": 3, "cfg": 3.0, "sampler": "euler", "scheduler": "normal", **changes})


def scene(model: Any, kind: str = "sd15", given: Any = None) -> Any:
    from comfyui_nodes.native.capture import checked_scene

    return checked_scene(model, conditioning(kind), conditioning(kind, 2), latent(kind) if given is None else given)


@pytest.mark.parametrize("kind", KINDS)
def test_listening_changes_nothing_and_leaves_nothing(kind: str, comfy: ModuleType) -> None:
    from comfyui_nodes.native import capture

    model, seen = tiny_model(kind), list[Any]()
    before = sample(model, kind)

    def wrap(executor: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(executor.class_obj)
        return executor(*args, **kwargs)

    with capture.listening(model, wrap) as clone:
        assert torch.equal(capture.sample(clone, scene(model, kind), sampling()), before)
    assert len(seen) == 3
    assert all(denoiser is model.model.diffusion_model for denoiser in seen)
    assert torch.equal(sample(model, kind), before)
    assert torch.equal(sample(clone, kind), before)
    assert len(seen) == 3
    assert "forward" not in vars(model.model.diffusion_model)


def test_every_sampler_makes_one_step(comfy: ModuleType) -> None:
    import comfy.samplers

    from comfyui_nodes.native import capture

    model, failed = tiny_model(), dict[str, str]()
    for name in comfy.samplers.KSampler.SAMPLERS:
        seen: list[float] = []

        def wrap(executor: Any, *args: Any, seen: list[float] = seen, **kwargs: Any) -> Any:
            seen.append(capture.timestep_of(capture.arguments(executor, args, kwargs)))
            return executor(*args, **kwargs)

        with capture.listening(model, wrap) as clone:
            try:
                capture.sample(clone, scene(model), sampling(sampler=name, steps=4), first_step=True)
            except Exception as cause:  # noqa: BLE001  (collected)
                failed[name] = str(cause)[:100]
        if not seen or seen[0] < 900 or len(seen) > 60:
            failed.setdefault(name, f"{seen}")
    assert not failed


def test_a_compiled_model_is_sampled_without_its_compiler(comfy: ModuleType) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    from comfyui_nodes.native import capture

    model = tiny_model()
    before = sample(model)
    compiled, asked = model.clone(), list[Any]()

    def backend(graph: Any, inputs: Any) -> Any:
        asked.append(graph)
        return graph.forward

    set_torch_compile_wrapper(compiled, backend=backend)
    with capture.listening(compiled, lambda executor, *a, **k: executor(*a, **k)) as clone:
        assert torch.equal(capture.sample(clone, scene(model), sampling()), before)
    assert not asked
    assert compiled.get_wrappers("apply_model", capture.COMPILED)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "connect Empty Latent Image"),
        ({"samples": torch.zeros(0, 4, 8, 8)}, "the latent is empty"),
        ({"samples": torch.zeros(1, 4, 0, 8)}, "the latent is empty"),
        ({"samples": torch.full((1, 4, 8, 8), torch.nan)}, "NaN or Inf"),
        ({"samples": torch.ones(1, 16, 8, 8)}, "16 channels, this MODEL samples 4"),
    ],
)
def test_a_latent_that_cannot_be_sampled_is_refused(given: dict[str, Any], told: str, comfy: ModuleType) -> None:
    from diffusers_ldmq.errors import LDMQError

    with pytest.raises(LDMQError, match=told):
        scene(tiny_model(), given=given)


def test_an_empty_latent_gets_the_models_channels(comfy: ModuleType) -> None:
    assert scene(tiny_model(), given=latent("sd3")).latent["samples"].shape == (1, 4, 8, 8)


@pytest.mark.parametrize("bare", [None, [], [[None, {}]], [[torch.zeros(1, 0, 16), {}]], [torch.zeros(1, 7, 16)]])
def test_conditioning_without_a_prompt_is_refused(bare: Any, comfy: ModuleType) -> None:
    from comfyui_nodes.native.capture import checked_scene
    from diffusers_ldmq.errors import LDMQError

    model = tiny_model()
    with pytest.raises(LDMQError, match="the positive conditioning holds no embedded prompt; connect CLIP Text Encode"):
        checked_scene(model, bare, conditioning(), latent())
    with pytest.raises(LDMQError, match="the negative conditioning"):
        checked_scene(model, conditioning(), bare, latent())


def test_conditioning_of_another_model_is_explained(comfy: ModuleType) -> None:
    from comfyui_nodes.native import capture
    from diffusers_ldmq.errors import LDMQError

    model = tiny_model()
    foreign = capture.checked_scene(model, [[torch.randn(1, 7, 24), {}]], conditioning(), latent())
    with pytest.raises(LDMQError, match="use the conditioning of the CLIP") as told:
        capture.sample(model, foreign, sampling())
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"denoise": 0.0}, "denoise is 0"),
        ({"sampler": "eular"}, "no sampler 'eular'"),
        ({"scheduler": "norml"}, "no scheduler 'norml'"),
    ],
)
def test_a_sampling_that_samples_nothing_is_refused(changes: Any, told: str, comfy: ModuleType) -> None:
    from diffusers_ldmq.errors import LDMQError

    with pytest.raises(LDMQError, match=told):
        sampling(**changes)


def test_running_out_of_memory_keeps_its_own_error(comfy: ModuleType) -> None:
    from comfyui_nodes.native import capture

    def wrap(executor: Any, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = tiny_model()
    before = sample(model)
    with capture.listening(model, wrap) as clone, pytest.raises(torch.OutOfMemoryError):
        capture.sample(clone, scene(model), sampling())
    assert torch.equal(sample(model), before)
