"""Registered folders, and names that stay inside them."""

import os
import re
from pathlib import Path, PurePath
from typing import NoReturn

import folder_paths

PLANS, MODELS, PIPELINES = "ldmq_plans", "ldmq_models", "ldmq_pipelines"
STOCK_MODELS = "diffusion_models"
SUFFIXES = {PLANS: ".json", MODELS: ".safetensors", PIPELINES: "", STOCK_MODELS: ".safetensors"}
"""What this pack writes into each folder, pipelines being folders; of plans and models also what it lists."""
NO_FILE = "(none)"
"""First entry of combos that list files: none of them."""
LONGEST = 200
"""Bytes of a name in UTF-8: with what is added (a number, the suffix, an unfinished file's mark) it fits into 255."""
_FORBIDDEN = re.compile(r'[<>:"|?*\x00-\x1f]')


def register_folders() -> None:
    """Make models/ldmq_plans, ldmq_models and ldmq_pipelines known to ComfyUI, beside what extra_model_paths.yaml
    names."""
    for kind in (PLANS, MODELS, PIPELINES):
        folder_paths.add_model_folder_path(kind, os.path.join(folder_paths.models_dir, kind))
        paths = folder_paths.folder_names_and_paths[kind][0]
        folder_paths.folder_names_and_paths[kind] = (paths, {SUFFIXES[kind]})


def listed(kind: str) -> list[str]:
    """Names of the files in a registered folder; unfinished ones, which begin with a dot, are left out."""
    return [name for name in folder_paths.get_filename_list(kind) if not PurePath(name).name.startswith(".")]


def existing(kind: str, name: str) -> Path:
    """The file of that name in a registered folder. Raises OutputError if there is none."""
    path = _found(kind, name)
    if path is None:
        _refuse(f"{name!r} is not in the folder {kind}; press R to refresh the list and choose another file")
    return path


def fingerprint(kind: str, name: str) -> str:
    """Changes when the file of that name does; empty for none. Size and time of change, not contents."""
    path = _found(kind, name)
    return "" if path is None else _stamp(path)


def folder_fingerprint(folder: str) -> str:
    """Changes when a file of a folder does; empty for what is no folder of this machine, a hub id for one."""
    named = os.path.expanduser(folder.strip())
    if not named or not os.path.isdir(named):
        return ""
    path = Path(named)
    # as deep as pipelines are: whoever types / or ~ here does not wait for a walk over the whole disk
    files = [p for pattern in ("*", "*/*") for p in path.glob(pattern) if p.is_file()]
    return "|".join(f"{p.relative_to(path)}:{_stamp(p)}" for p in sorted(files))


def source(named: str) -> str:
    """The folder or hub id that was typed in, without blanks around it and with the user's home in place of ~.

    Raises CheckpointError for what can be neither.
    """
    found = os.path.expanduser(named.strip())
    if not _encodable(found) or "\x00" in found or any(len(os.fsencode(p)) > 255 for p in PurePath(found).parts):
        from diffusers_ldmq.errors import CheckpointError

        raise CheckpointError(
            f"{_shortened(found)} is neither a folder nor a hub id: it is too long or holds characters that no name "
            "can; write the path of a folder, or a hub id such as owner/name"
        )
    return found


def new_file(kind: str, name: str, *, overwrite: bool = False) -> Path:
    """Where a file called `name` (subfolders allowed) goes in a registered folder.

    A counter is added as ComfyUI does (name_00001_.safetensors), so nothing is replaced; overwrite: no counter.
    Raises OutputError for a name that is empty, leaves the folder, or that not every system can hold.
    """
    problem = name_problem(name)
    if problem is not None:
        _refuse(problem)
    root, suffix = _folder(kind), SUFFIXES[kind]
    plain = name.removesuffix(suffix)
    if overwrite:
        path = _inside(root, root / f"{plain}{suffix}", name)
        _refuse_file_as_folder(root, path, name)
        return path
    # refused before ComfyUI's function, which makes folders, sees a link that leads outside
    _inside(root, root / plain, name)
    _refuse_file_as_folder(root, root / plain, name)
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


def name_problem(name: str) -> str | None:
    """Why no file can be called that, in words; None if it can."""
    parts = PurePath(name.replace("\\", "/")).parts
    if not _encodable(name) or len(os.fsencode(name)) > LONGEST:
        return f"{_shortened(name)}: a name must be UTF-8 text of at most {LONGEST} bytes; choose another"
    if not name.strip() or name.endswith(("/", "\\")):
        return "the name is empty; write one such as my-model"
    if ".." in parts or PurePath(name).is_absolute() or name.startswith(("/", "\\")):
        return f"{name!r} leaves ComfyUI's folder; write a name such as my-model, or sd15/my-model for a subfolder"
    if _FORBIDDEN.search(name) or any(part.startswith(".") for part in parts):
        return f'{name!r}: a name must not begin with a dot or hold any of < > : " | ? *; choose another'
    return None


def name_answer(name: str | None) -> bool | str:
    """What a node's validate_inputs says about a name that was typed in; None: it comes through a wire, unknown yet."""
    return True if name is None else name_problem(name) or True


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _found(kind: str, name: str) -> Path | None:
    path = None if name == NO_FILE or name_problem(name) else folder_paths.get_full_path(kind, name)
    return None if path is None else Path(path)


def _stamp(path: Path) -> str:
    told = path.stat()
    return f"{told.st_size}:{told.st_mtime_ns}"


def _inside(root: Path, path: Path, name: str) -> Path:
    if not path.resolve().is_relative_to(root.resolve()):
        _refuse(f"{name!r} leaves {root} through a link; choose another name")
    return path


def _refuse_file_as_folder(root: Path, path: Path, name: str) -> None:
    between = [parent for parent in path.parents if parent.is_relative_to(root)]
    blocking = next((parent for parent in between if parent.exists() and not parent.is_dir()), None)
    if blocking is not None:
        _refuse(f"{name!r} needs a folder {blocking} and that is a file; choose another name")


def _refuse(message: str) -> NoReturn:
    from diffusers_ldmq.errors import OutputError

    raise OutputError(message)
