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
from damaged_files import FILE, INTACT, first_layer
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from safetensors.torch import load_file
from torch import Tensor

from diffusers_ldmq import LDMQConfig, Recording
from diffusers_ldmq.calls import run
from diffusers_ldmq.errors import CheckpointError, LDMQError
from diffusers_ldmq.families import find_denoiser
from diffusers_ldmq.layers import QuantizedLayer, quantized_layers
from diffusers_ldmq.metrics import Power, sqnr, total
from diffusers_ldmq.plugin import LDMQQuantizer, register

Mixed = Callable[[str], Any]
Recordings = Callable[[str], Recording]
Tensors = dict[str, Tensor]

CLASSES = {"bundled": UNet2DConditionModel, "pixel": UNet2DModel, "dit": DiTTransformer2DModel}


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
    expected = load_file(INTACT / "expected.safetensors")
    denoiser = UNet2DModel.from_pretrained(INTACT)
    layers = quantized_layers(denoiser)
    held = {layer.scheme.name for layer in layers.values()}
    assert held == {"w8a16", "w8a8", "w8a8-dyn", "w4a16", "w4a8", "w4a4", "w4a16-g8"}
    for layer in layers.values():
        layer.use_backend("reference")
    with torch.no_grad():
        output = denoiser(expected["sample"], expected["timestep"]).sample
    assert sqnr(expected["output"], output) >= 90
    assert sum(f.stat().st_size for f in (INTACT).iterdir()) < 100_000


def test_quantized_weights_without_their_config_do_not_load_in_silence(tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(INTACT, folder)
    data = json.loads((folder / "config.json").read_text())
    del data["quantization_config"]
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="shape"):
        UNet2DModel.from_pretrained(folder)


def test_models_share_no_config_with_each_other_nor_with_the_caller() -> None:
    data = json.loads((INTACT / "config.json").read_text())["quantization_config"]
    config = LDMQConfig(**copy.deepcopy(data))
    quantizers = [LDMQQuantizer(config), LDMQQuantizer(config)]
    models = [UNet2DModel.from_pretrained(INTACT) for _ in range(2)]
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


def test_without_the_package_diffusers_refuses_rather_than_loading_nonsense() -> None:
    code = f"from diffusers import UNet2DModel; UNet2DModel.from_pretrained({str(INTACT)!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert re.search("Unknown quantization type, got ldmq", done.stderr)
