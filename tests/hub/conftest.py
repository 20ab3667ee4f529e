"""A hub on this machine, an empty cache, and a tiny quantized pipeline to share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from local_hub import LocalHub
from tiny_pipelines import tiny_pixel

from diffusers_ldmq import QuantizedLDMPipeline

from ..cli.conftest import ldmq

__all__ = ["ldmq"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """The hub that this process talks to, logged in as 'me', with an empty cache."""
    hub = LocalHub()
    server = hub.start()
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(tmp_path / "token"),  # nobody's own login
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Make this process forget what it downloaded; the new cache's folder."""
    made: list[Path] = []

    def forget() -> Path:
        made.append(tmp_path / f"cache-{len(made)}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made[-1]))
        return made[-1]

    return forget


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub waits between its attempts; the tests do not."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture(scope="session")
def secret_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name must never reach the hub."""
    return tmp_path_factory.mktemp("home-of-jane-doe")


@pytest.fixture(scope="session")
def float_folder(secret_folder: Path) -> Path:
    """A float pixel pipeline."""
    pipe = tiny_pixel()
    pipe.save_pretrained(secret_folder / "float")
    return secret_folder / "float"


@pytest.fixture(scope="session")
def made(float_folder: Path) -> Path:
    """That pipeline, quantized and saved as a user would; tests must not change it."""
    pipe = QuantizedLDMPipeline.from_pretrained(float_folder, steps=2)
    pipe.save_pretrained(float_folder.parent / "quantized")
    return float_folder.parent / "quantized"


@pytest.fixture
def pipe(made: Path) -> Any:
    """It, loaded."""
    pipe = QuantizedLDMPipeline.from_pretrained(made)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def picture() -> Callable[[Any], torch.Tensor]:
    """pipeline -> what it draws from seed 0, [1, 8, 8, 3]."""

    def draw(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipe(batch_size=1, generator=generator, num_inference_steps=2, output_type="numpy").images
        return torch.as_tensor(images)

    return draw
