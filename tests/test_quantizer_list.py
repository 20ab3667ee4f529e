"""What diffusers asks of every quantization backend (the list of its own per-backend tests), on five classes of
denoisers with every data-free scheme. None is skipped for want of an accelerator."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import apply_group_offloading
from peft.tuners.tuners_utils import BaseTunerLayer
from quantized_models import KINDS, SCHEMES, model
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusers_ldmq import LDMQConfig, LDMQError, calibrate, make_plan, quantize
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.layers import QuantizedLayer, quantized_layers
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.specs import parse_scheme

COUNTS = {"sd": (71, 83), "ddim": (39, 51), "dit": (12, 21), "sd3": (21, 33), "flux": (22, 36)}
"""Quantized layers when nothing is named, and all Linear and Conv2d layers, counted by hand in the classes."""
LEAST_DB = {"w8a16": 35, "w8a8-dyn": 25, "w4a16": 10, "w4a16-g8": 13}
"""Output SQNR that a call of each scheme reaches at least: an output of another model has 0 dB or less."""
REDUCTION = {"w8a16": 3.3, "w8a8-dyn": 3.3, "w4a16": 5.5, "w4a16-g8": 3.9}
"""fp32 bytes of the quantized weights over theirs with scales, at least: these layers are as small as 16 x 16."""
EXCLUDED = {"sd": "mid_block", "ddim": "mid_block", "dit": "transformer_blocks.1", "sd3": "ff", "flux": "to_q"}

every_model = pytest.mark.parametrize("kind", KINDS)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@functools.cache
def shared(kind: str, scheme: str = "w8a16") -> Any:
    """A quantized model that tests must not change."""
    return model(kind).quantized(scheme)


@functools.cache
def float_output(kind: str) -> Tensor:
    return model(kind).call(model(kind).float())


def expected_bytes(layer: QuantizedLayer) -> int:
    """Of the weight and its scales."""
    rows, columns = layer.geometry.shape[0], layer.geometry.columns
    spec = parse_scheme(layer.scheme.name).weight
    assert spec is not None
    groups = -(-columns // spec.group_size) if spec.group_size else 1
    return rows * (columns if spec.bits == 8 else -(-columns // 2)) + 4 * rows * groups


def float_weights(found: Any) -> int:
    """Elements of the weights that are quantized."""
    return sum(layer.geometry.shape[0] * layer.geometry.columns for layer in quantized_layers(found).values())


def tensor_bytes(folder: Path) -> int:
    return sum(tensor.nbytes for file in folder.glob("*.safetensors") for tensor in load_file(file).values())


def adapted(found: Any, targets: list[str], seed: int = 0) -> nn.Module:
    """The model with a random LoRA in it; not every class has add_adapter."""
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets)
    found.add_adapter(config) if hasattr(found, "add_adapter") else peft.inject_adapter_in_model(config, found)
    generator = torch.Generator().manual_seed(seed)
    for name, value in found.named_parameters():
        if ".lora_" in name:
            value.data.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    return found


def unchanged(kind: str, scheme: str, found: nn.Module) -> bool:
    """Bit for bit the output of a model that nobody touched."""
    return torch.equal(model(kind).call(found), model(kind).call(shared(kind, scheme)))


@every_scheme
@every_model
def test_the_number_of_parameters_is_the_float_models(kind: str, scheme: str) -> None:
    assert shared(kind, scheme).num_parameters() == model(kind).float().num_parameters()


@every_scheme
@every_model
def test_the_memory_footprint_is_the_schemes(kind: str, scheme: str) -> None:
    quantized, reference = shared(kind, scheme), model(kind).float()
    weights = float_weights(quantized)
    own = sum(expected_bytes(layer) for layer in quantized_layers(quantized).values())
    assert reference.get_memory_footprint() - quantized.get_memory_footprint() == 4 * weights - own
    assert 4 * weights / own >= REDUCTION[scheme]


@every_scheme
@every_model
def test_the_file_is_as_small_as_the_scheme(kind: str, scheme: str, tmp_path: Path) -> None:
    quantized = shared(kind, scheme)
    quantized.save_pretrained(tmp_path)
    own = sum(expected_bytes(layer) for layer in quantized_layers(quantized).values())
    rest = quantized.num_parameters() - float_weights(quantized)
    buffers = sum(b.numel() for b in model(kind).float().state_dict().values()) - quantized.num_parameters()
    assert tensor_bytes(tmp_path) == own + 2 * rest + 4 * buffers  # the rest in 16 bits; position tables as they are
    assert tensor_bytes(tmp_path) < 0.5 * tensor_bytes(model(kind).folder)


@every_scheme
@every_model
def test_a_call_gives_finite_numbers_near_the_float_models(kind: str, scheme: str) -> None:
    output = model(kind).call(shared(kind, scheme))
    assert torch.isfinite(output).all()
    assert sqnr(float_output(kind), output) >= LEAST_DB[scheme]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_scheme
@every_model
def test_a_call_in_16_bits_gives_finite_numbers(kind: str, scheme: str, dtype: torch.dtype) -> None:
    found = model(kind).quantized(scheme, torch_dtype=dtype)
    output = model(kind).call(found)
    assert output.dtype == dtype
    assert sqnr(float_output(kind), output) >= min(LEAST_DB[scheme], 20)


CASTS = {
    "to(float16)": lambda found: found.to(torch.float16),
    "to(device, float16)": lambda found: found.to(device="cpu", dtype=torch.float16),
    "half()": lambda found: found.half(),
    "bfloat16()": lambda found: found.bfloat16(),
    "to(float64)": lambda found: found.to(dtype=torch.float64),
}


@pytest.mark.parametrize("cast", list(CASTS))
@every_scheme
@every_model
def test_casts_are_refused_and_moves_are_not(kind: str, scheme: str, cast: str) -> None:
    found = model(kind).quantized(scheme)
    with pytest.raises(LDMQError, match=r"is not cast to torch\.\w+: load it, and .* again with dtype"):
        CASTS[cast](found)
    assert found.to("cpu") is found
    assert unchanged(kind, scheme, found)


@every_model
def test_float_is_refused_on_a_model_in_16_bits(kind: str) -> None:
    found = model(kind).quantized(torch_dtype=torch.bfloat16)
    with pytest.raises(LDMQError, match="in torch.bfloat16 is not cast to torch.float32"):
        found.float()


LORA = {
    "sd": {"Linear": ["to_q", "to_k", "to_v", "to_out.0"], "Conv2d": ["conv1", "conv2", "conv_shortcut"]},
    "ddim": {"Linear": ["to_q", "to_k", "to_v", "to_out.0"], "Conv2d": ["conv1", "conv2"]},
    "dit": {"Linear": ["to_q", "to_k", "to_v", "to_out.0"], "Conv2d": ["pos_embed.proj"]},
    "sd3": {"Linear": ["to_q", "to_k", "to_v", "to_out.0"], "Conv2d": ["pos_embed.proj"]},
    "flux": {"Linear": ["to_q", "to_k", "to_v", "to_out.0"]},
}
"""Flux has no convolution. Those of DiT and SD3 stay float unless they are named."""


@pytest.mark.parametrize(
    ("kind", "what", "scheme"),
    # without add_adapter peft itself counts the dimensions of packed codes, and diffusers loads no LoRA there anyway
    [
        (kind, what, scheme)
        for kind in KINDS
        for what in LORA[kind]
        for scheme in SCHEMES
        if what == "Linear" or kind not in ("ddim", "dit") or scheme.startswith("w8")
    ],
)
def test_a_lora_changes_the_output_as_it_changes_the_float_models(kind: str, what: str, scheme: str) -> None:
    plan = {"*": scheme} if kind in ("dit", "sd3") and what == "Conv2d" else scheme
    found = model(kind).quantized(plan)
    targets = LORA[kind][what]
    plain = model(kind).call(found)
    adapted(found, targets)
    bases = [m.get_base_layer() for m in found.modules() if isinstance(m, BaseTunerLayer)]
    assert bases
    assert all(isinstance(base, QuantizedLayer) and not base.scheme.is_float for base in bases)
    assert {"Conv2d" if isinstance(base, nn.Conv2d) else "Linear" for base in bases} == {what}
    output = model(kind).call(found)
    reference = model(kind).call(adapted(model(kind).float(), targets))
    assert sqnr(plain, output) < 60
    assert sqnr(reference, output) >= LEAST_DB[scheme] - 5


@every_scheme
@every_model
def test_saved_and_loaded_it_gives_the_same_bits(kind: str, scheme: str, tmp_path: Path) -> None:
    shared(kind, scheme).save_pretrained(tmp_path)
    assert unchanged(kind, scheme, model(kind).kind.from_pretrained(tmp_path))


@every_scheme
@every_model
def test_saved_in_shards_and_loaded_it_gives_the_same_bits(kind: str, scheme: str, tmp_path: Path) -> None:
    shared(kind, scheme).save_pretrained(tmp_path, max_shard_size=shared(kind, scheme).get_memory_footprint() // 3)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert len(list(tmp_path.glob("*.index.json"))) == 1
    assert unchanged(kind, scheme, model(kind).kind.from_pretrained(tmp_path))


@every_scheme
@every_model
def test_the_config_says_what_was_quantized_in_json(kind: str, scheme: str) -> None:
    config = model(kind).quantized(scheme).config["quantization_config"]  # saving turns it into a dict
    assert json.loads(json.dumps(config.to_dict())) == config.to_diff_dict()
    assert json.loads(config.to_json_string())["quant_method"] == "ldmq"
    assert {entry["scheme"] for entry in config.layers.values()} == {scheme}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_model
def test_the_config_says_the_dtype_before(kind: str, dtype: torch.dtype) -> None:
    found = model(kind).quantized(torch_dtype=dtype)
    assert found.config["_pre_quantization_dtype"] == dtype
    assert found.config["quantization_config"].compute_dtype == str(dtype).removeprefix("torch.")


@every_scheme
@every_model
def test_as_many_layers_are_quantized_as_there_are(kind: str, scheme: str) -> None:
    table = layer_table(model(kind).float())
    found = quantized_layers(shared(kind, scheme))
    assert set(found) == {info.name for info in table.layers if not info.keep_float}
    assert (len(found), len(table.layers)) == COUNTS[kind]
    assert len(quantized_layers(model(kind).quantized({"*": scheme}))) == COUNTS[kind][1]
    assert {layer.scheme.name for layer in found.values()} == {scheme}


@every_scheme
@every_model
def test_modules_to_not_convert_stay_float_and_take_their_memory(kind: str, scheme: str) -> None:
    found = model(kind).quantized(scheme, [EXCLUDED[kind]])
    kept = {name for name in quantized_layers(shared(kind, scheme)) if f".{EXCLUDED[kind]}." in f".{name}."}
    assert kept
    assert set(quantized_layers(found)) == set(quantized_layers(shared(kind, scheme))) - kept
    assert found.get_memory_footprint() > shared(kind, scheme).get_memory_footprint()
    assert sqnr(float_output(kind), model(kind).call(found)) >= LEAST_DB[scheme]


def placed_by_hand(kind: str) -> dict[str, str]:
    return {name: "cpu" for name, _ in model(kind).float().named_children()}


@pytest.mark.parametrize("how", ["cpu", "auto", "balanced", "dict"])
@every_scheme
@every_model
def test_a_device_map_places_everything(kind: str, scheme: str, how: str) -> None:
    if how in ("auto", "balanced") and model(kind).kind._no_split_modules is None:
        with pytest.raises(ValueError, match="does not support"):  # of float models of this class, too
            model(kind).quantized(scheme, device_map=how)
        return
    found = model(kind).quantized(scheme, device_map=placed_by_hand(kind) if how == "dict" else how)
    assert set(map(str, found.hf_device_map.values())) == {"cpu"}
    assert found.device == torch.device("cpu")
    assert not any(tensor.is_meta for tensor in found.state_dict().values())
    assert unchanged(kind, scheme, found)


@pytest.mark.parametrize("how", ["cpu", "dict"])
@every_model
def test_a_checkpoint_of_ours_takes_a_device_map(kind: str, how: str, tmp_path: Path) -> None:
    shared(kind).save_pretrained(tmp_path)
    placed = placed_by_hand(kind) if how == "dict" else how
    found = model(kind).kind.from_pretrained(tmp_path, device_map=placed)
    assert unchanged(kind, "w8a16", found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_scheme
@every_model
def test_dequantized_it_is_a_float_model_in_every_respect(
    kind: str, scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    found = model(kind).quantized(scheme, torch_dtype=dtype)
    before = model(kind).call(found)
    found.dequantize()
    assert not any(isinstance(module, QuantizedLayer) for module in found.modules())
    assert {p.dtype for p in found.parameters()} == {dtype}
    assert sqnr(before, model(kind).call(found)) >= (25 if scheme == "w8a8-dyn" or dtype != torch.float32 else 80)
    found.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert tensor_bytes(tmp_path) == tensor_bytes(model(kind).folder) * dtype.itemsize // 4
    again, held = model(kind).kind.from_pretrained(tmp_path, torch_dtype=dtype).state_dict(), found.state_dict()
    assert again.keys() == held.keys()
    assert all(torch.equal(again[name], held[name]) for name in held)
    found.to(torch.float64)  # a float model may be cast


def wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def test_modules_that_a_class_keeps_in_fp32_stay_so(tmp_path: Path) -> None:
    wan().save_pretrained(tmp_path / "float")
    options: Any = {"quantization_config": LDMQConfig({"*": "w8a16"}), "torch_dtype": torch.bfloat16}
    found = WanTransformer3DModel.from_pretrained(tmp_path / "float", **options)
    found.save_pretrained(tmp_path / "quantized")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "quantized", torch_dtype=torch.bfloat16)
    for loaded in (found, again):
        kept = {n: p.dtype for n, p in loaded.named_parameters() if "time_embedder" in n or "scale_shift_table" in n}
        assert set(kept.values()) == {torch.float32}
        assert not [name for name in quantized_layers(loaded) if "time_embedder" in name]
        assert loaded.get_parameter("blocks.0.attn1.to_q.bias").dtype == torch.bfloat16
    assert len(quantized_layers(found)) == len(quantized_layers(again)) > 10


@every_scheme
@every_model
def test_a_lora_step_lowers_the_loss(kind: str, scheme: str) -> None:
    found = model(kind).quantized(scheme)
    found.requires_grad_(False)
    adapted(found, ["to_q", "to_v"])
    trained = [p for name, p in found.named_parameters() if ".lora_" in name]
    assert trained
    assert all(p.requires_grad for p in trained)
    target = float_output(kind) + 1

    def loss() -> Tensor:
        return (found(**model(kind).cast(found), return_dict=False)[0] - target).square().mean()

    before = loss()
    before.backward()
    gradients = [p.grad for p in trained if p.grad is not None]
    assert len(gradients) == len(trained)
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)
    assert all(p.grad is None for name, p in found.named_parameters() if ".lora_" not in name)
    norm, length = torch.stack([g.norm() for g in gradients]).norm(), 0.2
    with torch.no_grad():
        for p, g in zip(trained, gradients, strict=True):
            p.sub_(length * g / norm)
        drop = (before - loss()) / (length * norm)  # 1 for exact gradients and an infinitely short step
    assert 0.5 < drop < 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_model
def test_gradients_reach_adapters_under_autocast(kind: str, dtype: torch.dtype) -> None:
    found = model(kind).quantized()
    found.requires_grad_(False)
    adapted(found, ["to_q", "to_v"])
    with torch.autocast("cpu", dtype=dtype):
        output = found(**model(kind).cast(found), return_dict=False)[0]
        output.float().norm().backward()
    assert torch.isfinite(output).all()
    trained = [p for name, p in found.named_parameters() if ".lora_" in name]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in trained)


@every_scheme
@every_model
def test_it_compiles_in_one_graph_without_recompiling(kind: str, scheme: str) -> None:
    found = model(kind).quantized(scheme)
    torch.compiler.reset()
    found.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        output = model(kind).call(found)
        again = model(kind).call(found)
    assert torch.equal(output, again)
    assert sqnr(model(kind).call(shared(kind, scheme)), output) >= 60
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_it_compiles_under_group_offloading(kind: str) -> None:
    found = model(kind).quantized()
    torch.compiler.reset()
    offload(found, "leaf_level")
    found.compile(backend="aot_eager")
    assert sqnr(model(kind).call(shared(kind)), model(kind).call(found)) >= 60
    torch.compiler.reset()


def offload(found: nn.Module, level: str, **options: Any) -> None:
    if level == "block_level":
        options["num_blocks_per_group"] = 1
    apply_group_offloading(found, onload_device=torch.device("cpu"), offload_type=level, **options)


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@every_scheme
@every_model
def test_group_offloading_leaves_every_bit(kind: str, scheme: str, level: str) -> None:
    found = model(kind).quantized(scheme)
    offload(found, level)
    assert unchanged(kind, scheme, found)
    assert unchanged(kind, scheme, found)  # packed meanwhile


@every_scheme
@every_model
def test_it_is_not_quantized_twice(kind: str, scheme: str, tmp_path: Path) -> None:
    found = copy.deepcopy(shared(kind, scheme))
    plan = make_plan(layer_table(found), planner="uniform", scheme="w8a16")
    with pytest.raises(LDMQError, match="is quantized already; load the original model"):
        quantize(found, calibrate(model(kind).float(), plan, None))
    found.save_pretrained(tmp_path)
    with pytest.raises(LDMQError, match=r"quantized already.*leave quantization_config out"):
        model(kind).kind.from_pretrained(tmp_path, quantization_config=LDMQConfig("w4a16"))


@every_model
def test_a_copy_is_as_good_as_the_model(kind: str) -> None:
    found = copy.deepcopy(shared(kind))
    assert unchanged(kind, "w8a16", found)
    assert len(quantized_layers(found)) == COUNTS[kind][0]
