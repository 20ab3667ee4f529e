"""Pipelines are loaded and saved completely or not at all, and what is saved tells nothing of this machine."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from tiny_pipelines import MAKERS, picture

from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.folders import as_saved, denoiser_loader, load_pipeline, save_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion on disk; tests must not change it."""
    folder = tmp_path_factory.mktemp("float") / "model"
    MAKERS["sd"]().save_pretrained(folder)
    return folder


def test_a_pipeline_loads_as_its_own_class_or_the_one_asked_for(folder: Path) -> None:
    pipe = load_pipeline(folder)
    assert type(pipe) is type(MAKERS["sd"]())
    assert torch.equal(picture(pipe, "sd"), picture(MAKERS["sd"](), "sd"))
    assert type(load_pipeline(folder, kind=StableDiffusionImg2ImgPipeline)) is StableDiffusionImg2ImgPipeline


def test_what_diffusers_says_of_a_broken_folder_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(LDMQError, match="cannot be loaded as a diffusers pipeline") as caught:
        load_pipeline(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_denoiser_is_loaded_anew_each_time(folder: Path) -> None:
    load = denoiser_loader(folder)
    first: Any
    second: Any
    first, second = load(), load()
    assert first is not second
    assert torch.equal(first.conv_in.weight, second.conv_in.weight)


def test_no_saved_file_tells_the_users_paths_and_the_pipeline_stays_as_it_was(folder: Path, tmp_path: Path) -> None:
    pipe: Any = load_pipeline(folder)
    before = {name: part.config.get("_name_or_path") for name, part in (("unet", pipe.unet), ("vae", pipe.vae))}
    assert all(str(folder) in path for path in before.values())
    save_pipeline(pipe, tmp_path / "saved")
    for name in ("unet", "vae", "scheduler"):
        for path in (tmp_path / "saved" / name).glob("*.json"):
            assert str(folder) not in path.read_text()
    assert {"unet": pipe.unet.config["_name_or_path"], "vae": pipe.vae.config["_name_or_path"]} == before


def test_models_are_written_in_the_dtype_that_loads_best(folder: Path, tmp_path: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16).to(torch.float32)
    pipe.text_encoder.to(torch.float16)
    with as_saved(pipe):
        assert pipe.vae.dtype == torch.float16  # its values fit
        assert pipe.text_encoder.dtype == torch.float32
    assert pipe.vae.dtype == torch.float32
    assert pipe.text_encoder.dtype == torch.float16
    exact: Any = load_pipeline(folder)  # values that 16 bits do not hold
    with as_saved(exact):
        assert exact.vae.dtype == torch.float32
