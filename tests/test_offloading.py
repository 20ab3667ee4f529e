"""Quantized models under every way of diffusers and accelerate to keep weights elsewhere, run on the CPU as the device
that computes; and what is refused before quantizing.

`enable_sequential_cpu_offload` itself asks accelerate for a device 'cpu:0', on which that loses the class of every
float Parameter; what it does to each model is called here on 'cpu' instead (`sequential`).
"""

import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.hooks import apply_group_offloading
from quantized_models import KINDS, SCHEMES, model
from tiny_pipelines import INPUTS, MAKERS, picture
from torch import Tensor, nn

from diffusers_ldmq import LDMQConfig, LDMQError, calibrate, make_plan, quantize
from diffusers_ldmq.families import find_denoiser, layer_table
from diffusers_ldmq.job import Settings, quantize_pipeline
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.metrics import sqnr

CPU = torch.device("cpu")
PIPES = ("sd", "ldm-uncond", "dit", "sd3", "flux")
every_pipe = pytest.mark.parametrize("name", PIPES)


def sequential(denoiser: Any) -> None:
    """What enable_sequential_cpu_offload does to a model."""
    accelerate.cpu_offload(denoiser, CPU, offload_buffers=len(denoiser._parameters) > 0)


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="offloading-")


@functools.cache
def folder(name: str) -> Path:
    """The float pipeline, saved."""
    path = Path(scratch().name) / name
    MAKERS[name]().save_pretrained(path)
    return path


def loaded(name: str, scheme: str | None = "w8a16", **options: Any) -> Any:
    """A fresh pipeline with a quantized denoiser (None: float)."""
    component, _ = find_denoiser(MAKERS[name]())
    if scheme is not None:
        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping={component: LDMQConfig(scheme)})
    pipe = DiffusionPipeline.from_pretrained(folder(name), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def expected(name: str, scheme: str) -> Tensor:
    return picture(loaded(name, scheme), name)


def groups(denoiser: Any, level: str, **options: Any) -> None:
    """Group offloading; level: 'leaf' or 'block'."""
    more = {"num_blocks_per_group": 1} if level == "block" else {}
    apply_group_offloading(denoiser, onload_device=CPU, offload_type=f"{level}_level", **more, **options)


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "sequential": lambda denoiser, path: sequential(denoiser),
    "group, leaf level": lambda denoiser, path: groups(denoiser, "leaf"),
    "group, block level": lambda denoiser, path: groups(denoiser, "block"),
    "group, leaf level, on disk": lambda denoiser, path: groups(denoiser, "leaf", offload_to_disk_path=str(path)),
    "group, block level, on disk": lambda denoiser, path: groups(denoiser, "block", offload_to_disk_path=str(path)),
    "accelerate.cpu_offload with buffers": lambda denoiser, path: accelerate.cpu_offload(denoiser, CPU, True),
    "accelerate.disk_offload": lambda denoiser, path: accelerate.disk_offload(denoiser, str(path), CPU),
    "accelerate.cpu_offload_with_hook": lambda denoiser, path: accelerate.cpu_offload_with_hook(denoiser, CPU),
    "accelerate.dispatch_model": lambda denoiser, path: accelerate.dispatch_model(
        denoiser,
        {child: "cpu" for child, _ in denoiser.named_children()},
        main_device=CPU,
        force_hooks=True,
    ),
}


