"""LoRA on whole quantized models, as users of diffusers' pipelines know it: load, mix, switch, fuse, unload, save."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from tiny_pipelines import MAKERS, picture
from torch import Tensor, nn

from diffusers_ldmq import calibrate, make_plan, quantize
from diffusers_ldmq.errors import CheckpointError, LDMQError
from diffusers_ldmq.families import find_denoiser, layer_table
from diffusers_ldmq.layers import QuantConv2d, QuantLinear, quantized_layers
from diffusers_ldmq.lora import adapter_layers, fuse_lora
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.plugin import attach
from diffusers_ldmq.quantization import replace_layer

pytestmark = pytest.mark.filterwarnings("ignore:Already f::peft")  # peft's hint that there are other adapters
TARGETS = ["to_q", "to_out.0", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj", "proj_in"]
"""Linear and Conv2d, 3x3 and 1x1; in `mixed_denoiser` their layers have every scheme, float too."""


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """What the fixtures below made, once."""
    return {}


@pytest.fixture
def pipe(made: dict[str, Any], make: Callable[[str], Any], mixed_denoiser: Callable[[str], Any]) -> Any:
    """The bundled pipeline with a U-Net of every scheme in turn."""
    if "unet" not in made:
        made["unet"] = mixed_denoiser("bundled")
    pipe = make("bundled")
    pipe.unet = copy.deepcopy(made["unet"])
    return pipe


@pytest.fixture
def float_pipe(make: Callable[[str], Any]) -> Any:
    return make("bundled")


def add_random(unet: Any, name: str, seed: int, targets: list[str] | str = TARGETS, **options: Any) -> None:
    """A seeded adapter of rank 4 that changes the output much."""
    unet.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, **options), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, value in unet.named_parameters():
        if ".lora_" in key and f".{name}." in key:
            value.data.copy_(torch.randn(value.shape, generator=generator) * 0.1)


@pytest.fixture
def files(make: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory, made: dict[str, Any]) -> Path:
    """A folder with two adapters in diffusers' format and the first in kohya's."""
    if "files" not in made:
        folder = made["files"] = tmp_path_factory.mktemp("adapters")
        for seed, name in enumerate(("a", "b")):
            pipe = make("bundled")
            add_random(pipe.unet, name, seed)
            layers = peft.get_peft_model_state_dict(pipe.unet, adapter_name=name)
            pipe.save_lora_weights(folder, unet_lora_layers=layers, weight_name=f"{name}.safetensors")
        save_file(kohya(load_file(folder / "a.safetensors")), folder / "kohya.safetensors")
    return made["files"]


def kohya(layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter as kohya's trainer writes it, its strength in the alpha keys instead of in the numbers."""
    found: dict[str, Tensor] = {}
    for key, value in layers.items():
        name, part = key.removeprefix("unet.").split(".lora_")
        flat = "lora_unet_" + name.replace(".", "_")
        found[f"{flat}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = value * (2 if part[0] == "B" else 1)
        found[f"{flat}.alpha"] = torch.tensor(2.0)  # of rank 4: half of what the numbers say
    return found


def output(unet: Any) -> Tensor:
    """Its answer to a fixed input."""
    generator = torch.Generator().manual_seed(5)
    x, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 24, 128, generator=generator)
    with torch.no_grad():
        return unet(x, torch.tensor([500, 20]), text).sample


def tensors(unet: Any) -> dict[str, Tensor]:
    """Every tensor of the model itself, under its name without adapters."""
    state = unet.state_dict()
    return {key.replace(".base_layer", ""): value.clone() for key, value in state.items() if ".lora_" not in key}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


@pytest.mark.parametrize("file", ["a.safetensors", "kohya.safetensors"])
def test_a_file_loads_into_linear_and_conv_layers_and_unloading_restores_every_bit(
    pipe: Any, float_pipe: Any, files: Path, file: str
) -> None:
    """Traps G19 and G20."""
    plain, before = output(pipe.unet), tensors(pipe.unet)
    float_plain = output(float_pipe.unet)
    pipe.load_lora_weights(files, weight_name=file)
    float_pipe.load_lora_weights(files, weight_name=file)
    wrapped = {type(layer.base_layer) for layer in adapter_layers(pipe.unet).values()}
    assert wrapped >= {QuantLinear, QuantConv2d}
    assert len(adapter_layers(pipe.unet)) == len(adapter_layers(float_pipe.unet)) > 60
    attached, truth = output(pipe.unet), output(float_pipe.unet)
    assert sqnr(plain, attached) < 15
    # the adapter costs nothing: as far from its float model as without
    assert sqnr(truth, attached) > sqnr(float_plain, plain) - 3
    pipe.unload_lora_weights()
    assert same(tensors(pipe.unet), before)
    assert torch.equal(output(pipe.unet), plain)


