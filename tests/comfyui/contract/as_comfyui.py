"""Run as a program: load a folder as ComfyUI loads custom nodes, on the stand-in, and tell what came of it as JSON.

Arguments: the folder; then 'hidden' to make diffusers_ldmq importable from nowhere but that folder.
"""

import asyncio
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

HEAVY = ("diffusers", "diffusers_ldmq", "transformers", "matplotlib", "scipy", "torchmetrics")


def load(folder: Path) -> dict[str, object]:
    """As ComfyUI does it: the folder's __init__.py as a package that is named after its path."""
    name = str(folder).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    start, before = time.perf_counter(), list(sys.path)
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    nodes = asyncio.run(extension.get_node_list())
    schemas = [node.define_schema() for node in nodes]
    return {
        "seconds": time.perf_counter() - start,
        "nodes": [schema.node_id for schema in schemas],
        "heavy": [name for name in HEAVY if name in sys.modules],
        "web": str((folder / module.WEB_DIRECTORY).resolve()),
        "added": [path for path in sys.path if path not in before],
        "last": sys.path[-1],
        "found": importlib.util.find_spec("diffusers_ldmq") is not None,
    }


def _main(folder: Path, how: str) -> None:
    root = Path(__file__).parents[3]
    sys.path.append(str(root / "tests"))
    import PIL.Image  # noqa: F401 - ComfyUI has these loaded long before custom nodes
    import torch  # noqa: F401
    from comfyui.contract.record_api import read_table
    from comfyui.contract.standin import standing_in

    if how == "hidden":
        sys.path[:] = [path for path in sys.path if not (Path(path) / "diffusers_ldmq").is_dir()]
        sys.path_importer_cache.clear()
    with tempfile.TemporaryDirectory() as base, standing_in(list(read_table())[-1], Path(base)):
        sys.stdout.write(json.dumps(load(folder)))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
