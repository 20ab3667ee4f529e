"""Headers of safetensors files, and files that are none."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ldmq.errors import CheckpointError
from diffusers_ldmq.headers import Header, read_headers


def test_dtype_and_shape_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(2, 3, dtype=torch.int8), "s": torch.ones(())}, file)
    found = read_headers([str(file)])
    assert found["x"] == Header(torch.int8, (2, 3), str(file), "x")
    assert found["s"] == Header(torch.float32, (), str(file), "s")
    assert torch.equal(found["s"].read(), torch.ones(()))
    assert read_headers([str(file)])["x"].like().shape == (2, 3)


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"<!doctype html>", b"\x80\x02}q\x00.", b""],
    ids=["lfs", "html", "pickle", "empty"],
)
def test_a_file_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is no readable safetensors file"):
        read_headers([str(file)])


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(64)}, file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="is no readable safetensors file"):
        read_headers([str(file)])


def test_a_pickle_a_tensor_held_twice_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="from safetensors files only"):
        read_headers([str(tmp_path / "pytorch_model.bin")])
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        save_file({"x": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match="holds tensor 'x', which another file holds already"):
        read_headers(map(str, files))
    with pytest.raises(CheckpointError, match="not from a state_dict"):
        read_headers([])
