"""The same job again is a load: found by content, exact, written completely or not at all, and never in the way."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import constants
from PIL import Image
from tiny_pipelines import INPUTS, MAKERS, drawing, picture
from torch.nn.modules.module import register_module_forward_pre_hook

from diffusers_ldmq import QuantizedLDMPipeline, cache, reconstruction
from diffusers_ldmq.cache import SWITCH, cache_folder, comparable, find_entry
from diffusers_ldmq.learning import LearningSettings
from diffusers_ldmq.request import Request
from diffusers_ldmq.selections import TDAC

NAME = "sd"


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion on disk; tests must not change it."""
    folder = tmp_path_factory.mktemp("float") / "model"
    MAKERS[NAME]().save_pretrained(folder)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face home with the cache turned on."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(SWITCH)
    return tmp_path / "home"


@pytest.fixture
def calls() -> Iterator[Callable[[], int]]:
    """How often a denoiser ran since the fixture or the last time it was asked."""
    made: list[Any] = []

    def note(module: Any, args: Any) -> None:
        if isinstance(module, UNet2DConditionModel):
            made.append(module)

    def get() -> int:
        count = len(made)
        made.clear()
        return count

    handle = register_module_forward_pre_hook(note)
    yield get
    handle.remove()


def quantized(folder: Path, **more: Any) -> Any:
    return QuantizedLDMPipeline.from_pretrained(folder, **{"plan": "uniform", "inputs": INPUTS[NAME], **more})


def entries() -> list[Path]:
    return sorted(cache_folder().iterdir()) if cache_folder().is_dir() else []


def request(**asked: Any) -> Request:
    return Request.taken(dict(asked), None, None, inputs=asked.pop("inputs", None), settings=None)


def test_the_second_time_nothing_is_recorded_and_everything_is_the_same(
    float_folder: Path, home: Path, calls: Callable[[], int], tmp_path: Path
) -> None:
    first = quantized(float_folder, plan="hybrid")
    assert calls() > 8
    second = quantized(float_folder, plan="hybrid")
    assert calls() == 0
    assert type(second) is type(first)
    assert (second.plan, second.report, second.profile) == (first.plan, first.report, first.profile)
    assert first.profile is not None
    assert torch.equal(picture(first, NAME), picture(second, NAME))
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    for path in (tmp_path / "first").rglob("*"):
        if path.is_file():
            other = tmp_path / "second" / path.relative_to(tmp_path / "first")
            assert other.read_bytes() == path.read_bytes(), path


def test_the_float_denoiser_is_not_even_read(float_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(float_folder)
    opened: list[str] = []
    original = UNet2DConditionModel.from_pretrained.__func__  # pyright: ignore[reportFunctionMemberAccess]

    def noting(kind: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(str(path))
        return original(kind, path, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", classmethod(noting))
    quantized(float_folder)
    assert opened
    assert all(Path(path).is_relative_to(home) for path in opened)


def test_a_result_in_another_dtype_is_kept_with_its_dtype(float_folder: Path, home: Path) -> None:
    first = quantized(float_folder, torch_dtype=torch.bfloat16)
    second = quantized(float_folder, dtype=torch.bfloat16)
    assert len(entries()) == 1
    assert second.unet.dtype == second.vae.dtype == second.text_encoder.dtype == torch.bfloat16
    assert torch.equal(picture(first, NAME), picture(second, NAME))


def test_what_is_shared_does_not_tell_where_it_was_cached(float_folder: Path, home: Path, tmp_path: Path) -> None:
    for _ in range(2):
        quantized(float_folder).save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").rglob("*.json"):
        assert str(home) not in path.read_text()
        assert str(float_folder) not in path.read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"plan": "hybrid"},
        {"scheme": "w8a16"},
        {"calibration": "uniform"},
        {"calibration": TDAC(seed=1)},
        {"seed": 5},
        {"dtype": torch.bfloat16},
    ]
    + [
        {"inputs": ["one", "two", "three", "four"], "steps": 2},
        {"inputs": INPUTS[NAME][::-1]},
        {"safety_checker": None},
    ],
    ids=str,
)
def test_anything_else_that_is_asked_is_another_entry(change: dict[str, Any], float_folder: Path, home: Path) -> None:
    def folder(**more: Any) -> Path:
        asked = {"inputs": INPUTS[NAME], **more}
        plan = asked.pop("plan", "uniform")
        taken = Request.taken(asked, plan, None, inputs=asked.pop("inputs"), settings=None)
        entry = find_entry(str(float_folder), taken, asked)
        assert entry is not None
        return entry.folder

    assert folder(**change) == folder(**change)
    assert folder(**change) != folder()
    assert folder() == folder(device="cpu", cache=True, progress=print, local_files_only=True)


