"""Tensors of checkpoints: every damage is refused, naming the tensor."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damaged_files import FILE, INTACT, Tensors, edited, key_of, refused, with_value
from diffusers import UNet2DModel
from torch import Tensor

from diffusers_ldmq import calibrate, make_plan, quantize
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.plugin import attach

SHAPE = r"shape \[[\d, ]*\], expected \[[\d, ]*\]"
DAMAGES: list[tuple[str, str, Callable[[Tensor], Tensor], str]] = [
    ("w8a8", "weight", lambda t: t[:-1].clone(), SHAPE),
    ("w8a8", "weight", lambda t: t.half(), "dtype torch.float16, expected torch.int8"),
    ("w8a8", "weight", lambda t: t.to(torch.int32), "dtype torch.int32, expected torch.int8"),
    ("w8a8", "weight", with_value(-128), "holds the code -128"),
    ("w8a8", "weight_scale", lambda t: t[:1].clone(), SHAPE),
    ("w8a8", "weight_scale", lambda t: t[:, None].clone(), SHAPE),
    ("w8a8", "weight_scale", lambda t: t.half(), "dtype torch.float16, expected torch.float32"),
    ("w8a8", "weight_scale", with_value(torch.nan), "NaN or Inf"),
    ("w8a8", "weight_scale", with_value(torch.inf), "NaN or Inf"),
    ("w8a8", "weight_scale", with_value(0.0), "zero or negative"),
    ("w8a8", "weight_scale", with_value(-1.0), "zero or negative"),
    ("w8a8", "input_scale", with_value(0.0), "zero or negative"),
    ("w8a8", "input_scale", with_value(torch.nan), "NaN or Inf"),
    ("w8a8", "input_scale", lambda t: t.reshape(1), SHAPE),
    ("w8a8", "input_zero_point", lambda t: t.to(torch.int8), "dtype torch.int8, expected torch.int32"),
    ("w8a8", "input_zero_point", with_value(300), "zero point"),
    ("w8a8", "input_zero_point", with_value(-129), "zero point"),
    ("w8a8", "bias", with_value(torch.nan), "NaN or Inf"),
    ("w8a8", "bias", lambda t: t.to(torch.int8), "dtype torch.int8, expected a floating one"),
    ("w4a8", "weight", lambda t: t[:, :-1].clone(), SHAPE),
    ("w4a8", "weight", lambda t: t.to(torch.int8), "dtype torch.int8, expected torch.uint8"),
    ("w4a16-g8", "weight_scale", lambda t: t[:, :-1].clone(), SHAPE),
    ("w4a16", "weight", lambda t: t.repeat_interleave(2, 1), SHAPE),
]


@pytest.mark.parametrize(
    ("scheme", "tensor", "change", "match"),
    DAMAGES,
    ids=[f"{scheme}-{tensor}-{index}" for index, (scheme, tensor, *_) in enumerate(DAMAGES)],
)
def test_a_damaged_tensor_is_named(
    scheme: str, tensor: str, change: Callable[[Tensor], Tensor], match: str, tmp_path: Path
) -> None:
    key = key_of(INTACT, scheme, tensor)
    folder = edited(INTACT, tmp_path, lambda tensors: tensors.update({key: change(tensors[key])}))
    refused(folder, key, match)


@pytest.mark.parametrize(
    ("scheme", "tensor"),
    [("w8a8", t) for t in ("weight", "weight_scale", "input_scale", "input_zero_point", "bias")]
    + [("w4a4", "weight"), ("w8a16", "weight_scale")],
)
def test_a_missing_tensor_is_named(scheme: str, tensor: str, tmp_path: Path) -> None:
    key = key_of(INTACT, scheme, tensor)
    refused(edited(INTACT, tmp_path, lambda tensors: tensors.pop(key)), key, "the file lacks this tensor")


def test_a_missing_tensor_of_the_float_rest_is_named(tmp_path: Path) -> None:
    key = "conv_norm_out.weight"
    refused(edited(INTACT, tmp_path, lambda tensors: tensors.pop(key)), key, "the file lacks this tensor")


def test_a_float_tensor_with_nan_is_named(tmp_path: Path) -> None:
    key = "conv_norm_out.weight"
    change = with_value(torch.nan)
    refused(edited(INTACT, tmp_path, lambda t: t.update({key: change(t[key])})), key, "NaN or Inf")


@pytest.mark.parametrize("tensor", ["pre_quant_scale", "surprise", "input_scale"])
def test_an_extra_tensor_is_named(tensor: str, tmp_path: Path) -> None:
    key = key_of(INTACT, "w8a16", tensor)
    folder = edited(INTACT, tmp_path, lambda tensors: tensors.update({key: torch.ones(())}))
    refused(folder, key, "which its quantization_config does not name")


def test_a_padding_nibble_must_be_8(tmp_path: Path) -> None:
    denoiser = UNet2DModel(
        in_channels=3,  # conv_in sums over 27 inputs: an odd number
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
    )
    plan = make_plan(layer_table(denoiser), planner="uniform", scheme="w4a16")
    quantize(denoiser, calibrate(denoiser, plan, None))
    attach(denoiser)
    denoiser.save_pretrained(tmp_path / "whole")
    UNet2DModel.from_pretrained(tmp_path / "whole")

    def change(tensors: Tensors) -> None:
        tensors["conv_in.weight"][0, -1] ^= 0x10

    refused(edited(tmp_path / "whole", tmp_path, change), "conv_in.weight", "a padding nibble is not 8")


@pytest.mark.parametrize(
    "content",
    [b"version https://git-lfs.github.com/spec/v1\noid sha256:0", b"<!doctype html>", b"\x80\x02}q\x00.", b""],
    ids=["lfs", "html", "pickle", "empty"],
)
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(INTACT, folder)
    (folder / FILE).write_bytes(content)
    with pytest.raises((OSError, ValueError)):
        UNet2DModel.from_pretrained(folder)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "edited"
    shutil.copytree(INTACT, folder)
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises((OSError, ValueError)):
        UNet2DModel.from_pretrained(folder)
