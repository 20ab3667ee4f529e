"""Corrections: each one is itself in exact arithmetic, and helps where it is meant to help."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from torch import Tensor, nn

from diffusers_ldmq.affine import dequantize_weight, weight_rows
from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.corrections import CORRECTIONS, LayerInputs, output_power
from diffusers_ldmq.corrections.contract import channel_absmax, rebuild
from diffusers_ldmq.corrections.dilate import column_room
from diffusers_ldmq.errors import CalibrationError
from diffusers_ldmq.layers import quantize_layer
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.observers import OBSERVERS
from diffusers_ldmq.specs import SCHEMES, LayerState, check_state, geometry_of, parse_scheme

QUANTIZED = [*SCHEMES[1:], "w4a16-g16"]


@dataclass(frozen=True)
class Made:
    """A layer with its plain state, inputs for its correction, and others of the same kind to judge by."""

    layer: nn.Linear | nn.Conv2d
    state: LayerState
    inputs: LayerInputs
    held_out: tuple[Tensor, ...]

    def gain(self, state: LayerState | None) -> float:
        """dB at the layer's output on held-out inputs."""
        assert state is not None
        before = output_power(self.layer, self.state, self.held_out).sqnr_db
        return output_power(self.layer, state, self.held_out).sqnr_db - before


