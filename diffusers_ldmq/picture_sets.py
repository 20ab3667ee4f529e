"""Many pictures in a folder or zip file, read a batch at a time."""

import hashlib
import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .errors import EvaluationError

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
BATCH = 100
"""Pictures that are in memory at once."""


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one size, in the order of their names. path: folder or zip file; names: from there; size: (width,
    height) in pixels that all must have; resize: others are cut to its shape around the middle and scaled instead."""

    path: Path
    names: tuple[str, ...]
    size: tuple[int, int]
    resize: bool = False

    def __len__(self) -> int:
        return len(self.names)

    def taken(self, count: int) -> "PictureSet":
        """`count` of the pictures at equal distances, so that every class of a folder per class is among them."""
        chosen = evenly(len(self.names), count)
        return PictureSet(self.path, tuple(self.names[i] for i in chosen), self.size, self.resize)

    def batches(self, batch: int = BATCH) -> Iterator[Tensor]:
        """Pictures, uint8 [n, 3, h, w], n <= batch. Transparent parts become white.

        Raises EvaluationError for one that cannot be read or has another size.
        """
        with _opened(self.path) as source:
            for start in range(0, len(self.names), batch):
                read = [self._pixels(name, source.read(name)) for name in self.names[start : start + batch]]
                yield torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).contiguous()

    def _pixels(self, name: str, data: bytes) -> np.ndarray:
        picture = _decoded(self.path, name, data)
        if picture.size != self.size and not self.resize:
            raise EvaluationError(
                f"{self.path}: {name} is {picture.width}x{picture.height}, expected {self.size[0]}x{self.size[1]}; "
                f"give pictures of one size, that of the model's, or let them be resized (--resize)"
            )
        return np.asarray(_fitted(picture, self.size))

    @cached_property
    def digest(self) -> str:
        """Hash of names, contents and size: equal exactly for equal sets."""
        digest = hashlib.sha256(repr((self.size, self.resize)).encode())
        with _opened(self.path) as source:
            for name in self.names:
                digest.update(name.encode() + b"\0" + hashlib.sha256(source.read(name)).digest())
        return digest.hexdigest()[:16]


def evenly(available: int, count: int) -> list[int]:
    """`count` of range(available) at equal distances; all where fewer are there."""
    count = min(count, available)
    return [i * available // count for i in range(count)]


def picture_set(
    path: str | os.PathLike[str], size: tuple[int, int] | None = None, *, resize: bool = False
) -> PictureSet:
    """Every picture of a folder (with its subfolders) or zip file. size: (width, height), None = that of the first.

    Raises EvaluationError where there are fewer than two, which have no statistics.
    """
    path = Path(path)
    with _opened(path) as source:
        names = [name for name in source.names() if PurePosixPath(name).suffix.lower() in ENDINGS]
        if len(names) < 2:
            raise EvaluationError(
                f"{path}: {len(names)} pictures, at least 2 are needed; pictures end in {', '.join(sorted(ENDINGS))}"
            )
        return PictureSet(path, tuple(names), size or _decoded(path, names[0], source.read(names[0])).size, resize)


def read_pictures(pictures: PictureSet) -> list[Image.Image]:
    """All of them as pictures in RGB."""
    return [Image.fromarray(one.permute(1, 2, 0).numpy()) for batch in pictures.batches() for one in batch]


def pixels_of(arrays: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """What a pipeline drew, float [n, h, w, 3] in 0..1, as uint8, rounded as diffusers itself does. numbers: of the
    pictures, for the message. Raises EvaluationError for NaN and Inf, which a picture file would show as black."""
    for number, array in zip(numbers, arrays, strict=True):
        if not np.isfinite(array).all():
            raise EvaluationError(
                f"picture {number} holds NaN or Inf; the model or its dtype is broken (float16 often is on VAEs: try "
                f"float32), nothing of this batch was kept"
            )
    return (np.clip(arrays, 0, 1) * 255).round().astype(np.uint8)


class _Source:
    """The files of a folder or a zip file; a zip file is never unpacked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.zip: zipfile.ZipFile | None = None
        if not path.is_dir():
            self.zip = _open_zip(path)

    def names(self) -> list[str]:
        if self.zip is not None:
            return sorted(name for name in self.zip.namelist() if not name.endswith("/"))
        return sorted(file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file())

    def read(self, name: str) -> bytes:
        try:
            return self.zip.read(name) if self.zip else (self.path / name).read_bytes()
        except (OSError, zipfile.BadZipFile, KeyError, RuntimeError) as cause:  # RuntimeError: encrypted
            raise EvaluationError(f"{self.path}: {name} cannot be read ({cause})") from None

    def __enter__(self) -> "_Source":
        return self

    def __exit__(self, *_: object) -> None:
        if self.zip is not None:
            self.zip.close()


_opened = _Source


def _open_zip(path: Path) -> zipfile.ZipFile:
    if not path.exists():
        raise EvaluationError(f"{path}: no such folder or zip file of pictures")
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as cause:
        raise EvaluationError(f"{path}: is neither a folder nor a zip file of pictures ({cause})") from None


def _decoded(path: Path, name: str, data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as opened:
            if not (opened.has_transparency_data):
                return opened.convert("RGB")
            picture = opened.convert("RGBA")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as cause:
        raise EvaluationError(f"{path}: {name} cannot be opened as a picture ({cause})") from None
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    white.alpha_composite(picture)
    return white.convert("RGB")


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest part of that shape around the middle, scaled to it; the picture itself where it fits already."""
    if picture.size == size:
        return picture
    scale = min(picture.width / size[0], picture.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    box = (left, top, left + width, top + height)
    return picture.resize(size, Image.Resampling.LANCZOS, box=box)
