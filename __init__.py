"""Entry point for ComfyUI, which runs this folder when it stands in custom_nodes. Anywhere else it does nothing."""

import importlib.util
import sys
from pathlib import Path

# Test runners import this file too: only ComfyUI has loaded these modules, and as a part of a package
if __package__ is not None and {"comfy", "folder_paths"} <= sys.modules.keys():
    if importlib.util.find_spec("diffusers_ldmq") is None:
        # at the end: this folder also holds `tests`, which must not hide anybody else's
        sys.path.append(str(Path(__file__).resolve().parent))

    from .comfyui_nodes import comfy_entrypoint

    WEB_DIRECTORY = "./comfyui_nodes/web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
