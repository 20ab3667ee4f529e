"""A quantized MODEL in ComfyUI's own sampler: how near it is to the float one, LoRA, switching between clones."""

from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.quantizing import plan_of, quantized, ranges_of
from comfyui.tiny_models import MODELS, lora, sample, sqnr, tiny_model

from diffusers_ldmq.errors import LDMQError


def with_lora(model: Any, file: dict[str, torch.Tensor]) -> Any:
    """What the Load LoRA node gives."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(model, None, dict(file), 1.0, 1.0)[0]


def big_lora(model: Any, strength: float = 0.7) -> dict[str, torch.Tensor]:
    """A LoRA for every layer of the blocks."""
    return lora(model, list(plan_of(model, "w8a16", "w8a16").quantized()), strength)


@pytest.mark.parametrize(
    ("linear", "conv", "calibrated", "least"),
    [
        ("w8a8-dyn", "w8a16", False, 26.0),
        ("w8a8", "w8a8", True, 20.0),
        ("w8a16", "w8a16", False, 26.0),
        ("w8a8-dyn", "w8a8-dyn", False, 20.0),
        ("w4a16", "w4a16", False, 6.0),
        ("w4a16-g16", "w4a16-g16", False, 8.0),
        ("w4a8", "w4a8", True, 6.0),
        ("w4a8-dyn", "w8a8", True, 6.0),
    ],
)
def test_the_final_latent_is_near_the_float_models(
    linear: str, conv: str, calibrated: bool, least: float, comfy: ModuleType
) -> None:
    model = tiny_model()
    base = sample(model)
    ranges = ranges_of(model, plan_of(model, linear, conv)) if calibrated else None
    assert sqnr(base, sample(quantized(model, linear, conv, ranges))) >= least


@pytest.mark.parametrize("kind", sorted(set(MODELS) - {"sd15"}))
def test_other_models_too(kind: str, comfy: ModuleType) -> None:
    model = tiny_model(kind)
    base = sample(model, kind)
    assert sqnr(base, sample(quantized(model), kind)) >= 20
    assert torch.equal(sample(model, kind), base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_models_whose_weights_have_16_bits(dtype: torch.dtype, comfy: ModuleType) -> None:
    model = tiny_model(dtype=dtype)
    base = sample(model)
    clone = quantized(model)
    assert sqnr(base, sample(clone)) >= 26
    assert clone.get_model_object("diffusion_model.input_blocks.1.0.in_layers.2").weight.dtype == dtype
    assert sqnr(sample(with_lora(model, big_lora(model))), sample(with_lora(clone, big_lora(model)))) >= 20


def test_the_float_model_is_bit_exact_before_between_and_after(comfy: ModuleType) -> None:
    model = tiny_model()
    base = sample(model)
    clone = quantized(model)
    first = sample(clone)
    assert torch.equal(sample(model), base)
    assert torch.equal(sample(clone), first)
    assert torch.equal(sample(model.clone()), base)
    assert torch.equal(sample(clone.clone()), first)
    del clone
    assert torch.equal(sample(model), base)


@pytest.mark.parametrize("schemes", [("w8a8-dyn", "w8a16"), ("w8a8", "w8a8"), ("w4a16-g16", "w4a16"), ("w4a8", "w4a8")])
def test_a_lora_costs_little_more_than_quantizing_does(schemes: tuple[str, str], comfy: ModuleType) -> None:
    model = tiny_model()
    file = big_lora(model)
    plan, carrier = plan_of(model, *schemes), with_lora(model, file)
    base, adapted = sample(model), sample(carrier)
    assert sqnr(base, adapted) <= 0
    without = sqnr(base, sample(quantized(model, *schemes, ranges_of(model, plan))))
    with_ = sqnr(adapted, sample(quantized(carrier, *schemes, ranges_of(carrier, plan))))  # calibrated behind the LoRA
    assert with_ >= without - 5


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8"])
def test_a_lora_behind_a_calibrated_model_costs_little_more_too(scheme: str, comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import quantized_layers_of

    model = tiny_model()
    file = big_lora(model)
    base, adapted = sample(model), sample(with_lora(model, file))
    clone = quantized(model, scheme, scheme, ranges_of(model, plan_of(model, scheme, scheme)))  # without the LoRA
    alone = sample(clone)
    assert sqnr(adapted, sample(with_lora(clone, file))) >= sqnr(base, alone) - 5
    assert {layer.scheme.name for layer in quantized_layers_of(clone).values()} == {"w8a8-dyn"}
    assert torch.equal(sample(clone), alone)
    assert {layer.scheme.name for layer in quantized_layers_of(clone).values()} == {scheme}


@pytest.mark.parametrize("scheme", ["w8a8-dyn", "w4a16"])
def test_a_lora_before_quantizing_is_one_after_it(scheme: str, comfy: ModuleType) -> None:
    model = tiny_model()
    file = big_lora(model)
    after = sample(with_lora(quantized(model, scheme, "w8a16"), file))
    adapted = with_lora(model, file)
    assert torch.equal(sample(quantized(adapted, scheme, "w8a16")), after)
    sample(adapted)  # now its weights are in the shared tree, and the original ones in a backup
    assert torch.equal(sample(quantized(adapted, scheme, "w8a16")), after)
    sample(adapted)
    assert sqnr(sample(model), sample(quantized(model, scheme, "w8a16"))) > 6


@pytest.mark.parametrize("scheme", ["w8a8-dyn", "w8a16", "w4a16", "w4a8-dyn"])
def test_a_lora_that_is_taken_out_leaves_no_trace(scheme: str, comfy: ModuleType) -> None:
    model = tiny_model()
    base = sample(model)
    clone = quantized(model, scheme, scheme)
    first = sample(clone)
    adapted = with_lora(clone, big_lora(model))
    second = sample(adapted)
    assert sqnr(first, second) < 3
    assert torch.equal(sample(clone), first)
    assert torch.equal(sample(model), base)
    assert torch.equal(sample(adapted), second)
    assert torch.equal(sample(model), base)
    assert torch.equal(sample(clone), first)


@pytest.mark.parametrize("first", [0, 1])
def test_two_quantize_nodes_in_one_graph_both_quantize_every_layer(first: int, comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import quantized_layers_of, source_layers

    model = tiny_model()
    base = sample(model)
    branches = [model.clone(), with_lora(model, big_lora(model))]
    one = quantized(branches[first])
    found = sample(one)
    two = quantized(branches[1 - first], "w8a16", "w8a8-dyn")  # while the other is loaded
    planned = plan_of(model, "w8a8-dyn", "w8a16").quantized()
    assert len(planned) == 107
    assert quantized_layers_of(one).keys() == quantized_layers_of(two).keys() == planned.keys()
    assert not quantized_layers_of(model)
    assert len(source_layers(model)) == len(source_layers(one)) == 119
    sample(two)
    assert torch.equal(sample(one), found)
    assert torch.equal(sample(model), base)
    assert {layer.scheme.name for layer in quantized_layers_of(two).values()} == {"w8a16", "w8a8-dyn"}


def test_the_size_is_what_the_layers_hold_and_clones_keep_it(comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import quantized_layers_of, source_layers

    model = tiny_model()
    clone = quantized(model, "w8a8-dyn", "w4a16-g16")
    floats = {name: layer for name, layer in source_layers(model).items() if name in quantized_layers_of(clone)}
    removed = sum(p.nbytes for layer in floats.values() for p in layer.parameters())
    added = sum(t.nbytes for layer in quantized_layers_of(clone).values() for t in layer.state().tensors().values())
    whole = sum(p.nbytes for p in model.model.diffusion_model.parameters())
    assert clone.model_size() - model.model_size() == added - removed
    assert added < 0.3 * removed
    assert model.model_size() >= whole
    sample(clone)
    assert clone.clone().model_size() == clone.model_size() < 0.5 * model.model_size()
    assert tiny_model().model_size() == model.model_size()


def test_a_clone_that_computes_something_else_says_so(comfy: ModuleType) -> None:
    model = tiny_model()
    clone = quantized(model)
    assert clone.patches_uuid != model.patches_uuid
    assert clone.clone().patches_uuid == clone.patches_uuid


def test_the_text_tells_what_runs_how(comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import quantize_model

    model = tiny_model()
    plan = plan_of(model, "w8a8", "w4a8")
    steps: list[tuple[int, int]] = []
    clone, text = quantize_model(model, plan, None, lambda done, count: steps.append((done, count)))
    assert "107 layers quantized: 37 x w4a8-dyn, 70 x w8a8-dyn" in text
    assert "70 layers planned as w8a8 have no calibration and run as w8a8-dyn" in text
    assert "37 layers planned as w4a8 have no calibration and run as w4a8-dyn" in text
    assert "4.2 MB -> 1." in text
    assert "runs on cpu: " in text
    assert sorted(set(steps)) == [(n, 107) for n in range(108)]
    ranges = ranges_of(model, plan)
    some = type(ranges)(**{**vars(ranges), "ranges": dict(list(ranges.ranges.items())[3:])})
    told = quantize_model(model, plan, some)[1]
    assert "3 layers planned as w4a8 have no calibration" in told
    assert "no calibration" not in quantize_model(model, plan, ranges)[1]
    assert "w8a8" in {layer.scheme.name for layer in _layers(quantize_model(model, plan, ranges)[0])}


def _layers(model: Any) -> list[Any]:
    from comfyui_nodes.native.patching import quantized_layers_of

    return list(quantized_layers_of(model).values())


def test_ranges_reach_the_layers(comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import quantized_layers_of

    model = tiny_model()
    ranges = ranges_of(model, plan_of(model, "w8a8", "w8a8"))
    for name, layer in quantized_layers_of(quantized(model, "w8a8", "w8a8", ranges)).items():
        state = layer.state()
        assert state.input_scale is not None
        assert state.input_zero_point is not None
        assert (float(state.input_scale), int(state.input_zero_point)) == ranges.ranges[name]


def test_an_interrupt_while_quantizing_leaves_the_model_as_it_was(comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import quantize_model

    class Interrupt(BaseException):
        pass

    def stop(done: int, count: int) -> None:
        if done == 5:
            raise Interrupt

    model = tiny_model()
    base = sample(model)
    with pytest.raises(Interrupt):
        quantize_model(model, plan_of(model, "w8a16", "w8a16"), None, stop)
    assert torch.equal(sample(model), base)


def test_an_interrupt_is_heard_inside_of_a_large_layer(comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import quantize_model

    told: list[int] = []
    model = tiny_model()
    plan = plan_of(model, "w4a16", "w4a16")
    quantize_model(model, plan, None, lambda done, count: told.append(done))
    assert told == sorted(told)
    assert len(told) >= 2 * len(plan.quantized())


def test_nan_in_a_weight_is_named(comfy: ModuleType) -> None:
    model = tiny_model()
    model.model.diffusion_model.middle_block[0].in_layers[2].weight.data[0, 0] = torch.nan
    with pytest.raises(LDMQError, match=r"layer 'middle_block.0.in_layers.2': .*NaN"):
        quantized(model)
