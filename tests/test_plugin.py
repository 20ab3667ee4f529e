"""Checkpoints through diffusers' own save and load: bit-identical, strict, deterministic, readable for good."""

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_ldmq import LDMQConfig, Recording, calibrate, quantize
from diffusers_ldmq.calls import run
from diffusers_ldmq.errors import CheckpointError, LDMQError
from diffusers_ldmq.families import find_denoiser
from diffusers_ldmq.layers import QuantizedLayer, quantized_layers
from diffusers_ldmq.metrics import Power, sqnr, total
from diffusers_ldmq.plugin import LDMQQuantizer, attach, register

Mixed = Callable[[str], Any]
Recordings = Callable[[str], Recording]
Tensors = dict[str, Tensor]

FILE = "diffusion_pytorch_model.safetensors"
CLASSES = {"bundled": UNet2DConditionModel, "pixel": UNet2DModel, "dit": DiTTransformer2DModel}
GOLDEN = Path(__file__).parent / "golden"


def outputs(denoiser: Any, recording: Recording) -> list[Tensor]:
    return [run(denoiser, recording.batch(call)) for call in recording.only("verify").calls]


def same_outputs(left: Any, right: Any, recording: Recording) -> bool:
    return all(map(torch.equal, outputs(left, recording), outputs(right, recording)))


def test_a_reloaded_denoiser_gives_bit_identical_outputs(
    kind: str, mixed_denoiser: Mixed, recordings: Recordings, tmp_path: Path
) -> None:
    saved = mixed_denoiser(kind)
    saved.save_pretrained(tmp_path)
    loaded = CLASSES[kind].from_pretrained(tmp_path)
    assert same_outputs(saved, loaded, recordings(kind))
    assert {n: m.scheme for n, m in quantized_layers(loaded).items()} == {
        n: m.scheme for n, m in quantized_layers(saved).items()
    }


@pytest.mark.parametrize("kind", ["pixel", "dit"], indirect=True)
def test_plain_diffusers_opens_the_whole_pipeline(
    kind: str, make: Mixed, mixed_denoiser: Mixed, recordings: Recordings, tmp_path: Path
) -> None:
    pipe = make(kind)
    name, _ = find_denoiser(pipe)
    pipe.register_modules(**{name: mixed_denoiser(kind)})
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is type(pipe)
    assert same_outputs(getattr(pipe, name), getattr(loaded, name), recordings(kind))


def test_a_second_generation_is_byte_identical(mixed_denoiser: Mixed, recordings: Recordings, tmp_path: Path) -> None:
    mixed_denoiser("pixel").save_pretrained(tmp_path / "first")
    loaded = UNet2DModel.from_pretrained(tmp_path / "first")
    outputs(loaded, recordings("pixel"))  # packs the codes
    loaded.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first" / FILE).read_bytes() == (tmp_path / "second" / FILE).read_bytes()


def test_shards_come_together_again(mixed_denoiser: Mixed, recordings: Recordings, tmp_path: Path) -> None:
    saved = mixed_denoiser("pixel")
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert same_outputs(saved, UNet2DModel.from_pretrained(tmp_path), recordings("pixel"))


def test_a_missing_shard_is_an_error(mixed_denoiser: Mixed, tmp_path: Path) -> None:
    mixed_denoiser("pixel").save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises((LDMQError, OSError), match=r"00002-of|module '.*', tensor"):
        UNet2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_another_dtype_leaves_codes_and_scales_alone(
    dtype: torch.dtype, quantized_folder: Path, recordings: Recordings
) -> None:
    saved = UNet2DConditionModel.from_pretrained(quantized_folder / "unet")
    loaded = UNet2DConditionModel.from_pretrained(quantized_folder / "unet", torch_dtype=dtype)
    assert loaded.dtype == dtype
    before = saved.state_dict()
    for name, value in loaded.state_dict().items():
        exact = name.endswith("_scale") or not before[name].is_floating_point()
        assert value.dtype == (before[name].dtype if exact else dtype)
        if exact:
            assert torch.equal(value, before[name])
    pairs = zip(outputs(saved, recordings("bundled")), outputs(loaded, recordings("bundled")), strict=True)
    assert total([Power.between(left, right) for left, right in pairs]).sqnr_db >= 35


