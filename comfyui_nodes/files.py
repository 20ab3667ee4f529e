"""Registered folders, and names that stay inside them."""

import os
import re
from pathlib import Path, PurePath
from typing import NoReturn

import folder_paths

PLANS, MODELS, STOCK_MODELS = "ldmq_plans", "ldmq_models", "diffusion_models"
SUFFIXES = {PLANS: ".json", MODELS: ".safetensors", STOCK_MODELS: ".safetensors"}
"""What this pack writes into each folder; of the first two also what it lists."""
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')


def register_folders() -> None:
    """Make models/ldmq_plans and models/ldmq_models known to ComfyUI, beside what extra_model_paths.yaml names."""
    for kind in (PLANS, MODELS):
        folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, kind))
        paths = folder_paths.folder_names_and_paths[kind][0]
        folder_paths.folder_names_and_paths[kind] = (paths, {SUFFIXES[kind]})


def listed(kind: str) -> list[str]:
    """Names of the files in a registered folder; unfinished ones, which begin with a dot, are left out."""
    return [name for name in folder_paths.get_filename_list(kind) if not PurePath(name).name.startswith(".")]


def existing(kind: str, name: str) -> Path:
    """The file of that name in a registered folder. Raises OutputError if there is none."""
    _refuse_name(name)
    path = folder_paths.get_full_path(kind, name)
    if path is None:
        _refuse(f"{name!r} is not in the folder {kind} any more; press R to refresh the list and choose another file")
    return Path(path)


def fingerprint(path: Path) -> str:
    """Changes when the file (or a file of the folder) does: sizes and times of change, not contents."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    told = [f"{p.relative_to(path)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files if p.exists()]
    return "|".join(told)


def new_file(kind: str, name: str, *, overwrite: bool = False) -> Path:
    """Where a file called `name` (subfolders allowed) goes in a registered folder.

    A counter is added as ComfyUI does (name_00001_.safetensors), so nothing is replaced; overwrite: no counter.
    Raises OutputError for a name that is empty, leaves the folder, or that not every system can hold.
    """
    _refuse_name(name)
    root, suffix = _folder(kind), SUFFIXES[kind]
    plain = name.removesuffix(suffix)
    if overwrite:
        return _inside(root, root / f"{plain}{suffix}", name)
    # refused before ComfyUI's function, which makes folders, sees a link that leads outside
    _inside(root, root / plain, name)
    folder, stem, counter, *_ = folder_paths.get_save_image_path(plain, str(root))
    path = Path(folder) / f"{stem}_{counter:05}_{suffix}"
    while path.exists():
        counter += 1
        path = Path(folder) / f"{stem}_{counter:05}_{suffix}"
    return path


def _folder(kind: str) -> Path:
    """The registered folder that new files go to: the one with the kind's own name, else the first."""
    paths = [Path(os.path.abspath(path)) for path in folder_paths.get_folder_paths(kind)]
    return next((path for path in paths if path.name == kind), paths[0])


def _refuse_name(name: str) -> None:
    parts = PurePath(name.replace("\\", "/")).parts
    if not name.strip() or name.endswith(("/", "\\")):
        _refuse("the name is empty; write one such as my-model")
    if ".." in parts or PurePath(name).is_absolute() or name.startswith(("/", "\\")):
        _refuse(f"{name!r} leaves ComfyUI's folder; write a name such as my-model, or sd15/my-model for a subfolder")
    if _FORBIDDEN.search(name) or any(part.startswith(".") for part in parts):
        _refuse(f'{name!r}: a name must not begin with a dot or hold any of < > : " | ? *; choose another')


def _inside(root: Path, path: Path, name: str) -> Path:
    if not path.resolve().is_relative_to(root.resolve()):
        _refuse(f"{name!r} leaves {root} through a link; choose another name")
    return path


def _refuse(message: str) -> NoReturn:
    from diffusers_ldmq.errors import OutputError

    raise OutputError(message)