def made(layer: nn.Linear | nn.Conv2d, xs: list[Tensor], scheme: str = "w8a8", split: int | None = None) -> Made:
    """The first half of the inputs calibrates, the second is held out."""
    inputs = LayerInputs(tuple(xs[: len(xs) // 2]), "minmax", split)
    observer = OBSERVERS["minmax"]()
    for x in inputs.calibrate:
        observer.update(x)
    return Made(layer, layer_state("layer", layer, parse_scheme(scheme), observer), inputs, tuple(xs[len(xs) // 2 :]))


def linear(scheme: str = "w8a8", width: int = 128) -> Made:
    torch.manual_seed(0)
    return made(nn.Linear(width, 192), [torch.randn(2, 40, width) for _ in range(4)], scheme)


def conv(scheme: str = "w8a8", groups: int = 1) -> Made:
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 192, 3, padding=1, groups=groups, bias=False)
    return made(layer, [torch.randn(2, 64, 6, 6) for _ in range(4)], scheme, split=32)


def outlier(scheme: str = "w8a8") -> Made:
    """Input channel 5 is 40 times as loud as the others, whose weights are no larger for that."""
    torch.manual_seed(0)
    loud = torch.ones(128)
    loud[5] = 40
    return made(nn.Linear(128, 192), [torch.randn(2, 40, 128) * loud for _ in range(4)], scheme)


def halves(scheme: str = "w8a8") -> Made:
    """The input is a concatenation whose second half is 30 times quieter, with weights as much larger."""
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 48, 3, padding=1)
    ratio = torch.ones(64)
    ratio[24:] = 1 / 30
    with torch.no_grad():
        layer.weight.div_(ratio[:, None, None])
    xs = [torch.randn(2, 64, 8, 8) * ratio[:, None, None] for _ in range(4)]
    return made(layer, xs, scheme, split=24)


def slack(scheme: str = "w8a8") -> Made:
    """The loudest input channel meets weights ten times smaller than what sets each row's scale."""
    torch.manual_seed(0)
    layer, loud = nn.Linear(128, 96), torch.ones(128)
    loud[5] = 10
    with torch.no_grad():
        layer.weight[:, 5] *= 0.05
    return made(layer, [torch.randn(2, 40, 128) * loud for _ in range(4)], scheme)


def shifted(scheme: str = "w8a8") -> Made:
    """Inputs with a mean, so that rounding the weights moves the mean of the outputs."""
    torch.manual_seed(0)
    return made(nn.Linear(64, 96), [torch.randn(2, 40, 64) * 0.1 + 1 for _ in range(4)], scheme)


def few_directions(scheme: str = "w4a16") -> Made:
    """A weight with a few large singular directions."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 192)
    with torch.no_grad():
        layer.weight.add_(torch.randn(192, 4) @ torch.randn(4, 128) * 0.3)
    return made(layer, [torch.randn(2, 40, 128) for _ in range(4)], scheme)


# where each correction is at home, and how much it must bring there
HELPS: dict[str, tuple[Callable[[], Made], float]] = {
    "bias": (lambda: shifted("w4a16"), 3.0),
    "dilate": (slack, 3.0),
    "low-rank": (few_directions, 3.0),
    "rotate": (outlier, 6.0),
    "skip-split": (halves, 6.0),
    "smooth": (outlier, 6.0),
}
KINDS = {"linear": linear, "conv": conv, "conv groups": lambda scheme: conv(scheme, groups=2)}


@pytest.fixture(params=list(CORRECTIONS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_correction_changes_neither_argument_and_its_state_fits_the_layer(name: str, scheme: str, kind: str) -> None:
    given = KINDS[kind](scheme)
    weight = given.layer.weight.detach().clone()
    before = {key: tensor.clone() for key, tensor in given.state.tensors().items()}
    new = CORRECTIONS[name](given.layer, given.state, given.inputs)
    assert torch.equal(given.layer.weight, weight)
    assert all(torch.equal(tensor, before[key]) for key, tensor in given.state.tensors().items())
    if new is None:
        return
    check_state(new, geometry_of(given.layer))
    assert new.scheme == given.state.scheme
    assert all(torch.isfinite(tensor).all() for tensor in new.tensors().values())
    # in exact arithmetic it is the same layer: what is left is rounding
    least = 12 if parse_scheme(scheme).weight.bits == 4 else 35  # pyright: ignore
    assert sqnr(weight, dequantize_weight(new, weight.shape)) > least


@pytest.mark.parametrize("scheme", ["w8a16", "w8a8", "w8a8-dyn"])
def test_what_a_correction_adds_cancels_when_nothing_is_rounded(name: str, scheme: str) -> None:
    """dequantize() is in the layer's own coordinates; a layer that runs its state gives that layer's output."""
    for given in (linear(scheme), conv(scheme)):
        new = CORRECTIONS[name](given.layer, given.state, given.inputs)
        if new is None:
            continue
        quantized = quantize_layer(given.layer, new)
        x = given.held_out[0]
        assert sqnr(quantized.dequantize()(x), quantized(x)) > (100 if scheme == "w8a16" else 30)


def test_every_correction_helps_where_it_is_at_home(name: str) -> None:
    make, least = HELPS[name]
    given = make()
    assert given.gain(CORRECTIONS[name](given.layer, given.state, given.inputs)) > least


@pytest.mark.parametrize("scheme", ["w8a8-dyn", "w4a4"])
@pytest.mark.parametrize("name", ["smooth", "rotate"])
def test_outlier_corrections_help_dynamic_and_four_bit_inputs_too(name: str, scheme: str) -> None:
    given = outlier(scheme)
    assert given.gain(CORRECTIONS[name](given.layer, given.state, given.inputs)) > 1


def test_two_runs_give_the_same_bits(name: str) -> None:
    given = conv()
    first, second = (CORRECTIONS[name](given.layer, given.state, given.inputs) for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.rotation == second.rotation
    assert all(torch.equal(tensor, second.tensors()[key]) for key, tensor in first.tensors().items())


@pytest.mark.parametrize("name", sorted(set(CORRECTIONS) - {"bias"}))  # which leaves the weight alone
def test_a_weight_that_is_not_finite_is_refused(name: str) -> None:
    given = conv()
    with torch.no_grad():
        given.layer.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises((CalibrationError, RuntimeError), match="NaN"):
        CORRECTIONS[name](given.layer, given.state, given.inputs)


def test_rebuilding_an_uncorrected_state_changes_nothing() -> None:
    for given in (linear(), conv("w8a8-dyn"), linear("w4a16-g16")):
        again = rebuild(given.layer, given.state, given.inputs)
        for field in fields(again):
            left, right = getattr(again, field.name), getattr(given.state, field.name)
            assert torch.equal(left, right) if isinstance(left, Tensor) else left == right


def test_corrections_leave_each_others_parts_in_place() -> None:
    given = outlier()
    smoothed = CORRECTIONS["smooth"](given.layer, given.state, given.inputs)
    assert smoothed is not None
    both = CORRECTIONS["rotate"](given.layer, smoothed, given.inputs)
    assert both is not None
    assert both.rotation > 0
    assert torch.equal(both.pre_quant_scale, smoothed.pre_quant_scale)  # pyright: ignore
    weight = given.layer.weight.detach()
    assert sqnr(weight, dequantize_weight(both, weight.shape)) > 35


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("skip-split", linear()),  # no concatenation
        ("skip-split", halves("w8a16")),  # activations stay float: one range or two is the same
        ("rotate", linear(width=24)),  # 16 does not divide it
        ("low-rank", conv(groups=2)),
        ("low-rank", made(nn.Linear(32, 32), [torch.randn(4, 32)] * 2)),  # the branch would be as large
        ("dilate", made(nn.Linear(8, 1), [torch.randn(4, 8)] * 2)),
    ],
)
def test_what_does_not_apply_says_so(name: str, given: Made) -> None:
    if name == "dilate":  # every column is the extreme of its row
        nn.init.ones_(given.layer.weight)
    assert CORRECTIONS[name](given.layer, given.state, given.inputs) is None


def test_a_silent_half_has_no_split() -> None:
    given = conv()
    silent = tuple(x * (torch.arange(64) < 32)[:, None, None] for x in given.inputs.calibrate)
    assert CORRECTIONS["skip-split"](given.layer, given.state, replace(given.inputs, calibrate=silent)) is None


def test_the_skip_split_is_one_factor_per_half() -> None:
    given = halves()
    state = CORRECTIONS["skip-split"](given.layer, given.state, given.inputs)
    assert state is not None
    assert state.pre_quant_scale is not None
    assert torch.equal(state.pre_quant_scale[:24], torch.ones(24))
    assert len(state.pre_quant_scale[24:].unique()) == 1
    assert float(state.pre_quant_scale[24]) > 5


@pytest.mark.parametrize(
    ("given", "groups"),
    [
        (slack(), 1),
        (conv(), 1),
        (conv(groups=2), 2),
        (made(nn.Linear(72, 3), [torch.randn(4, 72)] * 2, "w4a16-g16"), 1),
    ],
    ids=["linear", "conv", "conv groups", "group scales"],
)
def test_dilation_leaves_every_scale_as_it_was(given: Made, groups: int) -> None:
    spec = given.state.scheme.weight
    assert spec is not None
    weight = given.layer.weight.detach()
    factors = column_room(weight, spec, groups)
    assert float(factors.min()) >= 1
    assert float(factors.max()) > 1
    grown = weight * factors if weight.dim() == 2 else weight.unflatten(0, (groups, -1)).mul(
        factors.reshape(groups, 1, -1, 1, 1)
    ).flatten(0, 1)  # fmt: skip
    before, after = (weight_rows(w, spec).abs().amax(-1) for w in (weight, grown))
    assert torch.allclose(before, after, rtol=1e-6)
    # no column could grow further
    tight = (weight_rows(grown, spec).abs() / after[..., None]).flatten(1)[:, : weight[0].numel()]
    assert torch.allclose(channel_absmax(tight.reshape(weight.shape), groups), torch.ones(()))


def test_a_dead_column_grows_only_so_far() -> None:
    layer = nn.Linear(32, 8)
    with torch.no_grad():
        layer.weight[:, 3] = 0
    given = made(layer, [torch.randn(9, 32)] * 2)
    state = CORRECTIONS["dilate"](layer, given.state, given.inputs)
    assert state is not None
    assert state.pre_quant_scale is not None
    assert float(state.pre_quant_scale.min()) == 2.0**-10


def test_bias_gives_one_to_a_layer_without() -> None:
    given = conv("w4a16")
    assert given.state.bias is None
    shifted_inputs = replace(given.inputs, calibrate=tuple(x + 1 for x in given.inputs.calibrate))
    state = CORRECTIONS["bias"](given.layer, given.state, shifted_inputs)
    assert state is not None
    layer = quantize_layer(given.layer, state)
    assert layer.bias is not None
    x = torch.cat(shifted_inputs.calibrate)
    error = (layer(x) - given.layer(x)).detach().mean((0, 2, 3))
    assert float(error.abs().max()) < 1e-5
    assert layer.dequantize().bias is not None


def test_a_branch_has_sixteen_directions_in_sixteen_bits() -> None:
    given = few_directions()
    state = CORRECTIONS["low-rank"](given.layer, given.state, given.inputs)
    assert state is not None
    assert state.rank == 16
    for tensor in (state.low_rank_a, state.low_rank_b):
        assert tensor is not None
        assert torch.equal(tensor, tensor.half().float())


def test_smoothing_takes_the_alpha_with_the_least_error() -> None:
    given = outlier()
    state = CORRECTIONS["smooth"](given.layer, given.state, given.inputs)
    assert state is not None
    assert state.pre_quant_scale is not None
    seen = torch.stack([x.flatten(0, 1).abs().amax(0) for x in given.inputs.calibrate]).amax(0)
    held = given.layer.weight.detach().abs().amax(0)
    errors = {}
    for alpha in (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85):
        scale = held ** (1 - alpha) / seen**alpha
        other = rebuild(given.layer, replace(given.state, pre_quant_scale=scale), given.inputs)
        errors[output_power(given.layer, other, given.inputs.calibrate).noise] = scale
    assert torch.allclose(state.pre_quant_scale, errors[min(errors)])


def test_no_inputs_are_refused() -> None:
    given = linear("w8a16")
    with pytest.raises(CalibrationError, match="needs calibrating inputs"):
        CORRECTIONS["rotate"](given.layer, given.state, replace(given.inputs, calibrate=()))
