"""Rows of activations: the same in memory and in files, which are gone afterwards."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_ldmq import Recording
from diffusers_ldmq.activations import ActivationStore, gather_exact, windows, with_rounded
from diffusers_ldmq.errors import OutputError
from diffusers_ldmq.families import quantizable_layers
from diffusers_ldmq.units import find_units, watch

DenoiserOf = Callable[[str], Any]
Recordings = Callable[[str], Recording]


@pytest.fixture
def pixel(denoiser_of: DenoiserOf, recordings: Recordings) -> tuple[Any, list[Any], Any]:
    denoiser, batches = denoiser_of("pixel"), list(recordings("pixel").only("calibrate").batches())
    return denoiser, batches, find_units(denoiser, quantizable_layers(denoiser), batches[0])


def test_beyond_the_budget_tensors_lie_in_files_that_go(tmp_path: Path) -> None:
    with ActivationStore.open(budget=64, folder=tmp_path) as store:
        small, large = store.empty(4, torch.zeros(1, 4)), store.empty(4, torch.zeros(1, 4, dtype=torch.float16))
        assert (small.shape, large.shape, large.dtype) == ((4, 4), (4, 4), torch.float16)
        assert [path.stat().st_size for path in store.files] == [32]
        large.copy_(torch.arange(16).reshape(4, 4))
        with store.passing():
            store.empty(100, torch.zeros(1, 4))
            assert len(store.files) == 2
        assert len(store.files) == 1
        assert large.sum() == 120
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room_is_told_before_anything_is_mapped(tmp_path: Path) -> None:
    with (
        ActivationStore.open(budget=0, folder=tmp_path) as store,
        pytest.raises(OutputError, match="MB of activations"),
    ):
        store.empty(2**45, torch.zeros(1, 2**10))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("budget", [0, 2**30])
def test_rows_of_all_batches_are_what_each_of_them_gave(budget: int, pixel: tuple[Any, list[Any], Any]) -> None:
    denoiser, batches, units = pixel
    with ActivationStore.open(budget) as store:
        rows = gather_exact(denoiser, units, batches, store)
        start = 0
        for batch in batches:
            count = batch.output.shape[0]
            for name, seen in watch(denoiser, units, batch).items():
                part = slice(start, start + count)
                assert all(torch.equal(rows[name].outputs[path][part], value) for path, value in seen.outputs.items())
                assert all(torch.equal(rows[name].layers[n][part], value) for n, value in seen.layers.items())
            start += count


def test_only_what_the_layers_before_change_is_kept_twice(pixel: tuple[Any, list[Any], Any]) -> None:
    denoiser, batches, units = pixel
    with ActivationStore.open(2**30) as store:
        unit = units[-1]
        rows = gather_exact(denoiser, [unit], batches, store)[unit.name]
        assert with_rounded(rows, denoiser, unit, batches, {}, store) is rows
        first = units[0].layers[0]
        other = copy.copy(denoiser.get_submodule(first))
        same = with_rounded(rows, denoiser, unit, batches, {first: other}, store)
        assert same.rounded == {}
        changed = torch.nn.Sequential(denoiser.get_submodule(first), torch.nn.Dropout(0.0), torch.nn.Hardtanh())
        found = with_rounded(rows, denoiser, unit, batches, {first: changed}, store)
        (path,) = found.rounded
        some = torch.tensor([1, 0])
        assert torch.equal(found.arguments(some)[path], found.rounded[path][some])
        everything = found.arguments(some, lambda x: torch.ones_like(x, dtype=torch.bool))[path]
        assert torch.equal(everything, found.exact[path][some])


def test_windows_hold_what_fits_and_at_least_one(pixel: tuple[Any, list[Any], Any]) -> None:
    denoiser, batches, units = pixel
    assert list(windows(denoiser, units, batches[0], 8, 2**40)) == [tuple(units)]
    assert list(windows(denoiser, units, batches[0], 8, 0)) == [(unit,) for unit in units]