def test_scales_are_saved_in_fp32_and_the_float_rest_in_16_bits(mixed_denoiser: Mixed, tmp_path: Path) -> None:
    mixed_denoiser("pixel").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    assert {t.dtype for n, t in tensors.items() if n.endswith("_scale")} == {torch.float32}
    rest = {t.dtype for n, t in tensors.items() if t.is_floating_point() and not n.endswith("_scale")}
    assert rest == {torch.float16}
    assert {t.dtype for t in tensors.values() if not t.is_floating_point()} == {torch.int8, torch.uint8, torch.int32}


def test_a_channels_last_denoiser_is_saved_too(mixed_denoiser: Mixed, recordings: Recordings, tmp_path: Path) -> None:
    saved = mixed_denoiser("pixel")
    for module in saved.modules():
        module._apply(lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t, recurse=False)
    saved.save_pretrained(tmp_path)
    for left, right in zip(
        outputs(saved, recordings("pixel")),
        outputs(UNet2DModel.from_pretrained(tmp_path), recordings("pixel")),
        strict=True,
    ):
        assert sqnr(left, right) >= 90


def test_a_dequantized_model_is_an_ordinary_float_one(
    mixed_denoiser: Mixed, recordings: Recordings, tmp_path: Path
) -> None:
    mixed_denoiser("pixel").save_pretrained(tmp_path / "quantized")
    model: Any = UNet2DModel.from_pretrained(tmp_path / "quantized")
    name, layer = next((n, m) for n, m in quantized_layers(model).items() if m.scheme.name == "w8a8")
    state = layer.state()
    model.dequantize()
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    loaded: Any = UNet2DModel.from_pretrained(tmp_path / "float")
    assert same_outputs(model, loaded, recordings("pixel"))
    expected = state.weight.flatten(1) * state.weight_scale[:, None]
    assert torch.equal(loaded.get_submodule(name).weight.flatten(1), expected)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_a_copy_of_a_quantized_denoiser_can_be_saved(
    how: str, mixed_denoiser: Mixed, recordings: Recordings, tmp_path: Path
) -> None:
    saved = mixed_denoiser("pixel")
    outputs(saved, recordings("pixel"))
    copied = copy.deepcopy(saved) if how == "copy" else torch.load(_pickled(saved, tmp_path), weights_only=False)
    saved.save_pretrained(tmp_path / "a")
    copied.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


def _pickled(model: Any, folder: Path) -> Path:
    torch.save(model, folder / "model.pt")
    return folder / "model.pt"


def test_two_identical_runs_give_byte_identical_folders_without_local_paths(
    make: Mixed, inputs_of: Callable[[str], list[dict[str, Any]]], tmp_path: Path
) -> None:
    from diffusers_ldmq.pipeline import quantize_pipeline, save_pipeline

    source = tmp_path / "private" / "source"
    make("pixel").save_pretrained(source)
    for name in ("one", "two"):
        pipe = DiffusionPipeline.from_pretrained(source)
        pipe.set_progress_bar_config(disable=True)
        save_pipeline(pipe, tmp_path / name, outcome=quantize_pipeline(pipe, inputs_of("pixel")))
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert {"plan.json", "profile.json", "report.json", "model_index.json"} <= {str(f) for f in files}
    assert Path("unet") / FILE in files
    for file in files:
        content = (tmp_path / "one" / file).read_bytes()
        assert content == (tmp_path / "two" / file).read_bytes(), file
        if file.suffix == ".json":
            assert str(tmp_path).encode() not in content, file
            assert b"private" not in content, file


def test_the_golden_checkpoint_still_gives_its_output() -> None:
    expected = load_file(GOLDEN / "v1" / "expected.safetensors")
    denoiser = UNet2DModel.from_pretrained(GOLDEN / "v1")
    layers = quantized_layers(denoiser)
    held = {layer.scheme.name for layer in layers.values()}
    assert held == {"w8a16", "w8a8", "w8a8-dyn", "w4a16", "w4a8", "w4a4", "w4a16-g8"}
    for layer in layers.values():
        layer.use_backend("reference")
    with torch.no_grad():
        output = denoiser(expected["sample"], expected["timestep"]).sample
    assert sqnr(expected["output"], output) >= 90
    assert sum(f.stat().st_size for f in (GOLDEN / "v1").iterdir()) < 100_000


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved denoiser with every scheme; tests edit copies of it."""
    return GOLDEN / "v1"


def key_of(folder: Path, scheme: str, tensor: str) -> str:
    """The key of a tensor in the first layer of a scheme."""
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    return next(f"{name}.{tensor}" for name, entry in layers.items() if entry["scheme"] == scheme)


def refused(folder: Path, key: str, match: str) -> None:
    """Loading fails, naming the tensor's module and key, and says why."""
    module, _, tensor = key.rpartition(".")
    with pytest.raises(CheckpointError, match=match) as caught:
        UNet2DModel.from_pretrained(folder)
    assert f"module {module!r}, tensor {tensor!r}" in str(caught.value)


