"""Quantizing while a float model is loaded: which layers get which scheme, and what is refused."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoModel,
    DiffusionPipeline,
    DiTTransformer2DModel,
    PipelineQuantizationConfig,
    UNet2DConditionModel,
    UNet2DModel,
)
from safetensors.torch import load_file, save_file
from tiny_pipelines import MAKERS, picture

from diffusers_ldmq import LDMQConfig, LDMQError, calibrate, make_plan, quantize
from diffusers_ldmq.families import layer_table, quantizable_layers
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.specs import SCHEMES, parse_scheme

FREE = [name for name in (*SCHEMES, "w4a16-g8") if name != "float" and not parse_scheme(name).is_static]
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved float Stable Diffusion pipeline."""
    path = tmp_path_factory.mktemp("float")
    MAKERS["sd"]().save_pretrained(path)
    return path


def unet(folder: Path, config: Any = None, **options: Any) -> Any:
    return UNet2DConditionModel.from_pretrained(folder / "unet", quantization_config=config, **options)


def schemes(model: Any) -> Counter[str]:
    return Counter(layer.scheme.name for layer in quantized_layers(model).values())


def same_tensors(left: Any, right: Any) -> bool:
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("scheme", FREE)
def test_it_gives_the_same_integers_as_quantizing_the_loaded_model_g9(scheme: str, folder: Path) -> None:
    at_once = unet(folder, LDMQConfig(scheme))
    later = unet(folder)
    quantize(later, calibrate(later, make_plan(layer_table(later), planner="uniform", scheme=scheme), None))
    kept = {info.name for info in layer_table(later).layers if info.keep_float}
    assert quantized_layers(at_once).keys() == quantized_layers(later).keys() - kept
    for name, layer in quantized_layers(at_once).items():
        other = quantized_layers(later)[name].state()
        assert all(torch.equal(value, getattr(other, key)) for key, value in layer.state().tensors().items())


@pytest.mark.parametrize("scheme", FREE)
def test_it_is_saved_and_loaded_without_a_config_g5(scheme: str, folder: Path, tmp_path: Path) -> None:
    saved = unet(folder, LDMQConfig(scheme))
    saved.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert same_tensors(saved, loaded)
    assert schemes(loaded) == schemes(saved)
    assert not loaded.config["quantization_config"].plan


def test_shards_give_the_same_integers_g10(folder: Path, tmp_path: Path) -> None:
    unet(folder).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=LDMQConfig("w8a16"))
    assert same_tensors(loaded, unet(folder, LDMQConfig("w8a16")))


def test_threads_that_load_shards_give_the_same_integers_g38(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet(folder).save_pretrained(tmp_path, max_shard_size="100KB")
    monkeypatch.setattr("diffusers.models.modeling_utils.HF_ENABLE_PARALLEL_LOADING", True)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=LDMQConfig("w4a16"))
    assert same_tensors(loaded, unet(folder, LDMQConfig("w4a16")))


def test_integers_come_from_the_files_values_not_from_cast_ones_g7(folder: Path) -> None:
    exact, cast = unet(folder, LDMQConfig("w8a16")), unet(folder, LDMQConfig("w8a16"), torch_dtype=torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    for name, layer in quantized_layers(cast).items():
        own, other = layer.state(), quantized_layers(exact)[name].state()
        assert torch.equal(own.weight, other.weight)
        assert own.weight_scale.dtype == torch.float32
        assert torch.equal(own.weight_scale, other.weight_scale)


def test_schemes_by_layer_block_and_pattern_later_ones_first(folder: Path) -> None:
    plan = {"*": "w8a16", "mid_block": "w4a16", "*.to_out.0": "float", "conv_in": "w8a8-dyn"}
    found = {name: layer.scheme.name for name, layer in quantized_layers(unet(folder, LDMQConfig(plan))).items()}
    assert found["conv_in"] == "w8a8-dyn"
    assert found["mid_block.resnets.0.conv1"] == "w4a16"
    assert found["time_embedding.linear_1"] == "w8a16"
    assert not [name for name in found if name.endswith(".to_out.0")]
    outs = [name for name in quantizable_layers(unet(folder)) if name.endswith(".to_out.0")]
    assert outs
    assert len(found) + len(outs) == len(quantizable_layers(unet(folder)))


def test_a_whole_plan_is_kept_to(folder: Path, tmp_path: Path) -> None:
    table = layer_table(unet(folder))
    make_plan(table, planner="uniform", scheme="w4a16", keep_float="up_blocks").save(tmp_path / "plan.json")
    found = quantized_layers(unet(folder, LDMQConfig(tmp_path / "plan.json")))
    assert set(found) == {info.name for info in table.layers if not info.name.startswith("up_blocks")}


def test_modules_to_not_convert_stay_float(folder: Path) -> None:
    names = ["mid_block", "to_q", "*.ff.net.2", "conv_norm_out"]  # a norm is never converted: nothing to complain of
    found = quantized_layers(unet(folder, LDMQConfig("w8a16", names)))
    assert found
    assert not [name for name in found if "mid_block" in name or "to_q" in name or name.endswith("ff.net.2")]


REFUSED: dict[str, tuple[Any, str]] = {
    "no scheme": (LDMQConfig(), "names no scheme and no plan.*LDMQConfig\\('w8a16'\\)"),
    "absent": (LDMQConfig({"nope": "w8a16"}), "plan: 'nope' fits nothing, UNet2DConditionModel has no such layer"),
    "a norm": (LDMQConfig({"conv_norm_out": "w8a16"}), "has a GroupNorm there; only Linear and Conv2d layers are"),
    "absent kept": (LDMQConfig("w8a16", ["nope"]), "modules_to_not_convert: 'nope' fits nothing"),
    "all kept": (LDMQConfig("w8a16", ["*"]), "no layer of UNet2DConditionModel is left to quantize"),
    "all float": (LDMQConfig({"*": "float"}), "no layer of UNet2DConditionModel is left to quantize"),
}


@pytest.mark.parametrize("reason", list(REFUSED))
def test_a_config_that_does_not_fit_the_model_is_refused(reason: str, folder: Path) -> None:
    config, match = REFUSED[reason]
    with pytest.raises(LDMQError, match=match):
        unet(folder, config)


def test_another_models_plan_is_refused(folder: Path) -> None:
    plan = make_plan(layer_table(MAKERS["ddim"]().unet), planner="uniform", scheme="w8a16")
    with pytest.raises(LDMQError, match="made for another"):
        unet(folder, LDMQConfig(plan))


def test_a_checkpoints_description_does_not_quantize_a_float_model(folder: Path, tmp_path: Path) -> None:
    unet(folder, LDMQConfig("w8a16")).save_pretrained(tmp_path)
    described = UNet2DConditionModel.from_pretrained(tmp_path).config["quantization_config"]
    with pytest.raises(LDMQError, match="names no scheme and no plan"):
        unet(folder, described)


@pytest.mark.parametrize("damage", ["nan", "missing"])
def test_a_damaged_float_file_is_refused_by_name(damage: str, folder: Path, tmp_path: Path) -> None:
    unet(folder).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    if damage == "nan":
        tensors["mid_block.resnets.0.conv1.weight"][0, 0] = torch.nan
    else:
        del tensors["mid_block.resnets.0.conv1.weight"]
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    with pytest.raises(LDMQError, match="module 'mid_block.resnets.0.conv1', tensor 'weight'"):
        UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=LDMQConfig("w8a16"))


