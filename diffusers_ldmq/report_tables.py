"""The tables of a report, their numbers in words and units."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .artifacts import Plan, Profile, Report
from .metrics import told_db
from .planners import layer_bytes
from .plots import own_effect_db
from .summary import mb
from .tables import LayerInfo, LayerTable, LayerTimes

PREDICTED = "predicted"
"""Heading of the column that was not measured."""
TOLD = {
    "delta_n": "noise power that each block adds, relative to the signal",
    "threshold": "added noise above which a block counts as sensitive",
    "sensitive_blocks": "sensitive blocks",
    "cut_off": "cut-off: from this block on, higher precision",
    "suffix_layers_in_float": "layers after the cut-off that stay float",
    "measured_on_select_db": "output SQNR on the calls that plans are chosen with (dB)",
    "raised_after_measuring": "blocks raised after measuring, to meet the target",
    "demanded": "what the planner was asked for after measuring",
    "bytes": "bytes of the weights as planned",
    "integer_share": "share of the multiply-accumulates that are integer x integer, as planned",
    "predicted_ms": "predicted milliseconds of a denoiser call",
    "predicted_curve_db": "predicted output SQNR per timestep (dB)",
    "selection": "which recorded calls give the input ranges",
    "observer": "how a range is found",
    "scheme": "scheme of the block curve",
    "keep_float": "layers kept float",
    "calls": "denoiser calls profiled",
    "images": "pictures of each call",
    "schemes": "schemes that were measured",
    "groups": "most points of the block curve",
    "full": "every timestep, block, direction and part measured",
}
"""Keys of plan.reasons and profile.settings -> what they mean; others are shown under their own name."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in a table, and the number by which it is sorted (None = after all others)."""

    text: str
    key: float | None = None


def layer_rows(
    table: LayerTable, plan: Plan, profile: Profile | None, times: LayerTimes | None
) -> Iterator[dict[str, Any]]:
    """One row per Linear and Conv2d, in the order in which the model lists them."""
    for info in table.layers:
        choice = plan.layers.get(info.name)
        scheme = choice.scheme if choice else "float"
        size, shape = layer_bytes(info, scheme), "×".join(map(str, info.shape))
        yield {
            "name": info.name,
            "kind": info.kind,
            "shape": Cell(shape, info.parameters),
            "scheme": scheme,
            "reason": choice.reason if choice else "not in the plan",
            "numbers": [
                *_layer_db(profile, info, scheme),
                Cell(f"{size:,}", size),
                _milliseconds(times, info.name, scheme),
            ],
        }


def _layer_db(profile: Profile | None, info: LayerInfo, scheme: str) -> list[Cell]:
    """Relative SQNR and own effect at the output of a layer in its scheme."""
    if scheme == "float":
        return [Cell("exact", 1e9)] * 2
    noise = next((n for n in profile.layers if n.name == info.name), None) if profile else None
    if profile is None or noise is None:
        return [Cell("not measured")] * 2
    relative = noise.power(scheme).sqnr_db if scheme in noise.noise else None
    return [_db_cell(relative), _db_cell(own_effect_db(profile, noise, scheme))]


def _db_cell(db: float | None) -> Cell:
    told = told_db(db)
    if db is None or told == "not measured":
        return Cell(told)
    return Cell(told.removesuffix(" dB"), min(max(db, -1e9), 1e9))


def _milliseconds(times: LayerTimes | None, name: str, scheme: str) -> Cell:
    value = times.layers.get(name, {}).get(scheme) if times else None
    return Cell("not timed") if value is None else Cell(f"{value:.3f}", value)


def timestep_rows(reports: Mapping[str, Report], predicted: Mapping[float, float]) -> dict[str, Any]:
    """Output SQNR per timestep: predicted (timestep -> dB) where given, and measured in every report."""
    curves: dict[str, Mapping[float, float]] = {
        f"measured, {name}": dict(zip(report.timesteps, report.curve_db(), strict=True))
        for name, report in reports.items()
    }
    if predicted:
        curves = {PREDICTED: predicted, **curves}
    times = sorted({t for curve in curves.values() for t in curve}, reverse=True)
    rows = [(f"{t:g}", [_at(curve, t, name) for name, curve in curves.items()]) for t in times]
    return {"names": list(curves), "rows": rows, "predicted": bool(predicted)}


def _at(curve: Mapping[float, float], timestep: float, name: str) -> str:
    return "not predicted" if name == PREDICTED and timestep not in curve else told_db(curve.get(timestep))


def report_cells(report: Report) -> list[str]:
    """Output SQNR, that of the worst timestep, size and integer share of one report."""
    timestep, worst = report.worst()
    share = f"{100 * report.int8_macs:.1f} %"
    return [told_db(report.sqnr_db), f"{told_db(worst)} (timestep {timestep:g})", mb(report.bytes), share]


def correction_row(trial: Any) -> dict[str, Any]:
    """One correction that was tried: what it did at the layer and at the output, and whether it stayed."""
    return {
        "layer": trial.layer,
        "correction": trial.correction,
        "at_layer": _change(trial.layer_db),
        "at_output": _change(trial.output_db) if trial.output_db is not None else "not reached",
        "kept": trial.kept,
        "reason": trial.reason,
    }


def _change(pair: Sequence[float]) -> str:
    return f"{told_db(pair[0])} → {told_db(pair[1])}"


def in_words(data: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """(name, text or list of (name, text)) of plain JSON data, for people."""
    return [(TOLD.get(name, name.replace("_", " ")), _nested(value)) for name, value in data.items()]


def _nested(value: Any) -> str | list[tuple[str, str]]:
    if isinstance(value, dict):
        return [(str(name), _word(inner)) for name, inner in value.items()]
    return _word(value)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == [] or value == ():
        return "none"
    if value in ("inf", "-inf", "nan"):  # how JSON holds them
        value = float(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not measured" if math.isnan(value) else "unlimited"
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_word(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_word(item) for item in value)
    return str(value)
