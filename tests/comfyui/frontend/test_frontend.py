"""The workflows in ComfyUI's real frontend: all nodes known, all values kept, the prompt that it would send.

Without Chromium or the package comfyui-frontend-package these tests are skipped, saying so; with LDMQ_REQUIRE_BROWSER=1
(as in .ci/run) they fail instead.
"""

import importlib.util
import json
import os
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
from comfyui.frontend.browsing import browser_or_reason
from comfyui.frontend.object_info import object_info
from comfyui.frontend.served import Frontend
from comfyui.frontend.specs import WORKFLOWS
from comfyui.frontend.write_workflows import FOLDER

NAMES = [workflow.name for workflow in WORKFLOWS]


@pytest.fixture(scope="module")
def frontend() -> Iterator[Frontend]:
    """The frontend with our nodes and the stock ones that workflows use."""
    if importlib.util.find_spec("comfyui_frontend_package") is None:
        do_without("comfyui-frontend-package is not installed")
    with browser_or_reason() as browser:
        if isinstance(browser, str):
            do_without(browser)
        frontend = Frontend(browser, object_info())
        yield frontend
        frontend.close()


def do_without(reason: str) -> NoReturn:
    """Skip in words, or fail where a browser is demanded."""
    told = f"{reason}: the workflows were not opened in ComfyUI's frontend"
    if os.environ.get("LDMQ_REQUIRE_BROWSER") == "1":
        pytest.fail(f"{told}, though LDMQ_REQUIRE_BROWSER=1 demands it")
    pytest.skip(told)


def opened(frontend: Frontend, name: str) -> dict[str, Any]:
    """The workflow's file, loaded into the page without an error."""
    workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    frontend.load(workflow)
    assert frontend.missing_types() == []
    assert frontend.errors == []
    return workflow


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_keeps_its_values_and_sends_its_api_copy(frontend: Frontend, name: str) -> None:
    workflow = opened(frontend, name)
    kept = {str(node["id"]): node["widgets_values"] for node in workflow["nodes"] if node.get("widgets_values")}
    shown = {node: values for node, values in frontend.widgets().items() if node in kept}
    assert kept
    assert shown == kept
    assert frontend.prompt() == json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))


def test_a_file_from_before_reconstruction_opens_with_its_values(frontend: Frontend) -> None:
    """Widgets have values by position; one that came later keeps its default."""
    workflow = json.loads((FOLDER / "quick_start_bundled_model.json").read_text(encoding="utf-8"))
    loader = next(node for node in workflow["nodes"] if node["type"] == "ldmq_pipeline_loader")
    loader["inputs"] = [one for one in loader["inputs"] if one["name"] != "reconstruct"]
    loader["widgets_values"] = ["emoji-sd (comes with LDM-Q)", "Safe", "", "size<=0.3x", "uniform", 7, "float32"]
    sent = sent_of(frontend, workflow, loader)
    assert list(sent.values()) == [*loader["widgets_values"], "none"]


def test_a_quantize_node_from_before_reconstruction_keeps_its_links(frontend: Frontend) -> None:
    workflow = json.loads((FOLDER / "compare_float_and_quantized.json").read_text(encoding="utf-8"))
    node = next(node for node in workflow["nodes"] if node["type"] == "ldmq_quantize")
    gone = {one["link"] for one in node["inputs"][3:]} - {None}
    node["inputs"] = node["inputs"][:3]
    del node["widgets_values"]
    workflow["links"] = [link for link in workflow["links"] if link[0] not in gone]
    for other in workflow["nodes"]:
        for output in other.get("outputs", ()):
            output["links"] = [link for link in output["links"] or () if link not in gone]
    sent = sent_of(frontend, workflow, node)
    assert [name for name, value in sent.items() if isinstance(value, list)] == ["model", "plan", "calibration"]
    assert sent["reconstruct"] == "none"


def sent_of(frontend: Frontend, workflow: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """What the prompt of a workflow says about one of its nodes."""
    frontend.load(workflow)
    assert frontend.missing_types() == []
    assert frontend.errors == []
    return frontend.prompt()[str(node["id"])]["inputs"]


@pytest.mark.parametrize("name", NAMES)
def test_nodes_lie_beside_each_other(frontend: Frontend, name: str) -> None:
    opened(frontend, name)
    boxes = frontend.page.evaluate("() => app.graph._nodes.map(n => [n.title, ...n.boundingRect])")
    for number, (title, x, y, width, height) in enumerate(boxes):
        for other, left, top, across, down in boxes[:number]:
            apart = x >= left + across or left >= x + width or y >= top + down or top >= y + height
            assert apart, f"{title} covers {other}"


def test_a_missing_type_would_be_seen(frontend: Frontend) -> None:
    workflow = json.loads((FOLDER / f"{NAMES[0]}.json").read_text(encoding="utf-8"))
    workflow["nodes"][0]["type"] = "ldmq_no_such_node"
    frontend.load(workflow)
    assert frontend.missing_types() == ["ldmq_no_such_node"]
