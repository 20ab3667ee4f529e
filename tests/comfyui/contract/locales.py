"""locales/en/nodeDefs.json repeats what the schemas say: `python tests/comfyui/contract/locales.py` writes it."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
FILE = ROOT / "locales" / "en" / "nodeDefs.json"


def node_definitions(nodes: Any) -> dict[str, Any]:
    """What translators start from: the words of every node's schema. nodes: classes."""
    return {schema.node_id: _words(schema) for schema in (node.define_schema() for node in nodes)}


def _words(schema: Any) -> dict[str, Any]:
    inputs = {i.id: {"name": i.display_name or i.id, "tooltip": i.tooltip} for i in schema.inputs}
    outputs = {str(k): {"name": o.display_name or o.id, "tooltip": o.tooltip} for k, o in enumerate(schema.outputs)}
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": inputs,
        "outputs": outputs,
    }


def _write() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from comfyui.contract.record_api import read_table
    from comfyui.contract.standin import standing_in

    with tempfile.TemporaryDirectory() as folder, standing_in(list(read_table())[-1], Path(folder)):
        from comfyui_nodes.files import register_folders

        register_folders()
        from comfyui_nodes.nodes import NODES

        FILE.parent.mkdir(parents=True, exist_ok=True)
        FILE.write_text(json.dumps(node_definitions(NODES), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _write()
