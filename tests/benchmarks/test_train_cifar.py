"""The CIFAR-10 training scripts through their command lines: models that load, interruption, resumption, refusals."""

import json
import shutil
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
from diffusers_ldmq.extractors.classifier import load_classifier

CLASSIFIER = Path(__file__).parents[2] / "benchmarks" / "models" / "cifar-classifier"
TINY = ("width=16", "batch=2", "warmup=2", "checkpoint_every=2", "device=cpu")
CLASSES = ("cat", "dog")
STEPS = 5  # the fifth begins the second epoch of eight pictures
SCRIPTS = ("cifar_classifier", "cifar_ddim", "cifar_latent", "cifar_unconditional")
Script = Callable[[str], ModuleType]


@pytest.fixture(scope="module")
def sorted_pictures(tmp_path_factory: pytest.TempPathFactory, draw_picture: Callable[[Path, int], None]) -> Path:
    """Four pictures of each of two classes."""
    folder = tmp_path_factory.mktemp("sorted")
    for index in range(8):
        place = folder / CLASSES[index % 2]
        place.mkdir(exist_ok=True)
        draw_picture(place / f"{index}.png", index)
    return folder


@pytest.fixture(scope="module")
def trained(
    training_script: Script, sorted_pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The output folder of a script that was never interrupted."""
    done: dict[str, Path] = {}

    def output_of(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp(name)
            result = train(training_script(name), sorted_pictures, done[name])
            assert result.exit_code == 0, result.output
        return done[name]

    return output_of


@pytest.fixture
def resumed(
    training_script: Script,
    sorted_pictures: Path,
    tmp_path: Path,
    interrupted: Callable[[int], AbstractContextManager[None]],
) -> Callable[[str, int], Path]:
    """The output folder of a script that was interrupted after so many steps of its first stage."""

    def output_of(name: str, steps: int) -> Path:
        script = training_script(name)
        with interrupted(steps):
            assert train(script, sorted_pictures, tmp_path).exit_code != 0
        assert train(script, sorted_pictures, tmp_path).exit_code == 0
        return tmp_path

    return output_of


def train(script: ModuleType, data: Path, out: Path, *changes: str, steps: int = STEPS) -> Any:
    """Runs a script: its state goes to out/state, its model to out/model."""
    arguments = {"cifar_classifier": [data, data], "cifar_latent": ["all", data]}.get(script.__name__, [data])
    init = [f"init={demo_model()}"] if script.__name__ == "cifar_unconditional" else []  # its autoencoder
    options = [part for change in (*TINY, *init, *changes) for part in ("--set", change)]
    folders = ["--state", out / "state", "--model", out / "model", "--steps", steps]
    return CliRunner().invoke(script.app, [str(part) for part in (*arguments, *folders, *options)])


def loaded(model: Path) -> Any:
    pipeline: Any = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_ddim_pipeline_draws(trained: Callable[[str], Path]) -> None:
    pipeline = loaded(trained("cifar_ddim") / "model")
    drawn = pipeline(num_inference_steps=2, output_type="np").images
    assert type(pipeline).__name__ == "DDIMPipeline"
    assert drawn.shape == (1, 32, 32, 3)
    assert np.isfinite(drawn).all()


def test_the_unconditional_pipeline_draws(trained: Callable[[str], Path]) -> None:
    pipeline = loaded(trained("cifar_unconditional") / "model")
    drawn = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert type(pipeline).__name__ == "LDMPipeline"
    assert drawn.shape == (2, 32, 32, 3)
    assert np.isfinite(drawn).all()


def test_the_unconditional_model_takes_the_autoencoder_of_the_state_before_that_of_init(
    training_script: Script, sorted_pictures: Path, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    parts = tmp_path / "state" / "parts"
    shutil.copytree(trained("cifar_latent") / "state" / "parts" / "vae", parts / "vae")
    result = train(training_script("cifar_unconditional"), sorted_pictures, tmp_path, steps=1)
    assert result.exit_code == 0, result.output
    weights = "diffusion_pytorch_model.safetensors"
    used, given = load_file(tmp_path / "model" / "vqvae" / weights), load_file(parts / "vae" / weights)
    assert all(torch.equal(used[name], given[name].half()) for name in given)


def test_latents_are_kept_and_made_anew_for_another_autoencoder(
    training_script: Script, sorted_pictures: Path, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    script, kept = training_script("cifar_unconditional"), tmp_path / "state" / "latents.safetensors"
    assert train(script, sorted_pictures, tmp_path, steps=1).exit_code == 0
    first = kept.stat().st_ino
    assert train(script, sorted_pictures, tmp_path, steps=2).exit_code == 0
    assert kept.stat().st_ino == first  # a file that was written again is another file
    (tmp_path / "state" / "unconditional.safetensors").unlink()
    shutil.copytree(trained("cifar_latent") / "state" / "parts" / "vae", tmp_path / "state" / "parts" / "vae")
    old = load_file(kept)["latents"]
    assert train(script, sorted_pictures, tmp_path, steps=1).exit_code == 0
    assert not torch.equal(load_file(kept)["latents"], old)


def test_without_an_autoencoder_the_unconditional_model_is_refused(
    training_script: Script, sorted_pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = training_script("cifar_unconditional")
    monkeypatch.setattr(script, "AUTOENCODER", tmp_path / "absent")
    result = train(script, sorted_pictures, tmp_path, "init=")
    assert result.exit_code == 2
    assert "no vae in" in result.output


def test_the_class_conditional_pipeline_draws_by_name(trained: Callable[[str], Path]) -> None:
    pipeline = loaded(trained("cifar_latent") / "model")
    labels = pipeline.get_label_ids(["dog", "cat"])
    drawn = pipeline(labels, num_inference_steps=2, output_type="np").images
    assert type(pipeline).__name__ == "DiTPipeline"
    assert labels == [1, 0]
    assert drawn.shape == (2, 32, 32, 3)
    assert np.isfinite(drawn).all()


def test_the_classifier_is_described_and_has_features(training_script: Script, trained: Callable[[str], Path]) -> None:
    model = trained("cifar_classifier") / "model"
    network = load_classifier(model)
    config = json.loads((model / "config.json").read_text())
    pooled, spatial = network.features(torch.zeros(3, 3, 32, 32))
    assert config["class_names"] == list(CLASSES)
    assert 0 <= config["test_accuracy"] <= 1
    assert pooled.shape == (3, config["features"])
    assert spatial.shape == (3, config["widths"][1], 7, 7)


@pytest.mark.parametrize("name", SCRIPTS)
def test_models_are_float16_and_name_no_path(name: str, trained: Callable[[str], Path]) -> None:
    model = trained(name) / "model"
    for weights in model.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(weights).values()} <= {torch.float16, torch.int64}
    for config in model.rglob("*.json"):
        assert str(trained(name)) not in config.read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_resumed_equals_uninterrupted_bit_for_bit(
    name: str,
    trained: Callable[[str], Path],
    resumed: Callable[[str, int], Path],
    same_weights: Callable[[Path, Path], list[Path]],
) -> None:
    assert same_weights(trained(name), resumed(name, 3))


@pytest.mark.parametrize("name", ["cifar_ddim", "cifar_latent", "cifar_unconditional"])
def test_a_constant_rate_lets_a_finished_run_go_on(
    name: str,
    training_script: Script,
    sorted_pictures: Path,
    trained: Callable[[str], Path],
    tmp_path: Path,
    same_weights: Callable[[Path, Path], list[Path]],
) -> None:
    script, steps = training_script(name), STEPS
    if name == "cifar_latent":  # whose autoencoder's rate falls
        assert train_stage(script, "vae", sorted_pictures, tmp_path, steps).exit_code == 0
        assert train_stage(script, "denoiser", sorted_pictures, tmp_path, 2).exit_code == 0
        assert train_stage(script, "denoiser", sorted_pictures, tmp_path, steps).exit_code == 0
    else:
        assert train(script, sorted_pictures, tmp_path, steps=2).exit_code == 0
        assert train(script, sorted_pictures, tmp_path, steps=steps).exit_code == 0
    assert same_weights(trained(name), tmp_path)


def train_stage(script: ModuleType, stage: str, data: Path, out: Path, steps: int) -> Any:
    options = [part for change in TINY for part in ("--set", change)]
    folders = ["--state", out / "state", "--model", out / "model", "--steps", steps]
    return CliRunner().invoke(script.app, [str(part) for part in (stage, data, *folders, *options)])


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_state_training_starts_from_the_model(
    name: str, training_script: Script, sorted_pictures: Path, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    script, model = training_script(name), tmp_path / "model"
    assert train(script, sorted_pictures, tmp_path).exit_code == 0
    (tmp_path / "state").rename(tmp_path / "elsewhere")
    (model / "README.md").write_text("kept")
    assert train(script, sorted_pictures, tmp_path, "rate=1e-12", steps=1).exit_code == 0
    for weights in (trained(name) / "model").rglob("*.safetensors"):
        before = load_file(weights)
        after = load_file(model / weights.relative_to(trained(name) / "model"))
        assert all(torch.allclose(after[key], before[key], atol=1e-2) for key in before if "running" not in key)
    assert (model / "README.md").read_text() == "kept"


def test_other_settings_are_refused(
    training_script: Script, sorted_pictures: Path, trained: Callable[[str], Path]
) -> None:
    result = train(training_script("cifar_ddim"), sorted_pictures, trained("cifar_ddim"), "rate=0.5")
    assert result.exit_code == 2
    assert "was made with rate=0.0008, not 0.5" in result.output


def test_pictures_outside_of_a_class_are_refused(training_script: Script, pictures: Path, tmp_path: Path) -> None:
    result = train(training_script("cifar_ddim"), pictures, tmp_path)
    assert result.exit_code == 2
    assert "0.png is in no folder; expected a folder per class" in result.output


def test_other_test_classes_are_refused(
    training_script: Script,
    sorted_pictures: Path,
    tmp_path: Path,
    draw_picture: Callable[[Path, int], None],
) -> None:
    (tmp_path / "horse").mkdir()
    draw_picture(tmp_path / "horse" / "0.png", 0)
    arguments = [str(sorted_pictures), str(tmp_path), "--state", str(tmp_path / "state")]
    result = CliRunner().invoke(training_script("cifar_classifier").app, arguments)
    assert result.exit_code == 2
    assert "differ" in result.output


def test_velocity_loss_is_zero_for_the_velocity_and_weighs_noise_less(training_script: Script) -> None:
    diffusion = training_script("cifar_diffusion")
    weights = diffusion.loss_weights()
    kept = diffusion.NOISING.alphas_cumprod.double()
    snr = kept / (1 - kept)
    torch.testing.assert_close(weights.double(), snr.clamp(max=5) / (snr + 1), rtol=1e-4, atol=1e-6)
    # a network that knows the clean pictures (all zero) reads the noise from the noisy ones
    clean = torch.zeros(4, 3, 8, 8)

    def ideal(noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        scale = diffusion.NOISING.alphas_cumprod[times].view(-1, 1, 1, 1)
        return scale.sqrt() * noisy / (1 - scale).sqrt()

    loss = diffusion.velocity_loss(ideal, clean, torch.Generator().manual_seed(0))
    assert loss < 1e-8


def test_moved_pictures_stay_pictures(training_script: Script) -> None:
    classifier = training_script("cifar_classifier")
    picture = torch.arange(3 * 32 * 32, dtype=torch.float32).view(1, 3, 32, 32).expand(64, -1, -1, -1)
    moved = classifier.moved(picture, torch.Generator().manual_seed(0))
    centre = slice(8, 24)
    assert moved.shape == picture.shape
    # within a row neighbours differ by one, to the right or, flipped, to the left
    steps = (moved[..., centre, 1:] - moved[..., centre, :-1])[..., centre]
    assert set(steps.unique().tolist()) == {-1.0, 1.0}
    assert len({row.numpy().tobytes() for row in moved}) > 20


def test_the_committed_classifier_has_features(training_script: Script) -> None:
    network = load_classifier(CLASSIFIER)
    config = json.loads((CLASSIFIER / "config.json").read_text())
    pooled, spatial = network.features(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert config["test_accuracy"] >= 0.88
    assert (pooled.shape, spatial.shape) == ((4, 256), (4, 192, 7, 7))
    assert pooled.isfinite().all()
    assert (pooled.std(0) > 0).float().mean() > 0.9  # features that answer to the picture
