"""Where pipelines lie: models/ldmq_pipelines, ComfyUI's own models/diffusers, and the bundled model."""

from pathlib import Path

import folder_paths

from .files import PIPELINES, folder_fingerprint, source

BUNDLED = "emoji-sd (comes with LDM-Q)"
"""The bundled model among the choices."""
BUNDLED_NAME = "emoji-sd"
STOCK = "diffusers"
_INDEX = "model_index.json"


def choices() -> list[str]:
    """The bundled model, then every pipeline folder as 'registered folder/name'."""
    found = [f"{kind}/{name}" for kind in (PIPELINES, STOCK) for name in _names(kind)]
    return [BUNDLED, *found]


def model_of(choice: str, named: str) -> str:
    """What a choice, or a hub id or folder that was typed in and goes before it, is called for diffusers.

    Raises CheckpointError for a choice that is not there any more, and for what can be neither folder nor hub id.
    """
    if named.strip():
        return source(named)
    if choice == BUNDLED:
        return BUNDLED_NAME
    folder = _found(choice)
    if folder is None:
        from diffusers_ldmq.errors import CheckpointError

        raise CheckpointError(f"{choice} is no pipeline folder any more; press R to refresh the list, choose another")
    return str(folder)


def stamp(choice: str, named: str) -> str:
    """Changes when a file of the pipeline's folder does; empty for the bundled model and the hub's."""
    if named.strip() or choice == BUNDLED:
        return folder_fingerprint(named)
    folder = _found(choice)
    return "" if folder is None else folder_fingerprint(str(folder))


def _found(choice: str) -> Path | None:
    """The folder of a choice; None for what `choices` does not list."""
    if choice not in choices():
        return None
    kind, _, name = choice.partition("/")
    return next((root / name for root in _roots(kind) if (root / name / _INDEX).is_file()), None)


def _names(kind: str) -> list[str]:
    """Pipelines directly in a registered folder or one folder deeper; unfinished ones begin with a dot."""
    patterns = (f"*/{_INDEX}", f"*/*/{_INDEX}")
    found = {p.parent.relative_to(root) for root in _roots(kind) for pattern in patterns for p in root.glob(pattern)}
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def _roots(kind: str) -> list[Path]:
    return [Path(path) for path in folder_paths.get_folder_paths(kind)]
