"""Text encoders: quantized while they are loaded, saved, loaded strictly, and what is refused of them."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_files import Tensors, with_value
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from tiny_pipelines import MAKERS, clip, picture, t5
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel
from transformers.quantizers import auto

from diffusers_ldmq import LDMQConfig, LDMQError
from diffusers_ldmq.errors import CheckpointError
from diffusers_ldmq.layers import QuantLinear, quantized_layers
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.twin import attach, register

FILE = "model.safetensors"
KINDS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "clip": (CLIPTextModel, clip),
    "clip-projection": (CLIPTextModelWithProjection, lambda: clip(CLIPTextModelWithProjection)),
    "t5": (T5EncoderModel, t5),
}
SCHEMES = {"w8a16": 35.0, "w8a8-dyn": 33.0, "w4a16": 10.0, "w4a16-g8": 14.0}
IDS = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved float text encoders."""
    torch.manual_seed(0)
    found = {}
    for name, (_, make) in KINDS.items():
        found[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(found[name])
    return found


@pytest.fixture(scope="module")
def quantized(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved w8a16 CLIP; tests edit copies of it."""
    folder = tmp_path_factory.mktemp("quantized")
    load("clip", folders["clip"], "w8a16").save_pretrained(folder)
    return folder


def load(name: str, folder: Path, scheme: Any = None, **options: Any) -> Any:
    config = LDMQConfig(scheme) if scheme else None
    return KINDS[name][0].from_pretrained(folder, quantization_config=config, **options)


@torch.no_grad()
def output(model: Any) -> Tensor:
    return model(IDS).last_hidden_state


def same_tensors(left: Any, right: Any) -> bool:
    left, right = left.state_dict(), right.state_dict()
    same = all(torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left)
    return left.keys() == right.keys() and same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", KINDS)
def test_quantized_while_loading_then_saved_and_loaded_by_plain_transformers(
    name: str, scheme: str, dtype: torch.dtype, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(name, folders[name], scheme, dtype=dtype)
    assert len(quantized_layers(model)) == 12
    assert all(type(layer) is QuantLinear for layer in quantized_layers(model).values())
    assert output(model).dtype == model.dtype == dtype
    assert sqnr(output(load(name, folders[name])), output(model).float()) > SCHEMES[scheme]
    model.save_pretrained(tmp_path)
    again = KINDS[name][0].from_pretrained(tmp_path, dtype=dtype)
    assert same_tensors(model, again)
    assert torch.equal(output(model), output(again))
    assert (tmp_path / FILE).stat().st_size < 0.75 * (folders[name] / FILE).stat().st_size


@pytest.mark.parametrize("name", KINDS)
def test_integers_come_from_the_file_and_not_from_the_dtype_asked_for_g7(name: str, folders: dict[str, Path]) -> None:
    full = load(name, folders[name], "w8a16").state_dict()
    half = load(name, folders[name], "w8a16", dtype=torch.bfloat16).state_dict()
    integers = [key for key, value in full.items() if not value.is_floating_point()]
    scales = [key for key in full if key.endswith("weight_scale")]
    assert len(integers) == len(scales) == 12
    assert all(torch.equal(full[key], half[key]) for key in integers + scales)


def test_embeddings_projections_and_tied_weights_stay_float(folders: dict[str, Path]) -> None:
    model = load("clip-projection", folders["clip-projection"], "w8a16")
    assert type(model.text_projection) is nn.Linear
    encoder = load("t5", folders["t5"], "w8a16")
    assert encoder.shared.weight.data_ptr() == encoder.encoder.embed_tokens.weight.data_ptr()
    assert encoder.shared.weight.is_floating_point()


def test_a_tied_weight_is_saved_once(folders: dict[str, Path], tmp_path: Path) -> None:
    load("t5", folders["t5"], "w8a16").save_pretrained(tmp_path)
    assert [key for key in load_file(tmp_path / FILE) if "shared" in key or "embed_tokens" in key] == ["shared.weight"]


def test_shards_come_together_again_g10(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load("t5", folders["t5"], "w8a16")
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert same_tensors(model, T5EncoderModel.from_pretrained(tmp_path))
    assert same_tensors(model, T5EncoderModel.from_pretrained(tmp_path, device_map="auto"))


def test_a_file_saved_in_bf16_says_so_and_loads_so_g8(folders: dict[str, Path], tmp_path: Path) -> None:
    load("clip", folders["clip"], "w8a16", dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["compute_dtype"] == "bfloat16"
    assert config["quant_method"] == "ldmq"
    assert "plan" not in config
    assert CLIPTextModel.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_models_share_no_config_with_each_other_nor_with_the_caller_g6(folders: dict[str, Path]) -> None:
    config = LDMQConfig("w8a16", modules_to_not_convert=["fc1"])
    first = CLIPTextModel.from_pretrained(folders["clip"], quantization_config=config)
    assert config.to_dict() == LDMQConfig("w8a16", modules_to_not_convert=["fc1"]).to_dict()
    assert not any("fc1" in name for name in quantized_layers(first))
    assert first.config.quantization_config is not config


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_a_copy_can_be_saved(how: str, quantized: Path, tmp_path: Path) -> None:
    model = CLIPTextModel.from_pretrained(quantized)
    copied: Any = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))  # noqa: S301
    copied.save_pretrained(tmp_path)
    assert (tmp_path / FILE).read_bytes() == (quantized / FILE).read_bytes()


def test_autocast_gives_what_the_float_model_gives(folders: dict[str, Path]) -> None:
    for name in KINDS:
        model, reference = load(name, folders[name], "w8a16"), load(name, folders[name])
        with torch.autocast("cpu", torch.bfloat16):
            assert sqnr(output(reference).float(), output(model).float()) > 30


CASTS: dict[str, Callable[[Any], Any]] = {
    "to": lambda model: model.to(torch.bfloat16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_is_refused_in_words_g25(cast: str, quantized: Path) -> None:
    model: Any = CLIPTextModel.from_pretrained(quantized)
    with pytest.raises(LDMQError, match="quantized CLIPTextModel in torch.float32 is not cast to"):
        CASTS[cast](model)
    assert model.to("cpu") is model
    assert model.float() is model


def test_a_dequantized_text_encoder_is_an_ordinary_float_one_g23(quantized: Path, tmp_path: Path) -> None:
    model = CLIPTextModel.from_pretrained(quantized)
    before = output(model)
    model.dequantize().save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again: Any = CLIPTextModel.from_pretrained(tmp_path)
    assert not quantized_layers(again)
    assert sqnr(before, output(again)) > 60
    assert again.to(torch.bfloat16).dtype == torch.bfloat16


def test_saving_with_a_lora_attached_is_refused_g22(quantized: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    model = CLIPTextModel.from_pretrained(quantized)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="a LoRA is attached"):
        model.save_pretrained(tmp_path)


def edited(intact: Path, target: Path, edit: Callable[[Tensors], object]) -> Path:
    """A copy of the checkpoint whose tensors went through `edit`."""
    folder = target / "edited"
    shutil.copytree(intact, folder)
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def first(folder: Path, leaf: str) -> str:
    return next(key for key in sorted(load_file(folder / FILE)) if key.endswith(leaf) and "q_proj" in key)


DAMAGES: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    ("weight", lambda t: t[:-1].clone(), r"shape \[31, 32\], expected \[32, 32\]"),
    ("weight", lambda t: t.half(), "dtype torch.float16, expected torch.int8"),
    ("weight", with_value(-128), "holds the code -128"),
    ("weight_scale", lambda t: t[:1].clone(), r"shape \[1\], expected \[32\]"),
    ("weight_scale", lambda t: t.half(), "dtype torch.float16, expected torch.float32"),
    ("weight_scale", with_value(torch.nan), "NaN or Inf"),
    ("weight_scale", with_value(0.0), "zero or negative"),
    ("bias", with_value(torch.inf), "NaN or Inf"),
    ("bias", lambda t: t.to(torch.int8), "dtype torch.int8, expected a floating one"),
]


@pytest.mark.parametrize(("leaf", "change", "match"), DAMAGES, ids=[f"{d[0]}-{i}" for i, d in enumerate(DAMAGES)])
def test_a_damaged_tensor_is_named_g13_g14(
    leaf: str, change: Callable[[Tensor], Tensor], match: str, quantized: Path, tmp_path: Path
) -> None:
    key = first(quantized, leaf)
    folder = edited(quantized, tmp_path, lambda tensors: tensors.update({key: change(tensors[key])}))
    with pytest.raises(CheckpointError, match=match) as caught:
        CLIPTextModel.from_pretrained(folder)
    assert "q_proj" in str(caught.value)


@pytest.mark.parametrize("leaf", ["q_proj.weight", "q_proj.weight_scale", "q_proj.bias", "final_layer_norm.weight"])
def test_a_missing_tensor_is_named_g11(leaf: str, quantized: Path, tmp_path: Path) -> None:
    key = next(key for key in sorted(load_file(quantized / FILE)) if key.endswith(leaf))
    folder = edited(quantized, tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match="the file lacks this tensor"):
        CLIPTextModel.from_pretrained(folder)


def test_an_extra_tensor_is_named_g12(quantized: Path, tmp_path: Path) -> None:
    key = first(quantized, "weight").replace(".weight", ".input_scale")
    folder = edited(quantized, tmp_path, lambda tensors: tensors.update({key: torch.ones(())}))
    with pytest.raises(CheckpointError, match="which its quantization_config does not name"):
        CLIPTextModel.from_pretrained(folder)


def test_a_layer_that_the_model_lacks_is_named(quantized: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(quantized, folder)
    data = json.loads((folder / "config.json").read_text())
    data["quantization_config"]["layers"]["surprise"] = {"scheme": "w8a16", "tensors": ["weight", "weight_scale"]}
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="names layer 'surprise', which CLIPTextModel lacks"):
        CLIPTextModel.from_pretrained(folder)


@pytest.mark.parametrize("leaf", ["q_proj.weight", "q_proj.bias", "final_layer_norm.weight"])
def test_a_float_model_that_lacks_a_tensor_is_not_quantized(
    leaf: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """transformers would fill it with random values."""
    key = next(key for key in sorted(load_file(folders["clip"] / FILE)) if key.endswith(leaf))
    folder = edited(folders["clip"], tmp_path, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match="the file lacks this tensor"):
        load("clip", folder, "w8a16")


def test_a_float_weight_with_nan_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    key = first(folders["clip"], "weight")
    change = with_value(torch.nan)
    folder = edited(folders["clip"], tmp_path, lambda tensors: tensors.update({key: change(tensors[key])}))
    with pytest.raises(LDMQError, match=r"q_proj.*NaN"):
        load("clip", folder, "w8a16")


def test_what_cannot_be_quantized_while_loading_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(LDMQError, match="calibrated activations"):
        load("clip", folders["clip"], "w8a8")
    with pytest.raises(LDMQError, match="names no scheme and no plan"):
        CLIPTextModel.from_pretrained(folders["clip"], quantization_config=LDMQConfig())
    with pytest.raises(LDMQError, match="only Linear layers are quantized"):
        load("clip", folders["clip"], {"embeddings.token_embedding": "w8a16"})
    config = LDMQConfig("w8a16", attention={"fewest_keys": 1})
    with pytest.raises(LDMQError, match="attention on integers is for diffusers' models"):
        CLIPTextModel.from_pretrained(folders["clip"], quantization_config=config)


def test_registering_again_is_harmless_and_a_taken_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "ldmq", object)
    with pytest.raises(LDMQError, match="another package has registered"):
        register()


def test_a_model_quantized_by_hand_can_be_attached_and_saved(folders: dict[str, Path], tmp_path: Path) -> None:
    made = load("t5", folders["t5"], "w8a16")
    del made.config.quantization_config
    made.hf_quantizer = None
    attach(made)
    made.save_pretrained(tmp_path)
    assert same_tensors(made, T5EncoderModel.from_pretrained(tmp_path))


MAPPINGS: dict[str, Callable[[], PipelineQuantizationConfig]] = {
    "mapping": lambda: PipelineQuantizationConfig(
        quant_mapping={name: LDMQConfig("w8a16") for name in ("transformer", "text_encoder_3", "vae")}
    ),
    "backend": lambda: PipelineQuantizationConfig(
        quant_backend="ldmq",
        quant_kwargs={"plan": "w8a16"},
        components_to_quantize=["transformer", "text_encoder_3", "vae"],
    ),
}


@pytest.mark.parametrize("how", MAPPINGS)
def test_one_config_class_quantizes_transformer_text_encoder_and_vae(how: str, tmp_path: Path) -> None:
    pipe = MAKERS["sd3"]()
    pipe.save_pretrained(tmp_path / "float")
    made = DiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=MAPPINGS[how]())
    made.set_progress_bar_config(disable=True)
    parts = {name: part for name, part in made.components.items() if isinstance(part, nn.Module)}
    assert {name for name in parts if quantized_layers(parts[name])} == {"transformer", "text_encoder_3", "vae"}
    made.save_pretrained(tmp_path / "quantized")
    again = DiffusionPipeline.from_pretrained(tmp_path / "quantized")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(made, "sd3"), picture(again, "sd3"))
    assert sqnr(picture(pipe, "sd3"), picture(again, "sd3")) > 35
