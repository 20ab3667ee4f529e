"""T5 asks one of its layers for its weight's dtype: that layer in every scheme and dtype."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import t5
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from diffusers_ldmq import LDMQConfig
from diffusers_ldmq.errors import CheckpointError
from diffusers_ldmq.layers import QuantLinear, quantized_layers
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.text_layers import refuse_packed, text_schemes

IDS = torch.randint(3, 30, (2, 9), generator=torch.Generator().manual_seed(3))


def gated() -> Any:
    """As in SD3 and Flux: gated feed-forward."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 2, "num_layers": 2, "vocab_size": 40}
    return T5EncoderModel(T5Config(feed_forward_proj="gated-gelu", **sizes)).eval()


def wo(model: Any) -> Any:
    return model.encoder.block[0].layer[1].DenseReluDense.wo


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-dyn", "w4a16"])
def test_the_layer_that_t5_reads_the_dtype_of_runs_in_every_dtype(
    scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = gated()
    model.save_pretrained(tmp_path)
    made = T5EncoderModel.from_pretrained(tmp_path, quantization_config=LDMQConfig(scheme), dtype=dtype)
    assert wo(made).scheme.name == ("w8a16" if scheme == "w4a16" else scheme)
    with torch.no_grad():
        assert sqnr(model(IDS)[0], made(IDS)[0].float()) > (10 if scheme == "w4a16" else 30)


def test_its_input_is_in_fp32_where_float16_would_overflow(tmp_path: Path) -> None:
    model = gated()
    with torch.no_grad():
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(3e5)
    model.save_pretrained(tmp_path)
    made: Any = T5EncoderModel.from_pretrained(tmp_path, quantization_config=LDMQConfig("w8a16"), dtype=torch.float16)
    seen: list[Tensor] = []
    wo(made).register_forward_hook(lambda layer, inputs, result: seen.append(result))
    with torch.no_grad():
        found = made(IDS)[0]
        assert sqnr(model(IDS)[0], found.float()) > 30
    assert seen[0].dtype == torch.float32
    assert seen[0].abs().max() > torch.finfo(torch.float16).max


def test_fewer_than_8_bits_there_are_refused_rather_than_cast() -> None:
    with pytest.raises(CheckpointError, match="would cast its input to the packed weight's dtype"):
        refuse_packed(gated(), "encoder.block.0.layer.1.DenseReluDense.wo", "w4a16")
    refuse_packed(gated(), "encoder.block.0.layer.0.SelfAttention.q", "w4a16")


def test_only_linear_layers_that_nobody_shares_are_chosen() -> None:
    model = t5()
    chosen = text_schemes(LDMQConfig("w8a16"), model)
    assert {type(model.get_submodule(name)) for name in chosen} == {nn.Linear}
    assert not any("relative_attention" in name or "shared" in name for name in chosen)
    assert not quantized_layers(model)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