def edited(intact: Path, target: Path, edit: Callable[[Tensors], object]) -> Path:
    """A copy of the checkpoint whose tensors went through `edit`."""
    folder = target / "edited"
    shutil.copytree(intact, folder)
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def with_value(value: float) -> Callable[[Tensor], Tensor]:
    """The tensor with its first element replaced."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return change


SHAPE = r"shape \[[\d, ]*\], expected \[[\d, ]*\]"
DAMAGES: list[tuple[str, str, Callable[[Tensor], Tensor], str]] = [
    ("w8a8", "weight", lambda t: t[:-1].clone(), SHAPE),
    ("w8a8", "weight", lambda t: t.half(), "dtype torch.float16, expected torch.int8"),
    ("w8a8", "weight", lambda t: t.to(torch.int32), "dtype torch.int32, expected torch.int8"),
    ("w8a8", "weight", with_value(-128), "holds the code -128"),
    ("w8a8", "weight_scale", lambda t: t[:1].clone(), SHAPE),
    ("w8a8", "weight_scale", lambda t: t[:, None].clone(), SHAPE),
    ("w8a8", "weight_scale", lambda t: t.half(), "dtype torch.float16, expected torch.float32"),
    ("w8a8", "weight_scale", with_value(torch.nan), "NaN or Inf"),
    ("w8a8", "weight_scale", with_value(torch.inf), "NaN or Inf"),
    ("w8a8", "weight_scale", with_value(0.0), "zero or negative"),
    ("w8a8", "weight_scale", with_value(-1.0), "zero or negative"),
    ("w8a8", "input_scale", with_value(0.0), "zero or negative"),
    ("w8a8", "input_scale", with_value(torch.nan), "NaN or Inf"),
    ("w8a8", "input_scale", lambda t: t.reshape(1), SHAPE),
    ("w8a8", "input_zero_point", lambda t: t.to(torch.int8), "dtype torch.int8, expected torch.int32"),
    ("w8a8", "input_zero_point", with_value(300), "zero point"),
    ("w8a8", "input_zero_point", with_value(-129), "zero point"),
    ("w8a8", "bias", with_value(torch.nan), "NaN or Inf"),
    ("w8a8", "bias", lambda t: t.to(torch.int8), "dtype torch.int8, expected a floating one"),
    ("w4a8", "weight", lambda t: t[:, :-1].clone(), SHAPE),
    ("w4a8", "weight", lambda t: t.to(torch.int8), "dtype torch.int8, expected torch.uint8"),
    ("w4a16-g8", "weight_scale", lambda t: t[:, :-1].clone(), SHAPE),
    ("w4a16", "weight", lambda t: t.repeat_interleave(2, 1), SHAPE),
]


@pytest.mark.parametrize(
    ("scheme", "tensor", "change", "match"),
    DAMAGES,
    ids=[f"{scheme}-{tensor}-{index}" for index, (scheme, tensor, *_) in enumerate(DAMAGES)],
)
def test_a_damaged_tensor_is_named(
    scheme: str, tensor: str, change: Callable[[Tensor], Tensor], match: str, intact: Path, tmp_path: Path
) -> None:
    key = key_of(intact, scheme, tensor)
    folder = edited(intact, tmp_path, lambda tensors: tensors.update({key: change(tensors[key])}))
    refused(folder, key, match)


@pytest.mark.parametrize(
    ("scheme", "tensor"),
    [("w8a8", t) for t in ("weight", "weight_scale", "input_scale", "input_zero_point", "bias")]
    + [("w4a4", "weight"), ("w8a16", "weight_scale")],
)
def test_a_missing_tensor_is_named(scheme: str, tensor: str, intact: Path, tmp_path: Path) -> None:
    key = key_of(intact, scheme, tensor)
    refused(edited(intact, tmp_path, lambda tensors: tensors.pop(key)), key, "the file lacks this tensor")


def test_a_missing_tensor_of_the_float_rest_is_named(intact: Path, tmp_path: Path) -> None:
    key = "conv_norm_out.weight"
    refused(edited(intact, tmp_path, lambda tensors: tensors.pop(key)), key, "the file lacks this tensor")


def test_a_float_tensor_with_nan_is_named(intact: Path, tmp_path: Path) -> None:
    key = "conv_norm_out.weight"
    change = with_value(torch.nan)
    refused(edited(intact, tmp_path, lambda t: t.update({key: change(t[key])})), key, "NaN or Inf")


@pytest.mark.parametrize("tensor", ["pre_quant_scale", "surprise", "input_scale"])
def test_an_extra_tensor_is_named(tensor: str, intact: Path, tmp_path: Path) -> None:
    key = key_of(intact, "w8a16", tensor)
    folder = edited(intact, tmp_path, lambda tensors: tensors.update({key: torch.ones(())}))
    refused(folder, key, "which its quantization_config does not name")


def test_a_padding_nibble_must_be_8(mixed_denoiser: Mixed, tmp_path: Path) -> None:
    denoiser = UNet2DModel(
        in_channels=3,  # conv_in sums over 27 inputs: an odd number
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
    )
    from diffusers_ldmq import make_plan
    from diffusers_ldmq.families import layer_table

    plan = make_plan(layer_table(denoiser), planner="uniform", scheme="w4a16")
    quantize(denoiser, calibrate(denoiser, plan, None))
    attach(denoiser)
    denoiser.save_pretrained(tmp_path / "whole")
    UNet2DModel.from_pretrained(tmp_path / "whole")

    def change(tensors: Tensors) -> None:
        tensors["conv_in.weight"][0, -1] ^= 0x10

    refused(edited(tmp_path / "whole", tmp_path, change), "conv_in.weight", "a padding nibble is not 8")


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"<!doctype html>", b"\x80\x02}q\x00.", b""],
    ids=["lfs", "html", "pickle", "empty"],
)
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes, intact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(intact, folder)
    (folder / FILE).write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        UNet2DModel.from_pretrained(folder)


def test_a_truncated_file_is_refused(intact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(intact, folder)
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises((OSError, ValueError)):
        UNet2DModel.from_pretrained(folder)


def config_edited(intact: Path, target: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the checkpoint whose quantization_config went through `edit`."""
    folder = target / "edited"
    shutil.copytree(intact, folder)
    path = folder / "config.json"
    data = json.loads(path.read_text())
    edit(data["quantization_config"])
    path.write_text(json.dumps(data))
    return folder


