"""What cannot be quantized, and what a quantized MODEL refuses to take part in."""

import dataclasses
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.quantizing import plan_of, quantized, ranges_of
from comfyui.tiny_models import lora, sample, tiny_model
from torch import nn

from diffusers_ldmq.artifacts import LayerChoice
from diffusers_ldmq.errors import LDMQError, PlanError

NAME = "middle_block.1.transformer_blocks.0.attn1.to_q"


def replaced(model: Any, layer: nn.Module) -> Any:
    clone = model.clone()
    clone.add_object_patch(f"diffusion_model.{NAME}", layer)
    return clone


def test_a_model_that_is_quantized_already(comfy: ModuleType) -> None:
    clone = quantized(tiny_model())
    with pytest.raises(
        LDMQError, match="quantized by LDM-Q already; connect the float MODEL"
    ):
        quantized(clone)
    with pytest.raises(LDMQError, match="already"):
        quantized(clone.clone())


def test_a_gguf_model(comfy: ModuleType) -> None:
    class GGMLOps:
        class Linear(nn.Linear):
            pass

    model = tiny_model()
    with pytest.raises(LDMQError, match=r"GGUF file.*layer 'middle_block\..*Load Checkpoint or Load Diffusion Model"):
        quantized(replaced(model, GGMLOps.Linear(64, 64)))
    held = nn.Linear(64, 64)
    held.weight.tensor_type = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(LDMQError, match="GGUF"):
        quantized(replaced(model, held))


def test_a_nunchaku_model(comfy: ModuleType) -> None:
    kind = type("SVDQW4A4Linear", (nn.Module,), {"__module__": "nunchaku.models.linear"})
    with pytest.raises(LDMQError, match="Nunchaku model.*Load Checkpoint"):
        quantized(replaced(tiny_model(), kind()))


def test_a_model_of_comfyuis_own_quantized_layers(comfy: ModuleType) -> None:
    from comfy_kitchen.tensor import QuantizedTensor

    layer = nn.Linear(64, 64)
    tensor = QuantizedTensor.from_float(torch.randn(64, 64), "TensorWiseINT8Layout")
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    with pytest.raises(LDMQError, match="quantized already.*TensorWiseINT8Layout.*original fp16 or bf16 file"):
        quantized(replaced(tiny_model(), layer))


def test_a_model_whose_weights_have_8_bits(comfy: ModuleType) -> None:
    model = tiny_model(dtype=torch.float8_e4m3fn)
    with pytest.raises(
        LDMQError, match="float8_e4m3fn.*set weight_dtype to 'default' in the Load Diffusion Model node"
    ):
        quantized(model)


def test_a_model_that_another_node_replaced_as_a_whole(comfy: ModuleType) -> None:
    model = tiny_model()
    for name in ("diffusion_model", "diffusion_model.middle_block"):
        clone = model.clone()
        clone.add_object_patch(name, clone.get_model_object(name))
        with pytest.raises(LDMQError, match=f"replaced '{name}' of this MODEL as a whole.*put LDM-Q before"):
            quantized(clone)


