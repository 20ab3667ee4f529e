"""Record what ComfyUI's API takes: `COMFYUI_PATH=... python tests/comfyui/contract/record_api.py` adds that version.

Only facts are kept: names, parameter names and the version they were seen in. The stand-in refuses everything else.
"""

import importlib
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("api_signatures.json")
MODULES = ("comfy_api.latest", "folder_paths", "comfy.utils", "comfy.model_management", "comfy.samplers", "server")
NAMES = (
    "comfy_api.latest.ComfyExtension",
    "comfy_api.latest.io.ComfyNode",
    "comfy_api.latest.io.Schema",
    "comfy_api.latest.io.NodeOutput",
    "comfy_api.latest.io.Hidden.unique_id",
    "comfy_api.latest.io.Custom",
    "comfy_api.latest.io.Boolean.Input",
    "comfy_api.latest.io.Combo.Input",
    "comfy_api.latest.io.Conditioning.Input",
    "comfy_api.latest.io.Float.Input",
    "comfy_api.latest.io.Image.Output",
    "comfy_api.latest.io.Int.Input",
    "comfy_api.latest.io.Latent.Input",
    "comfy_api.latest.io.Model.Input",
    "comfy_api.latest.io.Model.Output",
    "comfy_api.latest.io.String.Input",
    "comfy_api.latest.io.String.Output",
    "comfy_api.latest.io.Vae.Input",
    "comfy_api.latest.ui.PreviewImage",
    "folder_paths.add_model_folder_path",
    "folder_paths.folder_names_and_paths",
    "folder_paths.get_filename_list",
    "folder_paths.get_folder_paths",
    "folder_paths.get_full_path",
    "folder_paths.get_output_directory",
    "folder_paths.get_save_image_path",
    "folder_paths.models_dir",
    "comfy.utils.ProgressBar",
    "comfy.utils.ProgressBar.update_absolute",
    "comfy.model_management.InterruptProcessingException",
    "comfy.model_management.processing_interrupted",
    "comfy.model_management.soft_empty_cache",
    "comfy.model_management.throw_exception_if_processing_interrupted",
    "comfy.model_management.unload_all_models",
    "comfy.samplers.KSampler.SAMPLERS",
    "comfy.samplers.KSampler.SCHEDULERS",
    "server.PromptServer.send_progress_text",
)
"""Everything of ComfyUI that the pack uses outside of `native`, which is tested against a real one only."""


def recorded(comfyui: Path) -> dict[str, list[str] | None]:
    """Name -> parameter names (None for what is no function or class) of the ComfyUI in that folder."""
    sys.path.insert(0, str(comfyui))
    sys.argv = sys.argv[:1]  # ComfyUI reads its options when it is imported
    importlib.import_module("comfy.cli_args").args.cpu = True
    importlib.import_module("utils.extra_config")  # as ComfyUI's main does, before `comfy/utils.py` can hide `utils`
    modules = {name: importlib.import_module(name) for name in MODULES}
    return {name: _parameters(_object(modules, name)) for name in NAMES}


def version_of(comfyui: Path) -> str:
    """The version that the ComfyUI in that folder says it is."""
    return (comfyui / "comfyui_version.py").read_text(encoding="utf-8").rsplit('"', 2)[-2]


def read_table() -> dict[str, dict[str, list[str] | None]]:
    """Version -> name -> parameter names, the oldest version first."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def _object(modules: dict[str, Any], name: str) -> Any:
    module = max((m for m in modules if name.startswith(f"{m}.")), key=len)
    found = modules[module]
    for part in name.removeprefix(f"{module}.").split("."):
        found = getattr(found, part)
    return found


def _parameters(found: Any) -> list[str] | None:
    is_member = not (inspect.isclass(found) or inspect.isroutine(found))
    if is_member or (inspect.isclass(found) and issubclass(found, BaseException)):
        return None
    return [name for name in inspect.signature(found).parameters if name != "self"]


def _add(comfyui: Path) -> None:
    table = read_table() if TABLE.exists() else {}
    table[version_of(comfyui)] = recorded(comfyui)
    order = sorted(table, key=lambda version: tuple(map(int, version.split("."))))
    lines = [
        f'  "{version}": {{\n'
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(found)}" for name, found in table[version].items())
        + "\n  }"
        for version in order
    ]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    _add(Path(os.environ["COMFYUI_PATH"]))
