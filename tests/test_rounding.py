"""A layer whose rounding is learned: it starts as the float layer, decides as rounding to nearest would, and what it
becomes is what its integers compute."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.corrections import LayerInputs
from diffusers_ldmq.corrections.contract import rebuild
from diffusers_ldmq.layers import quantize_layer
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.observers import OBSERVERS
from diffusers_ldmq.rounding import Drops, LearnedLayer
from diffusers_ldmq.specs import LayerState, parse_scheme

SCHEMES = ("w4a8", "w4a4", "w8a8", "w4a8-dyn", "w4a16", "w4a16-g16")
KINDS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(24, 12), (6, 24)),
    "conv": (nn.Conv2d(8, 12, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "grouped": (nn.Conv2d(8, 12, 3, padding=1, groups=4, bias=False), (2, 8, 6, 6)),
}


def made(kind: str, scheme: str) -> tuple[Any, LayerState, Tensor]:
    layer, shape = KINDS[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).abs() - 0.2
    observer = OBSERVERS["minmax-affine"]()
    observer.update(x)
    return layer, layer_state("layer", layer, parse_scheme(scheme), observer), x


def no_drops() -> Drops:
    return Drops(0.0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", list(KINDS))
def test_undecided_it_holds_the_float_weight_and_decided_what_its_integers_compute(kind: str, scheme: str) -> None:
    layer, state, x = made(kind, scheme)
    learned = LearnedLayer(layer, state, no_drops())
    clipped = learned.scale * torch.tensor([learned.spec.qmin, learned.spec.qmax])
    inside = layer.weight.reshape(len(clipped), -1) if learned.scale.shape[1] == 1 else None
    if inside is not None:  # of what the range does not clip nothing is lost
        low, high = clipped.reshape(-1, 2).T[..., None]
        expected = inside.clamp(low, high).reshape(layer.weight.shape)
        torch.testing.assert_close(learned.soft_weight(), expected, atol=1e-6, rtol=1e-5)
    learned.decided = True
    with torch.no_grad():
        found = learned(x)
        assert sqnr(quantize_layer(layer, state)(x), found) > 90
        assert sqnr(quantize_layer(layer, learned.hardened())(x), found) > 90
    assert torch.equal(learned.hardened().weight, state.weight)  # rounding to nearest is where learning begins


CORRECTED: dict[str, Callable[[LayerState], LayerState]] = {
    "bias": lambda state: replace(state, bias=torch.linspace(-1, 1, 12)),
    "pre_quant_scale": lambda state: replace(state, pre_quant_scale=torch.linspace(0.5, 2, 24)),
    "rotation": lambda state: replace(state, rotation=8),
    "low_rank": lambda state: replace(state, low_rank_a=torch.ones(2, 24) / 9, low_rank_b=torch.ones(12, 2) / 9),
}


@pytest.mark.parametrize("scheme", ["w4a8", "w4a16"])
@pytest.mark.parametrize("correction", list(CORRECTED))
def test_corrections_stay_and_count_while_learning(correction: str, scheme: str) -> None:
    layer, state, x = made("linear", scheme)
    state = rebuild(layer, CORRECTED[correction](state), LayerInputs((x,), "minmax-affine"))
    if correction == "bias":  # rebuilding gives the float layer's
        state = CORRECTED[correction](state)
    learned = LearnedLayer(layer, state, no_drops())
    learned.decided = True
    with torch.no_grad():
        assert sqnr(quantize_layer(layer, learned.hardened())(x), learned(x)) > 80
    kept, before = learned.hardened().tensors(), state.tensors()
    assert all(torch.equal(kept[name], before[name]) for name in before if name != "input_scale")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_half_precision_layers_learn_too(scheme: str, dtype: torch.dtype) -> None:
    layer, _, x = made("linear", scheme)
    half = nn.Linear(24, 12).to(dtype)
    half.load_state_dict(layer.state_dict())
    observer = OBSERVERS["minmax"]()
    observer.update(x)
    learned = LearnedLayer(half, layer_state("layer", half, parse_scheme(scheme), observer), no_drops())
    out = learned(x.to(dtype))
    assert out.dtype == dtype
    out.float().sum().backward()
    assert learned.rounding is not None
    assert learned.rounding.grad is not None


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_was_learned_is_what_the_state_says(kind: str) -> None:
    layer, state, x = made(kind, "w4a8")
    learned = LearnedLayer(layer, state, no_drops())
    assert learned.log_step is not None
    assert learned.rounding is not None
    with torch.no_grad():
        learned.rounding.copy_(torch.randn(learned.rounding.shape, generator=torch.Generator().manual_seed(2)))
        learned.log_step.add_(0.3)
        learned.log_gain.add_(torch.linspace(-0.1, 0.1, learned.log_gain.numel()).reshape(learned.log_gain.shape))
        if learned.shift is not None:
            learned.shift.add_(0.5)
        learned.spread = 2.0
    learned.decided = True
    new = learned.hardened()
    assert new.input_scale is not None
    assert state.input_scale is not None
    torch.testing.assert_close(new.input_scale, state.input_scale * torch.tensor(0.3).exp())
    assert not torch.equal(new.weight, state.weight)
    torch.testing.assert_close(new.weight_scale, state.weight_scale * torch.linspace(-0.1, 0.1, 12).exp())
    assert (new.bias is None) == (state.bias is None)
    if new.bias is not None and state.bias is not None:
        torch.testing.assert_close(new.bias, state.bias + 1.0)
    with torch.no_grad():
        assert sqnr(quantize_layer(layer, new)(x), learned(x)) > 90


def test_the_steps_gradient_is_that_of_a_finite_difference_of_its_codes() -> None:
    """With codes held fixed, q(x) = code * step: the straight-through gradient adds the part of x inside the range."""
    layer, state, _ = made("linear", "w4a8")
    learned = LearnedLayer(layer, state, no_drops())
    assert state.input_scale is not None
    assert state.input_zero_point is not None
    step, zero = float(state.input_scale), int(state.input_zero_point)
    x = torch.tensor([[0.3, 1.7, 500.0, -500.0]]) * step
    rounded = learned._input(x)
    rounded.sum().backward()
    low, high = -128 - zero, 127 - zero
    expected = step * ((round(0.3) - 0.3) + (round(1.7) - 1.7) + high + low)
    assert learned.log_step is not None
    assert float(learned.log_step.grad) == pytest.approx(expected, rel=1e-4)  # pyright: ignore[reportArgumentType]


def test_gradients_of_inputs_stop_outside_the_range_but_pass_what_was_dropped() -> None:
    layer, state, _ = made("linear", "w4a8")
    learned = LearnedLayer(layer, state, no_drops())
    x = torch.tensor([[0.1, 1e6]], requires_grad=True)
    learned._input(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 0.0]]
    everything = LearnedLayer(layer, state, Drops(1.0, torch.Generator().manual_seed(0)))
    assert torch.equal(everything._input(x), x)


def test_drops_take_their_share_and_differ_from_use_to_use() -> None:
    drops = Drops(0.25, torch.Generator().manual_seed(0))
    x = torch.zeros(100, 100)
    first, second = drops.mask(x), drops.mask(x)
    assert first is not None
    assert second is not None
    assert 0.2 < first.float().mean() < 0.3
    assert not torch.equal(first, second)
    assert Drops(0.0, torch.Generator()).mask(x) is None


def test_undecided_is_nothing_where_everything_is_decided() -> None:
    layer, state, _ = made("linear", "w4a8")
    learned = LearnedLayer(layer, state, no_drops())
    assert float(learned.undecided(20.0).detach()) > 0.5
    assert learned.rounding is not None
    with torch.no_grad():
        learned.rounding.fill_(10.0)
    assert float(learned.undecided(2.0).detach()) == 0.0


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_settled_codes_stay_and_only_what_costs_nothing_is_learned(kind: str, scheme: str) -> None:
    layer, state, x = made(kind, scheme)
    learned = LearnedLayer(layer, state, no_drops(), rounding="settled")
    with torch.no_grad():
        assert sqnr(quantize_layer(layer, state)(x), learned(x)) > 90
        for vector in learned.vectors():
            vector.add_(0.1)
        found = learned.hardened()
        assert torch.equal(found.weight, state.weight)
        assert torch.allclose(found.weight_scale, state.weight_scale * math.exp(0.1), rtol=1e-6)
        assert sqnr(quantize_layer(layer, found)(x), learned(x)) > 90
    assert learned.rounding is None
    assert {name for name, _ in learned.named_parameters()} <= {"log_step", "log_gain", "shift"}
