"""QuantizedLDMPipeline computes, loads, saves and pickles; unusable models end in one clear line."""

import json
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DiffusionPipeline,
    PipelineQuantizationConfig,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.hooks import apply_group_offloading
from tiny_pipelines import INPUTS, MAKERS
from tiny_pipelines import picture as draw
from torch import Tensor

from diffusers_ldmq import LDMQConfig, Plan, QuantizedLDMPipeline, Report, make_plan
from diffusers_ldmq.checkpoints import stored_config
from diffusers_ldmq.demo import demo_model
from diffusers_ldmq.errors import LDMQError, OutputError, PlanError, RecordingError
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.job import Settings, quantize_pipeline
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.pipeline import load_pipeline, save_pipeline
from diffusers_ldmq.recording import record_calls

Make = Callable[[str], Any]


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float pixel pipeline on disk."""
    from diffusers import DDIMScheduler, UNet2DModel

    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
    )
    folder = tmp_path_factory.mktemp("float") / "model"
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    return folder


@pytest.fixture(scope="module")
def quantized_pixel(float_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That pipeline, quantized and saved; tests must not change it."""
    folder = tmp_path_factory.mktemp("quantized") / "model"
    QuantizedLDMPipeline.from_pretrained(float_folder, "uniform", steps=2).save_pretrained(folder)
    return folder


def picture(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=1, generator=generator, num_inference_steps=2, output_type="numpy").images
    return torch.as_tensor(images)


def test_a_float_model_is_quantized_saved_and_loaded_with_the_same_pictures(float_folder: Path, tmp_path: Path) -> None:
    computed = QuantizedLDMPipeline.from_pretrained(float_folder, steps=2)
    assert computed.plan is not None
    assert computed.plan.planner == "hybrid"
    assert computed.report is not None
    assert computed.profile is not None
    computed.save_pretrained(tmp_path)
    loaded = QuantizedLDMPipeline.from_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    assert torch.equal(picture(computed), picture(loaded))
    assert torch.equal(picture(computed), picture(plain))
    assert (loaded.plan, loaded.report, loaded.profile) == (computed.plan, computed.report, computed.profile)