def test_something_that_is_no_model(comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import refuse_unfit_model

    with pytest.raises(LDMQError, match="dict is no MODEL of ComfyUI"):
        refuse_unfit_model({})


def test_a_dynamic_patcher_is_made_plain_or_refused(comfy: ModuleType) -> None:
    model = tiny_model()
    told: list[bool] = []

    class Dynamic(type(model)):
        def is_dynamic(self) -> bool:
            return not told

        def clone(self, disable_dynamic: bool = False) -> Any:
            told.append(disable_dynamic)
            return super().clone()

    plan = plan_of(model, "w8a16", "w8a16")
    from comfyui_nodes.native.patching import quantize_model

    model.__class__ = Dynamic
    clone, _ = quantize_model(model, plan)
    assert told[0] is True
    assert not clone.is_dynamic()

    class Stubborn(type(model)):
        def is_dynamic(self) -> bool:
            return True

        def clone(self, disable_dynamic: bool = False) -> Any:
            raise RuntimeError("cached_patcher_init is not initialized")

    model.__class__ = Stubborn
    with pytest.raises(LDMQError, match="dynamic VRAM.*--disable-dynamic-vram"):
        quantize_model(model, plan)


def test_a_plan_for_another_model(comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import quantize_model

    model, other = tiny_model("sd15"), tiny_model("sd3")
    with pytest.raises(
        PlanError, match=r"names 29 layers that this MODEL lacks: joint_blocks.0.context_block.attn.qkv, "
    ):
        quantize_model(model, plan_of(other, "w8a16", "w8a16"))
    plan = plan_of(model, "w8a16", "w8a16")
    with pytest.raises(PlanError, match="made for another UNetModel .layer fingerprint abc, .*LDM-Q Profile"):
        quantize_model(model, dataclasses.replace(plan, fingerprint="abc"))
    nothing = dataclasses.replace(plan, layers={NAME: LayerChoice("float", "")})
    with pytest.raises(PlanError, match="leaves every layer in floating point"):
        quantize_model(model, nothing)
    ranges = dataclasses.replace(ranges_of(model, plan), fingerprint="abc")
    with pytest.raises(PlanError, match="calibration was made for another model.*LDM-Q Calibrate"):
        quantize_model(model, plan, ranges)


@pytest.mark.parametrize("loaded", [True, False])
def test_merging_is_refused_on_either_side(loaded: bool, comfy: ModuleType) -> None:
    from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeBlocks, ModelMergeSimple, ModelSubtract

    model, other = tiny_model(), tiny_model(seed=2)
    clone = quantized(model)
    base = sample(model)
    first = sample(clone)
    if not loaded:
        sample(model)
    for one, two in ((clone, other), (other, clone), (clone.clone(), other), (other, clone.clone()), (model, clone)):
        for node in (ModelMergeSimple, ModelSubtract, ModelAdd, ModelMergeBlocks):
            arguments = (0.5,) if node in (ModelMergeSimple, ModelSubtract) else ()
            options = {"input": 0.5, "middle": 0.5, "out": 0.5} if node is ModelMergeBlocks else {}
            with pytest.raises(LDMQError, match="cannot be merged.*merge the float MODELs first"):
                node().merge(one, two, *arguments, **options)
    assert torch.equal(sample(clone), first)
    assert torch.equal(sample(model), base)
    ModelMergeSimple().merge(model, other, 0.5)


def test_merging_float_models_and_then_quantizing_works(comfy: ModuleType) -> None:
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    model, other = tiny_model(), tiny_model(seed=2)
    merged = ModelMergeSimple().merge(model, other, 0.9)[0]
    from comfyui.tiny_models import sqnr

    assert sqnr(sample(merged), sample(quantized(merged))) > 20


@pytest.mark.parametrize("loaded", [True, False])
def test_the_stock_savers_are_refused_and_write_nothing(loaded: bool, comfy: ModuleType, tmp_path: Any) -> None:
    import comfy.sd

    model = tiny_model()
    clone = quantized(model)
    base, first = sample(model), sample(clone)
    if not loaded:
        sample(model)
    for candidate in (clone, clone.clone()):
        with pytest.raises(
            LDMQError, match="cannot be saved as a stock checkpoint; use LDM-Q Save model, or LDM-Q Export"
        ):
            comfy.sd.save_checkpoint(str(tmp_path / "x.safetensors"), candidate)
    assert not list(tmp_path.iterdir())
    assert torch.equal(sample(clone), first)
    assert torch.equal(sample(model), base)
    comfy.sd.save_checkpoint(str(tmp_path / "x.safetensors"), model)
    assert (tmp_path / "x.safetensors").stat().st_size > 4e6


def test_lora_hooks_are_refused(comfy: ModuleType) -> None:
    import comfy.hooks

    model = tiny_model()
    clone = quantized(model)
    group = comfy.hooks.create_hook_lora(lora(model, [NAME], 0.5), 1.0, 0.0)
    from comfyui.tiny_models import conditioning

    hooked = [[tensor, options | {"hooks": group}] for tensor, options in conditioning()]
    with pytest.raises(LDMQError, match="LoRA hooks"):
        sample(clone, positive=hooked)
    assert sample(clone).isfinite().all()
    assert sample(model, positive=hooked).isfinite().all()
