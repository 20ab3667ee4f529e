"""Tensors of checkpoints: every damage is refused, naming the tensor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damaged_files import FILE, INTACT, Tensors, edited, key_of, refused, with_value
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_ldmq import calibrate, make_plan, quantize
from diffusers_ldmq.errors import CheckpointError
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.loading import LARGE
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
def test_a_damaged_tensor_is_named_g13_g14(
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
def test_a_missing_tensor_is_named_g11(scheme: str, tensor: str, tmp_path: Path) -> None:
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
def test_an_extra_tensor_is_named_g12(tensor: str, tmp_path: Path) -> None:
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


def sharded(target: Path, change: Callable[[dict[str, str], Tensors, Path], object]) -> Path:
    """The checkpoint in two files; `change` edits the index, the second file's tensors, or the folder."""
    folder = target / "sharded"
    shutil.copytree(INTACT, folder)
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = sorted(tensors)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    index = {name: f"part-{1 if name in first else 2}.safetensors" for name in names}
    rest = {name: tensors[name] for name in second}
    change(index, rest, folder)
    save_file({name: tensors[name] for name in first}, folder / "part-1.safetensors", {"format": "pt"})
    save_file(rest, folder / "part-2.safetensors", {"format": "pt"})
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return folder


def test_a_sharded_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    whole, parts = (UNet2DModel.from_pretrained(f).state_dict() for f in (INTACT, sharded(tmp_path, lambda *_: None)))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


INDEX_DAMAGES: dict[str, tuple[Callable[[dict[str, str], Tensors, Path], object], str]] = {
    "missing file": (lambda index, *_: index.update(conv_out="part-3.safetensors"), "part-3.safetensors"),
    "outside": (lambda index, *_: index.update(conv_out="../part-1.safetensors"), "parent-directory reference"),
    "left out": (lambda index, *_: index.pop("conv_in.bias"), "'conv_in', tensor 'bias': the file lacks this tensor"),
    "ghost": (lambda index, *_: index.update(ghost="part-1.safetensors"), "'ghost': the checkpoint holds this tensor"),
    "twice": (
        lambda index, rest, _: rest.update({"conv_in.bias": torch.zeros(8)}),
        "'conv_in', tensor 'bias': two files of the checkpoint hold this tensor",
    ),
}


@pytest.mark.parametrize("damage", list(INDEX_DAMAGES))
def test_a_damaged_index_is_refused(damage: str, tmp_path: Path) -> None:
    change, match = INDEX_DAMAGES[damage]
    with pytest.raises((ValueError, OSError), match=match):
        UNet2DModel.from_pretrained(sharded(tmp_path, change))


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(INTACT, folder)
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="model.bin: quantized models are read from safetensors"):
        UNet2DModel.from_pretrained(folder)


def test_float_weights_under_a_quantized_models_config_say_so_g24(tmp_path: Path) -> None:
    quantized = UNet2DModel.from_pretrained(INTACT)
    plain: Any = UNet2DModel.from_config(quantized.config)
    plain.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no scales at all.*remove its 'quantization_config' entry"):
        UNet2DModel.from_pretrained(tmp_path)


def test_codes_of_a_large_layer_are_looked_at_when_it_is_first_called(tmp_path: Path) -> None:
    denoiser: Any = UNet2DModel(
        block_out_channels=(352,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=8,
        add_attention=False,
    )
    name = "mid_block.resnets.0.conv1"
    plan = make_plan(layer_table(denoiser), planner="uniform", scheme="w8a16")
    quantize(denoiser, calibrate(denoiser, plan, None))
    attach(denoiser)
    assert denoiser.get_submodule(name).state().weight.nbytes >= LARGE
    denoiser.save_pretrained(tmp_path / "whole")
    key = f"{name}.weight"
    change = with_value(-128)
    model: Any = UNet2DModel.from_pretrained(
        edited(tmp_path / "whole", tmp_path, lambda t: t.update({key: change(t[key])}))
    )
    with (
        torch.no_grad(),
        pytest.raises(CheckpointError, match=f"'{name}', tensor 'weight': holds the code -128"),
    ):
        model(torch.zeros(1, 3, 8, 8), 1)