def test_the_bundled_model_is_loaded_and_draws(quantized_folder: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(quantized_folder)
    assert isinstance(pipe, StableDiffusionPipeline)
    pipe.set_progress_bar_config(disable=True)
    made: Any = pipe("red apple", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    image = made.images[0]
    assert image.size == (64, 64)
    assert image.getextrema() != ((0, 0),) * 3
    assert pipe.report is not None
    assert pipe.report.sqnr_db > 35


def test_it_is_of_both_classes_under_the_base_classs_name(quantized_pixel: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(quantized_pixel)
    assert isinstance(pipe, QuantizedLDMPipeline)
    assert isinstance(pipe, DDPMPipeline)
    assert type(pipe).__name__ == "DDPMPipeline"
    assert type(pipe).__module__ == DDPMPipeline.__module__
    assert type(pipe) is type(QuantizedLDMPipeline.from_pretrained(quantized_pixel))


def test_the_folder_names_the_base_class_and_holds_plan_and_report(quantized_pixel: Path) -> None:
    index = json.loads((quantized_pixel / "model_index.json").read_text())
    assert index["_class_name"] == "DDPMPipeline"
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert Plan.load(quantized_pixel / "plan.json").planner == "uniform"
    assert Report.load(quantized_pixel / "report.json").int8_macs == 1.0
    assert not (quantized_pixel / "profile.json").exists()


def test_it_survives_pickle(quantized_pixel: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(quantized_pixel)
    expected = picture(pipe)  # packs the codes first
    copied = pickle.loads(pickle.dumps(pipe))  # noqa: S301
    assert type(copied) is type(pipe)
    assert copied.plan == pipe.plan
    assert torch.equal(picture(copied), expected)


def test_a_loaded_pipeline_saves_the_same_bytes_again(quantized_pixel: Path, tmp_path: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(quantized_pixel)
    picture(pipe)
    pipe.save_pretrained(tmp_path)
    for name in ("unet/diffusion_pytorch_model.safetensors", "plan.json", "report.json"):
        assert (tmp_path / name).read_bytes() == (quantized_pixel / name).read_bytes()


def test_a_pipeline_passes_shards_and_variant_on_to_its_quantized_part(quantized_pixel: Path, tmp_path: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(quantized_pixel)
    pipe.save_pretrained(tmp_path, max_shard_size="10KB", variant="int8")
    names = {path.name for path in (tmp_path / "unet").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.int8.json" in names
    assert len(names) > 3
    assert all("int8" in name for name in names - {"config.json"})
    assert torch.equal(picture(QuantizedLDMPipeline.from_pretrained(tmp_path, variant="int8")), picture(pipe))


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_it_loads_at_the_verified_dtype_unless_told_otherwise(
    dtype: Any, expected: torch.dtype, quantized_pixel: Path
) -> None:
    assert QuantizedLDMPipeline.from_pretrained(quantized_pixel, dtype=dtype).unet.dtype == expected


def test_a_dtype_goes_by_its_name_too(quantized_pixel: Path, float_folder: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(quantized_pixel, torch_dtype="bfloat16")
    assert pipe.unet.dtype == torch.bfloat16
    assert QuantizedLDMPipeline.from_pipe(pipe, dtype="bfloat16").unet is pipe.unet
    computed = QuantizedLDMPipeline.from_pretrained(float_folder, "uniform", dtype="bfloat16", steps=2)
    assert computed.unet.dtype == torch.bfloat16
    with pytest.raises(LDMQError, match="dtype is 'bf16'; expected a floating one"):
        QuantizedLDMPipeline.from_pretrained(quantized_pixel, dtype="bf16")


def test_steps_are_for_quantizing_and_cache_and_progress_harm_nobody(quantized_pixel: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(quantized_pixel, cache=False, progress=lambda *told: None)
    with pytest.raises(LDMQError, match="is quantized already; leave plan and target, steps out to load it"):
        QuantizedLDMPipeline.from_pretrained(quantized_pixel, steps=2)
    with pytest.raises(LDMQError, match="is quantized already; leave steps out to share"):
        QuantizedLDMPipeline.from_pipe(pipe, steps=2)


def test_a_model_quantized_in_bf16_is_loaded_in_bf16(float_folder: Path, tmp_path: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(float_folder, "uniform", steps=2, torch_dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16
    pipe.save_pretrained(tmp_path)
    assert QuantizedLDMPipeline.from_pretrained(tmp_path).unet.dtype == torch.bfloat16


@pytest.mark.parametrize("arguments", [{"plan": "hybrid"}, {"target": "sqnr>=25dB"}])
def test_a_plan_or_target_for_a_quantized_checkpoint_names_the_original(
    arguments: dict[str, Any], quantized_folder: Path
) -> None:
    with pytest.raises(LDMQError, match=r"is quantized already; leave plan and target out .*original float model"):
        QuantizedLDMPipeline.from_pretrained(quantized_folder, **arguments)


@pytest.mark.parametrize("form", ["name", "object", "file"])
def test_a_plan_is_a_planners_name_a_plan_or_a_file(form: str, float_folder: Path, tmp_path: Path) -> None:
    unet = DiffusionPipeline.from_pretrained(float_folder).unet
    plan = make_plan(layer_table(unet), planner="uniform")
    plan.save(tmp_path / "plan.json")
    given: Any = {"name": "uniform", "object": plan, "file": tmp_path / "plan.json"}[form]
    pipe = QuantizedLDMPipeline.from_pretrained(float_folder, given, steps=2)
    assert pipe.plan == plan
    assert len(quantized_layers(pipe.unet)) == len(plan.layers)


def test_a_plan_that_is_neither_file_nor_planner_is_refused(float_folder: Path) -> None:
    with pytest.raises(PlanError, match=r"absent\.json: no such file"):
        QuantizedLDMPipeline.from_pretrained(float_folder, "absent.json")
    with pytest.raises(LDMQError, match="unknown planner 'best'; known: budget, hybrid, uniform"):
        QuantizedLDMPipeline.from_pretrained(float_folder, "best")


def test_inputs_are_prompts_or_arguments(float_folder: Path) -> None:
    inputs = [{"batch_size": 1, "num_inference_steps": 1, "seed": seed} for seed in range(4)]
    settings = Settings(planner="uniform", scheme="w8a16")
    pipe = QuantizedLDMPipeline.from_pretrained(float_folder, inputs=inputs, settings=settings)
    assert pipe.plan.counts() == {"w8a16": len(pipe.plan.layers)}
    assert len(pipe.report.timesteps) == 1
    with pytest.raises(RecordingError, match="takes no prompts"):
        QuantizedLDMPipeline.from_pretrained(float_folder, inputs=["red apple"])


def test_an_unknown_keyword_is_refused(float_folder: Path) -> None:
    with pytest.raises(LDMQError, match="takes no keyword 'tagret'.*no such component; it has scheduler, unet"):
        QuantizedLDMPipeline.from_pretrained(float_folder, tagret="size<=0.3x")


@pytest.mark.parametrize(
    ("model", "match"),
    [
        ("/no/such/folder", "no such folder; give a local pipeline folder or a hub id such as owner/name"),
        ("./absent", "no such folder"),
        ("absent", "no such folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_an_unknown_model_is_refused_without_a_download(model: str, match: str) -> None:
    with pytest.raises(LDMQError, match=match):
        load_pipeline(model)


@pytest.mark.parametrize("model", [None, 5])
def test_a_model_that_is_neither_folder_nor_hub_id_is_refused(model: Any) -> None:
    with pytest.raises(LDMQError, match=f"the model is of type {type(model).__name__}, .*a pipeline in memory is for"):
        QuantizedLDMPipeline.from_pretrained(model)


def test_folders_that_are_no_pipeline_are_refused(make: Make, tmp_path: Path) -> None:
    with pytest.raises(LDMQError, match="is no diffusers pipeline folder"):
        load_pipeline(tmp_path)
    with pytest.raises(LDMQError, match="is no diffusers pipeline folder"):
        load_pipeline(demo_model() / "unet")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(LDMQError, match="cannot be loaded as a diffusers pipeline"):
        load_pipeline(tmp_path)


def test_a_pipeline_without_a_denoiser_is_refused(float_folder: Path, make: Make, tmp_path: Path) -> None:
    make("dit").vae.save_pretrained(tmp_path / "unet")
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.38.0", "unet": ["diffusers", "AutoencoderKL"]}
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    DiffusionPipeline.from_pretrained(float_folder).scheduler.save_pretrained(tmp_path / "scheduler")
    with pytest.raises(RecordingError, match="DDPMPipeline has no denoiser that can be quantized"):
        load_pipeline(tmp_path)


def test_a_damaged_checkpoint_ends_in_one_line(quantized_pixel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(quantized_pixel, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LDMQError) as caught:
        QuantizedLDMPipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_stored_config_is_found_only_in_checkpoints_of_ours(quantized_pixel: Path, float_folder: Path) -> None:
    config = stored_config(quantized_pixel)
    assert config is not None
    assert config["quant_method"] == "ldmq"
    assert stored_config(float_folder) is None


def test_a_dequantized_pipeline_shows_and_saves_no_plan(quantized_pixel: Path, tmp_path: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(quantized_pixel)
    pipe.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "report.json").exists()
    pipe.unet.dequantize()
    assert (pipe.plan, pipe.report, pipe.profile) == (None, None, None)
    pipe.save_pretrained(tmp_path / "model")  # over what it was
    assert [path.name for path in (tmp_path / "model").glob("*.json")] == ["model_index.json"]
    assert stored_config(tmp_path / "model") is None


def test_a_plan_of_other_schemes_than_the_layers_have_is_not_shown(quantized_pixel: Path, float_folder: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(quantized_pixel)
    other = load_pipeline(float_folder)
    pipe.unet = QuantizedLDMPipeline.from_pipe(other, "uniform", scheme="w8a16", steps=2).unet
    assert (pipe.plan, pipe.report) == (None, None)
    pipe.unet = None  # to free its memory, say
    assert pipe.plan is None


def test_what_was_measured_before_a_lora_was_fused_is_not_said_of_the_sum(quantized_sd: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe = deepcopy(quantized_sd)
    pipe.save_pretrained(tmp_path / "model")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    assert pipe.plan == quantized_sd.plan  # attached, its layers are what they were
    pipe.fuse_lora()
    assert pipe.report is None
    pipe.unfuse_lora()
    assert pipe.report == quantized_sd.report
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert pipe.report is None
    assert pipe.plan == quantized_sd.plan
    assert QuantizedLDMPipeline.from_pipe(pipe).report is None
    pipe.save_pretrained(tmp_path / "model")
    loaded = QuantizedLDMPipeline.from_pretrained(tmp_path / "model")
    assert loaded.report is None
    assert loaded.plan == quantized_sd.plan


def test_save_pretrained_ends_in_one_line_where_it_cannot_write(quantized_pixel: Path, tmp_path: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(quantized_pixel)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="file: is a file, a folder is expected"):
        pipe.save_pretrained(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be created, .*file is not a writable folder"):
        pipe.save_pretrained(tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text() == "mine"


def test_saving_that_is_interrupted_leaves_nothing(quantized_pixel: Path, tmp_path: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(quantized_pixel)

    class Stopping(type(pipe.scheduler)):
        def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    pipe.scheduler = Stopping.from_config(pipe.scheduler.config)
    with pytest.raises(KeyboardInterrupt):
        pipe.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_saving_never_touches_a_folder_with_content_unless_asked(quantized_pixel: Path, tmp_path: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(quantized_pixel)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        save_pipeline(pipe, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    save_pipeline(pipe, tmp_path, overwrite=True)
    assert not (tmp_path / "mine.txt").exists()
    assert (tmp_path / "model_index.json").is_file()


def test_keywords_of_settings_and_of_diffusers_are_taken_as_such(float_folder: Path, quantized_pixel: Path) -> None:
    common: Any = {"steps": 2, "local_files_only": True}
    pipe = QuantizedLDMPipeline.from_pretrained(float_folder, plan="uniform", scheme="w8a16", **common)
    assert pipe.plan is not None
    assert set(pipe.plan.quantized().values()) == {"w8a16"}
    assert QuantizedLDMPipeline.from_pretrained(quantized_pixel, local_files_only=True).report is not None
    with pytest.raises(LDMQError, match="quantized already; leave plan and target, corrections out to load it"):
        QuantizedLDMPipeline.from_pretrained(quantized_pixel, corrections="auto")


def test_the_bundled_models_word_stands_for_it(tmp_path: Path) -> None:
    assert isinstance(load_pipeline("emoji-sd"), StableDiffusionPipeline)
    assert stored_config("emoji-sd") is None


@pytest.fixture(scope="module")
def float_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion on disk; tests must not change it."""
    folder = tmp_path_factory.mktemp("sd") / "model"
    MAKERS["sd"]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized_sd(float_sd: Path) -> Any:
    """That model quantized; tests must not change it."""
    return QuantizedLDMPipeline.from_pretrained(float_sd, "uniform", inputs=INPUTS["sd"])


def parts(pipe: Any) -> dict[str, Any]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def test_diffusers_own_from_pipe_takes_and_gives_back_a_quantized_pipeline(quantized_sd: Any) -> None:
    """G26: X.from_pipe(quantized) casts to fp32 unless told otherwise."""
    there = StableDiffusionImg2ImgPipeline.from_pipe(quantized_sd)
    assert type(there) is StableDiffusionImg2ImgPipeline
    assert parts(there) == parts(quantized_sd)
    assert draw(there, "img2img").isfinite().all()
    back = StableDiffusionPipeline.from_pipe(there)
    assert torch.equal(draw(back, "sd"), draw(quantized_sd, "sd"))


def test_from_pipe_of_a_bf16_model_needs_its_dtype_in_diffusers_and_nothing_in_ours(float_sd: Path) -> None:
    """G26: without torch_dtype= diffusers asks for fp32, which a quantized model refuses in words."""
    pipe = QuantizedLDMPipeline.from_pretrained(float_sd, "uniform", inputs=INPUTS["sd"], dtype=torch.bfloat16)
    with pytest.raises(
        LDMQError, match="is not cast to torch.float32: .* from_pipe casts unless told torch_dtype=torch.bfloat16"
    ):
        StableDiffusionImg2ImgPipeline.from_pipe(deepcopy(pipe))  # diffusers casts the others before it comes to ours
    told = StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16)
    both = QuantizedLDMPipeline.from_pipe(told)
    assert parts(told) == parts(both) == parts(pipe)
    assert isinstance(both, StableDiffusionImg2ImgPipeline)
    assert {part.dtype for part in parts(both).values()} == {torch.bfloat16}
    assert draw(both, "img2img").isfinite().all()


def test_a_built_class_makes_its_own_kind_of_any_pipeline(quantized_sd: Any, float_sd: Path) -> None:
    there = QuantizedLDMPipeline.from_pipe(StableDiffusionImg2ImgPipeline.from_pipe(quantized_sd))
    back = type(quantized_sd).from_pipe(there)
    assert type(back) is type(quantized_sd)
    assert parts(back) == parts(quantized_sd)
    other = type(there).from_pretrained(float_sd, "uniform", inputs=INPUTS["img2img"])
    assert type(other) is type(there)
    quantized = type(there).from_pipe(MAKERS["sd"](), "uniform", inputs=INPUTS["img2img"])
    assert type(quantized) is type(there)
    assert torch.equal(draw(quantized, "img2img"), draw(other, "img2img"))


def test_what_quantizes_is_refused_for_a_quantized_pipeline(quantized_sd: Any) -> None:
    with pytest.raises(LDMQError, match="is quantized already; leave plan, target, prompts out to share"):
        QuantizedLDMPipeline.from_pipe(quantized_sd, "hybrid", "sqnr>=30dB", prompts=["red apple"])
    with pytest.raises(LDMQError, match=r"is quantized at torch\.float32 and cannot be cast; load its checkpoint with"):
        QuantizedLDMPipeline.from_pipe(quantized_sd, dtype=torch.bfloat16)
    assert QuantizedLDMPipeline.from_pipe(quantized_sd, dtype=torch.float32).unet is quantized_sd.unet


def test_a_model_in_place_of_a_pipeline_is_refused(quantized_sd: Any) -> None:
    with pytest.raises(LDMQError, match="from_pipe takes a pipeline, found UNet2DConditionModel"):
        QuantizedLDMPipeline.from_pipe(quantized_sd.unet)


def test_a_compiled_quantized_pipeline_is_shared_and_saved(float_sd: Path, tmp_path: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(float_sd, "uniform", inputs=INPUTS["sd"])
    plan, pictured = pipe.plan, draw(pipe, "sd")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    shared = QuantizedLDMPipeline.from_pipe(pipe)
    assert shared.unet is pipe.unet
    assert shared.plan == pipe.plan == plan
    with pytest.raises(LDMQError, match="is quantized already; leave plan out"):
        QuantizedLDMPipeline.from_pipe(pipe, "uniform")
    shared.save_pretrained(tmp_path / "model")
    for config in (tmp_path / "model").glob("*/config.json"):
        assert str(float_sd) not in config.read_text()
    loaded = QuantizedLDMPipeline.from_pretrained(tmp_path / "model")
    assert loaded.plan == plan
    assert torch.equal(draw(loaded, "sd"), pictured)


def test_a_compiled_float_pipeline_is_quantized_before_it_is_compiled() -> None:
    pipe = MAKERS["sd"]()
    pipe.vae = torch.compile(pipe.vae, backend="eager")
    quantized = QuantizedLDMPipeline.from_pipe(pipe, "uniform", inputs=INPUTS["sd"], dtype=torch.bfloat16)
    assert {part.dtype for part in parts(quantized).values()} == {torch.bfloat16}
    assert {part.dtype for part in parts(pipe).values()} == {torch.float32}
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    message = r"the unet is compiled by torch\.compile: quantize first and compile .* is pipe\.unet\._orig_mod"
    with pytest.raises(LDMQError, match=message):
        QuantizedLDMPipeline.from_pipe(pipe, "uniform", inputs=INPUTS["sd"])
    with pytest.raises(LDMQError, match=message):
        quantize_pipeline(pipe, INPUTS["sd"], Settings(planner="uniform"))
    with pytest.raises(RecordingError, match=message):
        record_calls(pipe, INPUTS["sd"])


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_what_is_offloaded_is_not_copied_to_be_quantized(component: str) -> None:
    pipe = MAKERS["sd"]()
    cpu = torch.device("cpu")
    apply_group_offloading(getattr(pipe, component), cpu, cpu, offload_type="leaf_level")
    with pytest.raises(
        LDMQError, match=r"is under group offloading \(enable_group_offload\).*; load it again, quantize"
    ):
        QuantizedLDMPipeline.from_pipe(pipe, "uniform", inputs=INPUTS["sd"], dtype=torch.bfloat16)


def test_components_given_to_from_pipe_are_checked_by_name(quantized_sd: Any) -> None:
    with pytest.raises(LDMQError, match="takes no keyword 'vea'.*it has .*unet, vae"):
        QuantizedLDMPipeline.from_pipe(quantized_sd, vea=quantized_sd.vae)
    vae = MAKERS["sd"]().vae
    assert QuantizedLDMPipeline.from_pipe(quantized_sd, vae=vae).vae is vae


def test_a_plan_of_another_denoiser_is_not_carried_over(quantized_sd: Any) -> None:
    assert QuantizedLDMPipeline.from_pipe(quantized_sd).plan == quantized_sd.plan
    other = deepcopy(quantized_sd.unet)
    assert QuantizedLDMPipeline.from_pipe(quantized_sd, unet=other).plan is None


def test_quantizing_a_pipe_with_corrections_and_a_dtype_changes_nothing_of_it() -> None:
    pipe = MAKERS["sd"]()
    before = {(n, k): v.clone() for n, part in parts(pipe).items() for k, v in part.state_dict().items()}
    owned = parts(pipe)
    made = QuantizedLDMPipeline.from_pipe(
        pipe, inputs=INPUTS["sd"], corrections="auto", corrected_layers=2, dtype=torch.bfloat16
    )
    assert {part.dtype for part in parts(made).values()} == {torch.bfloat16}
    assert parts(pipe) == owned
    for name, part in parts(pipe).items():
        for key, value in part.state_dict().items():
            assert value.dtype == before[name, key].dtype
            assert torch.equal(value, before[name, key]), (name, key)
    assert not quantized_layers(pipe.unet)


def test_a_quantization_config_with_an_unknown_component_is_refused_and_one_for_the_vae_is_kept(float_sd: Path) -> None:
    def config(name: str) -> Any:
        mapping: Any = {name: LDMQConfig("w8a16")}
        return PipelineQuantizationConfig(quant_mapping=mapping)

    common: Any = {"plan": "uniform", "inputs": INPUTS["sd"]}
    with pytest.raises(LDMQError, match="names a component 'uent', which .* lacks; it has .*unet, vae"):
        QuantizedLDMPipeline.from_pretrained(float_sd, **common, quantization_config=config("uent"))
    with pytest.raises(LDMQError, match="names 'unet', the denoiser"):
        QuantizedLDMPipeline.from_pretrained(float_sd, **common, quantization_config=config("unet"))
    pipe = QuantizedLDMPipeline.from_pretrained(float_sd, **common, quantization_config=config("vae"))
    assert quantized_layers(pipe.vae)
    assert quantized_layers(pipe.unet)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_a_folder_with_another_model_quantized_is_quantized_in_bf16(
    component: str, float_sd: Path, tmp_path: Path
) -> None:
    mapping: Any = {component: LDMQConfig("w8a16")}
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    DiffusionPipeline.from_pretrained(float_sd, quantization_config=config).save_pretrained(tmp_path)
    before = quantized_layers(getattr(load_pipeline(tmp_path), component))
    common: Any = {"inputs": INPUTS["sd"], "dtype": torch.bfloat16}
    pipe = QuantizedLDMPipeline.from_pretrained(tmp_path, "uniform", **common)
    assert {part.dtype for part in parts(pipe).values()} == {torch.bfloat16}
    now = quantized_layers(getattr(pipe, component))
    assert now.keys() == before.keys()
    for name, layer in now.items():
        assert torch.equal(layer.state().weight, before[name].state().weight)
        assert torch.equal(layer.state().weight_scale, before[name].state().weight_scale)
    assert draw(pipe, "sd").isfinite().all()


def test_a_component_that_the_class_has_and_the_folder_lacks_may_be_given(float_sd: Path, tmp_path: Path) -> None:
    shutil.copytree(float_sd, tmp_path / "old")
    index = json.loads((tmp_path / "old" / "model_index.json").read_text())
    index.pop("image_encoder")
    (tmp_path / "old" / "model_index.json").write_text(json.dumps(index))
    common: Any = {"plan": "uniform", "inputs": INPUTS["sd"]}
    assert QuantizedLDMPipeline.from_pretrained(tmp_path / "old", **common, image_encoder=None).image_encoder is None
