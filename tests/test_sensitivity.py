"""The diagonal weights of block reconstruction: squared gradients of the denoiser's output error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffusers_ldmq import Recording, calibrate, make_plan
from diffusers_ldmq.calls import evaluating, forward
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.layers import quantize_layer
from diffusers_ldmq.sensitivity import output_sensitivity
from diffusers_ldmq.units import find_units, in_place


def test_it_is_the_squared_gradient_at_each_units_output_and_leaves_the_model_alone(
    denoiser_of: Callable[[str], Any], recordings: Callable[[str], Recording]
) -> None:
    denoiser, recording = denoiser_of("pixel"), recordings("pixel")
    plan = make_plan(layer_table(denoiser), planner="uniform", scheme="w4a8-dyn")
    states = calibrate(denoiser, plan, recording).states
    quantized = {name: quantize_layer(denoiser.get_submodule(name), state) for name, state in states.items()}
    batch = next(iter(recording.only("calibrate").batches()))
    units = find_units(denoiser, states, batch)
    wanted = [parameter.requires_grad for parameter in denoiser.parameters()]
    found = output_sensitivity(denoiser, units, [batch], quantized)
    assert [parameter.requires_grad for parameter in denoiser.parameters()] == wanted
    assert set(found) == {unit.name for unit in units}
    assert all(float(weight[""].mean()) == pytest.approx(1, rel=1e-4) for weight in found.values())
    name = units[-2].name
    captured: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[0]

    handle = denoiser.get_submodule(name).register_forward_hook(keep)
    with evaluating(denoiser), torch.enable_grad():
        exact = forward(denoiser, batch)
        with torch.no_grad(), in_place(denoiser, quantized):
            handle.remove()
            error = forward(denoiser, batch) - exact
        exact.backward(error)
    gradient = captured[0].grad
    assert gradient is not None
    expected = gradient.square().mean(0)
    torch.testing.assert_close(found[name][""], expected / expected.mean(), rtol=1e-3, atol=1e-6)
