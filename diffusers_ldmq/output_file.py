"""Single result files: refused before the slow work, written beside, renamed into place when complete."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError


def refuse_file(path: str | os.PathLike[str]) -> None:
    """Raise OutputError if no file can be written at `path`; an existing file may be replaced."""
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder, a file is expected; name a file in it")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{path}: cannot be created, {parent} is not a writable folder; choose another place")


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
    except OSError as cause:
        raise OutputError(f"{path}: could not be written ({cause.strerror or cause}); nothing was changed") from cause
    finally:
        beside.unlink(missing_ok=True)
