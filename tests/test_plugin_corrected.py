"""Checkpoints of corrected layers: rotation and rank in the manifest, branches in the file, hostile ones refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_ldmq import Recording, calibrate, make_plan, quantize
from diffusers_ldmq.calls import run
from diffusers_ldmq.correction import apply_everywhere
from diffusers_ldmq.errors import CheckpointError
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.manifest import entry_of
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.plugin import LDMQConfig, attach

FILE = "diffusion_pytorch_model.safetensors"
MADE = "mid_block.resnets.0.conv1"  # 32 channels: rotation 16; the branch is put there by hand
PLAIN = "conv_in"


def corrected(denoiser: Any, recording: Recording) -> Any:
    """The denoiser quantized in place: smoothed and rotated where that applies, with a branch at MADE."""
    plan = make_plan(layer_table(denoiser), planner="uniform")
    calibration = plain = calibrate(denoiser, plan, recording, selection="uniform", observer="minmax")
    for name in ("smooth", "rotate", "bias"):
        calibration = apply_everywhere(denoiser, calibration, recording, name)
    state = calibration.states[MADE]
    columns = denoiser.get_submodule(MADE).weight[0].numel()
    torch.manual_seed(0)
    a, b = torch.randn(2, columns).half().float() * 0.125, torch.randn(state.weight.shape[0], 2).half().float()
    changed = {MADE: replace(state, low_rank_a=a, low_rank_b=b), PLAIN: plain.states[PLAIN]}
    quantize(denoiser, replace(calibration, states={**calibration.states, **changed}))
    attach(denoiser)
    return denoiser


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """What `saved` made, once."""
    return {}


@pytest.fixture
def saved(
    made: dict[str, Any],
    denoiser_of: Callable[[str], Any],
    recordings: Callable[[str], Recording],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> tuple[Any, Path]:
    """(corrected denoiser, a copy of the folder it was saved in)."""
    if not made:
        denoiser = corrected(denoiser_of("pixel"), recordings("pixel"))
        folder = tmp_path_factory.mktemp("corrected")
        denoiser.save_pretrained(folder)
        made.update(denoiser=denoiser, folder=folder)
    shutil.copytree(made["folder"], tmp_path / "saved")
    return made["denoiser"], tmp_path / "saved"


def outputs(denoiser: Any, recording: Recording) -> list[Tensor]:
    return [run(denoiser, recording.batch(call)) for call in recording.only("verify").calls]


def test_a_corrected_denoiser_comes_back_bit_identically(
    saved: tuple[Any, Path], recordings: Callable[[str], Recording], tmp_path: Path
) -> None:
    denoiser, folder = saved
    before = outputs(denoiser, recordings("pixel"))
    loaded = UNet2DModel.from_pretrained(folder)
    assert all(map(torch.equal, before, outputs(loaded, recordings("pixel"))))
    layers = quantized_layers(loaded)
    assert {name: entry_of(layer) for name, layer in layers.items()} == {
        name: entry_of(layer) for name, layer in quantized_layers(denoiser).items()
    }
    assert layers[MADE].state().rank == 2
    assert layers[MADE].state().rotation == 16
    assert layers[MADE].state().pre_quant_scale is not None
    loaded.save_pretrained(tmp_path / "again")  # packed meanwhile
    assert (folder / FILE).read_bytes() == (tmp_path / "again" / FILE).read_bytes()


def test_the_manifest_names_rotation_and_rank_only_where_there_are_any(saved: tuple[Any, Path]) -> None:
    config = json.loads((saved[1] / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1
    assert config["layers"][MADE]["rotation"] == 16
    assert config["layers"][MADE]["rank"] == 2
    assert {"low_rank_a", "low_rank_b", "pre_quant_scale"} <= set(config["layers"][MADE]["tensors"])
    assert set(config["layers"][PLAIN]) == {"scheme", "tensors"}
    assert LDMQConfig(**config).to_dict() == config


def test_a_branch_is_stored_in_sixteen_bits_and_follows_the_dtype(saved: tuple[Any, Path]) -> None:
    tensors = load_file(saved[1] / FILE)
    assert tensors[f"{MADE}.low_rank_a"].dtype == torch.float16
    assert tensors[f"{MADE}.pre_quant_scale"].dtype == torch.float32
    loaded = UNet2DModel.from_pretrained(saved[1], torch_dtype=torch.bfloat16)
    state = quantized_layers(loaded)[MADE].state()
    assert state.low_rank_a is not None
    assert state.low_rank_a.dtype == torch.bfloat16
    assert torch.equal(state.pre_quant_scale, tensors[f"{MADE}.pre_quant_scale"])  # pyright: ignore


def test_a_bfloat16_denoiser_with_a_branch_gives_nearly_the_same(
    saved: tuple[Any, Path], recordings: Callable[[str], Recording]
) -> None:
    loaded = UNet2DModel.from_pretrained(saved[1], torch_dtype=torch.bfloat16)
    for left, right in zip(outputs(saved[0], recordings("pixel")), outputs(loaded, recordings("pixel")), strict=True):
        assert sqnr(left, right) > 25


def test_dequantizing_undoes_the_corrections(saved: tuple[Any, Path], recordings: Callable[[str], Recording]) -> None:
    before = outputs(saved[0], recordings("pixel"))
    model: Any = UNet2DModel.from_pretrained(saved[1])
    model.dequantize()
    assert not quantized_layers(model)
    for left, right in zip(before, outputs(model, recordings("pixel")), strict=True):
        assert sqnr(left, right) > 15  # what is left is the rounding of the activations


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """The folder, after `edit` went over the manifest's layers."""
    path = folder / "config.json"
    data = json.loads(path.read_text())
    edit(data["quantization_config"]["layers"])
    path.write_text(json.dumps(data))
    return folder


