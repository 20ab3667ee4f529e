"""Pictures in a folder: resumed as uninterrupted, the same for every way there, refused where settings differ."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import MAKERS, PROMPTS, tiny_ddim, tiny_dit, tiny_img2img, tiny_sd

from diffusers_ldmq.errors import EvaluationError, LDMQError
from diffusers_ldmq.generation import SETTINGS, model_digest, sample_images, steps_of, subjects_of
from diffusers_ldmq.sampling import Sampling, sample_pictures

TWO = Sampling(steps=2, batch=2)
SUBJECTS: dict[str, tuple[str, ...] | None] = {
    "ddim": None,
    "ddpm": None,
    "dit": ("7", "3", "1"),
    "ldm-uncond": None,
    "ldm-text": PROMPTS[:3],
    "sd": PROMPTS[:3],
}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


def interrupted_after(calls: int, pipe: Any) -> Any:
    """The pipeline, whose denoiser ends everything after so many calls."""
    made = 0

    def before(*_: object) -> None:
        nonlocal made
        made += 1
        if made > calls:
            raise Interrupted

    pipe.unet.register_forward_pre_hook(before)
    return pipe


@pytest.mark.parametrize("kind", SUBJECTS)
def test_every_kind_of_pipeline_draws_what_it_draws_elsewhere(kind: str, tmp_path: Path) -> None:
    pipe = MAKERS[kind]()
    found = sample_images(pipe, tmp_path / "out", 4, TWO, SUBJECTS[kind])
    turn: list[str | None] = list(SUBJECTS[kind] or [None])
    expected = sample_pictures(MAKERS[kind](), [turn[k % len(turn)] for k in range(4)], TWO)
    assert found.names == tuple(f"{k:06d}.png" for k in range(4))
    assert found.size == expected[0].size
    for name, picture in zip(found.names, expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(found.path / name)), np.asarray(picture.convert("RGB")))


def test_an_interrupted_run_goes_on_and_leaves_the_same_bytes(tmp_path: Path) -> None:
    sample_images(tiny_ddim(), tmp_path / "whole", 7, TWO)
    with pytest.raises(Interrupted):
        sample_images(interrupted_after(5, tiny_ddim()), tmp_path / "parts", 7, TWO)
    left = set(files(tmp_path / "parts"))
    assert left == {SETTINGS, *(f"{k:06d}.png" for k in range(4))}
    (tmp_path / "parts" / "000001.png").unlink()
    told: list[tuple[int, int]] = []
    sample_images(tiny_ddim(), tmp_path / "parts", 7, TWO, progress=lambda *done: told.append(done))
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert told == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_what_is_there_is_not_drawn_again(tmp_path: Path) -> None:
    sample_images(tiny_ddim(), tmp_path / "out", 4, TWO)
    again = sample_images(interrupted_after(0, tiny_ddim()), tmp_path / "out", 4, TWO)
    assert len(again) == 4
    with pytest.raises(Interrupted):
        sample_images(interrupted_after(0, tiny_ddim()), tmp_path / "out", 5, TWO)


def test_more_pictures_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    sample_images(tiny_ddim(), tmp_path / "grown", 4, TWO)
    sample_images(tiny_ddim(), tmp_path / "grown", 6, TWO)
    sample_images(tiny_ddim(), tmp_path / "whole", 6, TWO)
    assert files(tmp_path / "grown") == files(tmp_path / "whole")


def test_the_last_smaller_batch_stays_when_more_are_added(tmp_path: Path) -> None:
    sample_images(tiny_ddim(), tmp_path / "grown", 5, TWO)
    mark = b"drawn before"
    (tmp_path / "grown" / "000004.png").write_bytes(mark)
    sample_images(tiny_ddim(), tmp_path / "grown", 6, TWO)
    assert (tmp_path / "grown" / "000004.png").read_bytes() == mark
    assert (tmp_path / "grown" / "000005.png").is_file()


def test_a_picture_depends_on_its_own_seed_only(tmp_path: Path) -> None:
    one = sample_images(tiny_ddim(), tmp_path / "one", 4, TWO)
    other = sample_images(tiny_ddim(), tmp_path / "other", 3, Sampling(steps=2, batch=1, seed=1))
    first, second = (torch.cat(list(s.batches())).int() for s in (one, other))
    assert (first[1:] - second).abs().max() <= 1  # another batch, other kernels: a level at most
    assert (first[0] - second[0]).abs().max() > 1


OTHERWISE: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "seed": (lambda: {"sampling": replace(TWO, seed=1)}, "seed was 0, now 1"),
    "steps": (lambda: {"sampling": replace(TWO, steps=3)}, "steps was 2, now 3"),
    "batch": (lambda: {"sampling": replace(TWO, batch=1)}, "batch was 2, now 1"),
    "weights": (lambda: {"pipe": _other_weights()}, "the model's weights or scheduler was"),
    "pipeline": (lambda: {"pipe": tiny_dit()}, "the pipeline was DDIMPipeline, now DiTPipeline"),
}


def _other_weights() -> Any:
    pipe = tiny_ddim()
    pipe.unet.conv_in.bias.data[0] += 1e-6
    return pipe


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_folder_drawn_otherwise_is_refused_naming_the_difference(name: str, tmp_path: Path) -> None:
    sample_images(tiny_ddim(), tmp_path / "out", 2, TWO)
    before = files(tmp_path / "out")
    changed, expected = OTHERWISE[name]
    given = {"pipe": tiny_ddim(), "sampling": TWO, **changed()}
    with pytest.raises(EvaluationError, match=expected):
        sample_images(given["pipe"], tmp_path / "out", 2, given["sampling"])
    assert files(tmp_path / "out") == before


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    sample_images(tiny_sd(), tmp_path / "out", 2, TWO, PROMPTS[:2])
    with pytest.raises(EvaluationError, match="prompts or labels were .*red apple.*now .*green tree"):
        sample_images(tiny_sd(), tmp_path / "out", 2, TWO, PROMPTS[2:4])


def test_foreign_folders_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(EvaluationError, match="holds other files"):
        sample_images(tiny_ddim(), tmp_path, 2, TWO)
    with pytest.raises(LDMQError, match="is a file|not a writable folder"):
        sample_images(tiny_ddim(), tmp_path / "mine.txt", 2, TWO)
    assert list(files(tmp_path)) == ["mine.txt"]
    (tmp_path / SETTINGS).write_text(json.dumps({"pipeline": 3}))
    with pytest.raises(EvaluationError, match=SETTINGS):
        sample_images(tiny_ddim(), tmp_path, 2, TWO)


def test_nan_is_refused_and_leaves_no_picture(tmp_path: Path) -> None:
    pipe = tiny_ddim()
    pipe.unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(EvaluationError, match="picture 0 holds NaN"):
        sample_images(pipe, tmp_path / "out", 2, TWO)
    assert list(files(tmp_path / "out")) == [SETTINGS]


@pytest.mark.parametrize(("count", "batch"), [(0, 1), (3, 4), (3, 0)])
def test_batches_that_do_not_fit_are_refused(count: int, batch: int, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=f"{count} pictures in batches of {batch}"):
        sample_images(tiny_ddim(), tmp_path / "out", count, replace(TWO, batch=batch))
    assert not (tmp_path / "out").exists()


def test_what_a_pipeline_cannot_draw_is_said_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"DiTPipeline cannot draw \['5000'"):
        sample_images(tiny_dit(), tmp_path / "dit", 1, replace(TWO, batch=1), ["5000"])
    with pytest.raises(LDMQError, match="starts from a picture"):
        sample_images(tiny_img2img(), tmp_path / "img", 1, replace(TWO, batch=1), ["red apple"])
    with pytest.raises(EvaluationError, match="no subjects"):
        sample_images(tiny_sd(), tmp_path / "none", 2, TWO, [])


def test_what_is_drawn_by_itself() -> None:
    assert subjects_of(tiny_ddim()) == (None,)
    assert subjects_of(tiny_dit())[:3] == ("0", "1", "2")
    assert len(subjects_of(tiny_dit())) == 1000
    assert subjects_of(tiny_sd(), ["red apple"]) == ("red apple",)
    with pytest.raises(EvaluationError, match="draws from text"):
        subjects_of(tiny_sd())
    with pytest.raises(EvaluationError, match="takes neither prompts nor labels"):
        subjects_of(tiny_ddim(), ["red apple"])


def test_steps_are_those_asked_for_or_the_pipelines_own() -> None:
    assert steps_of(tiny_ddim(), TWO) == 2
    assert steps_of(tiny_ddim(), Sampling()) == 50


def test_the_models_digest_follows_weights_dtype_and_scheduler() -> None:
    pipe = tiny_ddim()
    digests = {model_digest(pipe), model_digest(_other_weights()), model_digest(tiny_ddim().to(torch.bfloat16))}
    assert model_digest(tiny_ddim()) in digests
    pipe.scheduler.register_to_config(clip_sample=not pipe.scheduler.config.clip_sample)
    digests.add(model_digest(pipe))
    assert len(digests) == 4
