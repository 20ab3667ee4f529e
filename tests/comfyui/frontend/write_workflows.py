"""Write workflows/*.json and workflows/api/*.json out of specs.py with the real frontend, and pictures of the graphs.

    python -m comfyui.frontend.write_workflows OBJECT_INFO.json     (in the folder tests)

OBJECT_INFO.json is what a server that has the pack gives at /object_info.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

from comfyui.frontend.browsing import browser_or_reason
from comfyui.frontend.served import Frontend
from comfyui.frontend.specs import WORKFLOWS, Workflow
from PIL import Image

FOLDER = Path(__file__).resolve().parents[3] / "workflows"
THUMBNAIL = (640, 360)
ARRANGE = """({places, titles, notes, groups}) => {
    for (const node of app.graph._nodes) {
        const [x, y, width, height] = places[node.id];
        node.pos = [x, y];
        const least = node.computeSize();
        node.size = [Math.max(width, 200), Math.max(height, height ? 0 : least[1])];
        if (titles[node.id]) node.title = titles[node.id];
        for (const widget of node.widgets ?? []) if (widget.name === "control_after_generate") widget.value = "fixed";
    }
    for (const note of notes) {
        const node = LiteGraph.createNode("MarkdownNote");
        app.graph.add(node);
        node.title = note.title;
        node.pos = note.place.slice(0, 2);
        node.size = note.place.slice(2);
        node.widgets[0].value = note.text;
    }
    for (const {title, place, color} of groups) {
        const group = new LiteGraph.LGraphGroup(title);
        group.pos = place.slice(0, 2);
        group.size = place.slice(2);
        group.color = color;
        app.graph.add(group);
    }
}"""
SHOW_ALL = """() => { app.canvas.ds.fitToBounds ? app.canvas.ds.fitToBounds(app.graph._nodes.reduce((all, node) => {
    const [x, y, w, h] = node.boundingRect; return [Math.min(all[0], x), Math.min(all[1], y), Math.max(all[2], x + w),
    Math.max(all[3], y + h)] }, [1e9, 1e9, -1e9, -1e9]).map((v, i, all) => i < 2 ? v - 20 : v - all[i - 2] + 40),
    {zoom: 1}) : 0; app.canvas.setDirty(true, true) }"""


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
    frontend.page.evaluate("async ([api, name]) => { await app.loadApiJson(api, name) }", [api_of(workflow), workflow.name])
    frontend.page.evaluate(
        ARRANGE,
        {
            "places": {number: list(node.place) for number, node in nodes.items()},
            "titles": {number: node.title for number, node in nodes.items()},
            "notes": [vars(note) for note in workflow.notes],
            "groups": [vars(group) for group in workflow.groups],
        },
    )
    put(FOLDER / f"{workflow.name}.json", frontend.serialized())
    put(FOLDER / "api" / f"{workflow.name}.json", frontend.prompt())
    frontend.page.evaluate(SHOW_ALL)
    frontend.page.wait_for_timeout(800)
    picture = Image.open(io.BytesIO(frontend.page.locator("#graph-canvas").screenshot())).convert("RGB")
    picture.resize(THUMBNAIL, Image.Resampling.LANCZOS).save(FOLDER / f"{workflow.name}.jpg", quality=85)


def put(path: Path, data: Any) -> None:
    """Write JSON that reads well in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(object_info: str) -> None:
    """Write all workflows."""
    info = json.loads(Path(object_info).read_text(encoding="utf-8"))
    with browser_or_reason() as browser:
        assert not isinstance(browser, str), browser
        frontend = Frontend(browser, info)
        for workflow in WORKFLOWS:
            write(frontend, workflow)
        assert not frontend.errors, frontend.errors


if __name__ == "__main__":
    main(sys.argv[1])
