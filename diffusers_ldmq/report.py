"""One self-contained HTML file that shows what was measured, what was decided, what came out, and why."""

import os
import platform
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata, resources
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from .artifacts import Plan, Profile, Report
from .drawing import SCHEME_COLOURS, Drawing, scheme_colour
from .errors import LDMQError, PlanError
from .metrics import told_db
from .network_plots import byte_bars, plan_map, time_bars
from .output import file_beside
from .pictures import picture_scores
from .planners import Target, parse_target
from .plots import block_curve, layer_ranking, noise_map, output_curve, predicted_curve
from .report_tables import correction_row, in_words, layer_rows, report_cells, timestep_rows
from .selection_plots import chosen_steps
from .selections import TDACScores
from .serialization import from_json
from .summary import calibration_told, mb, size_data
from .tables import LayerTable, LayerTimes
from .version import __version__

SHOWN_SIDE = 768
"""Longest side in pixels of a picture in the file; larger ones are reduced, so that the file can be mailed."""
THIS = "this plan"


@dataclass(frozen=True, slots=True)
class ReportInputs:
    """What a report shows; what is empty or None is named as missing.

    model: as the user wrote it; report: measured at the end; others: name -> Report of the same model under other
    plans; pictures: 'float' and 'quantized' -> one picture per caption, same seeds.
    """

    model: str
    table: LayerTable
    plan: Plan
    report: Report
    profile: Profile | None = None
    times: LayerTimes | None = None
    others: dict[str, Report] = field(default_factory=dict)
    pictures: dict[str, list[Image.Image]] = field(default_factory=dict)
    captions: tuple[str, ...] = ()


def write_report(path: str | os.PathLike[str], inputs: ReportInputs, *, pngs: bool = False) -> None:
    """Write one .html file that needs nothing else; pngs: also every figure beside it as <stem>-<figure>.png.

    Raises OutputError if a file cannot be written and LDMQError if the two lists of pictures differ.
    """
    path = Path(path)
    drawings = _drawings(inputs)
    page = _page(inputs, drawings)
    with file_beside(path) as beside:
        beside.write_text(page, encoding="utf-8")
    for drawing in drawings.values() if pngs else ():
        with file_beside(path.with_name(f"{path.stem}-{drawing.name}.png")) as beside:
            beside.write_bytes(drawing.png(titled=True))


def _drawings(inputs: ReportInputs) -> dict[str, Drawing]:
    """Figure name -> figure, as far as there is something to draw."""
    table, plan, profile = inputs.table, inputs.plan, inputs.profile
    found = [
        plan_map(table, plan),
        output_curve({THIS: inputs.report, **inputs.others}, plan),
        byte_bars(table, plan),
    ]
    if profile:
        found += [block_curve(profile, plan), noise_map(profile), layer_ranking(profile, plan)]
    if inputs.times:
        found.append(time_bars(table, plan, inputs.times))
    scores = inputs.report.calibration.get("scores")
    if scores is not None:
        found.append(chosen_steps(from_json(TDACScores, scores, PlanError, "the report's calibration.scores")))
    return {drawing.name: drawing for drawing in found}


def _page(inputs: ReportInputs, drawings: Mapping[str, Drawing]) -> str:
    from jinja2 import Environment, StrictUndefined  # only reports need it

    # names, captions and reasons come from files that others may have written: everything is escaped
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = resources.files(__package__ or "diffusers_ldmq").joinpath("report.html.j2").read_text(encoding="utf-8")
    rows = list(layer_rows(inputs.table, inputs.plan, inputs.profile, inputs.times))
    reports = {THIS: inputs.report, **inputs.others}
    return environment.from_string(text).render(
        model=inputs.model,
        plan=inputs.plan,
        table=inputs.table,
        report=inputs.report,
        profile=inputs.profile,
        facts=_facts(inputs),
        pairs=_pairs(inputs),
        figures={name: _figure(drawing) for name, drawing in drawings.items()},
        layers=rows,
        schemes=sorted({row["scheme"] for row in rows}),
        colours={scheme: scheme_colour(scheme) for scheme in (*SCHEME_COLOURS, *inputs.plan.counts())},
        timesteps=timestep_rows(reports, predicted_curve(inputs.plan)),
        reports=[(name, report_cells(report)) for name, report in reports.items()],
        corrections=[correction_row(trial) for trial in inputs.report.corrections],
        calibration=calibration_told(inputs.report),
        observer=inputs.report.calibration.get("observer"),
        profiled=in_words(inputs.profile.settings) if inputs.profile else [],
        reasons=in_words(inputs.plan.reasons),
        versions=_versions(),
    )


