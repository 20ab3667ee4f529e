"""Writing results so that nothing is ever half there: beside the target first, renamed into place when complete."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from safetensors import SafetensorError

from .errors import OutputError


def refuse_folder(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise OutputError if results cannot go to `folder`: it is a file, is not empty, or its parent is not writable."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file, a folder is expected; choose another output folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(f"{folder}: the folder exists and is not empty; pass --overwrite (overwrite=True) to replace")
    _refuse_parent(folder)


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


@contextmanager
def folder_into(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into what is to be in `folder`, where other files stay and those of the same names are
    replaced. What is absent or empty is filled when the context ends without an error, or stays as it was; a folder
    with files is written in directly.

    Raises OutputError for a file or an unwritable place, and when writing fails.
    """
    folder = Path(folder).absolute()
    if not folder.exists():
        with folder_beside(folder) as beside:
            yield beside
        return
    refuse_folder(folder, overwrite=True)
    try:
        if any(folder.iterdir()):
            yield folder
            return
        # inside, because the folder itself may be a mount point, a link or somebody's working directory
        with TemporaryDirectory(prefix=".partial-", dir=folder) as inside:
            yield Path(inside)
            for path in list(Path(inside).iterdir()):
                path.rename(folder / path.name)
    except (OSError, SafetensorError) as cause:
        raise OutputError(
            f"{folder}: could not be written ({_reason(cause)}); if it held a pipeline before, save it again"
        ) from cause


def _refuse_parent(path: Path) -> None:
    """Raise OutputError unless the nearest existing folder above `path` can really be written in."""
    parent = next(p for p in path.absolute().parents if p.exists())
    try:
        with TemporaryFile(dir=parent):
            return
    except OSError as cause:
        reason = _reason(cause)
        raise OutputError(
            f"{path}: cannot be created, {parent} is not a writable folder ({reason}); choose another place"
        ) from None


def _swap(new: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:  # an interrupt here must not lose the old folder either
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _reason(cause: Exception) -> str:
    number = getattr(cause, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause):
        return "no space left on the disk"
    return os.strerror(number) if number else str(cause)


def refuse_file(path: str | os.PathLike[str]) -> None:
    """Raise OutputError if no file can be written at `path`; an existing file may be replaced."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder, a file is expected; name a file in it")
    _refuse_parent(path)


@contextmanager
def file_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file name beside `path` to write to; it takes `path`'s place when the context ends without an error.

    Raises OutputError when writing fails; then, and on an interrupt, nothing is left and an earlier file stays.
    """
    path = Path(path).absolute()
    refuse_file(path)
    beside = path.with_name(f".{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    except (OSError, SafetensorError) as cause:
        raise OutputError(f"{path}: could not be written ({_reason(cause)}); nothing was changed") from cause
    finally:
        beside.unlink(missing_ok=True)
