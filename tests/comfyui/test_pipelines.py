"""What stands behind the pipeline nodes, without ComfyUI."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import tiny_dit, tiny_pixel

from comfyui_nodes import pipelines, previews
from comfyui_nodes.interrupting import interruptible
from comfyui_nodes.pipelines import LoadedPipeline, Order, Wish, image_tensor, load, sample, save, told_of, unused
from comfyui_nodes.presets import PRESETS
from comfyui_nodes.previews import previewer_of
from diffusers_ldmq.errors import LDMQError, PlanError

QUIET: Any = lambda *told: None  # noqa: E731
BUNDLED = Order("emoji-sd", None, dtype="float32")
APPLE = Wish("red apple", "", 3, 5.0, 1)


class Stopped(BaseException):
    """As ComfyUI's interrupt: no Exception."""


@pytest.fixture(scope="module")
def bundled() -> LoadedPipeline:
    with torch.inference_mode():
        return load(BUNDLED, QUIET, QUIET)


def folder(kind: str, path: Path) -> str:
    {"pixel": tiny_pixel, "dit": tiny_dit}[kind]().save_pretrained(path / kind)
    return str(path / kind)


def test_pictures_do_not_depend_on_their_batch_and_previews_come_with_each_step(bundled: LoadedPipeline) -> None:
    steps: list[Any] = []
    with torch.inference_mode():
        pair = sample(bundled, replace(APPLE, count=2), lambda *told: steps.append(told), QUIET)
        second = sample(bundled, replace(APPLE, seed=2), QUIET, QUIET)
    assert pair.shape == (2, 64, 64, 3)
    assert pair.dtype == torch.float32
    assert 0 <= pair.min() < pair.max() <= 1
    torch.testing.assert_close(pair[1], second[0], atol=2 / 255, rtol=0)
    assert [(done, total) for done, total, _ in steps] == [(1, 3), (2, 3), (3, 3)]
    last = image_tensor([steps[-1][2]])[0]
    assert last.shape == (64, 64, 3)
    assert (last - pair[0]).abs().mean() < 0.01, "the last preview is the picture"


