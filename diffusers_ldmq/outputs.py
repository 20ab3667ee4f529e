"""Where results go: checked before the slow work, written beside, renamed into place when complete."""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError

_REASONS = {
    errno.ENOSPC: "no space left on the disk; free some or choose another place",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another place",
    errno.EFBIG: "the file would be larger than this system allows (ulimit -f, or the disk's limit)",
    errno.EACCES: "permission denied; choose another place",
    errno.EROFS: "the disk is read-only; choose another place",
}


def reason(cause: OSError) -> str:
    """What went wrong with a file, in words and with what to do."""
    return _REASONS.get(cause.errno or 0, cause.strerror or str(cause))


def check_place(path: str | os.PathLike[str]) -> None:
    """Raise OutputError unless something can be written beside `path` (missing parent folders will be made)."""
    parent = Path(path).absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"cannot write {path}: {parent} is a file, not a folder")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".ldmq-", dir=parent))
    except OSError as cause:
        raise OutputError(f"cannot write {path}: {reason(cause)} ({parent})") from None


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise OutputError unless a file can be written at `path` (an existing one will be replaced)."""
    if Path(path).is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file")
    check_place(path)


def check_folder(path: str | os.PathLike[str], *, replaceable: str | None = None, remedy: str = "") -> None:
    """Raise OutputError unless a new folder can be made at `path`.

    replaceable: a file name; an existing folder that holds it may be replaced, every other one that is not empty may
    not. remedy: what the message tells the user to do.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"cannot write {path}: it is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not (replaceable and (folder / replaceable).is_file()):
        raise OutputError(f"{path} exists and is not empty; {remedy or 'choose another folder'}")
    check_place(folder)


@contextmanager
def complete_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new empty folder beside `path` that takes its place when the context ends well, and is removed when not.

    What is at `path` stays untouched until then. Raises OutputError in place of an OSError.
    """
    folder = Path(path).absolute()
    beside = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        beside.chmod(0o777 & ~_umask())  # mkdtemp makes private folders; this one is to be an ordinary one
        yield beside
        _swap(beside, folder)
    except OSError as cause:
        raise OutputError(f"cannot write {path}: {reason(cause)}; nothing was left behind") from cause
    finally:
        if beside is not None and beside.exists():
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def complete_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name of a file beside `path` that takes its place when the context ends well, and is removed when not."""
    target = Path(path).absolute()
    beside = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(target)
    except OSError as cause:
        raise OutputError(f"cannot write {path}: {reason(cause)}; nothing was left behind") from cause
    finally:
        beside.unlink(missing_ok=True)


def _swap(beside: Path, folder: Path) -> None:
    """Put `beside` in the place of `folder`, which comes back if that fails."""
    if not folder.exists():
        beside.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)) / "old"
    folder.rename(old)
    try:
        beside.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
