"""Calls of different timesteps as one batch give what they give one by one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffusers_ldmq import Recording
from diffusers_ldmq.calls import Batch, run
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.stacking import stacked


def test_stacked_calls_give_the_same_outputs(
    kind: str, denoiser_of: Callable[[str], Any], recordings: Callable[[str], Recording]
) -> None:
    batches = list(recordings(kind).only("calibrate").batches())
    rows = sum(batch.output.shape[0] for batch in batches)
    one_by_one = torch.cat([batch.output for batch in batches])
    together = list(stacked(batches, 10**6))
    assert len(together) == 1
    assert together[0].output.shape[0] == rows
    assert torch.equal(together[0].output, one_by_one)
    assert sqnr(one_by_one, run(denoiser_of(kind), together[0])) > 80


def test_batches_grow_to_the_rows_asked_for_and_larger_ones_are_parted(recordings: Callable[[str], Recording]) -> None:
    batches = list(recordings("pixel").only("calibrate").batches())
    each = batches[0].output.shape[0]
    assert [b.output.shape[0] for b in stacked(batches, 1)] == [1] * each * len(batches)
    assert [b.output.shape[0] for b in stacked(batches, each)] == [each] * len(batches)
    sizes = [b.output.shape[0] for b in stacked(batches, each + 1)]
    assert sum(sizes) == each * len(batches)
    assert max(sizes) == 2 * each


@pytest.mark.parametrize("change", ["constant", "shape", "path"])
def test_calls_that_differ_otherwise_stay_apart(change: str) -> None:
    def batch(**more: Any) -> Batch:
        return Batch({"sample": torch.zeros(2, 3, 4, 4), "timestep": 5.0, **more}, torch.zeros(2, 3, 4, 4), 5.0)

    other = {
        "constant": batch(scale=2.0),
        "shape": Batch(
            {"sample": torch.zeros(2, 3, 8, 8), "timestep": 4.0, "scale": 1.0}, torch.zeros(2, 3, 8, 8), 4.0
        ),
        "path": batch(scale=1.0, more=torch.zeros(2, 1)),
    }[change]
    first = batch(scale=1.0)
    assert len(list(stacked([first, other], 100))) == 2
    assert len(list(stacked([first, first], 100))) == 1


def test_timesteps_become_one_per_row() -> None:
    def at(timestep: Any, value: float) -> Batch:
        return Batch({"sample": torch.zeros(2, 1), "timestep": timestep}, torch.zeros(2, 1), value)

    (found,) = stacked([at(7.0, 7.0), at(torch.tensor(3.0), 3.0), at(torch.tensor([1.0, 2.0]), 1.0)], 100)
    assert found.kwargs["timestep"].tolist() == [7.0, 7.0, 3.0, 3.0, 1.0, 2.0]
