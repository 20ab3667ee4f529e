"""Pictures of folders and zip files: what is read, in which order, and what is refused."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_evaluation import picture_folder
from tiny_pipelines import drawing

from diffusers_ldmq.errors import EvaluationError
from diffusers_ldmq.picture_sets import PictureSet, evenly, picture_set, pixels_of


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


def read(pictures: PictureSet, batch: int = 100) -> torch.Tensor:
    return torch.cat(list(pictures.batches(batch)))


def test_a_folder_and_its_zip_file_are_the_same_set(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "in", 12)
    (folder / "README.txt").write_text("no picture")
    one, other = picture_set(folder), picture_set(zipped(folder, tmp_path / "in.zip"))
    assert one.names == other.names
    assert len(one) == 12
    assert one.size == (32, 32)
    assert one.digest == other.digest
    assert torch.equal(read(one), read(other, batch=5))
    expected = np.asarray(drawing(3, 32)).transpose(2, 0, 1)
    assert np.array_equal(read(one)[3].numpy(), expected)


def test_the_digest_follows_content_names_and_size(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "in", 4)
    digests = {picture_set(folder).digest, picture_set(folder, (16, 16), resize=True).digest}
    drawing(99, 32).save(folder / "class0" / "002.png")
    digests.add(picture_set(folder).digest)
    (folder / "class0" / "002.png").rename(folder / "class0" / "x.png")
    digests.add(picture_set(folder).digest)
    assert len(digests) == 4


def test_a_share_is_taken_at_equal_distances(tmp_path: Path) -> None:
    pictures = picture_set(picture_folder(tmp_path / "in", 20))
    assert pictures.taken(4).names == tuple(pictures.names[i] for i in (0, 5, 10, 15))
    assert pictures.taken(99).names == pictures.names
    assert evenly(7, 3) == [0, 2, 4]


def test_transparent_parts_are_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 255))
    for name in ("a", "b"):
        clear.save(tmp_path / f"{name}.png")
    found = read(picture_set(tmp_path))[0, :, 0]
    assert found.T.tolist() == [[255] * 3, [255, 0, 0], [255] * 3, [255] * 3]


def test_resizing_cuts_around_the_middle(tmp_path: Path) -> None:
    wide = Image.new("RGB", (64, 16), (255, 0, 0))
    wide.paste((0, 0, 255), (24, 0, 40, 16))
    for name in ("a", "b"):
        wide.save(tmp_path / f"{name}.png")
    found = read(picture_set(tmp_path, (8, 8), resize=True))
    assert found.shape == (2, 3, 8, 8)
    assert found[0, 2, :, 1:7].min() > 250
    with pytest.raises(EvaluationError, match=r"a\.png is 64x16, expected 8x8.*--resize"):
        read(picture_set(tmp_path, (8, 8)))


def _damaged(folder: Path) -> Path:
    place = picture_folder(folder, 3)
    (place / "class0" / "001.png").write_bytes(b"\x89PNG no picture")
    return place


def _no_zip(folder: Path) -> Path:
    folder.write_bytes(b"PK but no zip file")
    return folder


def _damaged_zip(folder: Path) -> Path:
    path = zipped(picture_folder(folder, 3), folder.with_suffix(".zip"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    return path


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda new: new, "no such folder or zip file"),
    "empty": (lambda new: (new.mkdir(), new)[1], "0 pictures, at least 2"),
    "one picture": (lambda new: picture_folder(new, 1), "1 pictures, at least 2"),
    "a file": (_no_zip, "neither a folder nor a zip file"),
    "a damaged picture": (_damaged, r"001\.png cannot be opened as a picture"),
    "a damaged zip file": (_damaged_zip, "cannot be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_sets_are_refused_in_words(name: str, tmp_path: Path) -> None:
    make, expected = BAD[name]
    with pytest.raises(EvaluationError, match=expected):
        read(picture_set(make(tmp_path / "in")))


def test_what_a_pipeline_drew_becomes_bytes_and_nan_is_refused() -> None:
    arrays = np.array([0, 0.5, 1, 1.5]).reshape(1, 2, 2, 1).repeat(3, 3)
    assert pixels_of(arrays, [0])[0, :, :, 0].tolist() == [[0, 128], [255, 255]]
    arrays[0, 1, 1, 2] = np.nan
    with pytest.raises(EvaluationError, match="picture 17 holds NaN"):
        pixels_of(arrays, [17])
