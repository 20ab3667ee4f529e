"""The workflow files, looked at without a browser."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from comfyui.frontend.object_info import object_info
from comfyui.frontend.specs import WORKFLOWS
from comfyui.frontend.workflow_problems import problems
from comfyui.frontend.write_workflows import FOLDER, THUMBNAIL, api_of
from PIL import Image

NAMES = [workflow.name for workflow in WORKFLOWS]


@pytest.fixture(scope="module")
def info() -> dict[str, Any]:
    return object_info()


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_every_workflow_has_its_files() -> None:
    stems = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert stems == {f"{name}.json" for name in NAMES} | {f"{n}.jpg" for n in NAMES} | {f"api/{n}.json" for n in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wrong_with_a_workflow(name: str, info: dict[str, Any]) -> None:
    assert problems(read(FOLDER / f"{name}.json"), info) == []


def test_what_is_wrong_is_found(info: dict[str, Any]) -> None:
    good = read(FOLDER / "load_quantized_with_lora.json")

    def spoiled(change: Any) -> list[str]:
        workflow = deepcopy(good)
        change(workflow, {node["type"]: node for node in workflow["nodes"]})
        return problems(workflow, info)

    def unknown(workflow: Any, nodes: Any) -> None:
        nodes["ldmq_load_model"]["type"] = "ldmq_lode_model"

    def one_value_less(workflow: Any, nodes: Any) -> None:
        nodes["KSampler"]["widgets_values"].pop()  # as if "control after generate" had been forgotten

    def no_link(workflow: Any, nodes: Any) -> None:
        workflow["links"].pop()

    def other_type(workflow: Any, nodes: Any) -> None:
        workflow["links"][0][5] = "VAE"

    def not_connected(workflow: Any, nodes: Any) -> None:
        nodes["KSampler"]["inputs"][0]["link"] = None

    changes = (unknown, one_value_less, no_link, other_type, not_connected)
    assert [bool(spoiled(change)) for change in changes] == [True] * len(changes)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=NAMES)
def test_the_api_copy_says_what_was_meant(workflow: Any) -> None:
    copy = read(FOLDER / "api" / f"{workflow.name}.json")
    for node in copy.values():
        del node["_meta"]
    assert copy == api_of(workflow)


@pytest.mark.parametrize("name", NAMES)
def test_every_workflow_has_a_picture_and_says_what_it_is_for(name: str) -> None:
    with Image.open(FOLDER / f"{name}.jpg") as picture:
        assert picture.size == THUMBNAIL
        assert len(picture.getcolors(1 << 20) or range(1000)) > 100, "it shows something"
    notes = [node for node in read(FOLDER / f"{name}.json")["nodes"] if node["type"] == "MarkdownNote"]
    assert notes
    assert notes[0]["widgets_values"][0].startswith("## ")