@pytest.mark.parametrize(
    ("kind", "way"),
    # a float DiT gives nonsense there, too: its embeddings are called without the hook that loads them
    [(kind, way) for kind in KINDS for way in WAYS if (kind, way) != ("dit", "group, block level, on disk")],
)
def test_outputs_stay_the_same_bits_while_offloaded(kind: str, way: str, tmp_path: Path) -> None:
    found = model(kind).quantized()
    before = model(kind).call(model(kind).quantized())
    inputs = model(kind).cast(found)
    WAYS[way](found, tmp_path)
    for _ in range(2):  # whatever the first call packed is gone or right
        with torch.no_grad():
            assert torch.equal(found(**inputs, return_dict=False)[0], before)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_pipelines_offload_whole_models(name: str) -> None:
    pipe = loaded(name)
    pipe.enable_model_cpu_offload(device=CPU)
    for _ in range(2):
        assert torch.equal(picture(pipe, name), expected(name, "w8a16"))


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_pipelines_offload_groups(name: str) -> None:
    pipe = loaded(name)
    pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level")
    for _ in range(2):
        assert torch.equal(picture(pipe, name), expected(name, "w8a16"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("way", ["sequential", "group, leaf level, on disk"])
def test_every_scheme_survives_offloading(way: str, scheme: str, tmp_path: Path) -> None:
    pipe = loaded("sd", scheme)
    WAYS[way](pipe.unet, tmp_path)
    for _ in range(2):
        assert torch.equal(picture(pipe, "sd"), expected("sd", scheme))


@pytest.mark.parametrize("way", ["sequential", "group, leaf level, on disk"])
def test_calibrated_layers_survive_offloading(way: str, mixed_denoiser: Callable[[str], Any], tmp_path: Path) -> None:
    inputs = {"sample": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), "timestep": 500}
    with torch.no_grad():
        before = mixed_denoiser("pixel")(**inputs).sample
        found = mixed_denoiser("pixel")
        WAYS[way](found, tmp_path)
        for _ in range(2):
            assert torch.equal(found(**inputs).sample, before)


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_model_that_was_called_already_is_offloaded_with_its_integers(
    kind: str, where: str, level: str, tmp_path: Path
) -> None:
    found = model(kind).quantized()
    before, inputs = model(kind).call(found), model(kind).cast(found)
    options: Any = {"offload_to_disk_path": str(tmp_path)} if where == "disk" else {}
    options |= {"num_blocks_per_group": 1} if level == "block_level" else {}
    found.enable_group_offload(onload_device=CPU, offload_type=level, **options)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(found(**inputs, return_dict=False)[0], before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_models_dtype_is_not_that_of_its_scales_g16(kind: str, dtype: torch.dtype) -> None:
    found = model(kind).quantized(torch_dtype=dtype)
    assert found.dtype == dtype
    assert {layer.weight_scale.dtype for layer in quantized_layers(found).values()} == {torch.float32}
    scales = {id(value) for layer in quantized_layers(found).values() for value in layer.buffers()}
    assert scales.isdisjoint(id(parameter) for parameter in found.parameters())


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-dyn", "w4a16"])
def test_sequential_offloading_takes_integers_away_and_keeps_small_scales_g17(scheme: str) -> None:
    """It leaves buffers of U-Nets on the device, so that big ones would stay there."""
    pipe = loaded("sd", scheme)
    held = {name: layer.state() for name, layer in quantized_layers(pipe.unet).items()}
    sequential(pipe.unet)
    for _ in range(2):  # before a call and after it
        on_device = [t for t in pipe.unet.state_dict(keep_vars=True).values() if not t.is_meta]
        assert sum(t.nbytes for t in on_device) < 0.35 * sum(s.weight.nbytes for s in held.values())
        for name, layer in quantized_layers(pipe.unet).items():
            assert layer.weight.is_meta
            assert layer.weight.dtype == held[name].weight.dtype
            assert isinstance(layer._parameters["weight"], nn.Parameter)
            assert torch.equal(layer.get_buffer("weight_scale"), held[name].weight_scale)
        picture(pipe, "sd")


def test_offloaded_weights_come_back_as_the_same_codes_g17() -> None:
    pipe = loaded("sd", "w4a16")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    sequential(pipe.unet)
    picture(pipe, "sd")
    pipe.remove_all_hooks()
    after = pipe.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["sd", "dit"])
def test_leaf_offloading_finds_every_quantized_layer_by_its_class_g18(kind: str) -> None:
    found = model(kind).quantized()
    apply_group_offloading(found, onload_device=CPU, offload_type="leaf_level")
    for name, layer in quantized_layers(found).items():
        hooked: Any = layer
        assert "group_offloading" in hooked._diffusers_hook.hooks, name
        assert type(layer.weight) is nn.Parameter
        assert type(layer.weight.data) is Tensor


@pytest.mark.parametrize("how", ["balanced", "cpu"])
@every_pipe
def test_pipelines_take_a_device_map(name: str, how: str) -> None:
    assert torch.equal(picture(loaded(name, device_map=how), name), expected(name, "w8a16"))


@pytest.mark.parametrize("how", ["balanced", "cpu"])
def test_a_pipeline_of_ours_takes_a_device_map(how: str, tmp_path: Path) -> None:
    loaded("sd").save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, device_map=how)
    assert torch.equal(picture(pipe, "sd"), expected("sd", "w8a16"))


