"""LoRA on corrected layers: adapters see the layer's true input, and fusing sees its true weight."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from diffusers_ldmq.corrections import CORRECTIONS, LayerInputs
from diffusers_ldmq.corrections.contract import rebuild
from diffusers_ldmq.guards import guard
from diffusers_ldmq.layers import quantize_layer
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.quantization import replace_layer
from diffusers_ldmq.specs import LayerState, parse_scheme

LORA_TARGETS = {
    "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": "linear",
    "up_blocks.1.resnets.0.conv1": "conv",
}


def loud_input(layer: nn.Module) -> Tensor:
    """An input with a loud channel, which every correction moves."""
    torch.manual_seed(0)
    x = torch.randn(2, 384, 8, 8) if isinstance(layer, nn.Conv2d) else torch.randn(2, 16, 512)
    x.movedim(1 if x.dim() == 4 else -1, 0)[3] *= 10
    return x


def corrected(layer: nn.Module, correction: str, x: Tensor) -> LayerState:
    """The w8a8 state of the layer with that correction, which has other codes than without."""
    inputs = LayerInputs((x,), "minmax-affine")
    plain = rebuild(layer, LayerState(parse_scheme("w8a8"), torch.zeros(0), torch.zeros(0)), inputs)
    state = CORRECTIONS[correction](layer, plain, inputs)
    assert state is not None
    assert not torch.equal(state.weight, plain.weight)
    return state


def lora_effect(denoiser: Any, name: str, x: Tensor) -> Tensor:
    """What a seeded rank-4 LoRA on that layer adds to its output for input x, at full strength."""
    without = denoiser.get_submodule(name)(x)
    torch.manual_seed(3)
    denoiser.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=[name], init_lora_weights=False))
    with torch.no_grad():
        change = denoiser.get_submodule(name)(x) - without
    denoiser.delete_adapters("default")
    return change


@pytest.mark.parametrize("correction", ["smooth", "rotate", "low-rank"])
@pytest.mark.parametrize("name", list(LORA_TARGETS))
def test_a_lora_changes_a_corrected_layer_as_it_changes_the_float_one(
    name: str, correction: str, denoiser_of: Callable[[str], Any]
) -> None:
    """Adapters see the layer's true input; nothing of the correction reaches them."""
    denoiser = denoiser_of("bundled")
    layer = denoiser.get_submodule(name)
    x = loud_input(layer)
    truth = lora_effect(denoiser, name, x)
    state = corrected(layer, correction, x)
    replace_layer(denoiser, name, quantize_layer(layer, state))
    assert sqnr(truth, lora_effect(denoiser, name, x)) > 90


@pytest.mark.parametrize("correction", ["smooth", "rotate"])
@pytest.mark.parametrize("name", list(LORA_TARGETS))
def test_a_fused_lora_is_the_float_layers(name: str, correction: str, denoiser_of: Callable[[str], Any]) -> None:
    """dequantize() gives the weight in the layer's own coordinates: adding B A there is what fusing means."""
    layer = denoiser_of("bundled").get_submodule(name)
    x = loud_input(layer)
    dense = quantize_layer(layer, corrected(layer, correction, x)).dequantize()
    before = dense(x)
    delta = torch.randn_like(layer.weight) * 0.02
    with torch.no_grad():
        dense.weight += delta  # pyright: ignore
    twin = copy.deepcopy(layer)
    twin.weight.data += delta
    assert sqnr(twin(x) - layer(x), dense(x) - before) > 90


@pytest.mark.parametrize("correction", ["smooth", "rotate", "low-rank"])
@pytest.mark.parametrize("name", list(LORA_TARGETS))
def test_fusing_keeps_the_correction_and_unfusing_restores_every_bit(
    name: str, correction: str, denoiser_of: Callable[[str], Any]
) -> None:
    """The sum is quantized in the correction's own coordinates; the codes hold what the branch leaves of it."""
    denoiser = denoiser_of("bundled")
    guard(denoiser)
    layer = denoiser.get_submodule(name)
    x = loud_input(layer)
    state = corrected(layer, correction, x)
    before = state.tensors()
    replace_layer(denoiser, name, quantize_layer(layer, state))
    truth = layer(x).detach() + lora_effect(denoiser, name, x)
    noise = sqnr(layer(x), denoiser.get_submodule(name)(x))
    assert sqnr(truth, layer(x)) < noise - 12  # so that a lost adapter shows
    torch.manual_seed(3)
    denoiser.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=[name], init_lora_weights=False))
    denoiser.fuse_lora()
    after = denoiser.get_submodule(name).base_layer.state()
    assert after.rotation == state.rotation
    kept = before.keys() - {"weight", "weight_scale"}
    assert all(torch.equal(after.tensors()[key], before[key]) for key in kept)
    with torch.no_grad():
        assert sqnr(truth, denoiser.get_submodule(name)(x)) > noise - 6
    denoiser.unfuse_lora()
    held = denoiser.get_submodule(name).base_layer.state().tensors()
    assert held.keys() == before.keys()
    assert all(torch.equal(held[key], before[key]) for key in before)
