"""The Diffusers route on a real server: the bundled model quantized, drawn, saved and loaded; stopped; misused."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from comfyui.server.comfy_server import Server
from comfyui.server.facts import Facts
from comfyui.server.images import pictures, psnr
from comfyui.server.prompts import changed, float_start, node_of, small_run, workflow
from PIL import Image

STOP_SECONDS = 1.0
QUANTIZING = {"quantize": "Balanced", "dtype": "float32"}
SAVE = "ldmq_pipeline_save"


def saving(prompt: dict[str, Any], prefix: str) -> dict[str, Any]:
    loader = node_of(prompt, "ldmq_pipeline_loader")
    return {**prompt, "90": {"class_type": SAVE, "inputs": {"pipeline": [loader, 0], "filename_prefix": prefix}}}


@pytest.fixture(scope="module")
def quick_start(server: Server) -> Any:
    """(what the quick start gave, events on the way)"""
    with server.listen() as listener:
        ran = server.run(workflow("quick_start_bundled_model"))
    assert ran.error is None, ran.error
    return ran, listener


def test_the_quick_start_draws_red_apples_like_the_float_model(server: Server, quick_start: Any, facts: Facts) -> None:
    made = pictures(server, quick_start[0].outputs)
    assert [picture.shape for picture in made] == [(64, 64, 3)] * 4
    plain = server.run(changed(workflow("quick_start_bundled_model"), "ldmq_pipeline_loader", quantize="no, as it is"))
    distances = [psnr(a, b) for a, b in zip(made, pictures(server, plain.outputs), strict=True)]
    for picture in made:
        assert picture.std() > 0.1, "neither black nor grey"
        middle = picture[20:52, 16:48].mean(axis=(0, 1))
        assert middle[0] > 0.6
        assert middle[0] > 1.5 * middle[2], "an apple is red"
        smooth = np.abs(np.diff(picture, axis=0)).mean()
        assert smooth < 0.1, "no noise"
    assert min(distances) > 20
    told = f"{quick_start[0].seconds:.0f} s the first time; PSNR to the float model's pictures"
    facts.add("quick start on the bundled model, as it is", f"{told} {min(distances):.1f} dB or more")


def test_stages_and_previews_are_told_on_the_way(quick_start: Any) -> None:
    listener = quick_start[1]
    texts = b" ".join(listener.of("text")).decode(errors="replace")
    for stage in ("record", "profile", "verify"):
        assert stage in texts, f"{stage} was never named"
    assert "Sampling" in texts
    previews = listener.of("preview")
    assert len(previews) >= 10
    sizes = {Image.open(io.BytesIO(picture[4:])).size for picture in previews}
    assert sizes == {(512, 512)}
    bars = [data for data in listener.of("progress") if data["max"] == 10]
    assert bars[-1]["value"] == 10


def test_the_same_again_is_loaded_not_computed(server: Server, quick_start: Any, facts: Facts) -> None:
    again = changed(workflow("quick_start_bundled_model"), "ldmq_pipeline_sampler", prompt="green heart")
    ran = server.run(again)
    assert ran.error is None
    assert ran.seconds < quick_start[0].seconds / 3
    facts.add("another prompt on the same pipeline", f"{ran.seconds:.1f} s")


def test_a_saved_pipeline_is_listed_and_draws_the_same(server: Server, quick_start: Any, facts: Facts) -> None:
    prompt = saving(workflow("quick_start_bundled_model"), "tests/emoji")
    first = server.run(prompt)
    assert first.error is None
    folder = server.base / "models" / "ldmq_pipelines" / "tests" / "emoji_00001_"
    assert (folder / "model_index.json").is_file()
    assert (folder / "plan.json").is_file()
    assert not [path for path in folder.parent.rglob(".*")]
    listed = server.get("/object_info/ldmq_pipeline_loader")["ldmq_pipeline_loader"]["input"]["required"]["model"]
    choice = "ldmq_pipelines/tests/emoji_00001_"
    assert choice in listed[1]["options"]
    loaded = server.run(changed(workflow("quick_start_bundled_model"), "ldmq_pipeline_loader", model=choice))
    assert loaded.error is None
    distances = [
        psnr(a, b)
        for a, b in zip(pictures(server, quick_start[0].outputs), pictures(server, loaded.outputs), strict=True)
    ]
    assert min(distances) > 100, "saving and loading changes nothing"
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    facts.add("pipeline saved, listed, loaded again", f"the same pictures; {size / 1e6:.1f} MB")
    shutil.rmtree(folder)
    gone = server.refusals(changed(small_run(), "ldmq_pipeline_loader", model=choice))
    assert gone, "a combo does not take what is not listed"


def test_stopping_while_quantizing(survivor: Server, facts: Facts) -> None:
    begun = saving(changed(float_start(steps=7), "ldmq_pipeline_loader", **QUANTIZING), "never")
    for stage in ("record", "profile"):
        with survivor.listen() as listener:
            ident = survivor.queue(begun)
            listener.wait_for(stage)
            seconds, worked = survivor.stopped(ident)
        assert worked <= STOP_SECONDS
        facts.add(f"Stop in the stage '{stage}' of a pipeline", f"{seconds:.2f} s, {worked:.2f} of the CPU's")
    assert not (survivor.base / "models" / "ldmq_pipelines" / "never_00001_").exists()
    assert not [path for path in (survivor.base / "huggingface" / "ldmq").rglob("*.partial*")]


def test_stopping_while_sampling(survivor: Server, facts: Facts) -> None:
    with survivor.listen() as listener:
        ident = survivor.queue(changed(float_start(), "ldmq_pipeline_sampler", steps=900, batch_size=8, seed=77))
        listener.wait_for("Sampling")
        seconds, worked = survivor.stopped(ident)
    assert worked <= STOP_SECONDS
    facts.add("Stop while sampling a pipeline", f"{seconds:.2f} s, {worked:.2f} of the CPU's")


BAD = {
    "no such folder": ({"hub_id_or_folder": "/no/such/pipeline"}, "no such folder"),
    "no pipeline": ({"hub_id_or_folder": "/"}, "no model_index.json"),
    "no id": ({"hub_id_or_folder": "a b c"}, "hub id such as owner/name"),
    "not on this machine": ({"hub_id_or_folder": "nobody/nothing"}, "nobody/nothing"),
    "impossible target": ({"quantize": "Balanced", "target": "size<=0.01x"}, "cannot be met"),
    "unknown target": ({"quantize": "Balanced", "target": "beauty>=3"}, "beauty"),
    "target without quantizing": ({"target": "sqnr>=30dB"}, "choose Safe, Balanced or Smallest"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_clear_message_on_the_loader(survivor: Server, name: str) -> None:
    inputs, words = BAD[name]
    ran = survivor.run(changed(float_start(), "ldmq_pipeline_loader", **inputs))
    assert ran.error is not None
    assert ran.error["node_type"] == "ldmq_pipeline_loader"
    assert words in ran.message()
    assert len(ran.message().splitlines()) == 1
    assert len(ran.message()) < 500


@pytest.mark.parametrize("prefix", ["../../x", "/tmp/x", "", "a/../../../x", "..\\..\\x", ".hidden"])
def test_a_pipeline_is_never_saved_outside_of_its_folder(survivor: Server, prefix: str) -> None:
    before = everything(survivor.base)
    refused = survivor.refusals(saving(small_run(), prefix))
    assert refused["90"]["errors"]
    assert everything(survivor.base) == before


def everything(base: Path) -> set[Path]:
    """All folders of models, and what lies beside the server's own."""
    return {path for path in (*base.parent.glob("*"), *base.glob("*"), *(base / "models").rglob("*")) if path.is_dir()}


def test_a_pipeline_that_takes_no_prompt_says_so(survivor: Server, tmp_path: Path) -> None:
    from tiny_pipelines import tiny_pixel

    tiny_pixel().save_pretrained(tmp_path / "pixel")
    start = changed(float_start(), "ldmq_pipeline_loader", hub_id_or_folder=str(tmp_path / "pixel"))
    ran = survivor.run(start)
    assert ran.error is not None
    assert "takes neither prompts nor class labels; empty the prompt field" in ran.message()
    drawn = survivor.run(changed(start, "ldmq_pipeline_sampler", prompt=""))
    assert drawn.error is None
    assert len(pictures(survivor, drawn.outputs)) == 4


def test_weights_that_are_pickled_are_not_read(survivor: Server, tmp_path: Path) -> None:
    from tiny_pipelines import tiny_pixel

    tiny_pixel().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    ran = survivor.run(changed(float_start(), "ldmq_pipeline_loader", hub_id_or_folder=str(tmp_path / "pickled")))
    assert ran.error is not None
    assert "safetensors" in ran.message()
