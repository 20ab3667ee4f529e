"""The model card (README.md) of a quantized pipeline: what it is, how to load it, what was measured, what it cannot."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import ModelCardData
from PIL import Image

from .artifacts import Plan, Profile, Report
from .metrics import told_db
from .pictures import comparison_sheet, picture_scores
from .plots import output_curve, plot_sqnr
from .specs import parse_scheme
from .summary import mb, reconstruction_told, size_data
from .version import __version__

SQNR_PLOT, SAMPLES = "sqnr.png", "samples.png"
"""Pictures that stand beside README.md."""
MARK = "<!-- written by diffusers-ldmq; without this line the next push keeps this card as it is -->"
"""By which a card of ours is told from one that somebody wrote or changed."""

SELECTED = {
    "first-step": "the first step",
    "normal": "normally distributed steps",
    "tdac": "steps chosen by how dense and how varied the denoiser's features are (TDAC)",
    "uniform": "steps from the whole schedule",
}
"""Calibration rule -> which denoiser inputs it uses, in words."""


@dataclass(frozen=True, slots=True)
class License:
    """The license of the base model as its card names it. name, link: where `id` is 'other'."""

    id: str | list[str]
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True, slots=True)
class Samples:
    """Pictures that show the model. pictures: 'quantized', and 'float' before it where that model was at hand -> one
    picture per caption, equal seeds; how: the sampling settings in words."""

    pictures: dict[str, list[Image.Image]]
    captions: tuple[str, ...]
    how: str


@dataclass(frozen=True, slots=True)
class Card:
    """What a card is made from; what is None is left out or named as missing.

    repo_id: under which the model will be found; pipeline: name of the diffusers class; component: the denoiser's name
    in it; others: of other quantized parts; base_model: owner/name on the hub; layers: layer name -> scheme, as the
    checkpoint holds them.
    """

    repo_id: str
    pipeline: str
    component: str
    layers: Mapping[str, str]
    dtype: str = "float32"
    base_model: str | None = None
    license: License | None = None
    plan: Plan | None = None
    others: tuple[str, ...] = ()
    report: Report | None = None
    profile: Profile | None = None
    samples: Samples | None = None


def write_card(folder: Path, card: Card) -> None:
    """Write README.md, and the pictures that it shows, into a folder."""
    figures = _write_figures(folder, card)
    text = f"---\n{metadata(card).to_yaml()}\n---\n\n{MARK}\n\n{_body(card, figures)}"
    (folder / "README.md").write_text(text, encoding="utf-8")


def metadata(card: Card) -> ModelCardData:
    """The card's YAML. Without a base model or license those keys are left out, never guessed."""
    own: dict[str, Any] = {}
    if card.base_model:
        own |= {"base_model": card.base_model, "base_model_relation": "quantized"}
    if card.license:
        own |= {"license": card.license.id, "license_name": card.license.name, "license_link": card.license.link}
    bits = sorted({spec.bits for scheme in card.layers.values() if (spec := parse_scheme(scheme).weight)}, reverse=True)
    tags = ("diffusers", f"diffusers:{card.pipeline}", "ldmq", "quantized", *(f"int{count}" for count in bits))
    return ModelCardData(
        **{name: value for name, value in own.items() if value is not None},
        library_name="diffusers",
        pipeline_tag=pipeline_tag(card.pipeline),
        tags=list(tags),
    )


def pipeline_tag(name: str) -> str | None:
    """The hub's word for what a pipeline class does; None where it has none (class labels) or diffusers lacks the
    class."""
    pipeline = getattr(diffusers, name, None)
    if pipeline is None:
        return None
    accepted = inspect.signature(pipeline.__call__).parameters
    video = "num_frames" in accepted or "Video" in name
    starts_from_picture = "image" in accepted and not re.search("ControlNet(?!.*(Img2Img|Inpaint))", name)
    if "audio_length_in_s" in accepted:
        return "text-to-audio"
    if video:
        return "image-to-video" if starts_from_picture else "text-to-video"
    if starts_from_picture:
        return "image-to-image"
    if "prompt" in accepted:
        return "text-to-image"
    return None if "class_labels" in accepted else "unconditional-image-generation"


def _write_figures(folder: Path, card: Card) -> set[str]:
    """Write the pictures; which of them there are."""
    made = set()
    if card.plan and card.report:
        made.add(SQNR_PLOT)
        if card.profile:
            plot_sqnr(folder / SQNR_PLOT, card.profile, card.plan, {"this model": card.report})
        else:
            drawing = output_curve({"this model": card.report}, card.plan)
            (folder / SQNR_PLOT).write_bytes(drawing.png(titled=True))
    if card.samples:
        made.add(SAMPLES)
        comparison_sheet(folder / SAMPLES, card.samples.pictures, card.samples.captions)
    return made


