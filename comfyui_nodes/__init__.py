"""LDM-Q in ComfyUI: nodes that profile, plan, calibrate, quantize and compare a MODEL, and run diffusers pipelines.

Importing loads neither diffusers nor diffusers_ldmq, and nothing of ComfyUI either; nodes do that when they first run.
"""

from typing import Any

WEB_DIRECTORY = "./web"
"""For a link to this folder alone in custom_nodes; a clone of the whole repository has its own in the root."""


async def comfy_entrypoint() -> Any:
    """What ComfyUI asks for the nodes (V3 API)."""
    from .extension import LDMQExtension

    return LDMQExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
