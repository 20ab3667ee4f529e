"""Attention of whole denoisers on integers: given, saved, loaded, taken back, refused."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tiny_pipelines import MAKERS, picture
from torch import nn

from diffusers_ldmq import LDMQConfig, Recording, quantize_attention, restore_attention, verify
from diffusers_ldmq.attention import IntegerProduct, attentions, fewest_keys_of, replace_product
from diffusers_ldmq.calls import run
from diffusers_ldmq.errors import CheckpointError, LDMQError
from diffusers_ldmq.families import find_denoiser
from diffusers_ldmq.metrics import sqnr

ALL = 1  # quantize attention over however few keys


@pytest.fixture
def unet(denoiser_of: Callable[[str], Any]) -> Any:
    return denoiser_of("bundled")


@pytest.fixture
def quantized(quantized_folder: Path) -> Callable[[], Any]:
    """The bundled model's UNet, quantized."""
    return lambda: UNet2DConditionModel.from_pretrained(quantized_folder / "unet")


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_every_kind_of_pipeline_runs_it(name: str) -> None:
    pipe: Any = MAKERS[name]()
    _, denoiser = find_denoiser(pipe)
    denoiser.eval()  # a DiT in training mode withholds classes by a dice
    outputs: list[torch.Tensor] = []
    denoiser.register_forward_hook(lambda module, args, output: outputs.append(output[0]))

    def first() -> torch.Tensor:
        outputs.clear()
        picture(pipe, name)
        return outputs[0]

    expected = first()
    assert quantize_attention(denoiser, fewest_keys=ALL) is denoiser
    measured = first()
    assert not torch.equal(expected, measured)
    assert sqnr(expected, measured) > 20
    restore_attention(denoiser)
    assert torch.equal(expected, first())


def test_layers_may_be_quantized_too_and_fewer_keys_stay_float(
    quantized: Callable[[], Any], recordings: Callable[[str], Recording]
) -> None:
    unet, recording = quantized(), recordings("bundled")
    alone = verify(unet, recording)
    both = verify(quantize_attention(unet, fewest_keys=ALL), recording)
    assert both.noise != alone.noise
    assert abs(both.sqnr_db - alone.sqnr_db) < 1
    assert verify(quantize_attention(unet, fewest_keys=10**6), recording).noise == alone.noise
    assert verify(restore_attention(unet), recording).noise == alone.noise


def test_it_is_saved_and_loaded_with_a_quantized_model(
    quantized: Callable[[], Any], recordings: Callable[[str], Recording], tmp_path: Path
) -> None:
    unet: Any = quantize_attention(quantized(), fewest_keys=64)
    unet.save_pretrained(tmp_path / "given")
    config = json.loads((tmp_path / "given" / "config.json").read_text())
    assert config["quantization_config"]["attention"] == {"fewest_keys": 64}
    loaded: Any = UNet2DConditionModel.from_pretrained(tmp_path / "given")
    assert fewest_keys_of(loaded) == 64
    batch = next(recordings("bundled").only("verify").batches())
    assert torch.equal(run(loaded, batch), run(unet, batch))
    restore_attention(loaded)
    loaded.save_pretrained(tmp_path / "taken")
    config = json.loads((tmp_path / "taken" / "config.json").read_text())
    assert "attention" not in config["quantization_config"]
    assert fewest_keys_of(UNet2DConditionModel.from_pretrained(tmp_path / "taken")) is None


def test_it_is_asked_for_while_a_float_model_is_loaded(unet: Any, tmp_path: Path) -> None:
    unet.save_pretrained(tmp_path)
    config = LDMQConfig("w8a16", attention={"fewest_keys": 64})
    loaded: Any = UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=config)
    assert fewest_keys_of(loaded) == 64
    assert loaded.config.quantization_config.attention == {"fewest_keys": 64}


def test_a_dequantized_model_is_float_altogether(quantized: Callable[[], Any]) -> None:
    unet: Any = quantize_attention(quantized())
    assert fewest_keys_of(unet.dequantize()) is None


@pytest.mark.parametrize("given", [{"fewest_keys": 0}, {"fewest_keys": "64"}, {"bits": 4}, {}, 64])
def test_a_malformed_description_is_refused(given: Any) -> None:
    with pytest.raises(CheckpointError, match="attention is"):
        LDMQConfig("w8a16", attention=given)


def test_copies_have_an_attention_of_their_own(unet: Any, recordings: Callable[[str], Recording]) -> None:
    batch = next(recordings("bundled").only("verify").batches())
    quantize_attention(unet, fewest_keys=ALL)
    quantize_attention(unet, fewest_keys=ALL)
    copied = copy.deepcopy(unet)
    restore_attention(unet)
    assert fewest_keys_of(copied) == ALL
    assert sqnr(run(unet, batch), run(copied, batch)) < 80


def test_another_product_can_take_its_place(unet: Any, recordings: Callable[[str], Recording]) -> None:
    batch = next(recordings("bundled").only("verify").batches())
    seen: list[tuple[int, ...]] = []

    def product(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        seen.append(tuple(query.shape))
        return nn.functional.scaled_dot_product_attention(query, *rest, **options)

    expected = run(unet, batch)
    replace_product(unet, product)
    assert torch.equal(run(unet, batch), expected)
    assert len(seen) == len(attentions(unet)) > 0
    assert fewest_keys_of(unet) is None


@pytest.mark.parametrize("keys", [0, -1, 2.5, True, "256"])
def test_a_wrong_number_of_keys_is_refused(unet: Any, keys: Any) -> None:
    with pytest.raises(LDMQError, match="fewest_keys is"):
        quantize_attention(unet, fewest_keys=keys)


def test_models_without_attention_are_refused() -> None:
    with pytest.raises(LDMQError, match="has no attention"):
        quantize_attention(nn.Sequential(nn.Linear(2, 2)))


def test_another_way_to_attention_is_refused_by_name(unet: Any, recordings: Callable[[str], Recording]) -> None:
    unet.set_attn_processor(AttnProcessor())
    quantize_attention(unet)
    with pytest.raises(LDMQError, match="its AttnProcessor does not call"):
        run(unet, next(recordings("bundled").only("verify").batches()))


def test_gradients_are_refused(unet: Any, recordings: Callable[[str], Recording]) -> None:
    batch = next(recordings("bundled").only("verify").batches())
    quantize_attention(unet, fewest_keys=ALL)
    with pytest.raises(LDMQError, match="no gradients"), torch.enable_grad():
        unet(**batch.kwargs)


def test_a_compiled_model_runs_it_between_its_graphs(unet: Any, recordings: Callable[[str], Recording]) -> None:
    batch = next(recordings("bundled").only("verify").batches())
    expected = run(quantize_attention(unet, fewest_keys=ALL), batch)
    compiled: Any = torch.compile(unet, backend="eager")
    assert torch.equal(run(compiled, batch), expected)


def test_offloaded_attention_is_refused(unet: Any) -> None:
    name, module = next(iter(attentions(unet).items()))
    module.forward = module.forward
    with pytest.raises(LDMQError, match=f"module '{name}' has hooks"):
        quantize_attention(unet)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.1}, {"enable_gqa": True}])
def test_attention_that_no_denoiser_has_is_refused(options: dict[str, Any]) -> None:
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(LDMQError, match="integer attention has no dropout"):
        IntegerProduct(ALL)(x, x, x, **options)