def first_layer(config: dict[str, Any], scheme: str = "w8a8") -> dict[str, Any]:
    return next(entry for entry in config["layers"].values() if entry["scheme"] == scheme)


CONFIG_DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda c: c.update(format_version=2), r"format_version 2.*pip install -U diffusers-ldmq"),
    "negative": (lambda c: c.update(format_version=-1), "format_version is -1, expected 1"),
    "string": (lambda c: c.update(format_version="1"), "format_version is '1', expected 1"),
    "bool": (lambda c: c.update(format_version=True), "format_version is True, expected 1"),
    "unknown key": (lambda c: c.update(surprise=1), r"unknown keys \['surprise'\]"),
    "no layers": (lambda c: c.update(layers={}), "names no layers"),
    "layers list": (lambda c: c.update(layers=[1]), "'layers' is a list, expected an object"),
    "entry string": (lambda c: c["layers"].update(conv_in="w8a8"), "layer 'conv_in': expected scheme and tensors"),
    "entry key": (lambda c: first_layer(c).update(bits=8), "expected scheme and tensors"),
    "tensors string": (lambda c: first_layer(c).update(tensors="weight"), "expected scheme and tensors"),
    "tensors numbers": (lambda c: first_layer(c).update(tensors=[1, ["weight"]]), "expected scheme and tensors"),
    "unknown scheme": (lambda c: first_layer(c).update(scheme="w3a8"), "unknown scheme 'w3a8'"),
    "number scheme": (lambda c: first_layer(c).update(scheme=8), "unknown scheme 8"),
    "float scheme": (lambda c: first_layer(c).update(scheme="float"), "layer '.*': .*float"),
    "scheme and tensors differ": (lambda c: first_layer(c).update(scheme="w8a16"), "a w8a16 layer has tensors"),
    "tensor not named": (lambda c: first_layer(c)["tensors"].remove("weight_scale"), "always .*weight_scale"),
    "bias not named": (lambda c: first_layer(c)["tensors"].remove("bias"), "'bias': the checkpoint holds this tensor"),
    "unknown tensor": (lambda c: first_layer(c)["tensors"].append("surprise"), "surprise"),
    "absent layer": (
        lambda c: c["layers"].update(absent={"scheme": "w8a8", "tensors": []}),
        "names layer 'absent', which UNet2DModel lacks",
    ),
    "a norm": (
        lambda c: c["layers"].update(conv_norm_out={"scheme": "w8a8", "tensors": []}),
        "names layer 'conv_norm_out', which UNet2DModel lacks",
    ),
    "layer left out": (lambda c: c["layers"].pop(next(iter(c["layers"]))), "holds this tensor|dtype"),
    "compute dtype": (lambda c: c.update(compute_dtype="load"), "compute_dtype"),
    "compute dtype number": (lambda c: c.update(compute_dtype=32), "compute_dtype"),
}


