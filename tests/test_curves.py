"""Block curves equal direct quantization of the same blocks, in both directions and for every part."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from diffusers_ldmq import Plan, Profile, ProfileSettings, Recording, calibrate, profile_sqnr
from diffusers_ldmq.artifacts import LayerChoice
from diffusers_ldmq.calibration import observe_inputs
from diffusers_ldmq.calls import run
from diffusers_ldmq.curves import CurveInputs, block_curve, group_blocks
from diffusers_ldmq.families import layer_table, quantizable_layers
from diffusers_ldmq.metrics import Power
from diffusers_ldmq.quantization import quantized_for_now
from diffusers_ldmq.selections import SELECTIONS

Recordings = Callable[[str], Recording]
DenoiserOf = Callable[[str], Any]
QUICK = ProfileSettings(timesteps=2, schemes=("w8a8", "w8a8-dyn", "w8a16"), groups=8)


def curve_inputs(denoiser: Any, recording: Recording, scheme: str = "w8a8") -> CurveInputs:
    table, calibrating = layer_table(denoiser), recording.only("calibrate")
    select = recording.only("select")
    batches = [select.batch(call) for call in select.calls if call.timestep in select.timesteps()[-2:]]
    picked = SELECTIONS["first-step"](calibrating, None)
    names = list(quantizable_layers(denoiser))
    ranges = observe_inputs(denoiser, calibrating.batches(list(picked)), names, "minmax-affine")
    schemes = {info.name: scheme for info in table.layers if not info.keep_float}
    return CurveInputs(table, batches, select.timesteps()[-2:], ranges, schemes, scheme)


def three_groups(given: CurveInputs) -> tuple[tuple[str, ...], ...]:
    names = [block.name for block in given.table.blocks]
    return tuple(names[:6]), tuple(names[6:11]), tuple(names[11:])


def layers_in(given: CurveInputs, groups: Sequence[tuple[str, ...]]) -> list[str]:
    blocks = {name for group in groups for name in group}
    return [n for block in given.table.blocks if block.name in blocks for n in block.layers if n in given.schemes]


def directly(denoiser: Any, given: CurveInputs, recording: Recording, names: list[str], scheme: str) -> list[float]:
    """[T] noise with those layers quantized by the other stages."""
    layers = {name: LayerChoice(scheme, "") for name in names}
    plan = Plan("", given.table.fingerprint, "test", layers)
    with quantized_for_now(denoiser, calibrate(denoiser, plan, recording, observer="minmax-affine")):
        return [Power.between(batch.output, run(denoiser, batch)).noise for batch in given.batches]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-dyn"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_row_is_what_its_groups_make_together(
    direction: str, scheme: str, denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    given = curve_inputs(denoiser, recording, scheme)
    groups = three_groups(given)
    curve = block_curve(denoiser, given, groups, (direction, "both"))
    assert (curve.direction, curve.part, curve.groups) == (direction, "both", groups)
    for index, row in enumerate(curve.noise):
        part = groups[: index + 1] if direction == "forward" else groups[index:]
        assert row == pytest.approx(directly(denoiser, given, recording, layers_in(given, part), scheme), rel=1e-5)
    assert curve.signal == tuple(Power.between(b.output, b.output).signal for b in given.batches)


def test_both_directions_end_in_the_same_model(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser = denoiser_of("pixel")
    given = curve_inputs(denoiser, recordings("pixel"))
    groups = three_groups(given)
    forward, backward = (block_curve(denoiser, given, groups, (d, "both")) for d in ("forward", "backward"))
    assert forward.noise[-1] == pytest.approx(backward.noise[0])
    assert forward.noise[0] != pytest.approx(backward.noise[-1])


def test_the_weight_part_is_the_weight_only_scheme(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    given = curve_inputs(denoiser, recording, "w4a8")
    groups = three_groups(given)
    curve = block_curve(denoiser, given, groups, ("forward", "weight"))
    for index, row in enumerate(curve.noise):
        names = layers_in(given, groups[: index + 1])
        assert row == pytest.approx(directly(denoiser, given, recording, names, "w4a16"), rel=1e-5)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dyn"])
def test_the_activation_part_rounds_inputs_and_no_weight(
    scheme: str, denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    given = curve_inputs(denoiser, recording, scheme)
    groups = three_groups(given)
    activation, weight, both = (
        block_curve(denoiser, given, groups, ("forward", part)).noise[-1] for part in ("activation", "weight", "both")
    )
    # the parts' errors are independent, so that their powers add up
    assert [a + w for a, w in zip(activation, weight, strict=True)] == pytest.approx(both, rel=0.25)
    # with weights that 8 bits hold exactly nothing but the inputs is rounded
    layers = quantizable_layers(denoiser)
    for name in given.schemes:
        weight = layers[name].weight.detach()
        scale = weight.abs().amax(tuple(range(1, weight.dim())), keepdim=True) / 127
        layers[name].weight.data = torch.round(weight / scale) * scale
    given = curve_inputs(denoiser, recording, scheme)
    given = replace(given, batches=[b._replace(output=run(denoiser, b)) for b in given.batches])
    activation = block_curve(denoiser, given, groups, ("forward", "activation")).noise[-1]
    assert activation == pytest.approx(directly(denoiser, given, recording, list(given.schemes), scheme), rel=1e-2)


def test_a_group_that_stays_float_repeats_the_row_before_and_costs_no_call(
    denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser = denoiser_of("pixel")
    given = curve_inputs(denoiser, recordings("pixel"))
    groups = three_groups(given)
    middle = set(layers_in(given, groups[1:2]))
    given = replace(given, schemes={n: s for n, s in given.schemes.items() if n not in middle})
    calls: list[int] = []
    curve = block_curve(denoiser, given, groups, done=calls.append)
    assert curve.noise[1] == curve.noise[0] != curve.noise[2]
    assert [done for done in calls if done] == [len(given.batches)] * 2
    assert calls.count(0) == len(given.schemes), "one sign of life for every layer that is replaced"


@pytest.mark.parametrize("part", ["both", "weight", "activation"])
def test_the_model_is_the_same_bit_for_bit_after_an_interrupt(
    part: str, denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser = denoiser_of("pixel")
    given = curve_inputs(denoiser, recordings("pixel"))
    modules, values = dict(denoiser.named_modules()), {k: v.clone() for k, v in denoiser.state_dict().items()}

    def interrupt(calls: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block_curve(denoiser, given, three_groups(given), ("backward", part), done=interrupt)
    after = dict(denoiser.named_modules())
    assert after.keys() == modules.keys()
    assert all(after[name] is module for name, module in modules.items())
    assert all(torch.equal(value, values[name]) for name, value in denoiser.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())


# -- groups ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def grouped(toy: Any, toy_profile: Callable[[Sequence[Any]], Profile]) -> Callable[..., tuple[tuple[str, ...], ...]]:
    """(text, noises, most) -> groups; text: one letter per block, e(ncoder), m(iddle), d(ecoder); None = float."""
    parts = {"e": "encoder", "m": "middle", "d": "decoder"}

    def group(text: str, noises: Sequence[float | None], most: int) -> tuple[tuple[str, ...], ...]:
        table = toy_profile([toy(f"{k}", 1e-3, parts[letter]) for k, letter in enumerate(text)]).table
        effects = {f"{k}.layer": noise for k, noise in enumerate(noises) if noise is not None}
        return group_blocks(table, effects, most)

    return group


@pytest.mark.parametrize(
    ("text", "noises", "most", "expected"),
    [
        ("dddd", [1, 1, 1, 9], 9, ["0", "1", "2", "3"]),
        ("dddd", [4, 1, 2, 9], 3, ["0", "12", "3"]),
        ("dddd", [4, 1, 2, 9], 2, ["012", "3"]),
        ("dddd", [9, 1, 1, 9], 1, ["0123"]),
        ("eedd", [5, 1, 1, 5], 3, ["01", "2", "3"]),  # the quietest pair would stand in two parts
        ("emdd", [1, 1, 5, 5], 3, ["0", "1", "23"]),
        ("emd", [1, 1, 1], 1, ["0", "1", "2"]),  # nothing more can be joined
        ("dddd", [None, 1, 1, None], 1, ["0", "12", "3"]),  # float blocks cost nothing and stay alone
        ("dddd", [None, 1, 1, None], 2, ["0", "1", "2", "3"]),
    ],
)
def test_the_quietest_neighbours_of_one_part_are_joined(
    text: str, noises: list[Any], most: int, expected: list[str], grouped: Callable[..., Any]
) -> None:
    assert ["".join(group) for group in grouped(text, noises, most)] == expected


def test_a_profile_has_as_many_groups_as_asked_for(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    profile = profile_sqnr(denoiser_of("pixel"), recordings("pixel"), QUICK)
    float_layers = {info.name for info in profile.table.layers if info.keep_float}
    blocks = {block.name: block for block in profile.table.blocks}
    costly = [g for g in profile.curve.groups if any(set(blocks[name].layers) - float_layers for name in g)]
    assert len(costly) == 8
    assert all(len({blocks[name].part for name in group}) == 1 for group in profile.curve.groups)
