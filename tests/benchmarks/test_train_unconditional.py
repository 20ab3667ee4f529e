"""The unconditional training script through its command line, and the model that it made."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffusers_ldmq.demo import demo_model

MODEL = Path(__file__).parents[2] / "benchmarks" / "models" / "emoji-unconditional"
TINY = ("width=16", "batch=2", "warmup=2", "checkpoint_every=2", "device=cpu")


@pytest.fixture(scope="module")
def script(training_script: Callable[[str], ModuleType]) -> ModuleType:
    return training_script("unconditional")


@pytest.fixture(scope="module")
def uninterrupted(script: ModuleType, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training in one go."""
    out = tmp_path_factory.mktemp("uninterrupted")
    result = train(script, pictures, out)
    assert result.exit_code == 0, result.output
    return out


def train(script: ModuleType, data: Path, out: Path, *changes: str) -> Any:
    options = [part for change in (*TINY, *changes) for part in ("--set", change)]
    return CliRunner().invoke(script.app, [str(data), str(out), "--steps", "4", *options])


def drawn_by(folder: Path, steps: int) -> np.ndarray:
    """A picture of the pipeline in `folder`: float32 [1, 64, 64, 3] between 0 and 1."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    assert type(pipeline).__name__ == "LDMPipeline"
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(generator=generator, num_inference_steps=steps, output_type="np").images


def test_the_pipeline_draws(uninterrupted: Path) -> None:
    drawn = drawn_by(uninterrupted / "pipeline", steps=2)
    assert drawn.shape == (1, 64, 64, 3)
    assert np.isfinite(drawn).all()


def test_resumed_equals_uninterrupted_bit_for_bit(
    script: ModuleType,
    pictures: Path,
    uninterrupted: Path,
    tmp_path: Path,
    interrupted: Callable[[int], AbstractContextManager[None]],
    same_weights: Callable[[Path, Path], list[Path]],
) -> None:
    with interrupted(3):
        assert train(script, pictures, tmp_path).exit_code != 0
    assert train(script, pictures, tmp_path).exit_code == 0
    compared = same_weights(uninterrupted, tmp_path)
    assert len(compared) == 1 + 1 + 2  # of checkpoints, parts and the pipeline


def test_the_starting_pipeline_gives_its_autoencoder_alone(script: ModuleType, pictures: Path, tmp_path: Path) -> None:
    result = train(script, pictures, tmp_path, f"init={demo_model()}")
    assert result.exit_code == 0, result.output
    weights = "diffusion_pytorch_model.safetensors"
    kept, given = load_file(tmp_path / "pipeline" / "vqvae" / weights), load_file(demo_model() / "vae" / weights)
    assert all(torch.equal(kept[name], given[name]) for name in given)
    assert not (tmp_path / "parts" / "vae").exists()


def test_a_start_without_an_autoencoder_is_refused(script: ModuleType, pictures: Path, tmp_path: Path) -> None:
    result = train(script, pictures, tmp_path, f"init={tmp_path}")
    assert result.exit_code == 2
    assert f"error: init {tmp_path} is not a pipeline folder" in result.output


def test_the_committed_model_draws() -> None:
    drawn = drawn_by(MODEL, steps=8)
    assert drawn.shape == (1, 64, 64, 3)
    assert np.isfinite(drawn).all()
    assert drawn.std() > 0.1  # neither blank nor washed out