@pytest.mark.parametrize("quantized_vae", [False, True])
@pytest.mark.parametrize("how", ["enable_tiling", "enable_slicing"])
def test_the_autoencoder_decodes_in_tiles_and_slices(how: str, quantized_vae: bool) -> None:
    options: Any = {}
    if quantized_vae:
        mapping: Any = {"unet": LDMQConfig("w8a16"), "vae": LDMQConfig("w8a16")}
        options["quantization_config"] = PipelineQuantizationConfig(quant_mapping=mapping)
    pipe = loaded("sd", None if quantized_vae else "w8a16", **options)
    whole = picture(pipe, "sd")
    getattr(pipe.vae, how)()
    parts = picture(pipe, "sd")
    if how == "enable_slicing":
        assert sqnr(whole, parts) >= 90
        return
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8  # so that there are tiles at all
    tiles = picture(pipe, "sd")
    reference = loaded("sd")
    reference.vae.enable_tiling()
    reference.vae.tile_latent_min_size, reference.vae.tile_sample_min_size = 4, 8
    assert sqnr(whole, tiles) < 60  # seams
    assert sqnr(picture(reference, "sd"), tiles) >= (25 if quantized_vae else 90)


def quantized_by_hand(pipe: Any, scheme: str = "w8a16") -> Any:
    denoiser = find_denoiser(pipe)[1]
    quantize(denoiser, calibrate(denoiser, make_plan(layer_table(denoiser), planner="uniform", scheme=scheme), None))
    return denoiser


OBSTACLES: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "sequential": (
        lambda pipe, path: pipe.enable_sequential_cpu_offload(device=CPU),
        "the UNet2DConditionModel's weights are on the meta device (offloaded); load it without offloading",
    ),
    "leaf": (
        lambda pipe, path: pipe.unet.enable_group_offload(onload_device=CPU, offload_type="leaf_level"),
        "the UNet2DConditionModel is under group offloading",
    ),
    "block": (
        lambda pipe, path: pipe.unet.enable_group_offload(
            onload_device=CPU, offload_type="block_level", num_blocks_per_group=1
        ),
        "the UNet2DConditionModel is under group offloading",
    ),
    "disk": (  # its weights are uninitialized memory between calls
        lambda pipe, path: pipe.unet.enable_group_offload(
            onload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(path)
        ),
        "the UNet2DConditionModel is under group offloading",
    ),
    "layerwise": (
        lambda pipe, path: pipe.unet.enable_layerwise_casting(torch.float16, torch.float32),
        "the UNet2DConditionModel is under layerwise casting",
    ),
}


@pytest.mark.parametrize("obstacle", list(OBSTACLES))
def test_quantizing_a_model_whose_weights_are_elsewhere_is_refused(obstacle: str, tmp_path: Path) -> None:
    prepare, words = OBSTACLES[obstacle]
    pipe = loaded("sd", None)
    prepare(pipe, tmp_path)
    for attempt in (
        lambda: quantized_by_hand(pipe),
        lambda: quantize_pipeline(pipe, INPUTS["sd"], Settings(planner="uniform")),
    ):
        with pytest.raises(LDMQError, match=re.escape(words)):
            attempt()
    assert not quantized_layers(pipe.unet)


def test_a_model_offloaded_as_a_whole_is_quantized_and_goes_on_being_offloaded() -> None:
    pipe = loaded("sd", None)
    pipe.enable_model_cpu_offload(device=CPU)
    plain = loaded("sd", None)
    for each in (pipe, plain):
        quantized_by_hand(each)
    assert torch.equal(picture(pipe, "sd"), picture(plain, "sd"))
    assert hasattr(pipe.unet, "_hf_hook")
