"""What a pipeline is fed while it is recorded, and the files that say so."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image

from diffusers_ldmq import default_inputs
from diffusers_ldmq.demo import demo_prompts
from diffusers_ldmq.errors import RecordingError
from diffusers_ldmq.inputs import captions, read_inputs, read_prompts

Make = Callable[[str], Any]


def test_there_are_32_different_captions_apart_from_the_demos_prompts() -> None:
    assert len(set(captions())) == len(captions()) == 32
    assert not set(captions()) & set(demo_prompts())


def test_text_pipelines_get_captions_of_ours(make: Make) -> None:
    inputs = default_inputs(make("bundled"), steps=7)
    assert [text for entry in inputs for text in entry["prompt"]] == captions()
    assert {entry["num_inference_steps"] for entry in inputs} == {7}


def test_class_pipelines_get_random_labels_that_a_seed_repeats(make: Make) -> None:
    pipe = make("dit")
    first = [label for entry in default_inputs(pipe, seed=1) for label in entry["class_labels"]]
    again = [label for entry in default_inputs(pipe, seed=1) for label in entry["class_labels"]]
    other = [label for entry in default_inputs(pipe, seed=2) for label in entry["class_labels"]]
    assert first == again != other
    assert len(first) == 32
    assert all(0 <= label < 1000 for label in first)


def test_unconditional_pipelines_get_seeds_only(make: Make) -> None:
    inputs = default_inputs(make("pixel"), seed=100)
    assert [entry["batch_size"] for entry in inputs] == [8, 8, 8, 8]
    assert [entry["seed"] for entry in inputs] == [100, 108, 116, 124]
    assert all(set(entry) == {"batch_size", "seed"} for entry in inputs)


@pytest.mark.parametrize("count", [1, 3, 4, 10, 33])
def test_prompts_are_used_once_each_in_calls_enough_for_three_sets(count: int, make: Make) -> None:
    prompts = [f"prompt {i}" for i in range(count)]
    inputs = default_inputs(make("bundled"), prompts)
    assert [text for entry in inputs for text in entry["prompt"]] == prompts
    assert len(inputs) >= min(count, 4)
    assert all(len(entry["prompt"]) <= 8 for entry in inputs)
    seeds = [entry["seed"] + i for entry in inputs for i in range(len(entry["prompt"]))]
    assert len(set(seeds)) == count


def test_prompts_for_a_pipeline_without_any_are_refused(make: Make) -> None:
    with pytest.raises(RecordingError, match="DDPMPipeline takes no prompts; leave --prompts out"):
        default_inputs(make("pixel"), ["red apple"])


@pytest.mark.parametrize(
    ("kind", "needed"),
    [(StableDiffusionImg2ImgPipeline, "image"), (StableDiffusionInpaintPipeline, "image and mask_image")],
)
def test_pipelines_that_need_images_are_refused_naming_what_is_missing(kind: Any, needed: str, make: Make) -> None:
    pipe = kind(**make("bundled").components, requires_safety_checker=False)
    with pytest.raises(RecordingError, match=rf"{kind.__name__} needs {needed}; pass --inputs FILE.jsonl"):
        default_inputs(pipe)


def test_a_prompt_file_has_one_prompt_per_non_empty_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("red apple\n\n  ghost ☃ \n", encoding="utf-8")
    assert read_prompts(path) == ["red apple", "ghost ☃"]


@pytest.mark.parametrize("read", [read_prompts, read_inputs])
@pytest.mark.parametrize(
    ("content", "match"),
    [(None, "no such file"), (b"\n  \n", "is empty; write one"), (b"\xff\xfe\x00", "cannot be read as UTF-8")],
    ids=["absent", "empty", "binary"],
)
def test_unusable_text_files_are_refused(
    read: Callable[[Path], Any], content: bytes | None, match: str, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecordingError, match=match):
        read(path)


def test_a_folder_in_place_of_a_prompt_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="cannot be read"):
        read_prompts(tmp_path)


def test_inputs_name_pictures_beside_their_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGBA", (4, 6), "red").save(tmp_path / "pictures" / "a.png")
    path = tmp_path / "inputs.jsonl"
    path.write_text('{"prompt": "x", "image": "pictures/a.png", "strength": 0.5}\n\n{"image": ["pictures/a.png"]}\n')
    first, second = read_inputs(path)
    assert (first["prompt"], first["strength"]) == ("x", 0.5)
    assert (first["image"].size, first["image"].mode) == ((4, 6), "RGB")
    assert second["image"][0].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"prompt": "x"', "line 2: not valid JSON"),
        ('["x"]', "line 2: expected an object of arguments"),
        ('{"image": "absent.png"}', "picture 'absent.png' does not exist beside the file"),
        ('{"image": "../secret.png"}', "is outside the file's folder"),
        ('{"mask_image": "/etc/hostname"}', "is outside the file's folder"),
        ('{"image": "inputs.jsonl"}', "cannot be opened"),
    ],
)
def test_bad_input_lines_are_named(line: str, match: str, tmp_path: Path) -> None:
    folder = tmp_path / "inside"
    folder.mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    path = folder / "inputs.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(RecordingError, match=match):
        read_inputs(path)


def test_one_prompt_is_not_taken_letter_by_letter(make: Make) -> None:
    calls = default_inputs(make("bundled"), "a red apple")
    assert [call["prompt"] for call in calls] == [["a red apple"]]


def test_prompts_that_are_none_are_refused(make: Make) -> None:
    wrong: Any = ["one", None]
    with pytest.raises(RecordingError, match=r"prompts\[1\] is 'None' .NoneType.; expected str"):
        default_inputs(make("bundled"), wrong)
