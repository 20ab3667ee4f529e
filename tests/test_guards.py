"""What quantized models refuse in our words, and what they go on doing."""

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from tiny_pipelines import MAKERS, picture, text_unet

from diffusers_ldmq import LDMQConfig, LDMQError, QuantizedLDMPipeline, calibrate, make_plan, quantize
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.guards import COPYING, guard, unguard
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.plugin import attach


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    MAKERS["sd"]().save_pretrained(path)
    return path


@pytest.fixture
def unet(folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(folder / "unet", quantization_config=LDMQConfig("w8a16"))


def call(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 4, 32, generator=generator)
    with torch.no_grad():
        return unet(sample.to(unet.dtype), torch.tensor(9), text.to(unet.dtype)).sample


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "to dtype": (
        lambda u: u.to(torch.float16),
        r"in torch.float32 is not cast to torch.float16.*torch_dtype=torch.flo",
    ),
    "to device and dtype": (lambda u: u.to("cpu", torch.bfloat16), "is not cast to torch.bfloat16"),
    "to dtype by name": (lambda u: u.to(dtype=torch.float64), "is not cast to torch.float64"),
    "to like": (lambda u: u.to(torch.zeros(1, dtype=torch.float16)), "is not cast to torch.float16"),
    "half": (lambda u: u.half(), "is not cast to torch.float16"),
    "bfloat16": (lambda u: u.bfloat16(), "is not cast to torch.bfloat16"),
    "type": (lambda u: u.type(torch.float16), "is not cast to torch.float16"),
    "double": (lambda u: u.double(), "is not cast to torch.float64"),
    "layerwise casting (G28)": (lambda u: u.enable_layerwise_casting(), "layerwise casting would.*group offloading"),
    "fused qkv (G29)": (lambda u: u.fuse_qkv_projections(), "cannot be joined; leave them apart"),
    "training (G31)": (lambda u: u.requires_grad_(True), r"cannot be trained; add a LoRA with add_adapter\(\)"),
    "flashpack (G35)": (lambda u: u.save_pretrained("nowhere", use_flashpack=True), "use_flashpack=True would leave"),
    "copying (G30)": (
        lambda u: ControlNetModel.from_unet(u),
        r"ControlNetModel.from_unet: .* is quantized.*dequantize\(\) first",
    ),
    "copying by name": (lambda u: ControlNetModel.from_unet(unet=u), "ControlNetModel.from_unet: .* is quantized"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_it_is_refused_in_our_words_and_changes_nothing(what: str, unet: Any) -> None:
    function, match = REFUSED[what]
    before = call(unet)
    with pytest.raises(LDMQError, match=match):
        function(unet)
    assert torch.equal(call(unet), before)
    assert not Path("nowhere").exists()


def test_moving_and_casting_to_what_it_is_go_on_working(unet: Any) -> None:
    before = call(unet)
    for moved in (unet.to("cpu"), unet.to(torch.float32), unet.float(), unet.to("cpu", torch.float32), unet.cpu()):
        assert moved is unet
    assert unet.to(memory_format=torch.channels_last) is unet
    assert unet.requires_grad_(False) is unet
    assert torch.allclose(call(unet), before, atol=1e-5)


def test_an_upstream_pipeline_takes_a_quantized_component_at_its_own_dtype_g26(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        loaded = UNet2DConditionModel.from_pretrained(
            folder / "unet", quantization_config=LDMQConfig("w8a16"), torch_dtype=dtype
        )
        pipe = StableDiffusionPipeline.from_pretrained(folder, unet=loaded, torch_dtype=dtype)
        other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=dtype)
        assert other.unet is loaded
    with pytest.raises(LDMQError, match="in torch.bfloat16 is not cast to torch.float32"):
        StableDiffusionImg2ImgPipeline.from_pipe(pipe)


def test_a_parents_cast_leaves_scales_in_fp32_g27(unet: Any) -> None:
    parent = torch.nn.Module()
    parent.child = unet
    parent.to(torch.bfloat16)
    layer = next(iter(quantized_layers(unet).values())).state()
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int8, torch.float32)
    assert unet.dtype == torch.bfloat16


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16"])
def test_parameters_are_counted_as_the_float_models_g34(scheme: str, folder: Path) -> None:
    whole = UNet2DConditionModel.from_pretrained(folder / "unet")
    found = UNet2DConditionModel.from_pretrained(folder / "unet", quantization_config=LDMQConfig(scheme))
    assert found.num_parameters() == whole.num_parameters()
    call(found)  # packed, codes are stand-ins
    assert found.num_parameters() == whole.num_parameters()
    assert 0 < found.num_parameters(only_trainable=True) < whole.num_parameters()


def test_copies_and_pickles_guard_themselves(unet: Any) -> None:
    for other in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):  # noqa: S301
        assert other.to("cpu") is other
        assert torch.equal(call(other), call(unet))
        with pytest.raises(LDMQError, match="is not cast"):
            other.half()


