"""What ComfyUI loads: the folders and the list of nodes."""

from comfy_api.latest import ComfyExtension, io

from .files import register_folders
from .nodes import NODES


class LDMQExtension(ComfyExtension):
    """All LDM-Q nodes."""

    async def on_load(self) -> None:
        """Make `ldmq_plans` and `ldmq_models` known, so that combos list what they hold."""
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The node classes."""
        return list(NODES)
