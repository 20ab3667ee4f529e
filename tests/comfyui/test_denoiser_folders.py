"""LDM-Q Load model on folders that diffusers_ldmq wrote: the same integers in ComfyUI's own U-Net."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.cut_models import sample_cut
from comfyui.tiny_models import lora, sqnr
from diffusers import DDIMScheduler, UNet2DConditionModel
from local_hub import LocalHub
from tiny_pipelines import MAKERS

from diffusers_ldmq.artifacts import Calibration, LayerChoice, Plan
from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.demo import demo_model
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.families import layer_table, quantizable_layers
from diffusers_ldmq.plugin import attach
from diffusers_ldmq.quantization import quantize
from diffusers_ldmq.specs import parse_scheme

from ..hub.conftest import hub, impatient

__all__ = ["hub", "impatient"]


def load(folder: Path | str) -> Any:
    from comfyui_nodes.native.denoiser_folders import load_denoiser

    return load_denoiser(folder)


def float_unet(**options: Any) -> UNet2DConditionModel:
    """SD 1.5 with one stage, in diffusers' own class; random weights that 16 bits hold exactly."""
    unet = UNet2DConditionModel(
        **{
            "sample_size": 8, "block_out_channels": (320,), "layers_per_block": 1, "cross_attention_dim": 768,
            "attention_head_dim": 8, "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
        } | options
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, tensor in unet.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        matrix = tensor.dim() > 1
        values[name] = noise / tensor[0].numel() ** 0.5 if matrix else noise * 0.1 + name.endswith("weight")
    unet.load_state_dict({name: value.half() for name, value in values.items()})
    return unet.eval()


def quantized_unet(scheme: str, **options: Any) -> UNet2DConditionModel:
    unet = float_unet(**options)
    table, layers = layer_table(unet), quantizable_layers(unet)
    choices = {i.name: LayerChoice("float" if i.keep_float else scheme, "test") for i in table.layers}
    plan = Plan(table.denoiser, table.fingerprint, "test", choices)
    states = {name: layer_state(name, layers[name], parse_scheme(s), None) for name, s in plan.quantized().items()}
    quantize(unet, Calibration(plan, states, "none", "none", 0, 0, 0))
    attach(unet)
    return unet


def folder_of(unet: Any, folder: Path, **scheduler: Any) -> Path:
    """A pipeline's folder, as far as loading the denoiser looks at it."""
    unet.save_pretrained(folder / "unet")
    said = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    DDIMScheduler(**said | scheduler).save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", type(unet).__name__]}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module", params=["w8a16", "w8a8-dyn", "w4a16-g64"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """Scheme, folder and diffusers' quantized U-Net."""
    unet = quantized_unet(request.param)
    return request.param, folder_of(unet, tmp_path_factory.mktemp("folder")), unet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(quantized_unet("w8a16"), tmp_path_factory.mktemp("folder"))


def test_comfyui_computes_what_diffusers_computes(opened: tuple[str, Path, Any], comfy: ModuleType):
    scheme, folder, unet = opened
    model = load(folder)
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 768, generator=generator)
    timestep = torch.tensor([500.0, 20.0])
    comfy.model_management.load_models_gpu([model])
    ours = model.model.diffusion_model(x, timestep, context=text)
    # the two round differently in the last bit of fp32, and a rounding of inputs to 8 bits turns that into a step
    assert sqnr(unet(x, timestep, text).sample, ours) > (25 if scheme == "w8a8-dyn" else 90)


def test_the_integers_are_moved_bit_for_bit(opened: tuple[str, Path, Any], comfy: ModuleType):
    from comfyui_nodes.native.patching import quantized_layers_of
    from diffusers_ldmq.layers import quantized_layers

    _, folder, unet = opened
    ours = {name: layer.state() for name, layer in quantized_layers_of(load(folder)).items()}
    theirs = {name: layer.state() for name, layer in quantized_layers(unet).items()}
    name, same = "down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2"
    assert len(ours) == len(theirs)
    for leaf, value in theirs[name].tensors().items():
        assert torch.equal(ours[same].tensors()[leaf], value)


def test_the_sampler_and_a_lora_work(comfy: ModuleType, folder: Path):
    from comfyui_nodes.native.patching import quantized_layers_of

    model = load(folder)
    before = sample_cut(model)
    file = lora(model, list(quantized_layers_of(model)), 0.3)
    patched = comfy.sd.load_lora_for_models(model, None, file, 1.0, 1.0)[0]
    assert sqnr(before, sample_cut(patched)) < 20
    assert torch.equal(sample_cut(model), before)


def test_it_can_be_saved_as_a_file_of_ours(comfy: ModuleType, folder: Path, tmp_path: Path):
    from comfyui_nodes.native.model_files import load_model, save_model

    model = load(folder)
    save_model(model, tmp_path / "model.safetensors")
    assert torch.equal(sample_cut(load_model(tmp_path / "model.safetensors")), sample_cut(model))


def test_what_the_scheduler_says_of_the_model_holds(comfy: ModuleType, folder: Path, tmp_path: Path):
    plain = load(folder).model.model_sampling
    assert torch.equal(plain.sigmas, comfy.model_sampling.ModelSamplingDiscrete().sigmas)
    other = folder_of(UNet2DConditionModel.from_pretrained(folder / "unet"), tmp_path, prediction_type="v_prediction")
    assert load(other).model.model_type == comfy.model_base.ModelType.V_PREDICTION
    scheduler = {"beta_schedule": "linear", "beta_start": 0.0015, "beta_end": 0.0195}
    edit(other / "scheduler" / "scheduler_config.json", **scheduler)
    cumulative = DDIMScheduler(**scheduler).alphas_cumprod
    expected = ((1 - cumulative) / cumulative) ** 0.5
    assert torch.allclose(load(other).model.model_sampling.sigmas, expected, rtol=1e-4)


def test_nodes_that_want_a_model_of_their_own_get_it(comfy: ModuleType, folder: Path):
    model = load(folder)
    factory, arguments = model.cached_patcher_init
    assert factory(*arguments, disable_dynamic=True).model is not model.model


def test_a_model_that_differs_where_no_tensor_shows_is_refused(comfy: ModuleType, tmp_path: Path):
    """Four heads in place of eight would draw other pictures with the same tensors."""
    other = folder_of(quantized_unet("w8a16", attention_head_dim=4), tmp_path / "heads")
    with pytest.raises(LDMQError, match=r"heads is 4.*LDM-Q Pipeline loader"):
        load(other)
    edit(other / "unet" / "config.json", act_fn="gelu")
    with pytest.raises(LDMQError, match=r"act_fn is 'gelu'.*LDM-Q Pipeline loader"):
        load(other)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prediction_type": "sample"}, "prediction_type 'sample'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"trained_betas": [0.1, 0.2]}, "beta_schedule"),
    ],
)
def test_schedulers_that_comfyui_does_not_sample_with_are_refused(
    changes: dict[str, Any], told: str, comfy: ModuleType, tmp_path: Path
):
    folder = folder_of(quantized_unet("w8a16"), tmp_path)
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(LDMQError, match=told):
        load(folder)


