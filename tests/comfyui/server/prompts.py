"""Prompts in API format for tests, made of the workflows that users get."""

import json
from copy import deepcopy
from typing import Any

from comfyui.server.comfy_server import REPOSITORY

FOLDER = REPOSITORY / "workflows" / "api"
Prompt = dict[str, Any]


def workflow(name: str) -> Prompt:
    """The API copy of a workflow as it is."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def small(prompt: Prompt, *, steps: int = 2, pixels: int = 64) -> Prompt:
    """The same with fewer steps and smaller pictures: what a test can wait for."""
    smaller = deepcopy(prompt)
    for node in smaller.values():
        inputs = node["inputs"]
        if "steps" in inputs:
            inputs["steps"] = steps
        if node["class_type"] == "EmptyLatentImage":
            inputs["width"] = inputs["height"] = pixels
    return smaller


def node_of(prompt: Prompt, kind: str) -> str:
    """Id of the only node of a type."""
    (found,) = (number for number, node in prompt.items() if node["class_type"] == kind)
    return found


def changed(prompt: Prompt, kind: str, /, **inputs: Any) -> Prompt:
    """The same with other inputs of the only node of a type."""
    other = deepcopy(prompt)
    other[node_of(other, kind)]["inputs"].update(inputs)
    return other


def float_start(**loader: Any) -> Prompt:
    """The quick start with nothing quantized and two steps."""
    prompt = small(workflow("quick_start_bundled_model"))
    return changed(prompt, "ldmq_pipeline_loader", quantize="no, as it is", **loader)


def small_run() -> Prompt:
    """Something short that must always work."""
    return changed(float_start(), "ldmq_pipeline_sampler", batch_size=1)


def without(prompt: Prompt, *kinds: str) -> Prompt:
    """The same without the nodes of those types."""
    return {number: node for number, node in deepcopy(prompt).items() if node["class_type"] not in kinds}
