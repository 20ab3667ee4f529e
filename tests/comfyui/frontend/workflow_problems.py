"""What is wrong with a workflow in UI format, by looking at it alone."""

from collections.abc import Iterator, Mapping
from typing import Any

NOTES = ("Note", "MarkdownNote")
"""Nodes that live in the browser only."""
SEEDS = ("seed", "noise_seed")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def problems(workflow: Mapping[str, Any], info: Mapping[str, Any]) -> list[str]:
    """Unknown nodes, links that do not match their slots in name or type, values too few or too many."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    found = [
        f"node {n['id']} is of the unknown type {n['type']}" for n in nodes.values() if n["type"] not in (*info, *NOTES)
    ]
    known = [node for node in nodes.values() if node["type"] in info]
    found += [text for node in known for text in _wrong_node(node, info[node["type"]])]
    return [*found, *_wrong_links(workflow["links"], nodes)]


def _wrong_node(node: Mapping[str, Any], info: Mapping[str, Any]) -> Iterator[str]:
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    where = f"node {node['id']} ({node['type']})"
    for one in node["inputs"]:
        if one["name"] not in inputs:
            yield f"{where} has an input {one['name']!r}, which its type does not"
    linked = {one["name"] for one in node["inputs"] if one.get("link") is not None}
    for name in info["input"].get("required", {}):
        if _kind(inputs[name]) not in WIDGETS and name not in linked:
            yield f"{where}: nothing is connected to {name!r}"
    expected = sum(_values(name, given) for name, given in inputs.items())
    if len(node.get("widgets_values", ())) != expected:
        yield f"{where} has {len(node.get('widgets_values', ()))} values for {expected} widgets"
    if [one["type"] for one in node["outputs"]] != info["output"]:
        yield f"{where} has outputs other than its type's"


def _kind(given: Any) -> str:
    return given[0] if isinstance(given[0], str) else "COMBO"


def _values(name: str, given: Any) -> int:
    """How many values an input keeps; a seed's is followed by what becomes of it after a run."""
    options = given[1] if len(given) > 1 else {}
    controlled = options.get("control_after_generate") or (name in SEEDS and _kind(given) == "INT")
    return 0 if _kind(given) not in WIDGETS else 2 if controlled else 1


def _wrong_links(links: list[Any], nodes: Mapping[Any, Any]) -> Iterator[str]:
    told = {link[0]: link for link in links}
    for number, source, output, target, slot, kind in links:
        ends = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        if number not in (ends[0]["links"] or ()) or ends[1]["link"] != number:
            yield f"link {number} is not known at both its ends"
        if ends[0]["type"] != kind or ends[1]["type"] not in (kind, "*"):
            yield f"link {number} carries {kind} from {ends[0]['type']} to {ends[1]['type']}"
    for node in nodes.values():
        for number in (one["link"] for one in node["inputs"] if one.get("link") is not None):
            if number not in told:
                yield f"node {node['id']} names link {number}, which is not there"
