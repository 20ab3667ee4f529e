"""4-bit weights that stay 4 bit while they run: the same outputs in less memory."""

import copy
import gc
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline
from safetensors.torch import save
from torch import Tensor, nn

from diffusers_ldmq import LDMQError, QuantizedLDMPipeline, Recording, set_low_memory
from diffusers_ldmq.allocator import give_back
from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.calls import run
from diffusers_ldmq.layers import QuantizedLayer, quantize_layer, quantized_layers
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.observers import OBSERVERS
from diffusers_ldmq.specs import LayerState, parse_scheme

FOUR_BIT = ("w4a8", "w4a8-dyn", "w4a4", "w4a4-dyn", "w4a16", "w4a16-g8")
FLOATS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(33, 12), (2, 5, 33)),
    "conv": (lambda: nn.Conv2d(7, 8, 3, padding=1), (2, 7, 5, 5)),
    "conv groups": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 5, 5)),
    "conv 1x1": (lambda: nn.Conv2d(6, 8, 1, bias=False), (2, 6, 5, 5)),
}


def quantized(layer: nn.Module, scheme: str, x: Tensor) -> QuantizedLayer:
    observer = OBSERVERS["minmax-affine"]()
    observer.update(x)
    return quantize_layer(layer, layer_state("layer", layer, parse_scheme(scheme), observer))


@pytest.fixture(params=FOUR_BIT)
def scheme(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(FLOATS))
def made(request: pytest.FixtureRequest, scheme: str) -> tuple[QuantizedLayer, Tensor]:
    torch.manual_seed(0)
    layer, x = FLOATS[request.param][0](), torch.randn(FLOATS[request.param][1])
    return quantized(layer, scheme, x), x


def test_outputs_and_files_are_the_same_and_codes_stay_packed(made: tuple[QuantizedLayer, Tensor]) -> None:
    layer, x = made
    before, codes = save(layer.state_dict()), layer.state().weight.clone()
    truth = layer(x)
    for on in (True, False, True):
        set_low_memory(layer, on)
        out = layer(x)
        assert sqnr(truth, out) > 120
        assert out.stride() == truth.stride()
        assert save(layer.state_dict()) == before
        assert torch.equal(layer.state().weight, codes)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):  # noqa: S301
        assert torch.equal(other(x), out)
        assert type(other._pack.data) is type(layer._pack.data)  # pyright: ignore
    layer.to(torch.bfloat16)
    out = layer(x.bfloat16())
    set_low_memory(layer, False)
    assert sqnr(layer(x.bfloat16()), out) > 50
    assert torch.equal(layer.state().weight, codes)


def test_gradients_are_the_same(made: tuple[QuantizedLayer, Tensor]) -> None:
    layer, x = made
    grads = []
    for on in (False, True):
        set_low_memory(layer, on)
        given = x.clone().requires_grad_()
        layer(given).square().sum().backward()
        grads.append(given.grad)
    assert torch.allclose(grads[0], grads[1], atol=1e-4)


def resident() -> int:
    gc.collect()
    give_back()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not tell a process's memory")
@pytest.mark.parametrize("scheme", ["w4a8-dyn", "w4a16", "w4a16-g64"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_resident_memory_is_that_of_four_bits(scheme: str, low_memory: bool) -> None:
    """4-bit codes are there before; running puts 8-bit ones in their place, or nothing."""
    side, group = 4096, 64 if "-g" in scheme else 0
    weight = torch.randint(0, 256, (side, side // 2), dtype=torch.uint8)
    scale = torch.ones((side, side // group) if group else (side,))
    layer = quantize_layer(nn.Linear(side, side, bias=False), LayerState(parse_scheme(scheme), weight, scale))
    set_low_memory(layer, low_memory)
    del weight, scale
    x = torch.randn(1, side)
    with torch.inference_mode():
        nn.Linear(side, 8)(x)  # what torch and oneDNN set up once
        before = resident()
        layer(x)
        grown = resident() - before
    four_bits = side * side // 2
    assert (grown < 0.4 * four_bits) is low_memory, f"{grown / four_bits:.2f} of the 4-bit codes"
    assert grown < 1.5 * four_bits  # the 4-bit ones are gone where there are 8-bit ones


def test_a_pipeline_is_loaded_so_and_saves_the_same(mixed_denoiser: Any, tmp_path: Path) -> None:
    pipe = make_pixel(mixed_denoiser("pixel"))
    pipe.save_pretrained(tmp_path / "first")
    plain = QuantizedLDMPipeline.from_pretrained(tmp_path / "first")
    small = QuantizedLDMPipeline.from_pretrained(tmp_path / "first", low_memory=True)
    truth, out = picture(plain), picture(small)
    assert sqnr(truth, out) > 60
    held = {name: layer._pack for name, layer in quantized_layers(small.unet).items()}
    assert forms(held, 4) == {"FourBitLayer"}
    assert "FourBitLayer" not in forms(held, 8)
    small.save_pretrained(tmp_path / "second")
    file = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert torch.equal(picture(QuantizedLDMPipeline.from_pipe(small, low_memory=False)), truth)
    usual = DiffusionPipeline.from_pretrained(tmp_path / "second")  # no part of what is saved
    set_low_memory(usual)
    assert torch.equal(picture(usual), out)


def test_a_compiled_model_follows(mixed_denoiser: Any, recordings: Callable[[str], Recording]) -> None:
    denoiser, batch = mixed_denoiser("pixel"), recordings("pixel").batch(recordings("pixel").calls[0])
    set_low_memory(denoiser)
    truth = run(denoiser, batch)
    set_low_memory(denoiser, False)
    denoiser.compile(backend="aot_eager", fullgraph=True)
    run(denoiser, batch)
    set_low_memory(denoiser)
    assert torch.equal(run(denoiser, batch), truth)


def test_where_there_is_nothing_to_keep_small_it_is_said(denoiser_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LDMQError, match="the given Linear has no quantized layer"):
        set_low_memory(nn.Linear(2, 2))
    with pytest.raises(LDMQError, match="the given DDPMPipeline has no quantized layer"):
        set_low_memory(make_pixel(denoiser_of("pixel")))
    layer = quantized(nn.Linear(4, 4), "w8a8", torch.randn(2, 4))
    set_low_memory(layer)
    assert "low_memory changes nothing: no layer of the QuantLinear has 4-bit weights" in caplog.text


def forms(packs: dict[str, Any], bits: int) -> set[str]:
    """What the packed layers with weights of so many bits are."""
    return {type(p.data).__name__ for p in packs.values() if p is not None and weight_bits(p) == bits}


def weight_bits(pack: Any) -> int:
    return 4 if pack.stand_in.dtype == torch.uint8 else 8


def make_pixel(unet: Any) -> DDPMPipeline:
    return DDPMPipeline(unet, DDIMScheduler())  # pyright: ignore[reportArgumentType]


def picture(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe(generator=generator, num_inference_steps=2, output_type="numpy").images)
