"""One V3 node a file: the schema, and one call of the function that does the work."""

from comfy_api.latest import io

NODES: tuple[type[io.ComfyNode], ...] = ()
"""Every node of the pack, in the order of the work."""
