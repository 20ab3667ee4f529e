"""What a server tells its browser of nodes (/object_info): ours out of their schemas, stock ones as recorded.

    python -m comfyui.frontend.object_info http://127.0.0.1:8188     (in the folder tests)

records the stock nodes that the workflows use from a running server: names, types, defaults and limits, no texts.
"""

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from comfyui.contract.record_api import read_table
from comfyui.contract.standin import standing_in
from comfyui.frontend.specs import CHECKPOINT, LORA, SAVED, WORKFLOWS

FILE = Path(__file__).with_name("stock_nodes.json")
FACTS = ("default", "min", "max", "step", "round", "multiline", "control_after_generate", "options", "advanced")
FILES = {"ckpt_name": [CHECKPOINT], "lora_name": [LORA], "model_file": ["(none)", f"{SAVED}_00001_.safetensors"]}
"""Combos that list files -> what somebody who follows the workflows has."""


def object_info() -> dict[str, Any]:
    """Of all our nodes, at the newest recorded API, and of the recorded stock nodes."""
    with tempfile.TemporaryDirectory() as folder, standing_in(list(read_table())[-1], Path(folder)):
        from comfyui_nodes.files import register_folders
        from comfyui_nodes.nodes import NODES

        register_folders()
        ours = {schema.node_id: _node(schema) for schema in (node.define_schema() for node in NODES)}
    return {**json.loads(FILE.read_text(encoding="utf-8")), **ours}


def _node(schema: Any) -> dict[str, Any]:
    required = {i.id: _input(i) for i in schema.inputs if not i.optional}
    optional = {i.id: _input(i) for i in schema.inputs if i.optional}
    return {
        "input": {"required": required, "optional": optional},
        "input_order": {"required": list(required), "optional": list(optional)},
        "output": [o.io_type for o in schema.outputs],
        "output_is_list": [False for _ in schema.outputs],
        "output_name": [o.display_name or o.id for o in schema.outputs],
        "name": schema.node_id,
        "display_name": schema.display_name,
        "description": schema.description,
        "python_module": "custom_nodes.diffusers-ldmq",
        "category": schema.category,
        "output_node": bool(schema.is_output_node),
    }


def _input(one: Any) -> list[Any]:
    facts = {key: getattr(one, key, None) for key in FACTS}
    options = {key: value for key, value in facts.items() if value is not None}
    if one.id in FILES and one.io_type == "COMBO":
        options["options"] = FILES[one.id]
    return [one.io_type, {**options, "tooltip": one.tooltip}]


def used_types() -> list[str]:
    """Types of the nodes in the workflows."""
    return sorted({node.kind for workflow in WORKFLOWS for node in workflow.nodes.values()})


def facts_of(node: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of a stock node, out of a server's own entry."""
    kept = ("input_order", "output", "output_is_list", "output_name", "name", "display_name", "category", "output_node")
    sections = {key: _facts(section) for key, section in node["input"].items() if key in ("required", "optional")}
    return {"input": sections, **{key: node[key] for key in kept if key in node}, "python_module": "nodes"}


def _facts(section: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, (kind, *rest) in section.items():
        options = {key: value for key, value in (rest[0] if rest else {}).items() if key in FACTS}
        if name in FILES:
            kind, options = ("COMBO", {"options": FILES[name]})
        found[name] = [kind, options]
    return found


def recorded(info: dict[str, Any], types: Iterable[str]) -> dict[str, Any]:
    """Facts of those nodes in a server's /object_info that are not ours."""
    return {name: facts_of(info[name]) for name in types if not name.startswith("ldmq_")}


if __name__ == "__main__":
    with urlopen(f"{sys.argv[1]}/object_info") as answer:
        known = json.loads(answer.read())
    FILE.write_text(json.dumps(recorded(known, used_types()), indent=1) + "\n", encoding="utf-8")
