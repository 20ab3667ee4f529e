"""Profiling and calibrating a MODEL, on a real ComfyUI."""

import gc
import logging
import weakref
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.test_capture import KINDS, sampling
from comfyui.test_capture import scene as capture_scene
from comfyui.tiny_models import conditioning, latent, lora, sample, sqnr, tiny_model
from torch import Tensor, nn

from diffusers_ldmq.selections import SELECTIONS


def profile(model: Any, kind: str = "sd15", progress: Any = None, **changes: Any) -> Any:
    from comfyui_nodes.native.measuring import profile_model

    given = conditioning(kind), conditioning(kind, 2), latent(kind)
    return profile_model(model, *given, sampling(**{"steps": 5, **changes}), progress)


def calibrated(model: Any, plan: Any, kind: str = "sd15", selection: str = "first-step", progress: Any = None) -> Any:
    from comfyui_nodes.native.measuring import calibrate_model

    given = conditioning(kind), conditioning(kind, 2), latent(kind)
    return calibrate_model(model, plan, *given, sampling(steps=5), selection, progress)


def everything(model: Any, scheme: str = "w8a8") -> Any:
    """A plan that gives every layer one scheme."""
    from comfyui_nodes.native.patching import fingerprint_of, source_layers
    from diffusers_ldmq.artifacts import LayerChoice, Plan

    layers = source_layers(model)
    name = type(model.model.diffusion_model).__name__
    return Plan(name, fingerprint_of(layers), "test", {n: LayerChoice(scheme, "asked for") for n in layers})