@pytest.mark.parametrize("damage", list(CONFIG_DAMAGES))
def test_a_damaged_config_is_refused(damage: str, intact: Path, tmp_path: Path) -> None:
    edit, match = CONFIG_DAMAGES[damage]
    with pytest.raises(CheckpointError, match=match):
        UNet2DModel.from_pretrained(config_edited(intact, tmp_path, edit))


def test_quantized_weights_without_their_config_do_not_load_in_silence(intact: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(intact, folder)
    data = json.loads((folder / "config.json").read_text())
    del data["quantization_config"]
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="shape"):
        UNet2DModel.from_pretrained(folder)


def test_a_data_free_config_without_layers_says_what_to_run(make: Mixed, tmp_path: Path) -> None:
    make("pixel").unet.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"names no layers.*`ldmq quantize`"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=LDMQConfig())


def test_a_config_of_another_library_is_refused() -> None:
    with pytest.raises(CheckpointError, match="quant_method is 'gguf', expected 'ldmq'"):
        LDMQConfig(quant_method="gguf")


def test_a_config_survives_its_own_dictionary(intact: Path) -> None:
    data = json.loads((intact / "config.json").read_text())["quantization_config"]
    assert LDMQConfig(**data).to_dict() == data
    assert json.loads(repr(LDMQConfig(**data)).partition(" ")[2]) == data


def test_models_share_no_config_with_each_other_nor_with_the_caller(intact: Path) -> None:
    data = json.loads((intact / "config.json").read_text())["quantization_config"]
    config = LDMQConfig(**copy.deepcopy(data))
    quantizers = [LDMQQuantizer(config), LDMQQuantizer(config)]
    models = [UNet2DModel.from_pretrained(intact) for _ in range(2)]
    configs = [config, *(q.config for q in quantizers), *(m.config["quantization_config"] for m in models)]
    for own in configs:
        assert own.to_dict() == data  # not changed through those before it
        first_layer({"layers": own.layers})["tensors"].clear()
        own.layers.popitem()
        own.compute_dtype = "float64"


def test_saving_with_a_lora_attached_is_refused(mixed_denoiser: Mixed, tmp_path: Path) -> None:
    denoiser = mixed_denoiser("pixel")
    wrapper = torch.nn.Module()
    wrapper.base_layer = denoiser.conv_in
    denoiser.conv_in = wrapper
    with pytest.raises(CheckpointError, match=r"module 'conv_in.base_layer'.*unload_lora_weights\(\) first"):
        denoiser.save_pretrained(tmp_path)


def test_saving_as_pickle_is_refused(mixed_denoiser: Mixed, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="saved as safetensors only"):
        mixed_denoiser("pixel").save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.glob("*.bin"))


def test_registering_again_is_harmless_and_a_taken_name_is_refused() -> None:
    ours = AUTO_QUANTIZER_MAPPING["ldmq"]
    register()
    assert AUTO_QUANTIZER_MAPPING["ldmq"] is ours
    AUTO_QUANTIZER_MAPPING["ldmq"] = object
    try:
        with pytest.raises(LDMQError, match="another package has registered a quantizer 'ldmq'"):
            register()
    finally:
        AUTO_QUANTIZER_MAPPING["ldmq"] = ours


def test_without_the_package_diffusers_refuses_rather_than_loading_nonsense(intact: Path) -> None:
    code = f"from diffusers import UNet2DModel; UNet2DModel.from_pretrained({str(intact)!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert re.search("Unknown quantization type, got ldmq", done.stderr)
