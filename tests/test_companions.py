"""Text encoders and autoencoders beside the denoiser: quantized on request, counted, cast, and saved or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tiny_pipelines import INPUTS, MAKERS, picture
from torch import nn
from typer.testing import CliRunner

from diffusers_ldmq import LDMQConfig, LDMQError, QuantizedLDMPipeline
from diffusers_ldmq.arguments import components
from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.cli import app
from diffusers_ldmq.companions import companions, loading_options, quantize_companions, quantize_data_free, recast
from diffusers_ldmq.inspection import describe, description_data
from diffusers_ldmq.layers import quantize_layer, quantized_layers
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.pipeline import load_pipeline, save_pipeline
from diffusers_ldmq.quantization import refuse_unfit, replace_layer
from diffusers_ldmq.specs import parse_scheme

ASKED = {"text_encoder_3": "w8a16", "vae": "w8a16"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved float pipelines."""
    found = {name: tmp_path_factory.mktemp(name) for name in ("sd3", "sdxl", "ldm-text")}
    for name, folder in found.items():
        MAKERS[name]().save_pretrained(folder)
    return found


def counts(pipe: Any) -> dict[str, int]:
    found = {name: quantized_layers(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return {name: len(layers) for name, layers in found.items() if layers}


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_components_are_quantized_beside_the_denoiser_and_load_with_plain_diffusers(
    dtype: torch.dtype | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(folders["sd3"], components=ASKED, inputs=INPUTS["sd3"], dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    assert counts(pipe).keys() == {"transformer", *ASKED}
    assert {one.name: (one.kind, sum(one.schemes.values())) for one in companions(pipe)} == {
        "text_encoder_3": ("T5EncoderModel", 12),
        "vae": ("AutoencoderKL", 36),
    }
    assert all(one.bytes < 0.3 * one.fp32_bytes for one in companions(pipe))
    assert description_data(describe(pipe), layers=False)["components"]["vae"]["schemes"] == {"float": 4, "w8a16": 32}
    save_pipeline(pipe, tmp_path / "out")
    again = QuantizedLDMPipeline.from_pretrained(tmp_path / "out", dtype=dtype)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(pipe, "sd3"), picture(again, "sd3"))
    plain = DiffusionPipeline.from_pretrained(tmp_path / "out")  # in fp32, every part of it
    plain.set_progress_bar_config(disable=True)
    assert {part.dtype for part in plain.components.values() if isinstance(part, nn.Module)} == {torch.float32}
    assert counts(plain) == counts(pipe)
    assert sqnr(picture(pipe, "sd3").float(), picture(plain, "sd3")) > 20


def test_components_are_float_by_default(folders: dict[str, Path]) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(folders["sd3"], inputs=INPUTS["sd3"])
    assert counts(pipe).keys() == {"transformer"}
    assert companions(pipe) == ()


REFUSED = [
    ({"tokenizer": "w8a16"}, "no component 'tokenizer' to quantize; the models beside the denoiser are text_encoder, "),
    ({"text": "w8a16"}, "text_encoder, text_encoder_2, text_encoder_3, vae"),
    ({"transformer": "w8a16"}, "'transformer' is the denoiser"),
    ({"vae": "w8a8"}, "component 'vae': w8a8 is not what it can be quantized to"),
    ({"vae": "float"}, "leave it out to keep it float"),
    ({"vae": "w9"}, "component 'vae': unknown scheme 'w9'"),
]


@pytest.mark.parametrize(("asked", "match"), REFUSED, ids=[str(asked) for asked, _ in REFUSED])
def test_what_is_no_model_or_needs_data_is_refused(asked: dict[str, str], match: str, folders: dict[str, Path]) -> None:
    with pytest.raises(LDMQError, match=match):
        QuantizedLDMPipeline.from_pretrained(folders["sd3"], components=asked)
    with pytest.raises(LDMQError, match=match):
        quantize_companions(MAKERS["sd3"](), asked)


def test_a_quantized_checkpoint_takes_no_components(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = QuantizedLDMPipeline.from_pretrained(folders["sd3"], inputs=INPUTS["sd3"])
    pipe.save_pretrained(tmp_path)
    with pytest.raises(LDMQError, match=r"is quantized already; leave .*components out to load it"):
        QuantizedLDMPipeline.from_pretrained(tmp_path, components={"vae": "w8a16"})


def test_in_place_gives_the_same_integers_as_while_loading(folders: dict[str, Path]) -> None:
    index = {"text_encoder_3": ["transformers", "T5EncoderModel"], "vae": ["diffusers", "AutoencoderKL"]}
    loaded = load_pipeline(folders["sd3"], dtype=torch.float32, **loading_options(index, ASKED))
    later = load_pipeline(folders["sd3"], dtype=torch.float32)
    quantize_companions(later, ASKED)
    for name in ASKED:
        left, right = loaded.components[name].state_dict(), later.components[name].state_dict()
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_a_bert_of_diffusers_is_quantized_too(folders: dict[str, Path], tmp_path: Path) -> None:
    schemes = {"bert": "w8a16", "vqvae": "w8a16"}
    pipe = QuantizedLDMPipeline.from_pretrained(
        folders["ldm-text"], components=schemes, inputs=INPUTS["ldm-text"], dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    assert counts(pipe).keys() == {"unet", *schemes}
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(picture(pipe, "ldm-text"), picture(again, "ldm-text"))


def test_casting_leaves_integers_and_scales_alone(folders: dict[str, Path]) -> None:
    pipe = load_pipeline(folders["sd3"], dtype=torch.float32)
    quantize_companions(pipe, ASKED)
    for name in ASKED:
        model: Any = pipe.components[name]
        before = model.state_dict()
        recast(model, torch.bfloat16)
        now = model.state_dict()
        exact = [key for key in before if key.endswith("weight_scale") or not before[key].is_floating_point()]
        assert exact
        assert all(torch.equal(before[key], now[key]) for key in exact)
        assert model.dtype == torch.bfloat16
        assert model.hf_quantizer.quantization_config.compute_dtype == "bfloat16"


def by_hand(model: nn.Module) -> None:
    """One layer replaced, and nothing said about it."""
    name, layer = next((n, m) for n, m in model.named_modules() if type(m) is nn.Linear)
    replace_layer(model, name, quantize_layer(layer, layer_state(name, layer, parse_scheme("w8a16"), None)))


@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_layers_quantized_by_hand_are_not_saved(name: str, tmp_path: Path) -> None:
    pipe = MAKERS["sdxl"]()
    by_hand(pipe.components[name])
    with pytest.raises(LDMQError, match=f"{name}: the .* layers were quantized by hand and its config does not say so"):
        save_pipeline(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_lora_or_integers_already_is_not_quantized() -> None:
    model = MAKERS["sd3"]().text_encoder_3
    quantize_data_free(model, LDMQConfig("w8a16"))
    with pytest.raises(LDMQError, match="is quantized already"):
        quantize_data_free(model, LDMQConfig("w8a16"))
    with pytest.raises(LDMQError, match="is quantized already"):
        refuse_unfit(model)


def test_the_first_parameter_of_the_vaes_ends_is_floating_g15(folders: dict[str, Path]) -> None:
    """SDXL's pipelines cast latents to that dtype."""
    config = LDMQConfig("w8a16")
    vae: Any = AutoencoderKL.from_pretrained(folders["sdxl"] / "vae", quantization_config=config)
    assert quantized_layers(vae)
    ends = (vae.quant_conv, vae.post_quant_conv, vae.encoder.conv_in, vae.decoder.conv_out)
    for layer in ends:
        assert isinstance(layer, nn.Conv2d)
        assert next(iter(layer.parameters())).dtype == torch.float32
        assert not quantized_layers(layer)
    everything = {"*": "w8a16"}  # also where somebody asks for the ends
    vae = AutoencoderKL.from_pretrained(folders["sdxl"] / "vae", quantization_config=LDMQConfig(everything))
    assert quantized_layers(vae.post_quant_conv)
    assert next(iter(vae.post_quant_conv.parameters())).dtype == torch.float32


def test_sdxl_that_upcasts_a_quantized_float16_vae_is_told_what_to_do_g25(folders: dict[str, Path]) -> None:
    vae: Any = AutoencoderKL.from_pretrained(
        folders["sdxl"] / "vae", quantization_config=LDMQConfig("w8a16"), torch_dtype=torch.float16
    )
    pipe = DiffusionPipeline.from_pretrained(folders["sdxl"], vae=vae, torch_dtype=torch.float16)
    pipe.set_progress_bar_config(disable=True)
    assert vae.config.force_upcast
    with pytest.raises(LDMQError, match=r"says force_upcast, .* load the pipeline with bfloat16 or float32"):
        picture(pipe, "sdxl")
    with pytest.raises(LDMQError, match="choose bfloat16 or float32, or leave the vae float"):
        QuantizedLDMPipeline.from_pretrained(folders["sdxl"], components={"vae": "w8a16"}, dtype=torch.float16)


def test_sdxl_draws_with_a_quantized_vae_and_text_encoders(folders: dict[str, Path]) -> None:
    pipe = load_pipeline(folders["sdxl"], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    before = picture(pipe, "sdxl")
    quantize_companions(pipe, {"vae": "w8a16", "text_encoder": "w8a16", "text_encoder_2": "w8a8-dyn"})
    assert sqnr(before, picture(pipe, "sdxl")) > 30


def test_component_options_are_read_and_refused() -> None:
    assert components(["vae=w8a16", "text_encoder=w8a8-dyn"]) == {"vae": "w8a16", "text_encoder": "w8a8-dyn"}
    assert components(None) == {}
    for wrong in (["vae"], ["=w8a16"], ["vae="], ["vae=w8a16", "vae=w4a16"]):
        with pytest.raises(LDMQError, match="expected NAME=SCHEME such as vae=w8a16"):
            components(wrong)


def test_the_command_line_quantizes_components_and_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\nblue whale\ngreen tree\nyellow star\nblack cat\nwhite dove\ngrey wolf\npink pig\n")
    options = ["--steps", "2", "--dtype", "float32", "--prompts", str(prompts), "--json"]
    asked = ["--component", "bert=w8a16", "--component", "vqvae=w8a16"]
    call = ["quantize", str(folders["ldm-text"]), "--out", str(tmp_path / "out"), *options, *asked]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0, done.output
    assert '"bert"' in done.stdout
    assert counts(DiffusionPipeline.from_pretrained(tmp_path / "out")).keys() == {"unet", "bert", "vqvae"}
