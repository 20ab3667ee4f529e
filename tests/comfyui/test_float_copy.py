"""The private float copy of a MODEL's denoiser, on a real ComfyUI."""

import gc
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.test_capture import KINDS, sampling, scene
from comfyui.tiny_models import lora, sample, sqnr, tiny_model
from torch import Tensor, nn


def recorded(model: Any, kind: str = "sd15", **changes: Any) -> tuple[Any, Any]:
    """(float copy, recording) of a short run."""
    from comfyui_nodes.native.measuring import Share, record_model

    return record_model(model, scene(model, kind), sampling(**changes), Share(None))


def worst(copy: Any, recording: Any) -> float:
    """SQNR in dB of what the copy gives against what the MODEL gave, of the worst recorded call."""
    from diffusers_ldmq.recording import with_reference

    with torch.inference_mode(False):
        given = with_reference(recording, copy)
    pairs = zip(recording.calls, given.calls, strict=True)
    return min(sqnr(recording.tensors[a.output], given.tensors[b.output]) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_copy_computes_what_the_model_computes(kind: str, comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import fingerprint_of, source_layers
    from diffusers_ldmq.families import fingerprint, quantizable_layers

    model = tiny_model(kind)
    before = sample(model, kind)
    copy, recording = recorded(model, kind)
    assert worst(copy, recording) > 100
    layers = quantizable_layers(copy)
    assert fingerprint(layers) == fingerprint_of(source_layers(model))
    assert all(type(layer) in (nn.Linear, nn.Conv2d) for layer in layers.values())
    assert not any(p.is_inference() for p in copy.parameters())
    assert torch.equal(sample(model, kind), before)
    live = {p.data_ptr() for p in model.model.parameters()}
    assert not live & {p.data_ptr() for p in copy.parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_copied_in_fp32(dtype: torch.dtype, comfy: ModuleType) -> None:
    copy, recording = recorded(tiny_model(dtype=dtype))
    assert {p.dtype for p in copy.parameters()} == {torch.float32}
    assert worst(copy, recording) > 100  # ComfyUI computes in fp32 from these, too


def test_a_lora_is_in_the_copy_with_its_weights_loaded_or_not(comfy: ModuleType) -> None:
    import comfy.sd

    model = tiny_model()
    names = ["input_blocks.1.0.in_layers.2", "middle_block.1.transformer_blocks.0.attn1.to_q"]
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora(model, names, 0.5), 1.0, 0.0)
    plain, recording = recorded(model)
    copy, recording_with = recorded(patched)
    assert worst(copy, recording_with) > 100
    for name in names:
        assert sqnr(plain.get_submodule(name).weight, copy.get_submodule(name).weight) < 30
    other = "input_blocks.1.0.out_layers.3"
    assert torch.equal(plain.get_submodule(other).weight, copy.get_submodule(other).weight)
    assert worst(copy, recording) < 60


def test_control_reaches_the_copy_with_and_without_gradients(comfy: ModuleType) -> None:
    from comfyui_nodes.native.float_copy import differentiable
    from diffusers_ldmq.calls import forward

    model = tiny_model()
    copy, recording = recorded(model)
    call = recording.only("select").calls[0]
    with torch.inference_mode(False):
        batch = recording.batch(call)
        control = {"input": [torch.randn(2, 32, 8, 8)], "middle": [], "output": []}
        plain = forward(copy, batch)
        batch.kwargs["control"] = control
        with torch.no_grad():
            controlled = forward(copy, batch._replace(kwargs={**batch.kwargs, "control": _lists(control)}))
        with differentiable():
            leaf = batch.kwargs["x"].requires_grad_()
            given = {**batch.kwargs, "control": _lists(control), "x": leaf}
            with torch.enable_grad():
                output = forward(copy, batch._replace(kwargs=given))
            output.sum().backward()
    assert sqnr(plain, controlled) < 40
    assert torch.allclose(output, controlled, rtol=1e-4, atol=1e-5)
    assert leaf.grad is not None


def _lists(control: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
    return {name: list(items) for name, items in control.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_central_differences_with_checkpointing_too(kind: str, comfy: ModuleType) -> None:
    from comfyui_nodes.native.float_copy import checkpointed, differentiable, recast
    from diffusers_ldmq.calls import forward

    if kind == "flux" and not hasattr(comfy.model_management, "in_training"):
        pytest.skip("this ComfyUI's rotary embedding has no gradient, so those of Flux were not tested")
    copy, recording = recorded(tiny_model(kind), kind)
    generator = torch.Generator().manual_seed(0)
    found = []
    with torch.inference_mode(False), torch.enable_grad(), differentiable():
        recast(copy, torch.float64)
        batch = recording.batch(recording.calls[0])
        latent = batch.kwargs["x"].double()
        direction = torch.randn(latent.shape, generator=generator, dtype=torch.float64)
        signs = torch.randn(batch.output.shape, generator=generator, dtype=torch.float64)
        for checkpointing in (False, True):
            if checkpointing:
                copy.enable_gradient_checkpointing()
            leaf = latent.clone().requires_grad_()
            (forward(copy, batch._replace(kwargs={**batch.kwargs, "x": leaf})) * signs).sum().backward()
            assert leaf.grad is not None
            found.append(float((leaf.grad * direction).sum()))
        copy.disable_gradient_checkpointing()
        step = 1e-3  # wide enough for the fp32 parts of Flux
        sides = [
            float((forward(copy, batch._replace(kwargs={**batch.kwargs, "x": latent + s * direction})) * signs).sum())
            for s in (-step, step)
        ]
    assert list(checkpointed(copy))
    expected = (sides[1] - sides[0]) / (2 * step)
    assert found[0] == pytest.approx(expected, rel=5e-3)
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert not any("forward" in vars(module) for module in copy.modules())


def test_augmented_assignments_are_out_of_place_and_methods_are_not(comfy: ModuleType) -> None:
    from comfyui_nodes.native.float_copy import OutOfPlace

    with torch.inference_mode(False), torch.enable_grad(), OutOfPlace():
        kept = torch.ones(2)
        x = kept
        x += 1
        x *= 3
        x -= 1
        x /= 5
        y = kept.half()
        same = y
        y += torch.ones(2)
        kept.add_(10)
    assert x.tolist() == [1.0, 1.0]
    assert kept.tolist() == [11.0, 11.0]
    assert (y.dtype, same.tolist(), y.tolist()) == (torch.float16, [1.0, 1.0], [2.0, 2.0])


def test_nothing_keeps_the_copy_alive(comfy: ModuleType) -> None:
    model = tiny_model()
    copy, _ = recorded(model)
    gone = weakref.ref(copy)
    del copy
    gc.collect()
    assert gone() is None


def test_a_copy_for_which_there_is_no_memory_is_refused(comfy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers_ldmq.errors import LDMQError

    management: Any = comfy.model_management
    model = tiny_model()
    before = sample(model)
    numbers = sum(p.numel() for p in model.model.diffusion_model.parameters())
    real = management.get_free_memory
    seen: list[Any] = []

    def little(device: Any = None, *args: Any, **kwargs: Any) -> Any:
        seen.append(device)
        return 2 * numbers if not args and not kwargs else real(device, *args, **kwargs)

    monkeypatch.setattr(management, "get_free_memory", little)
    with pytest.raises(LDMQError, match="GB of memory are free"):
        recorded(model)
    monkeypatch.undo()
    assert seen
    assert torch.equal(sample(model), before)