def test_a_linear_preview_shows_the_picture_too(bundled: LoadedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(previews, "SMALL_AUTOENCODER", 0)
    steps: list[Any] = []
    picture = sample(bundled, replace(APPLE, steps=8), lambda *told: steps.append(told), QUIET)
    small = image_tensor([steps[-1][2]])
    assert small.shape == (1, 16, 16, 3)
    wanted = torch.nn.functional.adaptive_avg_pool2d(picture.movedim(-1, 1), 16).movedim(1, -1)
    correlation = torch.corrcoef(torch.stack([small.flatten(), wanted.flatten()]))[0, 1]
    assert correlation > 0.8


def test_negative_prompts_and_sizes_change_the_picture(bundled: LoadedPipeline) -> None:
    plain = sample(bundled, APPLE, QUIET, QUIET)
    assert not torch.equal(plain, sample(bundled, replace(APPLE, negative="green leaf"), QUIET, QUIET))
    assert sample(bundled, replace(APPLE, width=96, height=32), QUIET, QUIET).shape == (1, 32, 96, 3)


def test_a_preset_quantizes_and_a_saved_pipeline_draws_the_same(tmp_path: Path) -> None:
    stages: set[str] = set()
    order = replace(BUNDLED, preset=PRESETS["Balanced"], steps=3)
    with torch.inference_mode():
        made = load(order, lambda stage, done, whole: stages.add(stage), QUIET)
    assert {"loading", "record", "profile", "calibrate", "verify"} <= stages
    assert "w8a8" in told_of(made)
    assert "takes a prompt" in told_of(made)
    save(made, tmp_path / "saved", QUIET)
    with torch.inference_mode():
        loaded = load(replace(order, model=str(tmp_path / "saved")), QUIET, QUIET)
        assert torch.equal(sample(made, APPLE, QUIET, QUIET), sample(loaded, APPLE, QUIET, QUIET))
    assert told_of(loaded).splitlines()[1:] == told_of(made).splitlines()[1:]
    for other in (replace(order, target="sqnr>=30dB"), replace(order, plan=made.pipe.plan)):
        with pytest.raises(LDMQError, match="is quantized already, and a (target|plan)"):
            load(replace(other, model=str(tmp_path / "saved")), QUIET, QUIET)


def test_a_float_pipeline_is_saved_as_one(tmp_path: Path, bundled: LoadedPipeline) -> None:
    save(bundled, tmp_path / "float", QUIET)
    assert not pipelines.is_quantized(load(replace(BUNDLED, model=str(tmp_path / "float")), QUIET, QUIET))
    assert "not quantized" in told_of(bundled)


def test_a_preset_whose_size_cannot_be_had_still_works(tmp_path: Path) -> None:
    small = replace(PRESETS["Smallest"], target="size<=0.1x")
    order = Order(folder("pixel", tmp_path), small, steps=2)
    assert pipelines.is_quantized(load(order, QUIET, QUIET))
    with pytest.raises(PlanError, match="cannot be met"):
        load(replace(order, target="size<=0.1x"), QUIET, QUIET)


def test_a_target_with_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(LDMQError, match="a target .* is given, but quantize says no"):
        load(replace(BUNDLED, target="sqnr>=30dB"), QUIET, QUIET)


def test_pipelines_without_prompts(tmp_path: Path) -> None:
    pixel = load(Order(folder("pixel", tmp_path), None), QUIET, QUIET)
    assert "no prompt" in told_of(pixel)
    assert "cfg is not used" in unused(pixel)
    steps: list[Any] = []
    wish = replace(APPLE, prompt="", count=2)
    assert sample(pixel, wish, lambda *told: steps.append(told), QUIET).shape[0] == 2
    assert steps[-1][:2] == (3, 3)
    assert steps[1][2] is not None, "pixels are shown as they are"
    with pytest.raises(LDMQError, match="empty the prompt field"):
        sample(pixel, replace(wish, prompt="red apple"), QUIET, QUIET)
    with pytest.raises(LDMQError, match="empty the negative field"):
        sample(pixel, replace(wish, negative="blue"), QUIET, QUIET)
    with pytest.raises(LDMQError, match="set width to 0"):
        sample(pixel, replace(wish, width=64), QUIET, QUIET)


def test_class_labels(tmp_path: Path) -> None:
    dit = load(Order(folder("dit", tmp_path), None), QUIET, QUIET)
    assert "class label" in told_of(dit)
    assert unused(dit) == ""
    assert sample(dit, replace(APPLE, prompt=" 3 "), QUIET, QUIET).shape[0] == 1
    for prompt, words in (("", "needs a class label"), ("apple", "neither a number nor a known name")):
        with pytest.raises(LDMQError, match=words):
            sample(dit, replace(APPLE, prompt=prompt), QUIET, QUIET)


def test_what_a_pipeline_itself_refuses_is_one_line(bundled: LoadedPipeline) -> None:
    with pytest.raises(LDMQError, match="cannot draw this: .*1001") as refused:
        sample(bundled, replace(APPLE, steps=1001), QUIET, QUIET)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("calls", [1, 40, 300])
def test_stopping_ends_a_step_half_way_and_leaves_the_pipeline_usable(bundled: LoadedPipeline, calls: int) -> None:
    before, left = sample(bundled, APPLE, QUIET, QUIET), [calls]

    def check() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped

    done: list[int] = []
    with pytest.raises(Stopped):
        sample(bundled, replace(APPLE, steps=50), lambda *told: done.append(told[0]), check)
    assert len(done) < 10
    assert torch.equal(sample(bundled, APPLE, QUIET, QUIET), before)


def test_only_the_thread_that_asked_is_checked() -> None:
    import threading

    seen: list[int] = []
    layer = torch.nn.Linear(2, 2)
    with interruptible(lambda: seen.append(1)):
        other = threading.Thread(target=layer, args=(torch.ones(1, 2),))
        other.start()
        other.join()
        assert seen == []
        layer(torch.ones(1, 2))
        assert seen == [1]
    layer(torch.ones(1, 2))
    assert seen == [1]


def test_packed_or_broken_latents_have_no_preview(bundled: LoadedPipeline) -> None:
    show: Callable[..., Any] | None = previewer_of(bundled.pipe)
    assert show is not None
    assert show(torch.zeros(1, 64, 16)) is None
    assert show(torch.full((1, 4, 16, 16), float("nan"))) is None
    buffer = io.BytesIO()
    picture = show(torch.zeros(2, 4, 16, 16))
    assert picture is not None
    picture.save(buffer, "JPEG")
    assert buffer.tell() > 100
