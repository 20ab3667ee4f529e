"""What stands on a model card: only what is known, and nothing that could be taken for something else."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_ldmq import Plan, QuantizedLDMPipeline, Report
from diffusers_ldmq.artifacts import LayerChoice
from diffusers_ldmq.card import Card, License, Samples, metadata, pipeline_tag, write_card
from diffusers_ldmq.card_inputs import Told, card_of, draw_samples
from diffusers_ldmq.demo import demo_model
from diffusers_ldmq.errors import LDMQError


def card_text(folder: Path, card: Card) -> str:
    """The body of the card that is written, below the YAML."""
    folder.mkdir()
    write_card(folder, card)
    return (folder / "README.md").read_text().split("---\n", 2)[2]


@pytest.fixture(scope="module")
def card(made: Path) -> Card:
    return card_of(made, "me/x", Told("you/base", "mit"))


def test_the_yaml_is_what_the_hub_reads(card: Card, tmp_path: Path) -> None:
    write_card(tmp_path, card)
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data == {
        "base_model": "you/base",
        "base_model_relation": "quantized",
        "library_name": "diffusers",
        "license": "mit",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "diffusers:DDPMPipeline", "ldmq", "quantized", "int8"],
    }


def test_every_precision_of_the_plan_is_a_tag(card: Card) -> None:
    mixed = replace(card, layers={"a": "w8a8", "b": "w4a16-g64", "c": "float"})
    assert (metadata(mixed).tags or [])[-2:] == ["int8", "int4"]


def test_what_is_not_known_is_left_out(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = metadata(card_of(made, "me/x", Told())).to_dict()
    assert not {"base_model", "base_model_relation", "license"} & set(bare)
    assert "names no base model" in caplog.text
    assert "names no license" in caplog.text


TAGS = {
    "StableDiffusionPipeline": "text-to-image",
    "StableDiffusionXLImg2ImgPipeline": "image-to-image",
    "StableDiffusionInpaintPipeline": "image-to-image",
    "StableDiffusionControlNetPipeline": "text-to-image",
    "StableDiffusionControlNetImg2ImgPipeline": "image-to-image",
    "FluxPipeline": "text-to-image",
    "PixArtSigmaPipeline": "text-to-image",
    "LDMTextToImagePipeline": "text-to-image",
    "LDMPipeline": "unconditional-image-generation",
    "DDPMPipeline": "unconditional-image-generation",
    "LDMSuperResolutionPipeline": "image-to-image",
    "StableVideoDiffusionPipeline": "image-to-video",
    "AnimateDiffPipeline": "text-to-video",
    "DiTPipeline": None,
    "NoSuchPipeline": None,
}


@pytest.mark.parametrize("name", TAGS)
def test_the_pipeline_tag_follows_from_the_class(name: str) -> None:
    assert pipeline_tag(name) == TAGS[name]


def test_the_card_says_how_to_load_and_what_was_measured(card: Card, tmp_path: Path) -> None:
    assert card.report is not None
    text = card_text(tmp_path / "card", card)
    assert "pip install diffusers-ldmq" in text
    assert "import diffusers_ldmq" in text
    assert 'DiffusionPipeline.from_pretrained("me/x")' in text
    assert 'QuantizedLDMPipeline.from_pretrained("me/x")' in text
    assert f"{card.report.sqnr_db:.1f} dB" in text
    assert f"{card.report.bytes / 1e6:.1f} MB" in text
    assert "the first step of" in text
    assert "[plan.json](plan.json)" in text
    for scheme, count in card.plan.counts().items() if card.plan else ():
        assert f"| `{scheme}` |" in text
        assert f"| {count} |" in text
    assert "![SQNR" in text
    assert Image.open(tmp_path / "card" / "sqnr.png").width > 500
    assert "](samples.png)" not in text


def test_a_speed_stands_there_only_if_it_was_measured(card: Card, tmp_path: Path) -> None:
    assert card.report is not None
    assert "Speed was not measured" in card_text(tmp_path / "without", card)
    measured = card_text(tmp_path / "with", replace(card, report=replace(card.report, speedup=1.25)))
    assert "1.25x" in measured
    assert "Speed was not measured" not in measured


def test_a_card_without_stored_measurements_says_so(card: Card, tmp_path: Path) -> None:
    text = card_text(tmp_path / "card", replace(card, plan=None, report=None, profile=None))
    assert "No measurements are stored" in text
    assert "How it was calibrated is not stored" in text
    assert "plan.json" not in text
    assert not (tmp_path / "card" / "sqnr.png").exists()


def test_without_a_profile_the_plot_shows_what_the_report_has(card: Card, tmp_path: Path) -> None:
    assert "![SQNR" in card_text(tmp_path / "card", replace(card, profile=None))
    assert Image.open(tmp_path / "card" / "sqnr.png").width > 500


def test_a_model_in_another_dtype_is_loaded_at_that(card: Card, tmp_path: Path) -> None:
    text = card_text(tmp_path / "card", replace(card, dtype="bfloat16"))
    assert 'DiffusionPipeline.from_pretrained("me/x", torch_dtype=torch.bfloat16)' in text
    assert "import torch\n" in text


def test_pictures_are_scored_only_beside_those_of_the_float_model(card: Card, tmp_path: Path) -> None:
    picture = [Image.new("RGB", (8, 8), "red")]
    alone = replace(card, samples=Samples({"quantized": picture}, ("picture 1",), "2 steps"))
    both = replace(card, samples=Samples({"float": picture, "quantized": picture}, ("picture 1",), "2 steps"))
    assert "not at hand to compare with" in card_text(tmp_path / "alone", alone)
    text = card_text(tmp_path / "both", both)
    assert "Float above, quantized below" in text
    assert "PSNR mean exact" in text
    assert Image.open(tmp_path / "both" / "samples.png").height > Image.open(tmp_path / "alone" / "samples.png").height


def test_a_pipeline_that_starts_from_a_picture_gets_a_card_without_pictures(caplog) -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(demo_model(), torch_dtype=torch.float32)
    assert draw_samples(pipe, Told(), None) is None
    assert "StableDiffusionImg2ImgPipeline starts from a picture" in caplog.text


def test_names_and_prompts_cannot_become_markup(card: Card, tmp_path: Path) -> None:
    picture = [Image.new("RGB", (8, 8), "red")]
    hostile = "a [link](http://bad) <img src=x> | `code`\n# heading"
    samples = Samples({"quantized": picture}, (hostile,), "2 steps")
    plan = Plan("Toy", "0" * 16, hostile, {"a": LayerChoice("w8a8", hostile)})
    text = card_text(tmp_path / "card", replace(card, samples=samples, plan=plan))
    assert "\n# heading" not in text
    assert "[link](http" not in text
    assert "<img" not in text.replace("\\<img", "")


def test_the_license_of_the_base_model_is_inherited(hub, made: Path) -> None:
    hub.add("you/base", {"README.md": b"---\nlicense: creativeml-openrail-m\n---\n# Base\n"})
    assert card_of(made, "me/x", Told("you/base")).license == License("creativeml-openrail-m")
    assert card_of(made, "me/x", Told("you/base", "mit")).license == License("mit")


def test_a_license_of_its_own_keeps_name_and_place(hub, made: Path) -> None:
    front = b"---\nlicense: other\nlicense_name: special\nlicense_link: LICENSE.md\n---\n"
    hub.add("you/base", {"README.md": front})
    found = card_of(made, "me/x", Told("you/base"))
    assert found.license == License("other", "special", "https://huggingface.co/you/base/blob/main/LICENSE.md")
    data = metadata(found).to_dict()
    assert (data["license"], data["license_name"]) == ("other", "special")


BASES: dict[str, tuple[dict[str, Any] | None, str]] = {
    "missing": (None, "neither a folder here nor a model that the hub shows you"),
    "gated": ({"files": {"README.md": b"---\nlicense: mit\n---\n"}, "gated": True}, "the model is gated"),
    "without a card": ({"files": {}}, "it has no card"),
    "without a license": ({"files": {"README.md": b"---\ntags: [a]\n---\n"}}, "the card of you/base names none"),
    "with broken yaml": ({"files": {"README.md": b"---\na: [\n---\n"}}, "its card cannot be read"),
}


@pytest.mark.parametrize("name", BASES)
def test_a_license_that_cannot_be_read_is_never_invented(name: str, hub, made: Path, caplog) -> None:
    repository, expected = BASES[name]
    if repository is not None:
        hub.add("you/base", **repository)
    found = card_of(made, "me/x", Told("you/base"))
    assert found.license is None
    assert found.base_model == "you/base"
    assert expected in caplog.text
    assert "give --license" in caplog.text


def test_a_base_model_of_the_hub_is_known_without_being_told(hub, float_folder: Path, tmp_path: Path) -> None:
    files = {str(p.relative_to(float_folder)): p.read_bytes() for p in float_folder.rglob("*") if p.is_file()}
    hub.add("you/base", {**files, "README.md": b"---\nlicense: mit\n---\n"})
    pipe = QuantizedLDMPipeline.from_pretrained("you/base", "uniform", steps=2)
    pipe.push_to_hub("me/x", images=0)
    again = QuantizedLDMPipeline.from_pretrained("me/x")
    again.save_pretrained(tmp_path / "copy")
    again.push_to_hub("me/y", images=0)
    for name in ("me/x", "me/y"):
        data = ModelCard(hub.repos[name].files()["README.md"].decode()).data.to_dict()
        assert (data["base_model"], data["base_model_relation"], data["license"]) == ("you/base", "quantized", "mit")
    assert card_of(tmp_path / "copy", "me/z", Told()).base_model == "you/base"


def test_a_report_of_another_kind_of_file_is_refused(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made, tmp_path / "copy")
    shutil.copy(folder / "plan.json", folder / "report.json")
    with pytest.raises(LDMQError, match="is a plan, a report is expected"):
        card_of(folder, "me/x", Told())
    assert Report.load(made / "report.json").sqnr_db > 0