def test_threads_and_versions_make_another_entry(
    float_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = find_entry(str(float_folder), request(), {})
    versions = cache._versions()
    monkeypatch.setattr(cache, "_versions", lambda: versions | {"torch": "0.1"})
    other = find_entry(str(float_folder), request(), {})
    monkeypatch.setattr(cache, "_versions", lambda: versions)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    more = find_entry(str(float_folder), request(), {})
    assert before is not None
    assert other is not None
    assert more is not None
    assert len({before.folder, other.folder, more.folder}) == 3


def test_entries_go_by_the_content_of_the_source_not_by_its_place(
    float_folder: Path, home: Path, tmp_path: Path
) -> None:
    shutil.copytree(float_folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("not loaded")
    (tmp_path / "copy" / "other").mkdir()
    (tmp_path / "copy" / "other" / "weights.safetensors").write_text("not loaded")
    found = [find_entry(str(folder), request(), {}) for folder in (float_folder, tmp_path / "copy")]
    assert found[0] == found[1]
    weights = tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert find_entry(str(tmp_path / "copy"), request(), {}) != found[0]


def test_a_hub_repository_goes_by_its_blobs_names_and_is_cached_too(
    float_folder: Path, home: Path, tmp_path: Path, calls: Callable[[], int]
) -> None:
    repository = tmp_path / "hub" / "models--me--tiny"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for number, path in enumerate(path for path in float_folder.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(float_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / f"{number:040x}")
        link.symlink_to(blobs / f"{number:040x}")
    hub: Any = {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}
    entry = find_entry("me/tiny", request(), hub)
    assert entry is not None
    assert set(entry.made_of["source"].values()) == {f"blob {path.name}" for path in blobs.iterdir()}
    common: Any = {"plan": "uniform", "inputs": INPUTS[NAME], **hub}
    first = QuantizedLDMPipeline.from_pretrained("me/tiny", **common)
    assert calls() > 0
    second = QuantizedLDMPipeline.from_pretrained("me/tiny", **common)
    assert calls() == 0
    assert second.config["_name_or_path"] == "me/tiny"
    assert second.unet.config["_name_or_path"] == first.unet.config["_name_or_path"]
    assert torch.equal(picture(first, NAME), picture(second, NAME))


@pytest.mark.parametrize("damage", ["truncated", "changed", "absent", "extra", "index", "manifest"])
def test_a_damaged_entry_is_computed_anew_with_a_warning(
    damage: str, float_folder: Path, home: Path, calls: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    first = quantized(float_folder)
    (entry,) = entries()
    weights = entry / "denoiser" / "diffusion_pytorch_model.safetensors"
    whole = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(whole[:-100])
    elif damage == "changed":  # a code, which no check of the file's form would notice
        whole[-1] ^= 1
        weights.write_bytes(whole)
    elif damage == "absent":
        weights.unlink()
    elif damage == "extra":
        (entry / "denoiser" / "more.json").write_text("{}")
    elif damage == "index":
        (entry / "entry.json").unlink()
    else:
        index = json.loads((entry / "entry.json").read_text())
        (entry / "entry.json").write_text(json.dumps({**index, "files": []}))
    calls()
    with caplog.at_level(logging.WARNING):
        second = quantized(float_folder)
    assert calls() > 0
    assert [r for r in caplog.records if "is damaged" in r.message and "computed anew" in r.message]
    assert torch.equal(picture(first, NAME), picture(second, NAME))
    calls()
    quantized(float_folder)
    assert calls() == 0


@pytest.mark.parametrize("how", ["keyword", "environment"])
def test_it_can_be_switched_off(
    how: str, float_folder: Path, home: Path, calls: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized(float_folder)
    kept = entries()
    if how == "environment":
        monkeypatch.setenv(SWITCH, "0")
    calls()
    quantized(float_folder, **{"cache": False} if how == "keyword" else {})
    quantized(float_folder, scheme="w8a16", **{"cache": False} if how == "keyword" else {})
    assert calls() > 0
    assert entries() == kept


def test_a_cache_that_cannot_be_written_costs_one_warning(
    float_folder: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        pipe = quantized(float_folder)
    assert pipe.plan is not None
    (told,) = [r.message for r in caplog.records if "not cached" in r.message]
    assert f"{home} is not a writable folder (Not a directory)" in told
    assert told.endswith("name a writable folder by HF_HOME, or pass cache=False")


def test_what_cannot_be_compared_is_not_cached_and_said(
    float_folder: Path, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inputs = [{**entry, "callback_on_step_end": lambda *args: {}} for entry in INPUTS[NAME]]
    with caplog.at_level(logging.WARNING):
        quantized(float_folder, inputs=inputs)
        quantized(float_folder, vae=MAKERS[NAME]().vae)
    assert "the result is not cached: function objects cannot be compared between runs" in caplog.text
    assert "the result is not cached: AutoencoderKL objects cannot be compared between runs" in caplog.text
    assert not entries()


def test_a_checkpoint_of_ours_is_never_cached(float_folder: Path, home: Path, tmp_path: Path) -> None:
    quantized(float_folder, cache=False).save_pretrained(tmp_path / "q")
    QuantizedLDMPipeline.from_pretrained(tmp_path / "q")
    assert not entries()


def test_values_are_equal_exactly_where_their_content_is() -> None:
    def values() -> list[Any]:
        array = np.arange(4, dtype=np.float32)
        palette = Image.new("P", (2, 2))
        palette.putpalette([1, 2, 3])
        return [
            *(None, True, 1, 1.0, "1", "red", ["red"], [["red"]], {"a": 1}, {1: 1}, [], {}),
            *(torch.tensor([1.0]), torch.tensor([1]), torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor(1.0)),
            *(array, array.astype(np.float64), array.reshape(2, 2), drawing(0), drawing(1), drawing(0).convert("L")),
            *(Image.new("P", (2, 2)), palette, torch.float16, DDIMScheduler(), DDIMScheduler(steps_offset=1)),
        ]

    texts = [json.dumps(comparable(value), sort_keys=True) for value in values()]
    assert len(set(texts)) == len(texts)
    assert texts == [json.dumps(comparable(value), sort_keys=True) for value in values()]
    assert comparable(("red", 1)) == comparable(["red", 1])
    for value in (torch.Generator(), object(), {"a": [print]}):
        with pytest.raises(TypeError, match="objects cannot be compared between runs"):
            comparable(value)


TWO_AT_ONCE = """
import sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from tiny_pipelines import INPUTS
from diffusers_ldmq import QuantizedLDMPipeline
pipe = QuantizedLDMPipeline.from_pretrained({folder!r}, plan="uniform", inputs=INPUTS["sd"])
pipe.save_pretrained(sys.argv[1])
"""


def test_two_processes_at_once_leave_one_good_entry(float_folder: Path, home: Path, tmp_path: Path) -> None:
    code = TWO_AT_ONCE.format(path=[str(Path(__file__).parent), *sys.path], folder=str(float_folder))
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / name)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for process in running:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
        assert "not cached" not in told
    (entry,) = [path for path in (home / "ldmq").iterdir()]
    assert not entry.name.startswith(".")
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    pipe = quantized(float_folder)
    assert [path for path in (home / "ldmq").iterdir()] == [entry]
    assert torch.equal(picture(pipe, NAME), picture(DiffusionPipeline.from_pretrained(tmp_path / "one"), NAME))


def test_other_quantized_components_are_part_of_an_entry(
    float_folder: Path, home: Path, calls: Callable[[], int]
) -> None:
    components = {"text_encoder": "w8a16"}
    first = picture(quantized(float_folder, components=components), NAME)
    assert calls()
    again = quantized(float_folder, components=components)
    assert not calls()
    assert torch.equal(picture(again, NAME), first)
    quantized(float_folder, components={"text_encoder": "w8a8-dyn"})
    quantized(float_folder)
    assert len(entries()) == 3


def test_where_nothing_can_be_kept_a_reconstruction_is_warned_of_and_works(
    float_folder: Path, home: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = replace(reconstruction.QUICK, learning=LearningSettings(iterations=2, batch=4), samples=4)
    monkeypatch.setitem(reconstruction.PRESETS, "quick", brief)
    home.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        pipe = quantized(float_folder, scheme="w4a8", reconstruction="quick")
    assert pipe.report.reconstruction
    assert "an interrupted reconstruction will begin anew: " in caplog.text
