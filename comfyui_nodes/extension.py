"""What ComfyUI loads: the folders and the list of nodes."""

from comfy_api.latest import ComfyExtension, io

from .files import register_folders
from .nodes import NODES


class LDMQExtension(ComfyExtension):
    """All LDM-Q nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The node classes. First makes the pack's folders known, because combos list them: `on_load` would be
        the place, but ComfyUI 0.8 does not call it."""
        register_folders()
        return list(NODES)