def test_a_pipeline_takes_a_config_per_component_and_keeps_them_apart_g6(folder: Path, tmp_path: Path) -> None:
    one = LDMQConfig("w8a16")
    mapping: Any = {"unet": one, "vae": one}
    options: Any = {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)}
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    assert schemes(pipe.unet).keys() == schemes(pipe.vae).keys() == {"w8a16"}
    assert not {"quant_conv", "post_quant_conv"} & quantized_layers(pipe.vae).keys()
    assert one.to_dict() == LDMQConfig("w8a16").to_dict()
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert schemes(again.vae) == schemes(pipe.vae)
    assert torch.equal(picture(again, "sd"), picture(pipe, "sd"))
    assert sqnr(picture(DiffusionPipeline.from_pretrained(folder), "sd"), picture(pipe, "sd")) >= 25


def test_automodel_and_device_maps_quantize_too(folder: Path) -> None:
    expected = unet(folder, LDMQConfig("w8a16"))
    found = AutoModel.from_pretrained(str(folder), subfolder="unet", quantization_config=LDMQConfig("w8a16"))
    mapped = unet(folder, LDMQConfig("w8a16"), device_map="cpu")
    automatic = unet(folder, LDMQConfig("w8a16"), device_map="auto")
    assert all(same_tensors(expected, other) for other in (found, mapped, automatic))


def test_a_device_map_with_disk_is_refused(folder: Path, tmp_path: Path) -> None:
    placed = {"": "cpu", "mid_block": "disk"}
    with pytest.raises(LDMQError, match="device_map puts parts of the model on disk"):
        unet(folder, LDMQConfig("w8a16"), device_map=placed, offload_folder=tmp_path)


@pytest.mark.parametrize(("kind", "loaded_as"), [("ddim", UNet2DModel), ("dit", DiTTransformer2DModel)])
def test_other_denoisers_are_quantized_alike(kind: str, loaded_as: Any, tmp_path: Path) -> None:
    pipe = MAKERS[kind]()
    model = pipe.components["unet" if kind == "ddim" else "transformer"]
    model.save_pretrained(tmp_path)
    found = loaded_as.from_pretrained(tmp_path, quantization_config=LDMQConfig("w8a16"))
    kept = {info.name for info in layer_table(model).layers if info.keep_float}
    assert set(quantized_layers(found)) == set(quantizable_layers(model)) - kept


def test_a_single_file_is_quantized_while_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    tensors = unet(folder).state_dict()
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "unet.safetensors")
    options: Any = {"config": str(folder / "unet"), "quantization_config": LDMQConfig("w8a16")}
    found = UNet2DConditionModel.from_single_file(str(tmp_path / "unet.safetensors"), **options)
    assert same_tensors(found, unet(folder, LDMQConfig("w8a16")))


def test_flashpack_is_refused_rather_than_left_unquantized_g35(folder: Path) -> None:
    with pytest.raises(LDMQError, match="use_flashpack=True skips quantizing"):
        unet(folder, LDMQConfig("w8a16"), use_flashpack=True)