def test_both_formats_are_the_same_adapter(pipe: Any, files: Path) -> None:
    pipe.load_lora_weights(files, weight_name="a.safetensors")
    one = output(pipe.unet)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(files, weight_name="kohya.safetensors")
    assert sqnr(one, output(pipe.unet)) > 60


def test_g19_a_conv_adapter_is_built_of_float_layers_of_our_class(pipe: Any) -> None:
    """Trap G19: peft builds it with type(base_layer)(...), also around packed 4-bit codes of two dimensions."""
    add_random(pipe.unet, "a", 0, ["conv1"])
    convs = [layer for layer in adapter_layers(pipe.unet).values() if layer.base_layer.weight.dim() == 2]
    assert convs  # 4-bit ones
    for layer in convs:
        assert type(layer.lora_A["a"]) is QuantConv2d
        assert layer.lora_A["a"].scheme.is_float
        assert layer.lora_A["a"].weight.dtype == torch.float32
        assert "dim" not in vars(layer.base_layer.weight)
    names = [name for name in quantized_layers(pipe.unet) if ".lora_" in name]
    assert not names


def test_g20_adapters_stay_float32_and_unloading_is_exact(pipe: Any) -> None:
    """Trap G20, on one Linear layer by itself."""
    before = tensors(pipe.unet)
    add_random(pipe.unet, "a", 0, ["to_q"])
    assert {v.dtype for k, v in pipe.unet.named_parameters() if ".lora_" in k} == {torch.float32}
    pipe.unet.unload_lora()
    assert same(tensors(pipe.unet), before)


def test_g21_fuse_lora_works_on_integers_and_unfusing_restores_every_bit(pipe: Any, files: Path) -> None:
    """Trap G21: everybody else tries to add floats to integers. Through the pipeline, which unmerges by itself."""
    before = tensors(pipe.unet)
    pipe.load_lora_weights(files, weight_name="a.safetensors", adapter_name="a")
    attached = output(pipe.unet)
    pipe.fuse_lora(components=["unet"], lora_scale=0.7)
    fused = output(pipe.unet)
    assert pipe.num_fused_loras == 1
    assert not torch.equal(fused, attached)
    pipe.unfuse_lora(components=["unet"])
    assert pipe.num_fused_loras == 0
    assert same(tensors(pipe.unet), before)
    assert torch.equal(output(pipe.unet), attached)  # at full strength again, although fused at 0.7


def test_g22_saving_with_an_adapter_attached_is_refused_and_saving_it_fused_is_exact(
    pipe: Any, files: Path, tmp_path: Path
) -> None:
    """Trap G22: a file of base_layer keys that nobody can load."""
    pipe.load_lora_weights(files, weight_name="a.safetensors")
    pipe.fuse_lora(components=["unet"])
    with pytest.raises(CheckpointError, match=r"a LoRA is attached.*unload_lora_weights\(\) first"):
        pipe.unet.save_pretrained(tmp_path / "refused")
    pipe.unload_lora_weights()
    fused, held = output(pipe.unet), tensors(pipe.unet)
    pipe.unet.save_pretrained(tmp_path / "fused")
    loaded: Any = UNet2DConditionModel.from_pretrained(tmp_path / "fused")
    assert same(tensors(loaded), held)
    assert torch.equal(output(loaded), fused)
    entries = json.loads((tmp_path / "fused" / "config.json").read_text())["quantization_config"]["layers"]
    ranks = {name: layer.rank for name, layer in quantized_layers(pipe.unet).items() if layer.rank}
    assert ranks == {name: entry["rank"] for name, entry in entries.items() if "rank" in entry}
    assert set(ranks.values()) == {4}


def test_what_is_fused_and_unloaded_stays_and_another_adapter_can_be_fused_into_it(pipe: Any, files: Path) -> None:
    pipe.load_lora_weights(files, weight_name="a.safetensors")
    pipe.fuse_lora(components=["unet"])
    fused = output(pipe.unet)
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe.unet), fused)
    before = tensors(pipe.unet)
    pipe.load_lora_weights(files, weight_name="b.safetensors")
    pipe.fuse_lora(components=["unet"])
    assert not torch.equal(output(pipe.unet), fused)
    pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    assert same(tensors(pipe.unet), before)


