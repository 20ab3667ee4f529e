"""A stand-in for what the pack uses of ComfyUI, so that its nodes can be looked at and run where there is no ComfyUI.

It knows the names and parameters of api_signatures.json and refuses all others; what functions do is our own, and as
little as the pack needs.
"""

import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from comfyui.contract.record_api import MODULES, read_table

PACKAGES = ("comfy", "comfy_api", "comfyui_nodes", "folder_paths", "server")
SAMPLERS, SCHEDULERS = ["euler", "dpmpp_2m"], ["normal", "karras"]


class Interrupted(BaseException):
    """ComfyUI's interrupt."""


@contextlib.contextmanager
def standing_in(version: str, base: Path) -> Iterator["StandIn"]:
    """While open, `import comfy` and so on give the stand-in, and the pack is imported afresh. base: of its folders."""
    ours = lambda: [name for name in sys.modules if name.split(".")[0] in PACKAGES]  # noqa: E731
    before = {name: sys.modules.pop(name) for name in ours()}
    stand_in = StandIn(version, base)
    sys.modules.update(stand_in.modules)
    try:
        yield stand_in
    finally:
        for name in ours():
            del sys.modules[name]
        sys.modules.update(before)


class StandIn:
    """ComfyUI of one recorded version. told: texts sent to nodes; bars: [(value, total)] of the progress bar."""

    def __init__(self, version: str, base: Path) -> None:
        self.signatures = read_table()[version]
        self.base, self.told, self.bars = base, [], []
        self.interrupted = False
        self.unloaded = 0
        self.modules: dict[str, Any] = {name: ModuleType(name) for name in (*MODULES, "comfy", "comfy_api")}
        for name, module in self.modules.items():
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(self.modules[parent], last, module)
        self._api(self.modules["comfy_api.latest"])
        self._folders(self.modules["folder_paths"])
        self._models(self.modules)
        self._server(self.modules["server"])

    def kind(self, name: str, base: type = object) -> type:
        """A class that takes exactly the recorded parameters and keeps them as attributes."""
        signature = self.signature(name)

        def keep(this: Any, *args: Any, **keywords: Any) -> None:
            for key in signature.parameters:
                setattr(this, key, None)
            this.__dict__.update(signature.bind(*args, **keywords).arguments)

        return type(name.rpartition(".")[2], (base,), {"__init__": keep, "__signature__": signature})

    def signature(self, name: str) -> inspect.Signature:
        """The recorded parameters, all of them optional: which are required is not recorded."""
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = self.signatures[name]
        assert names is not None, f"{name} takes no parameters"
        return inspect.Signature([inspect.Parameter(key, kind, default=None) for key in names])

    def _api(self, api: Any) -> None:
        kinds: dict[str, dict[str, type]] = {}
        for name in self.signatures:
            parts = name.removeprefix("comfy_api.latest.io.").split(".")
            if name.startswith("comfy_api.latest.io.") and parts[-1] in ("Input", "Output"):
                kinds.setdefault(parts[0], {})[parts[1]] = self.kind(name)
        io = SimpleNamespace(**{name: type(name, (), members) for name, members in kinds.items()})
        for name, members in kinds.items():
            for member in members.values():
                member.io_type = name.upper()  # pyright: ignore[reportAttributeAccessIssue]
        io.Input = object
        io.Schema = self.kind("comfy_api.latest.io.Schema")
        io.ComfyNode = type("ComfyNode", (), {"hidden": None})
        io.Hidden = SimpleNamespace(unique_id="unique_id")
        io.NodeOutput = type("NodeOutput", (), {"__init__": _output})
        io.Custom = self._custom
        api.io, api.ui = io, SimpleNamespace(PreviewImage=_Preview)
        api.ComfyExtension = type("ComfyExtension", (), {})

    def _custom(self, io_type: str) -> type:
        names = {"Input": "comfy_api.latest.io.Model.Input", "Output": "comfy_api.latest.io.Model.Output"}
        members = {member: self.kind(name) for member, name in names.items()}
        for member in members.values():
            member.io_type = io_type  # pyright: ignore[reportAttributeAccessIssue]
        return type(io_type, (), members)

    def _folders(self, paths: Any) -> None:
        paths.models_dir = str(self.base / "models")
        stock = [str(self.base / "models" / name) for name in ("unet", "diffusion_models")]
        paths.folder_names_and_paths = {
            "diffusion_models": (stock, {".safetensors"}),
            "diffusers": ([str(self.base / "models" / "diffusers")], ["folder"]),
        }

        def add(folder_name: str, full_folder_path: str, is_default: bool = False) -> None:
            known = paths.folder_names_and_paths.setdefault(folder_name, ([], set()))
            known[0].append(full_folder_path)

        def listed(folder_name: str) -> list[str]:
            folders, suffixes = paths.folder_names_and_paths[folder_name]
            files = [(Path(root), path) for root in folders for path in Path(root).rglob("*")]
            return sorted(str(path.relative_to(root)) for root, path in files if path.suffix in suffixes)

        def full(folder_name: str, filename: str) -> str | None:
            found = [Path(root) / filename for root in paths.folder_names_and_paths[folder_name][0]]
            return next((str(path) for path in found if path.is_file()), None)

        def free(filename_prefix: str, output_dir: str) -> tuple[str, str, int, str, str]:
            path = Path(output_dir) / filename_prefix
            path.parent.mkdir(parents=True, exist_ok=True)
            taken = [int(found.name.split("_")[-2]) for found in path.parent.glob(f"{path.name}_*_*")]
            return str(path.parent), path.name, max(taken, default=0) + 1, "", filename_prefix

        paths.add_model_folder_path, paths.get_filename_list, paths.get_full_path = add, listed, full
        paths.get_folder_paths = lambda folder_name: list(paths.folder_names_and_paths[folder_name][0])
        paths.get_output_directory = lambda: str(self.base / "output")
        paths.get_save_image_path = free

    def _models(self, modules: dict[str, Any]) -> None:
        modules["comfy.utils"].ProgressBar = lambda total: SimpleNamespace(update_absolute=self._progress)
        management = modules["comfy.model_management"]
        management.InterruptProcessingException = Interrupted
        management.throw_exception_if_processing_interrupted = self._check
        management.processing_interrupted = lambda: self.interrupted
        management.soft_empty_cache = lambda: None
        management.unload_all_models = self._unload
        modules["comfy.samplers"].KSampler = SimpleNamespace(SAMPLERS=SAMPLERS, SCHEDULERS=SCHEDULERS)

    def _server(self, server: Any) -> None:
        send = lambda text, node_id: self.told.append((node_id, text))  # noqa: E731
        server.PromptServer = SimpleNamespace(instance=SimpleNamespace(send_progress_text=send))

    def _progress(self, value: int, total: int, preview: Any = None) -> None:
        self.bars.append((value, total))

    def _check(self) -> None:
        if self.interrupted:
            raise Interrupted

    def _unload(self) -> None:
        self.unloaded += 1


class _Preview:
    def __init__(self, image: Any, cls: Any) -> None:
        self.image = image


def _output(this: Any, *args: Any, ui: Any = None) -> None:
    this.args, this.ui = args, ui
