"""LDM-Q Export: files that ComfyUI's own loader reads."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.cut_models import cut_model, quantized_cut, sample_cut
from comfyui.quantizing import plan_of, quantized
from comfyui.tiny_models import lora, sqnr, tiny_model
from safetensors.torch import load_file

from diffusers_ldmq.errors import LDMQError


def export(model: Any, path: Path, **options: Any) -> str:
    from comfyui_nodes.native.export import export_model

    return export_model(model, path, **options)


@pytest.fixture
def stock(comfy: ModuleType) -> ModuleType:
    """ComfyUI, if it reads int8 files itself."""
    import comfy.quant_ops

    if "int8_tensorwise" not in getattr(comfy.quant_ops, "QUANT_ALGOS", {}):
        pytest.skip("this ComfyUI is older than 0.27 and reads no int8 files: exported ones were not loaded")
    return comfy


def test_the_stock_loader_opens_it_and_loras_work_on_it(stock: ModuleType, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    export(quantized_cut("w8a8-dyn", "float", stages=2), path)
    model, exported = cut_model(stages=2), stock.sd.load_diffusion_model(str(path))
    expected = sample_cut(model)
    assert sqnr(expected, sample_cut(exported)) > 30
    file = lora(model, list(plan_of(model, "w8a16", "w8a16").quantized()), 0.7)
    patched = [stock.sd.load_lora_for_models(m, None, dict(file), 1.0, 1.0)[0] for m in (model, exported)]
    changed, ours = (sample_cut(m) for m in patched)
    assert sqnr(expected, changed) < 10
    assert sqnr(changed, ours) > 20  # ComfyUI rounds the patched weight anew, with a scale of its own


def test_weight_only_layers_ask_the_stock_loader_for_float_inputs(stock: ModuleType, tmp_path: Path):
    """ComfyUI up to 0.30 rounds them all the same; what is tested is how near the picture stays and that it is said."""
    path = tmp_path / "model.safetensors"
    weight_only = quantized_cut("w8a16", "float", stages=2)
    text = export(weight_only, path)
    assert "70 of the int8 layers are weight-only here" in text
    assert "rounds each row of them to 8 bits" in text
    exported = stock.sd.load_diffusion_model(str(path))
    asked = [m for m in exported.model.diffusion_model.modules() if getattr(m, "_full_precision_mm", False)]
    assert len(asked) == 70
    expected = sample_cut(cut_model(stages=2))
    assert sqnr(expected, sample_cut(weight_only)) > 32
    assert sqnr(expected, sample_cut(exported)) > 28


def test_only_linear_layers_with_8_bit_weights_are_integers(comfy: ModuleType, tmp_path: Path):
    from comfyui_nodes.native.patching import quantized_layers_of

    path = tmp_path / "model.safetensors"
    model = tiny_model()
    exported = quantized(model, "w8a8-dyn", "w8a8-dyn")
    text = export(exported, path)
    tensors = load_file(path)
    codes = {name.removesuffix(".weight") for name, value in tensors.items() if value.dtype == torch.int8}
    plan = plan_of(model, "w8a8-dyn", "float").quantized()
    assert codes == set(plan)
    for name in codes:
        assert tensors[f"{name}.weight_scale"].shape == (tensors[f"{name}.weight"].shape[0], 1)
        assert bytes(tensors[f"{name}.comfy_quant"].tolist()) == b'{"format": "int8_tensorwise"}'
    floats = {value.dtype for name, value in tensors.items() if not name.endswith(("weight_scale", "comfy_quant"))}
    assert floats == {torch.int8, torch.float16}
    assert set(model.model.diffusion_model.state_dict()) <= set(tensors)
    layers = quantized_layers_of(exported)
    convolution = next(name for name, layer in layers.items() if layer.geometry.is_conv)
    written = tensors[f"{convolution}.weight"].float()
    assert torch.equal(written, layers[convolution].weight.dequantize().half().float())
    assert f"{len(codes)} of {len(layers)} quantized layers" in text
    assert f"{len(layers) - len(codes)} convolutions: as the fp16 values of their integers" in text


def test_what_the_format_does_not_have_is_fp16_and_said(comfy: ModuleType, tmp_path: Path):
    from comfyui_nodes.native.patching import quantized_layers_of

    path = tmp_path / "model.safetensors"
    text = export(quantized(tiny_model(), "w4a16", "w4a16"), path)
    assert "Linear layers with 4-bit weights: as the fp16 values" in text
    assert "LDM-Q Save model instead" in text
    assert torch.int8 not in {value.dtype for value in load_file(path).values()}

    model = quantized(tiny_model(), "w8a16", "w8a16")
    layers = {name: layer for name, layer in quantized_layers_of(model).items() if not layer.geometry.is_conv}
    name, smoothed = next(iter(layers.items()))
    _smooth(smoothed)
    text = export(model, path)
    tensors = load_file(path)
    assert "1 Linear layers with a correction (smoothing, rotation or low rank): as the fp16 values" in text
    weight = tensors[f"{name}.weight"]
    assert weight.dtype == torch.float16
    assert sqnr(smoothed.weight.dequantize(), weight.float()) > 60


def _smooth(layer: Any) -> None:
    """Give the layer factors for its input channels, as smoothing does; its codes then stand for other weights."""
    import dataclasses

    state = layer.state()
    factors = torch.linspace(0.5, 2.0, layer.geometry.in_channels)
    layer._hidden.load_state(dataclasses.replace(state, pre_quant_scale=factors))
    layer._show()


def test_v_prediction_is_told_in_the_stock_way(comfy: ModuleType, tmp_path: Path):
    from comfyui_nodes.native.operations import set_sampling

    model = quantized(tiny_model(), "w8a16", "w8a16")
    set_sampling(model.model, "V_PREDICTION", {"zsnr": True})
    path = tmp_path / "model.safetensors"
    export(model, path)
    assert {"v_pred", "ztsnr"} <= set(load_file(path))


def test_a_float_model_is_refused(comfy: ModuleType, tmp_path: Path):
    with pytest.raises(LDMQError, match="LDM-Q Quantize"):
        export(tiny_model(), tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(comfy: ModuleType, tmp_path: Path):
    def interrupt(done: int, total: int) -> None:
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        export(quantized(tiny_model()), tmp_path / "model.safetensors", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