def untouched(model: Any) -> bool:
    """Whether nothing is left on the modules that all clones share."""
    return not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.model.diffusion_model.modules()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_profile_foretells_what_a_hybrid_plan_does(
    kind: str, comfy: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    from comfyui_nodes.native.comparing import compare_models
    from comfyui_nodes.native.patching import quantize_model
    from diffusers_ldmq.errors import LDMQError
    from diffusers_ldmq.planning import make_plan

    model = tiny_model(kind)
    before = sample(model, kind)
    if kind == "flux" and not hasattr(comfy.model_management, "in_training"):
        with pytest.raises(LDMQError, match="gradients do not pass .* update ComfyUI"):
            profile(model, kind)
        assert torch.equal(sample(model, kind), before)
        return
    with caplog.at_level(logging.WARNING, "diffusers_ldmq"):
        found = profile(model, kind)
    assert not caplog.records, "so few rows that predictions would be off by several dB"
    assert torch.equal(sample(model, kind), before)
    assert untouched(model)
    plan = make_plan(found)
    quantized, _ = quantize_model(model, plan, calibrated(model, plan, kind))
    given = conditioning(kind), conditioning(kind, 2), latent(kind)
    told = compare_models(model, quantized, *given, sampling(steps=5, seed=77))
    assert plan.predicted_sqnr_db == pytest.approx(told.output_db, abs=3.0)
    assert torch.equal(sample(model, kind), before)


def test_a_profile_tells_what_it_took(comfy: ModuleType) -> None:
    model = tiny_model()
    found = profile(model)
    assert found.settings["images"] == 4  # x 2 halves x 5 timesteps = 40 rows
    assert found.settings["copy"] == "float32"
    # four images: one step, five steps, five replays, and what profile_sqnr counts
    assert found.settings["cost_in_calls"] > 4 * (1 + 5 + 6)
    assert len(found.schedule) == 5


@pytest.mark.parametrize(
    ("batch", "changes", "copies"),
    [(1, {}, 4), (1, {"cfg": 1.0}, 8), (1, {"steps": 1}, 8), (3, {}, 2), (8, {}, 1), (20, {"cfg": 1.0}, 1)],
)
def test_so_many_images_are_sampled_that_rows_are_enough(
    batch: int, changes: dict[str, Any], copies: int, comfy: ModuleType
) -> None:
    from comfyui_nodes.native.measuring import _copies

    scene = capture_scene(tiny_model(), given={"samples": torch.zeros(batch, 4, 8, 8)})
    assert _copies(scene, sampling(**{"steps": 5, **changes}), 5) == copies


def test_a_profile_is_of_the_model_with_its_lora(comfy: ModuleType) -> None:
    import comfy.sd

    model, name = tiny_model(), "input_blocks.1.0.in_layers.2"
    patched, _ = comfy.sd.load_lora_for_models(model, None, lora(model, [name], 2.0), 1.0, 0.0)
    plain, found = profile(model).noise_of(name), profile(patched).noise_of(name)
    assert sum(found.signal) > 2 * sum(plain.signal)


def test_a_schedule_of_one_step_is_profiled(comfy: ModuleType) -> None:
    found = profile(tiny_model(), steps=1)
    assert len(found.timesteps) == 1
    assert found.settings["images"] == 8


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_are_those_of_hooks_on_the_first_step(kind: str, comfy: ModuleType) -> None:
    from comfyui_nodes.native import capture

    model = tiny_model(kind)
    before = sample(model, kind)
    found = calibrated(model, everything(model), kind)
    assert torch.equal(sample(model, kind), before)
    assert untouched(model)
    highest: dict[str, float] = {}

    def wrap(executor: Any, *args: Any, **kwargs: Any) -> Any:
        def see(name: str) -> Any:
            return lambda module, given: highest.__setitem__(name, float(given[0].max()))

        handles = [executor.class_obj.get_submodule(n).register_forward_pre_hook(see(n)) for n in found.ranges]
        output = executor(*args, **kwargs)
        for handle in handles:
            handle.remove()
        return output

    with capture.listening(model, wrap) as clone:
        scene = capture.checked_scene(model, conditioning(kind), conditioning(kind, 2), latent(kind))
        capture.sample(clone, scene.times(4), sampling(steps=5), first_step=True)
    assert highest.keys() == found.ranges.keys() == everything(model).layers.keys()
    assert (found.samples, found.selection) == (8, "first-step")
    for name, (scale, zero_point) in found.ranges.items():
        assert scale * (127 - zero_point) >= 0.99 * highest[name] - scale


def test_uniform_sees_the_whole_schedule(comfy: ModuleType) -> None:
    model = tiny_model()
    plan = everything(model)
    first, whole = calibrated(model, plan), calibrated(model, plan, selection="uniform")
    assert (first.samples, whole.samples) == (8, 10)
    name = "time_embed.2"  # depends on the timestep alone, of which one step sees one
    assert whole.ranges[name][0] > first.ranges[name][0]
    assert len(whole.ranges) == len(plan.layers)


@pytest.mark.parametrize("selection", sorted(set(SELECTIONS) - {"first-step", "uniform"}))
def test_others_look_at_half_of_what_a_few_images_give(selection: str, comfy: ModuleType) -> None:
    model = tiny_model()
    before = sample(model)
    plan = everything(model)
    found, again = (calibrated(model, plan, selection=selection) for _ in range(2))
    assert found == again, "the choice is the same every time"
    assert found.samples == 4 * 5 * 2 // 2, "of 4 images, 5 steps and 2 halves"
    assert found.selection == selection
    assert found.ranges.keys() == plan.layers.keys()
    assert found.ranges != calibrated(model, plan, selection="uniform").ranges
    assert torch.equal(sample(model), before)
    assert untouched(model)


def test_samples_that_were_not_chosen_do_not_count(comfy: ModuleType) -> None:
    """A selection of one sample gives that image's range at that step, taken out of a batch."""
    from comfyui_nodes.native.capture import listening
    from comfyui_nodes.native.capture import sample as sampled
    from comfyui_nodes.native.observing import SampleRanges
    from diffusers_ldmq.calls import SampleId

    model, name = tiny_model(), "input_blocks.1.0.in_layers.2"
    inputs: list[Tensor] = []

    def wrap(executor: Any, *args: Any, **kwargs: Any) -> Any:
        layer = executor.class_obj.get_submodule(name)
        handle = layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0].clone()))
        output = seen.wrap(executor, *args, **kwargs)
        handle.remove()
        return output

    seen = SampleRanges([name], 3, lambda recording, n: (SampleId((0, 1), 2),), "minmax")
    with listening(model, wrap) as clone:
        sampled(clone, capture_scene(model).times(3), sampling(steps=4))
    observers, rows = seen.chosen()
    own = inputs[2].unflatten(0, (2, 3))[:, 1]
    observed: Any = observers[name]
    assert rows == 2
    assert (observed.low, observed.high) == (own.min(), own.max())
    assert observed.high < max(float(given.max()) for given in inputs)


def test_a_plan_without_static_layers_needs_no_step(comfy: ModuleType) -> None:
    model = tiny_model()
    found = calibrated(model, everything(model, "w8a8-dyn"))
    assert (found.ranges, found.samples) == ({}, 0)


def test_all_w8a8_calibrated_keeps_20_db(comfy: ModuleType) -> None:
    """Of the final latent. The tiny random model's inputs grow as it samples, far beyond those of the first step."""
    from comfyui_nodes.native.measuring import calibrate_model
    from comfyui_nodes.native.patching import quantize_model

    model = tiny_model()
    plan, given = everything(model), (conditioning(), conditioning(seed=2), latent())
    quantized, _ = quantize_model(model, plan, calibrate_model(model, plan, *given, sampling(steps=20), "uniform"))
    assert sqnr(sample(model, steps=20), sample(quantized, steps=20)) >= 20


