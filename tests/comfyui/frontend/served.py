"""ComfyUI's real frontend in a browser, without a server: its package's files, and short answers to what it asks.

Nothing is executed. What loading a workflow gives, which nodes it lacks, what its widgets hold and which prompt it
sends are the frontend's own doing.
"""

import json
import mimetypes
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ADDRESS = "http://comfyui.invalid"
READY = "() => window.app?.graph && window.LiteGraph && Object.keys(LiteGraph.registered_node_types).length > 5"
ANSWERS: dict[str, Any] = {
    "/api/users": {"storage": "server", "migrated": True},
    "/api/settings": {
        "Comfy.TutorialCompleted": True,  # otherwise the templates cover the canvas
        "Comfy.InstalledVersion": "1.47.10",
        "Comfy.Minimap.Visible": False,
        "Comfy.Graph.CanvasInfo": False,
        "Comfy.Graph.CanvasMenu": False,
    },
    "/api/system_stats": {
        "system": {
            "os": "linux",
            "comfyui_version": "0.29.0",
            "python_version": "3.11",
            "pytorch_version": "2",
            "argv": [],
        },
        "devices": [],
    },
    "/api/jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 200, "total": 0, "has_more": False}},
    "/api/queue": {"queue_running": [], "queue_pending": []},
    "/api/userdata": [],
    "/api/extensions": [],
    "/api/experiment/models": [],
    "/templates/index.json": [],
}
"""Path -> JSON; every other /api path is answered with {}."""


def static_folder() -> Path:
    """Files of the package comfyui-frontend-package."""
    return Path(str(resources.files("comfyui_frontend_package").joinpath("static")))


class Frontend:
    """The frontend in a page of `browser`, knowing the nodes of `object_info`, or that of a real server at `address`.
    errors: uncaught ones of the page."""

    def __init__(self, browser: Any, object_info: Mapping[str, Any], address: str | None = None) -> None:
        self.root = static_folder()
        self.answers = {**ANSWERS, "/api/object_info": dict(object_info)}
        self.errors: list[str] = []
        self.page = browser.new_page(viewport={"width": 1600, "height": 900})
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        if address is None:
            self.page.route("**/*", self._answer)
            self.page.route_web_socket("**/ws*", lambda socket: None)
        self.page.goto(address or ADDRESS)
        self.page.wait_for_function(READY, timeout=60_000)

    def _answer(self, route: Any) -> None:
        address = urlsplit(route.request.url)
        if address.scheme in ("data", "blob"):
            route.continue_()
        elif not route.request.url.startswith(ADDRESS):
            route.abort()
        elif address.path in self.answers or address.path.startswith("/api/"):
            missing = address.path.startswith("/api/userdata/")
            body = json.dumps(self.answers.get(address.path, {}))
            route.fulfill(status=404 if missing else 200, content_type="application/json", body=body)
        else:
            self._file(route, address.path)

    def _file(self, route: Any, path: str) -> None:
        file = (self.root / (path.lstrip("/") or "index.html")).resolve()
        if file.is_relative_to(self.root) and file.is_file():
            kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            route.fulfill(body=file.read_bytes(), content_type="text/javascript" if file.suffix == ".js" else kind)
        else:
            route.fulfill(status=404, body="")

    def load(self, workflow: Mapping[str, Any]) -> None:
        """Open a workflow (UI format) as dropping its file does."""
        self.page.evaluate("async workflow => { await app.loadGraphData(workflow) }", workflow)

    def missing_types(self) -> list[str]:
        """Types of nodes that the frontend does not know."""
        return self.page.evaluate(
            "() => app.graph._nodes.map(n => n.type).filter(t => !LiteGraph.registered_node_types[t])"
        )

    def widgets(self) -> dict[str, list[Any]]:
        """Node id -> values of its widgets, in order."""
        return self.page.evaluate(
            "() => Object.fromEntries(app.graph._nodes.map(n => [n.id, (n.widgets ?? []).map(w => w.value)]))"
        )

    def serialized(self) -> dict[str, Any]:
        """The open workflow as saving it gives (UI format)."""
        return json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def prompt(self) -> dict[str, Any]:
        """What pressing Run would send (API format)."""
        return json.loads(self.page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))

    def run(self) -> None:
        """Press Run and wait until all output nodes show something; for a real server."""
        self.page.evaluate("async () => { await app.queuePrompt(0, 1) }")
        shown = "() => app.graph._nodes.some(n => n.type === 'SaveImage' && n.imgs?.length)"
        self.page.wait_for_function(shown, timeout=600_000)

    def close(self) -> None:
        """Close the page."""
        self.page.close()
