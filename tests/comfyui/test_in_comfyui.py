"""A quantized MODEL with what else ComfyUI does to models: offloading, ControlNet, torch.compile, unloading."""

from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.quantizing import plan_of, quantized
from comfyui.tiny_models import SD15, conditioning, fill, lora, sample, sqnr, tiny_model


def with_lora(model: Any) -> Any:
    import comfy.sd

    file = lora(model, list(plan_of(model, "w8a16", "w8a16").quantized()), 0.7)
    return comfy.sd.load_lora_for_models(model, None, file, 1.0, 1.0)[0]


def evaluated(model: Any) -> torch.Tensor:
    """One call of the denoiser as it is loaded now."""
    generator = torch.Generator().manual_seed(3)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 16, generator=generator)
    return model.model.diffusion_model(x, torch.tensor([500.0, 500.0]), context=context)


@pytest.mark.parametrize("scheme", ["w8a8-dyn", "w4a16"])
def test_offloaded_layers_take_a_lora_through_their_functions(scheme: str, comfy: ModuleType) -> None:
    """Low VRAM: no layer is loaded, so that a LoRA is added to every weight in every call."""
    model = tiny_model()
    adapted = with_lora(model)
    expected = [sample(adapted), evaluated(adapted)][1]
    clone = with_lora(quantized(model, scheme, scheme))
    regular = [sample(clone), evaluated(clone)][1]
    clone.detach()
    clone.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    assert clone.model.model_lowvram
    layer = clone.get_model_object("diffusion_model.middle_block.0.in_layers.2")
    assert layer.weight_function
    offloaded = evaluated(clone)
    clone.detach()
    assert not layer.weight_function
    # activations stay floating there, so it is nearer than the loaded model
    assert sqnr(expected, offloaded) > sqnr(expected, regular) - 1
    assert sqnr(expected, offloaded) > (25 if scheme == "w8a8-dyn" else 5)


def test_an_offloaded_model_without_a_lora_runs_its_integers(comfy: ModuleType) -> None:
    clone = quantized(tiny_model())
    regular = [sample(clone), evaluated(clone)][1]
    clone.detach()
    clone.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    assert torch.equal(evaluated(clone), regular)
    clone.detach()


def test_partly_unloading_keeps_the_result(comfy: ModuleType) -> None:
    model = tiny_model()
    adapted = with_lora(quantized(model))
    first = sample(adapted)
    regular = evaluated(adapted)
    adapted.partially_unload(torch.device("cpu"), 500_000)
    assert sqnr(regular, evaluated(adapted)) > 20
    adapted.detach()
    assert torch.equal(sample(adapted), first)


def test_unloading_everything_and_sampling_again(comfy: ModuleType) -> None:
    import comfy.model_management

    model = tiny_model()
    base = sample(model)
    adapted = with_lora(quantized(model))
    first = sample(adapted)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(adapted), first)
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(model), base)


def control_net(seed: int = 11) -> Any:
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    config = {name: value for name, value in SD15.items() if name not in ("out_channels", "transformer_depth_output")}
    config["transformer_depth"] = list(SD15["transformer_depth"])  # pyright: ignore[reportArgumentType]
    module = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
    )
    fill(module, seed)
    cpu = torch.device("cpu")
    return comfy.controlnet.ControlNet(module, load_device=cpu, manual_cast_dtype=None)


def test_a_controlnet_steers_it_as_it_steers_the_float_model(comfy: ModuleType) -> None:
    hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    net = control_net().set_cond_hint(hint, 1.0, (0.0, 1.0))
    steered = [[tensor, options | {"control": net}] for tensor, options in conditioning()]
    model = tiny_model()
    clone = quantized(model)
    base, controlled = sample(model), sample(model, positive=steered)
    assert sqnr(base, controlled) < 15
    assert sqnr(controlled, sample(clone, positive=steered)) > sqnr(base, sample(clone)) - 3


def test_torch_compile_gives_the_same_picture(comfy: ModuleType) -> None:
    """Of one transformer block and one convolution: compiling all of the denoiser takes minutes."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = quantized(tiny_model())
    first = sample(clone)
    compiled = clone.clone()
    keys = ["diffusion_model.middle_block.1.transformer_blocks.0", "diffusion_model.middle_block.0.in_layers"]
    set_torch_compile_wrapper(compiled, backend="aot_eager", keys=keys)
    assert sqnr(first, sample(compiled)) > 60
    assert torch.equal(sample(clone), first)
    adapted = with_lora(compiled)
    assert sqnr(sample(with_lora(clone)), sample(adapted)) > 60
    assert torch.equal(sample(clone), first)


def test_a_wrapper_sees_the_quantized_denoiser(comfy: ModuleType) -> None:
    import comfy.patcher_extension

    clone, calls = quantized(tiny_model()), []
    first = sample(clone)

    def wrap(executor: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(executor.class_obj.middle_block[0].in_layers[2]).__name__)
        return executor(*args, **kwargs)

    watched = clone.clone()
    watched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "test", wrap)
    assert torch.equal(sample(watched), first)
    assert calls == ["LDMQLayer"] * 3
