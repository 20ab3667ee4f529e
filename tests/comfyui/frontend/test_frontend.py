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