def _facts(inputs: ReportInputs) -> list[dict[str, str]]:
    """The headline: what a reader wants to know first. state: 'good' or 'bad' where something was demanded."""
    report, plan = inputs.report, inputs.plan
    timestep, worst = report.worst()
    size = size_data(report)
    state, told = _target(inputs)
    predicted = "not predicted" if plan.predicted_sqnr_db is None else told_db(plan.predicted_sqnr_db)
    rows = [
        ("Measured SQNR", told_db(report.sqnr_db), "at the output, over all steps, on prompts not seen before", ""),
        ("Predicted SQNR", predicted, "at the output, by the planner, before quantizing", ""),
        ("Worst timestep", told_db(worst), f"SQNR at timestep {timestep:g}", ""),
        (
            "Size of the weights",
            f"{mb(report.bytes)}",
            f"{size['ratio_fp32']:.3f}× of fp32 ({mb(report.fp32_bytes)}), {size['ratio_fp16']:.3f}× of fp16",
            "",
        ),
        ("Integer work", f"{100 * report.int8_macs:.1f} %", "of the multiply-adds run integer × integer", ""),
        ("Target", plan.target or "none", told, state),
    ]
    return [{"label": a, "value": b, "note": c, "state": d} for a, b, c, d in rows]


def _target(inputs: ReportInputs) -> tuple[str, str]:
    """('good', 'bad' or '', sentence): whether the plan's target holds in what was measured."""
    text = inputs.plan.target
    if not text:
        return "", "no target was asked for; the planner's own rule decided"
    try:
        target = parse_target(text)
    except PlanError:
        return "", "cannot be checked from what is in this report"
    found = _demands(target, inputs)
    if not found:
        return "", "cannot be checked from what is in this report"
    return "good" if all(holds for holds, _ in found) else "bad", "; ".join(told for _, told in found)


def _demands(target: Target, inputs: ReportInputs) -> list[tuple[bool, str]]:
    """(whether it holds, in words) of every demand that was measured."""
    report, limit, found = inputs.report, target.byte_limit(inputs.table), []
    if target.min_sqnr_db is not None:
        spare = report.sqnr_db - target.min_sqnr_db
        found.append(
            (spare >= 0, f"holds, {told_db(spare)} to spare" if spare >= 0 else f"missed by {told_db(-spare)}")
        )
    if limit is not None:
        holds = report.bytes <= limit
        found.append((holds, f"{'holds' if holds else 'missed'}: {mb(limit)} were allowed"))
    if target.min_speedup is not None and report.speedup is not None:
        holds = report.speedup >= target.min_speedup
        found.append((holds, f"{'holds' if holds else 'missed'}: {report.speedup:.2f}x the fastest float's speed"))
    if target.min_integer_share is not None:
        holds = report.int8_macs >= target.min_integer_share
        found.append((holds, f"{'holds' if holds else 'missed'}: {100 * report.int8_macs:.1f} % integer work"))
    return found


def _pairs(inputs: ReportInputs) -> list[dict[str, Any]]:
    """Float and quantized picture of every caption with their scores."""
    before, after = inputs.pictures.get("float", []), inputs.pictures.get("quantized", [])
    if not before and not after:
        return []
    scores = picture_scores(before, after)
    if inputs.captions and len(inputs.captions) != len(before):
        raise LDMQError(f"the report has {len(before)} pictures for {len(inputs.captions)} captions; give one each")
    captions = inputs.captions or tuple(f"picture {number + 1}" for number in range(len(before)))
    rows = zip(captions, before, after, scores.psnr_db, scores.ssim, strict=True)
    return [
        {
            "caption": caption,
            "float": _picture(one),
            "quantized": _picture(other),
            "size": f"{one.width}×{one.height}",
            "ratio": f"{one.width} / {one.height}",
            "small": max(one.size) < 256,
            "reduced": max(one.size) > SHOWN_SIDE,
            "psnr": "equal" if told_db(psnr) == "exact" else told_db(psnr),
            "ssim": f"{similarity:.3f}",
        }
        for caption, one, other, psnr, similarity in rows
    ]


def _picture(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    if max(picture.size) > SHOWN_SIDE:
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    file = BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return _data_url(file.getvalue())


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


def _figure(drawing: Drawing) -> dict[str, Any]:
    return {
        "name": drawing.name,
        "title": drawing.title,
        "explanation": drawing.explanation,
        "width": drawing.width,
        "url": _data_url(drawing.png()),
    }


def _versions() -> list[tuple[str, str]]:
    names = ("torch", "diffusers", "transformers", "numpy")
    found = [(name, metadata.version(name)) for name in names]
    return [("diffusers-ldmq", __version__), *found, ("Python", platform.python_version())]