def test_several_adapters_with_weights_are_mixed_switched_off_and_deleted(
    pipe: Any, float_pipe: Any, files: Path
) -> None:
    plain = output(pipe.unet)
    noise = sqnr(output(float_pipe.unet), plain)
    for each in (pipe, float_pipe):
        each.load_lora_weights(files, weight_name="a.safetensors", adapter_name="a")
        each.load_lora_weights(files, weight_name="b.safetensors", adapter_name="b")
    seen = []
    for weights in ([1.0, 0.0], [0.0, 1.0], [0.6, -0.4]):
        for each in (pipe, float_pipe):
            each.set_adapters(["a", "b"], weights)
        assert sqnr(output(float_pipe.unet), output(pipe.unet)) > noise - 4
        seen.append(output(pipe.unet))
    assert sqnr(seen[0], seen[1]) < 15
    pipe.disable_lora()
    assert torch.equal(output(pipe.unet), plain)
    pipe.enable_lora()
    assert torch.equal(output(pipe.unet), seen[2])
    pipe.delete_adapters("b")
    pipe.set_adapters("a", 1.0)
    assert torch.equal(output(pipe.unet), seen[0])
    pipe.delete_adapters("a")
    assert torch.equal(output(pipe.unet), plain)


def test_an_adapter_is_swapped_for_another_in_place_and_fused_afterwards(pipe: Any, files: Path) -> None:
    pipe.load_lora_weights(files, weight_name="b.safetensors")
    expected = output(pipe.unet)
    pipe.unload_lora_weights()
    before = tensors(pipe.unet)
    pipe.unet.enable_lora_hotswap(target_rank=8)  # its scales become tensors, its ranks are padded
    pipe.load_lora_weights(files, weight_name="a.safetensors", adapter_name="x")
    pipe.load_lora_weights(files, weight_name="b.safetensors", adapter_name="x", hotswap=True)
    swapped = output(pipe.unet)
    assert sqnr(expected, swapped) > 60
    pipe.fuse_lora(components=["unet"], lora_scale=0.5)
    pipe.unfuse_lora(components=["unet"])
    assert torch.equal(output(pipe.unet), swapped)
    assert same(tensors(pipe.unet), before)


def test_adapter_names_choose_what_is_fused(pipe: Any, files: Path) -> None:
    pipe.load_lora_weights(files, weight_name="a.safetensors", adapter_name="a")
    pipe.load_lora_weights(files, weight_name="b.safetensors", adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.8, 0.5])
    before = tensors(pipe.unet)
    pipe.fuse_lora(components=["unet"], adapter_names=["b"])
    assert pipe.fused_loras == {"b"}
    pipe.fuse_lora(components=["unet"], adapter_names=["a"])
    assert pipe.fused_loras == {"a", "b"}
    one_by_one = tensors(pipe.unet)
    pipe.unet.unfuse_lora()  # the model's own does the same as the pipeline's
    assert same(tensors(pipe.unet), before)
    pipe.fuse_lora(components=["unet"], adapter_names=["b", "a"])
    assert same(tensors(pipe.unet), one_by_one)


def test_fusing_every_layer_or_none(pipe: Any, files: Path) -> None:
    """A layer that cannot be fused leaves the others as they were: here the last, after an earlier fuse."""
    pipe.load_lora_weights(files, weight_name="a.safetensors", adapter_name="a")
    pipe.load_lora_weights(files, weight_name="b.safetensors", adapter_name="b")
    pipe.fuse_lora(components=["unet"], adapter_names=["a"])
    before = tensors(pipe.unet)
    name = list(adapter_layers(pipe.unet))[-1]
    layer: Any = pipe.unet.get_submodule(name)
    good = layer.lora_A["b"].weight.data.clone()
    layer.lora_A["b"].weight.data[0, 0] = float("nan")
    with pytest.raises(LDMQError, match=rf"fuse_lora, layer '{name}': .*NaN.*\(nothing was fused\)"):
        pipe.fuse_lora(components=["unet"], adapter_names=["b"], safe_fusing=True)
    assert same(tensors(pipe.unet), before)
    assert {tuple(each.merged_adapters) for each in adapter_layers(pipe.unet).values()} == {("a",)}
    layer.lora_A["b"].weight.data.copy_(good)
    pipe.unet.unfuse_lora()
    pipe.fuse_lora(components=["unet"])


