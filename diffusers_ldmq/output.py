"""Writing results so that nothing is ever half there: beside the target first, renamed into place when complete."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import OutputError


def refuse_folder(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise OutputError if results cannot go to `folder`: it is a file, is not empty, or its parent is not writable."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file, a folder is expected; choose another output folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"{folder}: the folder exists and is not empty; pass --overwrite (overwrite=True) to replace")
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{folder}: cannot be created, {parent} is not a writable folder; choose another place")


@contextmanager
def folder_beside(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder beside `folder` to write into; it takes `folder`'s place when the context ends without an error.

    Raises OutputError for a folder that may not be replaced, and when writing fails (no space, no permission); in
    every other case too, an interrupt among them, what was written is removed and an earlier folder stays as it was.
    """
    folder = Path(folder).absolute()
    refuse_folder(folder, overwrite=overwrite)
    beside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
        yield beside
        _swap(beside, folder)
    except (OSError, SafetensorError) as cause:
        raise OutputError(f"{folder}: could not be written ({_reason(cause)}); nothing was changed") from cause
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _swap(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _reason(cause: Exception) -> str:
    number = getattr(cause, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause):
        return "no space left on the disk"
    return os.strerror(number) if number else str(cause)