def _body(card: Card, figures: set[str]) -> str:
    from jinja2 import Environment, StrictUndefined  # only cards and reports need it

    environment = Environment(
        autoescape=False, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["plain"] = plain
    text = resources.files(__package__ or "diffusers_ldmq").joinpath("card.md.j2").read_text(encoding="utf-8")
    quantized = [scheme for scheme in card.layers.values() if scheme != "float"]
    return environment.from_string(text).render(
        card=card,
        title=card.repo_id.rpartition("/")[2],
        call=_call(card),
        sizes=_size_rows(card),
        schemes=_scheme_rows(card),
        layer_count=len(quantized),
        float_layers=[name for name, scheme in card.layers.items() if scheme == "float"],
        low=sorted({scheme for scheme in quantized if scheme.startswith("w4")}),
        reconstruction=reconstruction_told(card.report.reconstruction)
        if card.report and any(unit.kept for unit in card.report.reconstruction)
        else "",
        corrections=[trial for trial in card.report.corrections if trial.kept] if card.report else [],
        dtype_argument="" if card.dtype == "float32" else f", torch_dtype=torch.{card.dtype}",
        calibration=_calibration(card.report),
        scores=_scores(card.samples),
        sqnr_plot=SQNR_PLOT if SQNR_PLOT in figures else None,
        sheet=SAMPLES if SAMPLES in figures else None,
        versions=f"diffusers-ldmq {__version__}, diffusers {diffusers.__version__}",
    )


def plain(text: str) -> str:
    """Text that Markdown shows as it is: names and captions come from files that others may have written."""
    return re.sub(r"([\\`*_{}\[\]<>#|!$~&])", r"\\\1", " ".join(text.split()))


def _call(card: Card) -> str | None:
    """How the pipeline is called in the card's example; None where it needs a picture."""
    calls = {
        "text-to-image": 'pipe({prompt}).images[0].save("picture.png")',
        "unconditional-image-generation": 'pipe(batch_size=1).images[0].save("picture.png")',
    }
    prompt = card.samples.captions[0] if card.samples else "a red apple"
    call = calls.get(pipeline_tag(card.pipeline) or "")
    return call.replace("{prompt}", repr(prompt)) if call else None


def _size_rows(card: Card) -> list[tuple[str, str, str]]:
    """(what, float, quantized) of everything that was measured."""
    report = card.report
    if report is None:
        return []
    size = size_data(report)
    timestep, worst = report.worst()
    rows = [
        (
            f"weights of the {card.component}",
            f"{mb(report.fp32_bytes)} fp32, {mb(report.fp32_bytes // 2)} fp16",
            f"{mb(report.bytes)} = {size['ratio_fp32']:.3f}x of fp32, {size['ratio_fp16']:.3f}x of fp16",
        ),
        ("output SQNR over all steps", "", told_db(report.sqnr_db)),
        ("output SQNR at the worst step", "", f"{told_db(worst)} (timestep {timestep:g})"),
        ("multiply-adds that are int8 x int8", "0 %", f"{100 * report.int8_macs:.1f} %"),
    ]
    if report.speedup is not None:
        rows.append(("speed, where it was quantized", "1x (fastest float dtype)", f"{report.speedup:.2f}x"))
    return rows


def _scheme_rows(card: Card) -> list[tuple[str, str, int]]:
    """(scheme, in words, layers) from the most to the least frequent."""
    counts = {scheme: list(card.layers.values()).count(scheme) for scheme in sorted(set(card.layers.values()))}
    return [(s, _in_words(s), n) for s, n in sorted(counts.items(), key=lambda row: -row[1])]


def _in_words(name: str) -> str:
    scheme = parse_scheme(name)
    if scheme.weight is None:
        return "left in floating point"
    weights = f"int{scheme.weight.bits} weights"
    if scheme.activation is None:
        return f"{weights}, floating-point activations"
    ranges = "found in each call" if scheme.is_dynamic else "calibrated"
    return f"{weights}, int{scheme.activation.bits} activations with ranges {ranges}"


def _calibration(report: Report | None) -> str:
    """Which data gave the static ranges, in sentences."""
    facts = report.calibration if report else {}
    if not report or "samples" not in facts:
        return "How it was calibrated is not stored."
    if not facts["samples"]:
        return "No data was needed: no layer has a static input range."
    where = SELECTED.get(str(facts["selection"]), f"the steps that `{plain(str(facts['selection']))}` selects")
    return (
        f"The static input ranges come from the denoiser's inputs at {where} of {facts['samples']} sampled pictures "
        f"({facts['sampler_calls']} denoiser calls to sample them, {facts['forward_calls']} to calibrate); a range is "
        f"found by `{plain(str(facts['observer']))}`. Other pictures decided on the plan and gave the figures above. "
        f"The pictures and their prompts are not stored."
    )


def _scores(samples: Samples | None) -> str | None:
    """PSNR and SSIM of the pictures; None without the float ones."""
    if samples is None or "float" not in samples.pictures:
        return None
    scores = picture_scores(samples.pictures["float"], samples.pictures["quantized"])
    return (
        f"PSNR mean {told_db(scores.mean_psnr_db)}, worst {told_db(scores.worst_psnr_db)}; SSIM mean "
        f"{scores.mean_ssim:.3f}, worst {scores.worst_ssim:.3f}"
    )