def test_a_pipeline_with_a_fused_adapter_draws_the_picture_that_the_attached_one_draws(pipe: Any, files: Path) -> None:
    def latents() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return pipe("red apple", num_inference_steps=2, generator=generator, output_type="latent").images

    plain = latents()
    pipe.load_lora_weights(files, weight_name="a.safetensors")
    attached = latents()
    pipe.fuse_lora(components=["unet"])
    assert sqnr(attached, latents()) > sqnr(attached, plain) + 6


def test_dequantizing_a_fused_model_gives_fused_float_weights(pipe: Any, files: Path) -> None:
    pipe.load_lora_weights(files, weight_name="a.safetensors")
    pipe.fuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    names = list(quantized_layers(pipe.unet))
    expected: dict[str, Any] = {name: layer.dequantize() for name, layer in quantized_layers(pipe.unet).items()}
    pipe.unet.dequantize()
    assert not quantized_layers(pipe.unet)
    for name in names:
        layer: Any = pipe.unet.get_submodule(name)
        assert torch.equal(layer.weight, expected[name].weight)


def test_a_copy_of_a_model_with_a_fused_adapter_is_a_model_of_its_own(pipe: Any, files: Path) -> None:
    before = tensors(pipe.unet)
    pipe.load_lora_weights(files, weight_name="a.safetensors")
    pipe.fuse_lora(components=["unet"])
    fused = tensors(pipe.unet)
    twin = copy.deepcopy(pipe.unet)
    twin.unfuse_lora()
    assert same(tensors(twin), before)
    assert same(tensors(pipe.unet), fused)


def test_a_fused_model_in_another_process_unfuses_too(mixed_denoiser: Callable[[str], Any], tmp_path: Path) -> None:
    """Unfusing needs nothing but what the adapter layers hold; the wrapped layers alone survive a pickle."""
    import pickle

    unet = mixed_denoiser("bundled")
    add_random(unet, "a", 0, ["conv1"])
    before = tensors(unet)
    unet.fuse_lora()
    layers = pickle.loads(pickle.dumps(dict(adapter_layers(unet))))  # noqa: S301
    for name, layer in layers.items():
        layer.unmerge()
        replace_layer(unet, name, layer)
    assert same(tensors(unet), before)


def test_dora_is_refused_in_words_and_leaves_no_adapter_behind(pipe: Any, files: Path, tmp_path: Path) -> None:
    words = r"layer '.*' is quantized, and DoRA needs its float weight.*fuse it there with fuse_lora\(\)"
    with pytest.raises(LDMQError, match=words):
        pipe.unet.add_adapter(peft.LoraConfig(r=4, target_modules=["conv1"], use_dora=True))
    layers = load_file(files / "a.safetensors")
    up = next(key for key in layers if "ff.net.2.lora_B" in key and f"{key[5:].split('.lora_')[0]}" in quantized(pipe))
    magnitude = torch.ones(layers[up].shape[0])
    layers[up.replace("lora_B.weight", "lora_magnitude_vector")] = magnitude
    with pytest.raises(LDMQError, match=words):
        pipe.load_lora_weights(layers)
    assert not adapter_layers(pipe.unet)


def quantized(pipe: Any) -> set[str]:
    return set(quantized_layers(pipe.unet))


def quantized_in_place(model: Any, scheme: str) -> Any:
    """The model with every layer in that data-free scheme."""
    quantize(model, calibrate(model, make_plan(layer_table(model), planner="uniform", scheme=scheme), None))
    attach(model)
    return model


FAMILIES = {"flux": ["to_q", "proj_out", "ff.net.2"], "sd3": ["to_k", "ff.net.2"], "sdxl": ["to_q", "conv1", "proj_in"]}
"""Name of a tiny pipeline -> what its adapters are put on."""