def set_to(key: str, value: Any, layer: str = MADE) -> Callable[[dict[str, Any]], object]:
    return lambda layers: layers[layer].update({key: value})


def no_branch(layers: dict[str, Any]) -> None:
    layers[MADE]["tensors"] = [name for name in layers[MADE]["tensors"] if not name.startswith("low_rank")]


ENTRIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "rotation 3": (set_to("rotation", 3), "layer 'mid.*': rotation 3: expected 0 or a power of two from 2 on"),
    "rotation 1": (set_to("rotation", 1), "rotation 1: expected 0 or a power of two"),
    "rotation -1": (set_to("rotation", -1), "rotation is -1, expected a positive integer or no such key"),
    "rotation 0": (set_to("rotation", 0), "rotation is 0, expected a positive integer or no such key"),
    "rotation true": (set_to("rotation", True), "rotation is True, expected a positive integer"),
    "rotation text": (set_to("rotation", "16"), "rotation is '16', expected a positive integer"),
    "rotation number": (set_to("rotation", 16.0), "rotation is 16.0, expected a positive integer"),
    "rotation null": (set_to("rotation", None), "rotation is None, expected a positive integer"),
    "rotation list": (set_to("rotation", [16]), r"rotation is \[16\], expected a positive integer"),
    "rotation huge": (set_to("rotation", 2**80), "rotation 12089.*: expected 0 or a power of two"),
    "rotation of another layer": (set_to("rotation", 16, PLAIN), "rotation 16: .* the 3 input channels"),
    "rank -1": (set_to("rank", -1), "rank is -1, expected a positive integer"),
    "rank 0": (set_to("rank", 0), "rank is 0, expected a positive integer"),
    "rank true": (set_to("rank", True), "rank is True, expected a positive integer"),
    "rank huge": (set_to("rank", 2**80), "low-rank branch of rank 12089.*: expected 0..32"),
    "rank wrong": (set_to("rank", 3), "tensor 'low_rank_[ab]': shape .*, expected"),
    "rank without tensors": (no_branch, "low_rank_a.*; found bias"),
    "tensors without rank": (lambda layers: layers[MADE].pop("rank"), "has tensors .*; found .*low_rank_a"),
    "no rank, no tensors": (
        lambda layers: (no_branch(layers), layers[MADE].pop("rank")),
        "low_rank_[ab]': the checkpoint holds this tensor",
    ),
    "another key": (set_to("spin", 16), "expected scheme and tensors"),
}


@pytest.mark.parametrize("damage", list(ENTRIES))
def test_a_hostile_entry_is_refused(damage: str, saved: tuple[Any, Path]) -> None:
    edit, match = ENTRIES[damage]
    with pytest.raises(CheckpointError, match=match):
        UNet2DModel.from_pretrained(edited(saved[1], edit))


def change(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{MADE}.{name}": value(tensors[f"{MADE}.{name}"]).contiguous()})


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "nan": (change("low_rank_a", lambda t: t.fill_(torch.nan)), "tensor 'low_rank_a': holds NaN or Inf"),
    "inf": (change("low_rank_b", lambda t: t.fill_(torch.inf)), "tensor 'low_rank_b': holds NaN or Inf"),
    "transposed": (change("low_rank_a", lambda t: t.T), r"'low_rank_a': shape \[\d+, 2\], expected \[2, \d+\]"),
    "integers": (change("low_rank_b", lambda t: t.to(torch.int8)), "'low_rank_b': dtype torch.int8, expected a float"),
    "one missing": (lambda t: t.pop(f"{MADE}.low_rank_b"), "'low_rank_b': the file lacks this tensor"),
    "scale": (change("pre_quant_scale", lambda t: -t), "a scale is zero or negative"),
}


@pytest.mark.parametrize("damage", list(TENSORS))
def test_a_damaged_branch_is_refused(damage: str, saved: tuple[Any, Path], tmp_path: Path) -> None:
    edit, match = TENSORS[damage]
    folder = tmp_path / "damaged"
    shutil.copytree(saved[1], folder)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / FILE).items()}
    edit(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=match):
        UNet2DModel.from_pretrained(folder)
