"""Every kind of pipeline is quantized, draws, is saved, and opens in every way that people open pipelines."""

import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoModel,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
)
from tiny_pipelines import INPUTS, MAKERS, picture
from torch import Tensor

from diffusers_ldmq import QuantizedLDMPipeline
from diffusers_ldmq.families import find_denoiser
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.planners import fp32_bytes

NAMES = sorted(MAKERS)
OWN_INPUTS = [name for name in NAMES if name not in ("controlnet", "img2img", "inpaint")]


@dataclass(frozen=True)
class Made:
    """A float folder, the pipeline quantized from it, the folder that saved, and the pictures of both."""

    float_folder: Path
    pipe: Any
    folder: Path
    float_picture: Tensor
    picture: Tensor


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """name -> its folders, made once; tests must change neither them nor the pipeline."""
    done: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in done:
            root = tmp_path_factory.mktemp(name)
            original = MAKERS[name]()
            original.save_pretrained(root / "float")
            pipe = QuantizedLDMPipeline.from_pretrained(root / "float", inputs=INPUTS[name])
            drawn = picture(pipe, name)
            pipe.save_pretrained(root / "quantized")
            done[name] = Made(root / "float", pipe, root / "quantized", picture(original, name), drawn)
        return done[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_it_is_quantized_saved_and_opened_by_plain_diffusers_with_the_same_picture(name: str, made: Any) -> None:
    it = made(name)
    assert torch.equal(picture(DiffusionPipeline.from_pretrained(it.folder), name), it.picture)
    assert not torch.equal(it.float_picture, it.picture)
    assert sqnr(it.float_picture, it.picture) > 30
    layers = quantized_layers(find_denoiser(it.pipe)[1])
    assert layers.keys() == it.pipe.plan.quantized().keys()
    assert {layer.scheme.name for layer in layers.values()} == set(it.pipe.plan.quantized().values())


@pytest.mark.parametrize("name", NAMES)
def test_the_folder_names_the_base_class_and_loads_as_both(name: str, made: Any) -> None:
    """G32: 'QuantizedLDMPipeline' in model_index.json is a class that plain diffusers does not have."""
    it = made(name)
    index = json.loads((it.folder / "model_index.json").read_text())
    assert index["_class_name"] == type(MAKERS[name]()).__name__
    assert index == json.loads((it.float_folder / "model_index.json").read_text()) | {"_name_or_path": "float"}
    loaded = QuantizedLDMPipeline.from_pretrained(it.folder)
    assert isinstance(loaded, QuantizedLDMPipeline)
    assert isinstance(loaded, type(MAKERS[name]()))
    assert (loaded.plan, loaded.report, loaded.profile) == (it.pipe.plan, it.pipe.report, it.pipe.profile)
    assert torch.equal(picture(loaded, name), it.picture)


@pytest.mark.parametrize("name", NAMES)
def test_uniform_plan_and_calibration_and_all_integers(name: str, made: Any) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(
        made(name).float_folder, plan="uniform", calibration="uniform", inputs=INPUTS[name]
    )
    assert pipe.plan.planner == "uniform"
    assert pipe.profile is None
    assert set(pipe.plan.quantized().values()) == {"w8a8"}
    assert len(pipe.plan.quantized()) == len(pipe.plan.layers)
    assert pipe.report.int8_macs == 1.0
    assert sqnr(made(name).float_picture, picture(pipe, name)) > 20


@pytest.mark.parametrize("name", NAMES)
def test_the_built_class_is_copied_pickled_and_saved_again(name: str, made: Any, tmp_path: Path) -> None:
    it = made(name)
    fresh = QuantizedLDMPipeline.from_pretrained(it.folder)  # text encoders of transformers, once used, do not pickle
    for copied in (deepcopy(it.pipe), pickle.loads(pickle.dumps(fresh))):  # noqa: S301
        assert type(copied) is type(it.pipe)
        assert copied.plan == it.pipe.plan
        assert find_denoiser(copied)[1] is not find_denoiser(it.pipe)[1]
        assert torch.equal(picture(copied, name), it.picture)
    deepcopy(it.pipe).save_pretrained(tmp_path)
    for path in it.folder.rglob("*"):
        if path.is_file():
            assert (tmp_path / path.relative_to(it.folder)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("name", NAMES)
def test_sharded_variant_and_mapped_checkpoints_draw_the_same_picture(name: str, made: Any, tmp_path: Path) -> None:
    it = made(name)
    component = find_denoiser(it.pipe)[0]
    it.pipe.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded" / component).glob("*-of-*.safetensors"))) > 1
    assert torch.equal(picture(DiffusionPipeline.from_pretrained(tmp_path / "sharded"), name), it.picture)
    it.pipe.save_pretrained(tmp_path / "variant", variant="int8")
    assert list((tmp_path / "variant" / component).glob("*.int8.safetensors"))
    assert torch.equal(
        picture(DiffusionPipeline.from_pretrained(tmp_path / "variant", variant="int8"), name), it.picture
    )
    mapped = AutoModel.from_pretrained(str(it.folder), subfolder=component, device_map="cpu")
    pipe = DiffusionPipeline.from_pretrained(it.folder, **{component: mapped})
    assert torch.equal(picture(pipe, name), it.picture)


def models(pipe: Any) -> dict[str, Any]:
    """The components that are models."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


@dataclass
class Call:
    """The last call of a denoiser: its arguments and what it gave."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    output: Any = None

    def keep(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.args, self.kwargs, self.output = args, kwargs, output


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, nested as they may be, in `dtype`; timesteps and the like stay."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.ndim > 1 else value
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    return type(value)(cast(item, dtype) for item in value) if isinstance(value, (list, tuple)) else value


def output(model: Any, call: Call) -> Tensor:
    """What a model of whatever dtype gives for that call."""
    with torch.no_grad():
        return model(*cast(call.args, model.dtype), **cast(call.kwargs, model.dtype))[0].float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_at_another_dtype_codes_and_scales_are_the_same_and_the_output_is_near(
    name: str, dtype: torch.dtype, made: Any
) -> None:
    """35 dB, or less where the float model itself is not as near in that dtype, or the quantized one to the float one:
    random weights make some of these models so sensitive."""
    it = made(name)
    component, denoiser = find_denoiser(it.pipe)
    call = Call()
    hook = denoiser.register_forward_hook(call.keep, with_kwargs=True)
    picture(it.pipe, name)
    hook.remove()
    other: Any = AutoModel.from_pretrained(str(it.folder), subfolder=component, torch_dtype=dtype)
    assert other.dtype == dtype
    layers = quantized_layers(other)
    for layer, original in quantized_layers(denoiser).items():
        for tensor, value in original.state().tensors().items():
            if not tensor.startswith(("bias", "low_rank")):
                again = layers[layer].state().tensors()[tensor]
                assert again.dtype == value.dtype
                assert torch.equal(again, value), (layer, tensor)
    there = AutoModel.from_pretrained(str(it.float_folder), subfolder=component)
    cast_float = AutoModel.from_pretrained(str(it.float_folder), subfolder=component, torch_dtype=dtype)
    float_db = sqnr(output(there, call), output(cast_float, call))
    assert sqnr(call.output[0], output(other, call)) >= min(35, float_db - 1, it.pipe.report.sqnr_db - 1)


@pytest.mark.parametrize("name", NAMES)
def test_a_dict_of_dtypes_reaches_each_component(name: str, made: Any) -> None:
    it = made(name)
    component = find_denoiser(it.pipe)[0]
    dtypes = {component: torch.float32, "default": torch.bfloat16}
    for kind in (DiffusionPipeline, QuantizedLDMPipeline):
        pipe = kind.from_pretrained(it.folder, torch_dtype=dtypes)
        found = {n: model.dtype for n, model in models(pipe).items()}
        assert found.pop(component) == torch.float32
        assert set(found.values()) <= {torch.bfloat16}


AUTOS = {
    "controlnet": AutoPipelineForText2Image,
    "flux": AutoPipelineForText2Image,
    "img2img": AutoPipelineForImage2Image,
    "inpaint": AutoPipelineForInpainting,
    "pixart": AutoPipelineForText2Image,
    "sd": AutoPipelineForText2Image,
    "sd3": AutoPipelineForText2Image,
    "sdxl": AutoPipelineForText2Image,
}


@pytest.mark.parametrize("name", AUTOS)
def test_auto_pipelines_open_it(name: str, made: Any) -> None:
    it = made(name)
    pipe = AUTOS[name].from_pretrained(it.folder)
    assert type(pipe) is type(MAKERS[name]())
    assert torch.equal(picture(pipe, name), it.picture)


@pytest.mark.parametrize("name", ["flux", "sd", "sd3", "sdxl"])
@pytest.mark.parametrize("auto", [AutoPipelineForImage2Image, AutoPipelineForInpainting])
def test_auto_pipelines_take_its_components_and_give_them_back(auto: Any, name: str, made: Any) -> None:
    it = made(name)
    component, denoiser = find_denoiser(it.pipe)
    there = auto.from_pipe(it.pipe)
    assert getattr(there, component) is denoiser
    assert type(there).__name__ != type(it.pipe).__name__
    back = AutoPipelineForText2Image.from_pipe(there)
    assert type(back) is type(MAKERS[name]())
    assert torch.equal(picture(back, name), it.picture)


@pytest.mark.parametrize("name", NAMES)
def test_from_pipe_makes_both_classes_of_any_quantized_pipeline_and_copies_nothing(name: str, made: Any) -> None:
    """G26: diffusers' own from_pipe casts everything to fp32."""
    it = made(name)
    plain = DiffusionPipeline.from_pretrained(it.folder)
    both = QuantizedLDMPipeline.from_pipe(plain)
    assert type(both) is type(it.pipe)
    assert all(both.components[n] is model for n, model in models(plain).items())
    assert both.plan is None
    again = QuantizedLDMPipeline.from_pipe(it.pipe)
    assert again.plan == it.pipe.plan
    assert again.config["_name_or_path"] == it.pipe.config["_name_or_path"]
    assert torch.equal(picture(both, name), it.picture)


@pytest.mark.parametrize("name", NAMES)
def test_from_pipe_quantizes_a_float_pipeline_and_leaves_it_as_it_was(name: str, made: Any) -> None:
    it = made(name)
    original = DiffusionPipeline.from_pretrained(it.float_folder)
    component, denoiser = find_denoiser(original)
    weights = {key: value.clone() for key, value in denoiser.state_dict().items()}
    pipe = QuantizedLDMPipeline.from_pipe(original, it.pipe.plan, inputs=INPUTS[name])
    assert torch.equal(picture(pipe, name), it.picture)
    assert find_denoiser(original)[1] is denoiser
    assert not quantized_layers(denoiser)
    assert all(torch.equal(value, weights[key]) for key, value in denoiser.state_dict().items())
    assert torch.equal(picture(original, name), it.float_picture)
    shared = {n for n, model in models(original).items() if pipe.components[n] is model}
    assert shared == models(original).keys() - {component}


@pytest.mark.parametrize("name", OWN_INPUTS)
def test_without_inputs_it_finds_its_own(name: str, made: Any) -> None:
    common: Any = {"inputs": None if "prompt" not in INPUTS[name][0] else [f"a {n} thing" for n in range(4)]}
    if name in ("flux", "pixart", "sd3"):  # their own default size is 1024 pixels
        common = {"inputs": [{**entry, "seed": index} for index, entry in enumerate(INPUTS[name])]}
    pipe = QuantizedLDMPipeline.from_pretrained(made(name).float_folder, "uniform", steps=2, scheme="w8a16", **common)
    assert pipe.report.sqnr_db > 35


@pytest.mark.parametrize(("name", "target"), [("dit", "size<=0.45x"), ("sd", "sqnr>=38dB")])
def test_a_target_holds_in_what_is_measured_at_the_end(name: str, target: str, made: Any) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(
        made(name).float_folder, plan="budget", target=target, inputs=INPUTS[name]
    )
    if name == "sd":
        assert pipe.report.sqnr_db >= 38
    else:
        assert pipe.report.bytes <= 0.45 * fp32_bytes(pipe.profile.table)