def test_a_hub_id_opens_what_a_folder_holds(
    comfy: ModuleType, folder: Path, hub: LocalHub, impatient: None, tmp_path: Path
):
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add("you/x", files)
    assert torch.equal(sample_cut(load("you/x")), sample_cut(load(folder)))
    with pytest.raises(LDMQError, match="you/absent: neither a folder here nor a model that the hub shows you"):
        load("you/absent")
    hub.add("you/half", {name: data for name, data in files.items() if not name.endswith(".safetensors")})
    with pytest.raises(LDMQError, match="you/half: the U-Net cannot be loaded"):
        load("you/half")


def test_float_folders_are_refused(comfy: ModuleType, tmp_path: Path):
    with pytest.raises(LDMQError, match="not quantized.*LDM-Q Quantize"):
        load(folder_of(float_unet(), tmp_path))


def test_the_bundled_model_is_for_the_pipeline_loader(comfy: ModuleType, tmp_path: Path):
    unet = UNet2DConditionModel.from_pretrained(demo_model(), subfolder="unet")
    table, layers = layer_table(unet), quantizable_layers(unet)
    choices = {i.name: LayerChoice("float" if i.keep_float else "w8a16", "test") for i in table.layers}
    plan = Plan(table.denoiser, table.fingerprint, "test", choices)
    states = {name: layer_state(name, layers[name], parse_scheme(s), None) for name, s in plan.quantized().items()}
    attach(quantize(unet, Calibration(plan, states, "none", "none", 0, 0, 0)))
    with pytest.raises(LDMQError, match="LDM-Q Pipeline loader"):
        load(folder_of(unet, tmp_path))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_transformers_are_refused_in_words(kind: str, comfy: ModuleType, tmp_path: Path):
    MAKERS[kind]().save_pretrained(tmp_path)
    with pytest.raises(LDMQError, match="q, k and v are one layer.*LDM-Q Pipeline loader"):
        load(tmp_path)


def test_what_is_no_pipeline_is_refused(comfy: ModuleType, folder: Path, tmp_path: Path):
    with pytest.raises(LDMQError, match="no diffusers pipeline folder"):
        load(tmp_path)
    with pytest.raises(LDMQError, match="no such folder"):
        load(tmp_path / "absent")
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(LDMQError, match="not quantized"):
        load(tmp_path)


def test_a_damaged_file_is_refused(comfy: ModuleType, tmp_path: Path):
    folder = folder_of(quantized_unet("w8a16"), tmp_path)
    file = next((folder / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(LDMQError, match="cannot be loaded"):
        load(folder)
