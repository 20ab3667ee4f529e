"""The Diffusers route without a server: stops that leave nothing, memory that runs out, and what is said of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_sd

from comfyui_nodes.pipelines import LoadedPipeline, Order, Wish, bring_back, load, sample, save, told_of
from comfyui_nodes.presets import PRESETS
from diffusers_ldmq.errors import LDMQError


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


def test_out_of_memory_while_drawing_moves_the_pipeline_to_the_cpu(monkeypatch: Any) -> None:
    pipe, moved = tiny_sd(), []
    move = type(pipe).to

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        moved.append(args)
        return move(self, *args, **kwargs)

    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(type(pipe), "to", recorded)
    pipe.unet.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        sample(LoadedPipeline(pipe, "tiny"), Wish("x", "", 1, 1.0, 0), lambda *told: None, lambda: None)
    assert moved == [("cpu",)]


def test_a_pipeline_that_was_moved_away_comes_back_when_there_is_room() -> None:
    made = []
    pipe = tiny_sd()
    bring_back(LoadedPipeline(pipe, "tiny", "cpu"), lambda: made.append(pipe.device.type))
    assert made == [], "it is where it computes"
    bring_back(LoadedPipeline(pipe, "tiny", "meta"), lambda: made.append(pipe.device.type))
    assert made == ["cpu"], "room is made first"
    assert pipe.unet.device.type == pipe.vae.device.type == "meta"


@pytest.mark.parametrize("name", ["a" * 400, "owner/" + "a" * 400, "/" + "a" * 400, "a" * 5000])
def test_a_name_too_long_for_a_file_is_refused_in_words(name: str) -> None:
    with pytest.raises(LDMQError, match="no such folder|no hub id"):
        load(Order(model=name, preset=PRESETS["Safe"]), lambda *told: None, lambda: None)


def test_a_size_of_a_preset_that_cannot_be_met_is_told(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LDMQ_CACHE", "0")
    tiny_sd().save_pretrained(tmp_path / "tiny")
    impossible = replace(PRESETS["Safe"], target="size<=0.01x")
    order = Order(model=str(tmp_path / "tiny"), preset=impossible, steps=2, dtype="float32")
    text = told_of(load(order, lambda *told: None, lambda: None))
    assert "the preset's size<=0.01x cannot be met by this model; planned by the planner's own rule instead" in text
    assert "the preset's" not in told_of(
        load(replace(order, preset=PRESETS["Balanced"]), lambda *t: None, lambda: None)
    )
