"""What is reconstructed together: blocks where the family names them, layers alone elsewhere, in running order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from diffusers_ldmq import Recording
from diffusers_ldmq.calls import run
from diffusers_ldmq.errors import CalibrationError
from diffusers_ldmq.families import FAMILIES, quantizable_layers
from diffusers_ldmq.units import Unit, find_units, hooked, in_place, watch, watch_arguments

DenoiserOf = Callable[[str], Any]
Recordings = Callable[[str], Recording]


@pytest.fixture
def given(kind: str, denoiser_of: DenoiserOf, recordings: Recordings) -> tuple[Any, Any]:
    return denoiser_of(kind), next(iter(recordings(kind).only("calibrate").batches()))


@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_names_its_blocks(name: str) -> None:
    assert FAMILIES[name].units
    assert all(unit.isidentifier() for unit in FAMILIES[name].units)


def test_every_layer_is_in_one_unit_and_units_come_in_running_order(given: tuple[Any, Any]) -> None:
    denoiser, batch = given
    layers = quantizable_layers(denoiser)
    units = find_units(denoiser, layers, batch)
    assert sorted(name for unit in units for name in unit.layers) == sorted(layers)
    assert any(len(unit.layers) > 1 for unit in units)
    order: list[str] = []
    hooks = {unit.name: lambda *_, n=unit.name: order.append(n) for unit in units}
    with hooked(denoiser, hooks):
        run(denoiser, batch)
    assert list(dict.fromkeys(order)) == [unit.name for unit in units]  # none lies inside another: ends come as starts
    assert not any(module._forward_hooks for module in denoiser.modules())


def test_the_bundled_models_blocks_are_resnets_and_transformer_blocks(
    denoiser_of: DenoiserOf, recordings: Recordings
) -> None:
    denoiser = denoiser_of("bundled")
    batch = next(iter(recordings("bundled").only("calibrate").batches()))
    units = {unit.name: unit for unit in find_units(denoiser, quantizable_layers(denoiser), batch)}
    resnet = units["up_blocks.2.resnets.1"]
    assert set(resnet.layers) == {
        f"up_blocks.2.resnets.1.{n}" for n in ("conv1", "time_emb_proj", "conv2", "conv_shortcut")
    }
    assert units["down_blocks.0.downsamplers.0.conv"].is_layer
    assert len(units["mid_block.attentions.0.transformer_blocks.0"].layers) == 10


def test_a_unit_gives_again_what_was_seen_of_it(given: tuple[Any, Any]) -> None:
    denoiser, batch = given
    units = find_units(denoiser, quantizable_layers(denoiser), batch)
    seen = watch(denoiser, units, batch)
    for unit in units:
        found = seen[unit.name]
        assert set(found.layers) == set(unit.layers)
        assert found.outputs
        if unit.is_layer:
            (x,) = (value for value in found.arguments.values() if isinstance(value, torch.Tensor))
            with torch.no_grad():
                assert torch.equal(denoiser.get_submodule(unit.name)(x), found.outputs[""])
    alone = watch(denoiser, units[:1], batch)[units[0].name]
    assert all(torch.equal(alone.outputs[path], value) for path, value in seen[units[0].name].outputs.items())
    arguments = watch_arguments(denoiser, units[-1], batch)
    assert arguments.keys() == seen[units[-1].name].arguments.keys()


def test_layers_in_place_come_out_again_even_after_an_error(denoiser_of: DenoiserOf) -> None:
    denoiser = denoiser_of("pixel")
    name = next(iter(quantizable_layers(denoiser)))
    before, other = denoiser.get_submodule(name), nn.Identity()
    with in_place(denoiser, {name: other}):
        assert denoiser.get_submodule(name) is other
    assert denoiser.get_submodule(name) is before

    def fail() -> None:
        with in_place(denoiser, {name: other}):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert denoiser.get_submodule(name) is before


def test_a_unit_that_never_runs_is_refused_by_name(denoiser_of: DenoiserOf, recordings: Recordings) -> None:
    denoiser = denoiser_of("pixel")
    denoiser.spare = nn.Linear(2, 2)
    batch = next(iter(recordings("pixel").only("calibrate").batches()))
    with pytest.raises(CalibrationError, match="'spare' was never called"):
        find_units(denoiser, ["spare", "conv_in"], batch)


def test_a_unit_says_whether_it_is_a_layer() -> None:
    assert Unit("a.b", ("a.b",)).is_layer
    assert not Unit("a", ("a.b",)).is_layer