def test_a_float_model_is_left_alone_also_after_a_quantized_one_was_there(unet: Any) -> None:
    plain = text_unet()
    assert ControlNetModel.from_unet(plain).config["cross_attention_dim"] == plain.config["cross_attention_dim"]
    assert plain.half().dtype == torch.float16


def test_a_dequantized_model_does_what_its_class_does_g23_g30(unet: Any, tmp_path: Path) -> None:
    own = set(vars(unet)) - set(vars(text_unet()))
    plain = unet.dequantize()
    assert not {name for name in own if callable(vars(plain).get(name))}
    ControlNetModel.from_unet(plain)
    plain.requires_grad_(True)
    plain.to(torch.bfloat16).save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert torch.equal(call(again), call(plain))
    assert "quantization_config" not in again.config


def test_guarding_twice_is_harmless_and_can_be_undone(unet: Any) -> None:
    before, method = dict(vars(unet)), UNet2DConditionModel.to
    guard(unet)
    assert (vars(unet), UNet2DConditionModel.to) == (before, method)
    unguard(unet)
    unet.requires_grad_(False)
    with pytest.raises(ValueError, match="Casting a quantized model"):
        unet.to(torch.float16)


def test_a_model_that_nobody_holds_is_saved(folder: Path, tmp_path: Path) -> None:
    UNet2DConditionModel.from_pretrained(folder / "unet", quantization_config=LDMQConfig("w8a16")).save_pretrained(
        tmp_path
    )
    assert quantized_layers(UNet2DConditionModel.from_pretrained(tmp_path))


def test_a_denoiser_from_the_stages_is_guarded_too() -> None:
    denoiser: Any = text_unet()
    plan = make_plan(layer_table(denoiser), planner="uniform", scheme="w8a16")
    quantize(denoiser, calibrate(denoiser, plan, None))
    attach(denoiser)
    with pytest.raises(LDMQError, match="is not cast"):
        denoiser.half()


def test_diffusers_itself_refuses_tensor_parallelism_g35(tmp_path: Path) -> None:
    from diffusers import TensorParallelConfig

    parallel = TensorParallelConfig(tp_degree=2)
    MAKERS["flux"]().transformer.save_pretrained(tmp_path)
    load: Any = partial(FluxTransformer2DModel.from_pretrained, tmp_path, quantization_config=LDMQConfig("w8a16"))
    with pytest.raises(ValueError, match="`quantization_config` cannot be combined with a tensor-parallel"):
        load(parallel_config=parallel)
    with pytest.raises(ValueError, match="is quantized, which cannot be combined with tensor parallelism"):
        load().enable_parallelism(config=parallel)


def test_every_class_of_diffusers_that_copies_a_denoiser_is_known() -> None:
    """A new version of diffusers that brings another one fails here."""
    kinds = {name: getattr(diffusers, name) for name in dir(diffusers) if re.search("ControlNet|Motion|Adapter", name)}
    methods = {name: [m for m in vars(k) if re.match("from_(unet|transformer)", m)] for name, k in kinds.items()}
    assert {name: found[0] for name, found in methods.items() if found} == COPYING


def test_a_deleted_model_is_freed_at_once(unet: Any) -> None:
    """Without waiting for the garbage collector: nothing of ours makes the model hold itself."""
    other = copy.deepcopy(unet)
    call(other)
    watched = weakref.ref(other)
    gc.collect()
    gc.disable()
    try:
        del other
        assert watched() is None
    finally:
        gc.enable()


def test_a_denoiser_with_joined_projections_is_not_quantized() -> None:
    denoiser: Any = text_unet()
    plan = make_plan(layer_table(denoiser), planner="uniform", scheme="w8a16")
    calibration = calibrate(denoiser, plan, None)
    denoiser.fuse_qkv_projections()
    with pytest.raises(LDMQError, match=r"have joined q, k and v.*call unfuse_qkv_projections\(\) first"):
        quantize(denoiser, calibration)


def test_an_ip_adapters_tensors_are_not_saved(unet: Any, tmp_path: Path) -> None:
    attention = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    attention.processor = IPAdapterAttnProcessor2_0(attention.to_q.in_features, attention.to_k.in_features)
    with pytest.raises(LDMQError, match=r"attn2.processor.to_k_ip.0'.*unload_ip_adapter\(\) first"):
        unet.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_refused_cast_of_our_pipeline_leaves_every_model_as_it_was(folder: Path) -> None:
    quantized = UNet2DConditionModel.from_pretrained(folder / "unet", quantization_config=LDMQConfig("w8a16"))
    pipe = QuantizedLDMPipeline.from_pipe(StableDiffusionPipeline.from_pretrained(folder, unet=quantized))
    before = picture(pipe, "sd")
    with pytest.raises(LDMQError, match="is not cast to torch.float16"):
        pipe.to("cpu", torch.float16)
    assert {model.dtype for model in (pipe.text_encoder, pipe.vae, pipe.unet)} == {torch.float32}
    assert torch.equal(picture(pipe.to("cpu").to(dtype=torch.float32), "sd"), before)
