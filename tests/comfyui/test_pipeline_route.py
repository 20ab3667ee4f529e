"""The Diffusers route without a server: stops that leave nothing, memory that runs out, and what is said of it."""

from pathlib import Path
from typing import Any

import pytest
from tiny_pipelines import tiny_sd

from comfyui_nodes.pipelines import LoadedPipeline, save


class Stopped(BaseException):
    """As ComfyUI's interrupt is."""


def test_saving_is_told_before_every_model_and_never_after_the_folder_stands(tmp_path: Path) -> None:
    told = []

    def progress(done: int, total: int) -> None:
        assert not (tmp_path / "saved").exists()
        told.append((done, total))

    pipe = tiny_sd()
    save(LoadedPipeline(pipe, "tiny"), tmp_path / "saved", progress)
    assert told == [(0, 3), (1, 3), (2, 3)], "text encoder, UNet and autoencoder"
    assert (tmp_path / "saved" / "model_index.json").is_file()
    assert "save_pretrained" not in vars(pipe.unet)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_stop_while_saving_leaves_nothing_and_the_pipeline_can_be_saved_again(tmp_path: Path, at: int) -> None:
    def progress(done: int, total: int) -> None:
        if done == at:
            raise Stopped

    loaded = LoadedPipeline(tiny_sd(), "tiny")
    with pytest.raises(Stopped):
        save(loaded, tmp_path / "saved", progress)
    assert list(tmp_path.iterdir()) == []
    save(loaded, tmp_path / "saved", lambda done, total: None)
    assert (tmp_path / "saved" / "unet" / "config.json").is_file()
