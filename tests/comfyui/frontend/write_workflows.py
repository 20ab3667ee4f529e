"""Write workflows/*.json and workflows/api/*.json out of specs.py with the real frontend, and pictures of the graphs.

python -m comfyui.frontend.write_workflows [SERVER]     (in the folder tests, with the repository on PYTHONPATH)

With the address of a running server that has the pack, the quick start is run there for its picture.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

from comfyui.frontend.browsing import browser_or_reason
from comfyui.frontend.object_info import object_info
from comfyui.frontend.served import Frontend
from comfyui.frontend.specs import QUICK_START, WORKFLOWS, Workflow
from PIL import Image, ImageOps

FOLDER = Path(__file__).resolve().parents[3] / "workflows"
THUMBNAIL = (640, 360)
NOTE_PLACE = (40, 0, 820, 200)
ARRANGE = """({places, titles, note, groups}) => {
    for (const node of app.graph._nodes) {
        const [x, y, width, height] = places[node.id];
        node.pos = [x, y];
        const least = node.computeSize();
        node.size = [Math.max(width, 200), Math.max(height, height ? 0 : least[1])];
        if (titles[node.id]) node.title = titles[node.id];
        for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
    }
    const text = LiteGraph.createNode("MarkdownNote");
    app.graph.add(text);
    text.title = "Start here";
    text.pos = note.place.slice(0, 2);
    text.size = note.place.slice(2);
    text.widgets[0].value = note.text;
    for (const {title, place, color} of groups) {
        const group = new LiteGraph.LGraphGroup(title);
        group.pos = place.slice(0, 2);
        group.size = place.slice(2);
        group.color = color;
        app.graph.add(group);
    }
}"""
WINDOW = {"width": 3000, "height": 1700}
STARTED = 3000
"""Milliseconds until the frontend has said what it thinks of the graph that it opens with."""
MISSING = "Missing Node Packs"
EMPTY = {"last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "groups": [], "version": 0.4}
MARGIN = 90
"""Pixels of the window that the frontend's own bars take at the left and the top."""
SHOW_ALL = """margin => {
    const boxes = [...app.graph._nodes, ...app.graph._groups].map(part => part.boundingRect);
    const left = Math.min(...boxes.map(b => b[0])) - 20, top = Math.min(...boxes.map(b => b[1])) - 20;
    const right = Math.max(...boxes.map(b => b[0] + b[2])) + 20, bottom = Math.max(...boxes.map(b => b[1] + b[3])) + 20;
    const scale = Math.min(1, (innerWidth - margin) / (right - left), (innerHeight - margin) / (bottom - top));
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset = [margin / scale - left, margin / scale - top];
    app.canvas.setDirty(true, true);
    return {x: margin, y: margin, width: (right - left) * scale, height: (bottom - top) * scale};
}"""


def api_of(workflow: Workflow) -> dict[str, Any]:
    """The workflow in API format, nodes numbered in their order."""
    numbers = {name: str(index + 1) for index, name in enumerate(workflow.nodes)}

    def value(given: Any) -> Any:
        return [numbers[given[0]], given[1]] if isinstance(given, tuple) else given

    return {
        numbers[name]: {"class_type": node.kind, "inputs": {key: value(given) for key, given in node.inputs.items()}}
        for name, node in workflow.nodes.items()
    }


def write(frontend: Frontend, workflow: Workflow) -> None:
    """Both files and the picture of one workflow."""
    nodes = dict(enumerate(workflow.nodes.values(), start=1))
    frontend.page.evaluate(
        "async ([api, name]) => { await app.loadApiJson(api, name) }", [api_of(workflow), workflow.name]
    )
    frontend.page.evaluate(
        ARRANGE,
        {
            "places": {number: list(node.place) for number, node in nodes.items()},
            "titles": {number: node.title for number, node in nodes.items()},
            "note": {"text": workflow.note, "place": list(NOTE_PLACE)},
            "groups": [vars(group) for group in workflow.groups],
        },
    )
    put(FOLDER / f"{workflow.name}.json", frontend.serialized())
    put(FOLDER / "api" / f"{workflow.name}.json", frontend.prompt())
    thumbnail(frontend).save(FOLDER / f"{workflow.name}.jpg", quality=85)


def thumbnail(frontend: Frontend) -> Image.Image:
    """The graph that is open, whole, on black."""
    frontend.page.set_viewport_size(WINDOW)
    assert not frontend.page.get_by_text(MISSING).count(), "the frontend lacks a node of this workflow"
    box = frontend.page.evaluate(SHOW_ALL, MARGIN)
    frontend.page.wait_for_timeout(800)
    picture = Image.open(io.BytesIO(frontend.page.screenshot(clip=box))).convert("RGB")
    return ImageOps.pad(picture, THUMBNAIL, Image.Resampling.LANCZOS)


def dismiss_notice(frontend: Frontend) -> None:
    """The graph that the frontend opens with has stock nodes that are not recorded; its notice of them goes when a
    workflow without such nodes is opened, not with one in API format."""
    frontend.page.wait_for_timeout(STARTED)
    frontend.load(EMPTY)
    frontend.page.get_by_text(MISSING).wait_for(state="detached")


def put(path: Path, data: Any) -> None:
    """Write JSON that reads well in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def picture_of_run(browser: Any, workflow: Workflow, address: str) -> None:
    """The workflow's picture with what a real server made of it."""
    frontend = Frontend(browser, {}, address)
    frontend.load(json.loads((FOLDER / f"{workflow.name}.json").read_text(encoding="utf-8")))
    frontend.run()
    thumbnail(frontend).save(FOLDER / f"{workflow.name}.jpg", quality=85)


def main(*addresses: str) -> None:
    """Write all workflows."""
    with browser_or_reason() as browser:
        assert not isinstance(browser, str), browser
        frontend = Frontend(browser, object_info())
        dismiss_notice(frontend)
        for workflow in WORKFLOWS:
            write(frontend, workflow)
        assert not frontend.errors, frontend.errors
        for address in addresses:
            picture_of_run(browser, QUICK_START, address)


if __name__ == "__main__":
    main(*sys.argv[1:])
