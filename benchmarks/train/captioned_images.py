"""Captioned pictures from a folder or zip file, as one uint8 tensor and a list of captions.

Two layouts are read: Hugging Face's imagefolder (`metadata.jsonl` with `file_name` and `text` per line), and
pictures with a text file of the same name beside them (`cat.png`, `cat.txt`).
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PICTURE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}

# Flags and skin tones are hundreds of near duplicates that a network of this size cannot tell apart.
SKIPPED_GROUPS = {"Flags", "Component"}
SKIPPED_WORDS = "skin tone"

FAMILIAR_GROUPS = {"Smileys & Emotion", "Animals & Nature", "Food & Drink"}
FAMILIAR_SUBGROUPS = {
    "sky & weather", "transport-air", "transport-ground", "transport-water", "sport", "game", "event",
    "musical-instrument", "place-building", "light & video", "person-fantasy",
}  # fmt: skip


class TrainingError(ValueError):
    """The data, a setting or a checkpoint cannot be used; the message is one line and says what to do."""


@dataclass(frozen=True)
class Record:
    """One picture's file name, its caption and, for emoji, Unicode's group and subgroup ("" elsewhere)."""

    file_name: str
    caption: str
    group: str = ""
    subgroup: str = ""

    @property
    def usable(self) -> bool:
        """Whether any stage learns this picture. Data without groups is taken as it is."""
        return not self.group or (self.group not in SKIPPED_GROUPS and SKIPPED_WORDS not in self.caption)

    @property
    def familiar(self) -> bool:
        """Whether this is a thing that people know by sight."""
        return self.group in FAMILIAR_GROUPS or self.subgroup in FAMILIAR_SUBGROUPS


@dataclass(frozen=True)
class CaptionedImages:
    """`pixels` uint8 [N, 3, size, size] in RGB, and N captions in lower case."""

    pixels: Tensor
    captions: list[str]

    def fingerprint(self) -> str:
        """A short digest by which a resumed run recognises that it sees the same data."""
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        digest.update("\n".join(self.captions).encode())
        return f"{len(self.captions)} pictures, {digest.hexdigest()[:12]}"

    def images(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """The chosen rows as float32 [n, 3, size, size] between -1 and 1, as the autoencoder expects them."""
        return self.pixels[rows].float() / 127.5 - 1


class Source:
    """The files of a folder or a zip file, by their relative names; a zip file is never unpacked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        if path.is_dir():
            self.names = sorted(f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file())
        elif path.is_file() and zipfile.is_zipfile(path):
            self._zip = zipfile.ZipFile(path)
            self.names = sorted(name for name in self._zip.namelist() if not name.endswith("/"))
        else:
            problem = "is neither a folder nor a zip file" if path.exists() else "does not exist"
            raise TrainingError(f"data {path} {problem}: give a folder or zip file of captioned pictures")

    def read(self, name: str) -> bytes:
        return self._zip.read(name) if self._zip else (self.path / name).read_bytes()

    def read_text(self, name: str) -> str:
        try:
            return self.read(name).decode()
        except UnicodeDecodeError as error:
            raise TrainingError(f"{name} of {self.path} is not UTF-8 text") from error


def load_captioned_images(path: Path, size: int, subset: str) -> CaptionedImages:
    """Every usable picture, `size` pixels square; the subset "familiar" keeps well-known emoji only."""
    source = Source(path)
    records = [record for record in read_records(source) if record.usable]
    if subset == "familiar":
        records = [record for record in records if record.familiar]
    if not records:
        raise TrainingError(f"no picture of {path} is left in the subset '{subset}': use subset=all")
    pixels = np.stack([square(source, record.file_name, size) for record in records])
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return CaptionedImages(channels_first, [record.caption for record in records])


def read_records(source: Source) -> list[Record]:
    """The records of either layout, in the order of metadata.jsonl or of the names."""
    pictures = [name for name in source.names if PurePosixPath(name).suffix.lower() in PICTURE_ENDINGS]
    if not pictures:
        raise TrainingError(f"no pictures in {source.path}: expected {', '.join(sorted(PICTURE_ENDINGS))} files")
    has_metadata = "metadata.jsonl" in source.names
    records = _from_metadata(source) if has_metadata else _from_text_files(source, pictures)
    captioned = {record.file_name for record in records if record.caption}
    _refuse_uncaptioned(source, [name for name in pictures if name not in captioned], len(pictures))
    unknown = sorted(captioned - set(pictures))
    if unknown:
        raise TrainingError(f"metadata.jsonl names {unknown[0]}, which is not in {source.path}")
    return records


def _refuse_uncaptioned(source: Source, uncaptioned: list[str], total: int) -> None:
    if uncaptioned:
        raise TrainingError(
            f"{len(uncaptioned)} of {total} pictures in {source.path} have no caption "
            f"(first: {uncaptioned[0]}): name it in metadata.jsonl or write a .txt file of the same name"
        )


def _from_metadata(source: Source) -> list[Record]:
    records = []
    for number, line in enumerate(source.read_text("metadata.jsonl").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            caption = str(row.get("text") or "").strip().lower()
            records.append(Record(row["file_name"], caption, row.get("group", ""), row.get("subgroup", "")))
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise TrainingError(
                f"metadata.jsonl of {source.path}, line {number}: expected an object with file_name and text"
            ) from error
    return records


def _from_text_files(source: Source, pictures: Iterable[str]) -> list[Record]:
    names = set(source.names)
    records = []
    for picture in pictures:
        text_file = PurePosixPath(picture).with_suffix(".txt").as_posix()
        if text_file in names:
            records.append(Record(picture, source.read_text(text_file).strip().lower()))
    return records


def square(source: Source, name: str, size: int) -> np.ndarray:
    """The picture on white, padded to a square and resized: uint8 [size, size, 3]."""
    try:
        picture = Image.open(io.BytesIO(source.read(name))).convert("RGBA")
    except (OSError, zipfile.BadZipFile) as error:
        raise TrainingError(f"picture {name} of {source.path} cannot be read: {error}") from error
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))
