"""Weight dilation: columns grow as far as they can without moving a scale, and no further."""

import pytest
import torch
from torch import Tensor

from diffusers_ldmq.affine import scale_inputs, weight_rows
from diffusers_ldmq.corrections.contract import channel_absmax
from diffusers_ldmq.corrections.dilate import column_room
from diffusers_ldmq.errors import CalibrationError
from diffusers_ldmq.specs import QuantSpec

PER_ROW, PER_GROUP = QuantSpec(8, "channel"), QuantSpec(4, "group", 16)


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("w", "spec", "groups"),
    [
        (weight(48, 128), PER_ROW, 1),
        (weight(24, 64, 3, 3), PER_ROW, 1),
        (weight(24, 32, 3, 3), PER_ROW, 2),
        (weight(3, 72), PER_GROUP, 1),
        (weight(3, 5, 3, 3), PER_GROUP, 1),
    ],
    ids=["linear", "conv", "conv groups", "group scales", "group scales conv"],
)
def test_every_scale_stays_as_it_was(w: Tensor, spec: QuantSpec, groups: int) -> None:
    factors = column_room(w, spec, groups)
    assert factors.shape == (w.shape[1] * groups,)
    assert float(factors.min()) >= 1
    assert float(factors.max()) > 1.01
    grown = scale_inputs(w, factors)
    before, after = (weight_rows(value, spec).abs().amax(-1) for value in (w, grown))
    assert torch.allclose(before, after, rtol=1e-6)
    # and every column now holds an extreme
    tight = (weight_rows(grown, spec).abs() / after[..., None]).flatten(1)[:, : w[0].numel()].reshape(w.shape)
    assert torch.allclose(channel_absmax(tight, groups), torch.ones(()))


def test_by_hand() -> None:
    w = torch.tensor([[4.0, 2.0, -1.0, 0.0], [8.0, 2.0, 4.0, 0.0]])
    assert column_room(w, PER_ROW, 1).tolist() == [1.0, 2.0, 2.0, 1024.0]  # min(4/4, 8/8), min(4/2, 8/2), min(4, 2)


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        column_room(torch.tensor([[1.0, torch.inf]]), PER_ROW, 1)