@pytest.mark.parametrize("scheme", ["w8a8-dyn", "w4a16"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_pipelines_of_other_families_load_fuse_save_and_unload_adapters(
    family: str, scheme: str, tmp_path: Path
) -> None:
    source = MAKERS[family]()
    component, unit = find_denoiser(source)
    add_random(unit, "a", 0, FAMILIES[family])
    layers = {f"{component}_lora_layers": peft.get_peft_model_state_dict(unit, adapter_name="a")}
    source.save_lora_weights(tmp_path, **layers)
    pipe = MAKERS[family]()
    model = quantized_in_place(getattr(pipe, component), scheme)
    before, plain = tensors(model), picture(pipe, family)
    pipe.load_lora_weights(tmp_path)
    assert len(adapter_layers(model)) == len(adapter_layers(unit)) > 2
    attached = picture(pipe, family)
    pipe.fuse_lora(components=[component])
    fused = picture(pipe, family)
    assert sqnr(attached, fused) > sqnr(attached, plain) + 3
    pipe.unfuse_lora(components=[component])
    assert same(tensors(model), before)
    assert torch.equal(picture(pipe, family), attached)
    pipe.fuse_lora(components=[component])
    pipe.unload_lora_weights()
    assert torch.equal(picture(pipe, family), fused)
    model.save_pretrained(tmp_path / "fused")
    kind: Any = type(unit)
    loaded = kind.from_pretrained(tmp_path / "fused")
    assert same(tensors(loaded), tensors(model))


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_a_model_in_bfloat16_is_fused_in_bfloat16_and_comes_back_bit_identically(scheme: str, tmp_path: Path) -> None:
    """Adapters stay fp32; branches get the model's dtype, also in layers that have no bias."""
    unit: Any = MAKERS["sdxl"]().unet
    plan = make_plan(layer_table(unit), planner="uniform", scheme=scheme)
    quantize(unit, calibrate(unit, plan, None), dtype=torch.bfloat16)
    attach(unit)
    before = tensors(unit)
    add_random(unit, "a", 0, ["to_q", "conv1"])
    unit.fuse_lora()
    branches = {value.dtype for key, value in unit.state_dict().items() if key.endswith(("low_rank_a", "low_rank_b"))}
    assert branches == (set() if scheme == "w8a16" else {torch.bfloat16})
    unit.unfuse_lora()
    assert same(tensors(unit), before)
    unit.fuse_lora()
    unit.unload_lora()
    unit.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert same(tensors(loaded), tensors(unit))


def tiny_quantized(scheme: str) -> Any:
    """A tiny Flux transformer with every layer in that scheme."""
    return quantized_in_place(MAKERS["flux"]().transformer, scheme)


def flux_output(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 4, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
    }
    still = {"timestep": torch.tensor([0.5]), "guidance": torch.tensor([3.0])}
    with torch.no_grad():
        return model(**inputs, **still, img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(4, 3)).sample


@pytest.mark.parametrize("config", [peft.LoKrConfig, peft.LoHaConfig])
def test_adapters_of_other_kinds_fuse_at_8_bits_and_are_refused_below(config: Any) -> None:
    model = tiny_quantized("w8a16")
    before = tensors(model)
    model.add_adapter(config(r=4, alpha=4, target_modules=["to_q", "proj_out"], init_weights=False))
    attached = flux_output(model)
    model.fuse_lora()
    assert sqnr(attached, flux_output(model)) > 30
    model.unfuse_lora()
    assert same({k: v for k, v in tensors(model).items() if "hada_" not in k and "lokr_" not in k}, before)
    model = tiny_quantized("w4a16")
    with pytest.raises(LDMQError, match=r"layer '.*' is w4a16, and lo(ha|kr) adapters need 8-bit weights"):
        model.add_adapter(config(r=4, alpha=4, target_modules=["to_q"], init_weights=False))


def test_adapters_of_two_kinds_are_not_fused_at_once() -> None:
    model = tiny_quantized("w8a16")
    before = tensors(model)
    add_random(model, "a", 0, ["to_q"])
    model.add_adapter(peft.LoKrConfig(r=4, target_modules=["to_q"], init_weights=False), adapter_name="b")
    with pytest.raises(LDMQError, match=r"it carries adapters of two kinds; fuse the first and unload it"):
        model.fuse_lora()
    held = {key.replace(".base_layer", ""): value for key, value in tensors(model).items() if "lokr_" not in key}
    assert same(held, before)


def test_a_grouped_convolution_is_refused_as_in_floating_point() -> None:
    layer = nn.Conv2d(8, 8, 3, groups=2)
    from diffusers_ldmq.calibration import layer_state
    from diffusers_ldmq.layers import quantize_layer
    from diffusers_ldmq.specs import parse_scheme

    model: Any = nn.Module()
    model.conv = quantize_layer(layer, layer_state("conv", layer, parse_scheme("w8a16"), None))
    with pytest.warns(UserWarning, match="groups > 1"):
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["conv"]), model)
    assert isinstance(model.conv, BaseTunerLayer)
    with pytest.raises(LDMQError, match=r"layer 'conv': Merging is not supported.*groups > 1.*\(nothing was fused\)"):
        fuse_lora(model)
