"""The training script through its command line: every stage, interruption and resumption, and refused inputs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

TINY = ("width=16", "batch=2", "warmup=2", "checkpoint_every=2", "device=cpu")
STEPS = 4
STAGES = ("vae", "decoder", "unet")


@pytest.fixture(scope="module")
def script(training_script: Callable[[str], ModuleType]) -> ModuleType:
    return training_script("emoji_sd")


@pytest.fixture(scope="module")
def uninterrupted(script: ModuleType, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of all three stages in one go."""
    out = tmp_path_factory.mktemp("uninterrupted")
    result = train(script, "all", pictures, out)
    assert result.exit_code == 0, result.output
    return out


def train(script: ModuleType, stage: str, data: Path, out: Path, *changes: str) -> Any:
    options = [part for change in (*TINY, *changes) for part in ("--set", change)]
    return CliRunner().invoke(script.app, [stage, str(data), str(out), "--steps", str(STEPS), *options])


def refusal(result: Any) -> str:
    """The message of a run that must have ended with exit code 2 and a single line."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.output
    return lines[0].removeprefix("error: ")


def test_all_stages_save_a_pipeline_that_draws(uninterrupted: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(uninterrupted / "pipeline").to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("square number 3", num_inference_steps=2, output_type="np").images
    assert drawn.shape == (1, 64, 64, 3)
    assert np.isfinite(drawn).all()


def test_the_pipeline_is_float16_and_names_no_path(uninterrupted: Path) -> None:
    for weights in (uninterrupted / "pipeline").rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(weights).values()} <= {torch.float16, torch.int64}
    for config in (uninterrupted / "pipeline").rglob("*.json"):
        assert str(uninterrupted) not in config.read_text()


def test_the_pipeline_has_what_transformers_4_needs(uninterrupted: Path) -> None:
    pipeline = uninterrupted / "pipeline"
    assert (pipeline / "tokenizer" / "vocab.json").is_file()
    assert (pipeline / "tokenizer" / "merges.txt").is_file()
    names = load_file(pipeline / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)


def test_decoder_stage_keeps_the_encoder(uninterrupted: Path) -> None:
    trained_vae = load_file(uninterrupted / "checkpoints" / "vae.safetensors")
    final = load_file(uninterrupted / "parts" / "vae" / "diffusion_pytorch_model.safetensors")
    for name, value in final.items():
        fixed = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(value, trained_vae[f"average.{name}"]) == fixed, name


def test_resumed_equals_uninterrupted_bit_for_bit(
    script: ModuleType,
    pictures: Path,
    uninterrupted: Path,
    tmp_path: Path,
    interrupted: Callable[[int], AbstractContextManager[None]],
    same_weights: Callable[[Path, Path], list[Path]],
) -> None:
    for stage in STAGES:
        with interrupted(3):
            assert train(script, stage, pictures, tmp_path).exit_code != 0
        assert train(script, stage, pictures, tmp_path).exit_code == 0
    compared = same_weights(uninterrupted, tmp_path)
    assert len(compared) == 3 + 3 + 3  # of checkpoints, parts and the pipeline


def test_a_finished_stage_is_left_alone(script: ModuleType, pictures: Path, uninterrupted: Path) -> None:
    checkpoint = uninterrupted / "checkpoints" / "vae.safetensors"
    written = checkpoint.stat().st_mtime_ns
    assert train(script, "vae", pictures, uninterrupted).exit_code == 0
    assert checkpoint.stat().st_mtime_ns == written


def test_training_goes_on_from_a_pipeline(
    script: ModuleType, pictures: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    result = train(script, "unet", pictures, tmp_path, f"init={uninterrupted / 'pipeline'}", "rate=1e-5")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_resuming_with_other_settings_is_refused(script: ModuleType, pictures: Path, uninterrupted: Path) -> None:
    message = refusal(train(script, "vae", pictures, uninterrupted, "batch=3"))
    assert "was made with batch=2, not 3" in message


def test_resuming_with_other_data_is_refused(
    script: ModuleType, uninterrupted: Path, tmp_path: Path, draw_picture: Callable[[Path, int], None]
) -> None:
    draw_picture(tmp_path / "other.png", 9)
    (tmp_path / "other.txt").write_text("another square")
    message = refusal(train(script, "vae", tmp_path, uninterrupted))
    assert "was made with data=8 pictures" in message


def test_missing_data_is_refused(script: ModuleType, tmp_path: Path) -> None:
    message = refusal(train(script, "vae", tmp_path / "nowhere", tmp_path / "out"))
    assert message.endswith("nowhere does not exist: give a folder or zip file of captioned pictures")


def test_a_file_that_is_no_zip_is_refused(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_text("not a zip")
    message = refusal(train(script, "vae", tmp_path / "data.zip", tmp_path / "out"))
    assert "is neither a folder nor a zip file" in message


def test_an_empty_folder_is_refused(script: ModuleType, tmp_path: Path) -> None:
    assert refusal(train(script, "vae", tmp_path, tmp_path / "out")).startswith(f"no pictures in {tmp_path}")


def test_pictures_without_captions_are_refused(
    script: ModuleType, tmp_path: Path, draw_picture: Callable[[Path, int], None]
) -> None:
    for name in ("a", "b", "c"):
        draw_picture(tmp_path / f"{name}.png", 0)
    (tmp_path / "b.txt").write_text("the one with a caption")
    message = refusal(train(script, "vae", tmp_path, tmp_path / "out"))
    assert message.startswith(f"2 of 3 pictures in {tmp_path} have no caption (first: a.png)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("colour=red", "--set colour=red: expected name=value"),
        ("batch=many", "--set batch=many: expected a whole number"),
        ("width=20", "width must be a positive multiple of 16"),
        ("device=abacus", "device abacus cannot be used here"),
        ("init=nowhere", "init nowhere is not a pipeline folder"),
    ],
)
def test_wrong_settings_are_refused(
    script: ModuleType, pictures: Path, tmp_path: Path, change: str, message: str
) -> None:
    assert refusal(train(script, "vae", pictures, tmp_path, change)).startswith(message)


def test_a_stage_without_its_autoencoder_is_refused(script: ModuleType, pictures: Path, tmp_path: Path) -> None:
    assert refusal(train(script, "unet", pictures, tmp_path)).startswith("no vae in")


def test_a_damaged_checkpoint_is_refused(script: ModuleType, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vae.safetensors").write_bytes(b"half a file")
    assert "cannot be read: delete it" in refusal(train(script, "vae", pictures, tmp_path))
