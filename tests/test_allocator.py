"""Giving memory back: only what a file still holds."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from diffusers_ldmq.allocator import release_file_pages


def test_released_tensors_of_a_file_keep_their_values(tmp_path: Path) -> None:
    value = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    save_file({"a": value, "b": value + 1}, tmp_path / "file.safetensors")
    mapped = load_file(tmp_path / "file.safetensors")
    for tensor in mapped.values():
        release_file_pages(tensor)
    assert torch.equal(mapped["a"], value)
    assert torch.equal(mapped["b"], value + 1)


def test_tensors_outside_of_files_are_left_alone() -> None:
    value = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    copy = value.clone()
    release_file_pages(copy)
    assert torch.equal(copy, value)