@pytest.mark.parametrize(("batch", "size", "copies"), [(1, 8, 4), (1, 64, 4), (1, 128, 1), (3, 8, 1), (2, 64, 2)])
def test_one_step_calibrates_on_a_few_images(batch: int, size: int, copies: int, comfy: ModuleType) -> None:
    from comfyui_nodes.native.measuring import _calibrating

    assert _calibrating(capture_scene(tiny_model(), given={"samples": torch.zeros(batch, 4, size, size)})) == copies


def test_a_plan_for_another_model_is_refused_with_the_first_missing_layers(comfy: ModuleType) -> None:
    from diffusers_ldmq.errors import LDMQError

    with pytest.raises(LDMQError, match="lacks: img_in, .* made for another model"):
        calibrated(tiny_model(), everything(tiny_model("flux")))


def test_an_unknown_selection_is_refused(comfy: ModuleType) -> None:
    from diffusers_ldmq.errors import LDMQError

    model = tiny_model()
    with pytest.raises(LDMQError, match="first-step"):
        calibrated(model, everything(model), selection="last-step")


@pytest.mark.parametrize("measure", [profile, lambda model: calibrated(model, everything(model))])
def test_a_model_that_gives_nan_is_refused(measure: Any, comfy: ModuleType) -> None:
    from diffusers_ldmq.errors import LDMQError

    model = tiny_model()
    model.model.diffusion_model.out[2].weight.data.fill_(torch.nan)
    with pytest.raises(LDMQError, match="NaN or Inf at timestep 999"):
        measure(model)
    assert untouched(model)


@pytest.mark.parametrize("measure", [profile, lambda model: calibrated(model, everything(tiny_model()))])
def test_a_quantized_model_is_refused(measure: Any, comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import quantize_model
    from diffusers_ldmq.errors import LDMQError

    model = tiny_model()
    quantized, _ = quantize_model(model, everything(model, "w8a16"))
    with pytest.raises(LDMQError, match="quantized by LDM-Q already"):
        measure(quantized)


class Stopped(BaseException):
    """As ComfyUI's interrupt: no Exception."""


@pytest.mark.parametrize("part", [0.0, 0.05, 0.15, 0.4, 0.7, 0.95])
def test_the_model_is_the_same_after_an_interrupt_and_nothing_is_kept(part: float, comfy: ModuleType) -> None:
    model = tiny_model()
    before = sample(model)
    copies: list[Any] = []

    def stop(done: int, total: int) -> None:
        if done >= part * total:
            copies.extend(weakref.ref(o) for o in gc.get_objects() if isinstance(o, nn.Module) and _is_copy(o))
            raise Stopped

    with pytest.raises(Stopped):
        profile(model, progress=stop)
    assert copies or part < 0.15
    gc.collect()
    assert not any(copy() is not None for copy in copies)
    assert torch.equal(sample(model), before)
    assert untouched(model)
    with pytest.raises(Stopped):
        calibrated(model, everything(model), selection="uniform", progress=stop)
    assert torch.equal(sample(model), before)
    assert untouched(model)


def _is_copy(module: nn.Module) -> bool:
    return hasattr(type(module), "enable_gradient_checkpointing")


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_comfyuis_own_interrupt_stops_every_stage(kind: str, comfy: ModuleType) -> None:
    management: Any = comfy.model_management
    model = tiny_model(kind)
    before = sample(model, kind)

    def stop(done: int, total: int) -> None:
        if done >= 0.3 * total:
            management.interrupt_current_processing()
        management.throw_exception_if_processing_interrupted()

    with pytest.raises(management.InterruptProcessingException):
        profile(model, kind, progress=stop)
    assert not management.processing_interrupted()
    assert not getattr(management, "in_training", False)
    assert torch.equal(sample(model, kind), before)


def test_a_patch_that_reads_the_conditionings_fits_every_replay(comfy: ModuleType) -> None:
    """As IP-Adapter's: what it adds is repeated by the options' list of conditionings."""
    model, seen = tiny_model(), set[tuple[int, int]]()
    patched = model.clone()

    def patch(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        halves = extra["cond_or_uncond"]
        each = q.shape[0] // len(halves)
        seen.add((q.shape[0], len(halves)))
        factors = torch.cat([torch.full((each, 1, 1), 1.0 + half) for half in halves])
        return q, k, v * factors

    patched.set_model_attn2_patch(patch)
    found = profile(patched)
    assert len(found.layers) == len(everything(model).layers)
    assert len(seen) > 1, "the rows of replays were never others than those of the sampler's calls"
    assert all(rows % halves == 0 for rows, halves in seen)
