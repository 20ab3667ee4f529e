"""Figures of a profile and of what was measured: where quantization noise arises, and what the plan made of it."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .artifacts import BlockCurve, LayerNoise, Plan, Profile, Report
from .drawing import COLOURS, Drawing, blocks_by_name, clipped, scheme_colour, scheme_legend, split_parts, spread_ticks
from .metrics import sqnr_db, told_db

RANKED = 25
"""So many layers stand in the ranking."""
SQNR_AXIS = "SQNR at the denoiser's output (dB, higher is better)"
TIME_AXIS = "diffusion timestep (pure noise on the left, finished picture on the right)"
ROUNDING = 1e-11
"""Noise-to-signal powers below this (-110 dB) are fp32's own rounding, not quantization."""
_KINDS = {"both": "", "weight": "weights alone, ", "activation": "layer inputs alone, "}


def block_curve(profile: Profile, plan: Plan) -> Drawing:
    """Output SQNR as one group of blocks after another is quantized, with the plan's sensitive blocks and cut-off."""
    explanation = (
        "Each point is one measurement: all blocks up to there are quantized, the rest stays in floating point. A "
        "steep fall means that this block adds much noise; where the curve rises, its noise cancels earlier noise."
    )
    if any(curve.direction == "backward" for curve in profile.curves):
        explanation += " The backward curve starts at the output instead: all blocks from there on are quantized."

    def draw(figure: Any) -> None:
        _draw_curves(figure.subplots(), profile, plan)

    return Drawing("block-curve", "Where the noise enters, block after block", explanation, _wide(profile, 5.6), draw)


def noise_map(profile: Profile) -> Drawing:
    """Blocks x timesteps: the noise power that each group of blocks adds, relative to the signal at that timestep."""
    explanation = (
        "Colour: the noise power that quantizing one more block adds at the denoiser's output, in decibels below the "
        "signal of the same timestep (darker = more noise). It is a difference of powers, so the fall that comes from "
        "noise merely adding up is taken out. Blue: the noise falls, errors of this block cancel earlier ones; grey: "
        "nothing was quantized there."
    )

    def draw(figure: Any) -> None:
        _draw_map(figure, profile)

    return Drawing("noise-map", "Where and when the noise enters", explanation, _wide(profile, 5.2), draw)


def layer_ranking(profile: Profile, plan: Plan) -> Drawing:
    """The layers that do most harm in the low-precision scheme, in the colour of the scheme that the plan gives."""
    scheme = profile.curve.scheme
    own = any(scheme in layer.own for layer in profile.layers)
    where = "at the denoiser's output when this layer alone is" if own else "at the layer's own output when it is"
    explanation = (
        f"SQNR {where} quantized to {scheme}; the longer the bar, the more harm. The colour is the scheme that the "
        "plan gives the layer: the longest bars should not have the colour of the lowest precision."
    )
    ranked = _ranked(profile, own)
    axis = f"SQNR {where} quantized to {scheme} (dB, less is worse)"

    def draw(figure: Any) -> None:
        _draw_ranking(figure.subplots(), ranked, plan, axis)

    title = f"The {len(ranked)} layers that quantization harms most"
    return Drawing("layer-ranking", title, explanation, (11, 1.4 + 0.24 * len(ranked)), draw)


def output_curve(reports: Mapping[str, Report], plan: Plan) -> Drawing:
    """Measured output SQNR per timestep of every report (name -> Report), against what the plan predicted."""
    explanation = (
        "Measured on prompts and seeds that neither profiling, planning nor calibration saw. "
        "Falling to the right is natural: the last steps have little left to predict, so the same error weighs more."
    )
    if plan.predicted_sqnr_db is not None:
        explanation += " Black: the prediction, made from the profile alone."

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        _draw_reports(axes, reports)
        _draw_prediction(axes, plan)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9)

    return Drawing("output-sqnr", "Measured and predicted at the output", explanation, (11, 4.6), draw)


def plot_sqnr(path: str | os.PathLike[str], profile: Profile, plan: Plan, reports: Mapping[str, Report]) -> None:
    """Write a picture of two curves: the SQNR at the denoiser's output as block after block is quantized, with the
    plan's sensitive blocks and cut-off, and the output SQNR per timestep of every report (name -> Report)."""

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_curves(left, profile, plan)
        left.set_title("Where the noise enters, block after block", pad=20)
        _draw_reports(right, reports)
        right.set_title("What the quantized model reaches, on prompts it has not seen", pad=20)
        if reports:
            right.legend(fontsize=9)

    told = "Higher is better; 6 dB less means twice the error."
    title = f"Signal to quantization noise ratio (SQNR) of {profile.table.denoiser}"
    Path(path).write_bytes(Drawing("sqnr", title, told, (15, 6.4), draw).png(titled=True))


def predicted_curve(plan: Plan) -> dict[float, float]:
    """Timestep -> output SQNR in dB that the planner predicted; empty where it predicted none."""
    curve = plan.reasons.get("predicted_curve_db")
    return {float(t): float(db) for t, db in curve.items()} if isinstance(curve, dict) else {}


def _wide(profile: Profile, height: float) -> tuple[float, float]:
    """Wide enough that block names can be read under every column, within reason."""
    return min(max(11.0, 2 + 0.19 * len(profile.curve.groups)), 30.0), height


def _names(groups: Sequence[tuple[str, ...]]) -> list[str]:
    return [group[0] if len(group) == 1 else f"{group[0]} +{len(group) - 1}" for group in groups]


def _parts(profile: Profile, curve: BlockCurve) -> list[str]:
    blocks = blocks_by_name(profile.table)
    return [blocks[group[0]].part for group in curve.groups]


def _finite(values: Sequence[float]) -> list[float]:
    """Values that can be drawn; points without any noise leave a gap."""
    return [value if math.isfinite(value) else math.nan for value in values]


def _heights(curve: BlockCurve) -> list[float]:
    return _finite([sqnr_db(1.0, nsr if nsr > ROUNDING else 0.0) for nsr in curve.nsr()])


def _draw_curves(axes: Any, profile: Profile, plan: Plan) -> None:
    main = profile.curve
    position = {block: k for k, group in enumerate(main.groups) for block in group}
    heights = _heights(main)
    _draw_cut(axes, plan, position, len(main.groups))
    axes.plot(range(len(heights)), heights, "o-", color=COLOURS[0], markersize=4, label=_curve_label(main))
    for number, curve in enumerate(profile.curves):
        where = [position[group[0]] for group in curve.groups if group[0] in position]
        values = _heights(curve)
        if len(where) == len(values):
            colour = COLOURS[3 + number % (len(COLOURS) - 3)]
            axes.plot(where, values, ".--", color=colour, linewidth=1.2, label=_curve_label(curve))
    sensitive = sorted({position[b] for b in plan.reasons.get("sensitive_blocks") or () if b in position})
    if sensitive:
        label = "sensitive block: adds more than 4x the median noise"
        axes.plot(sensitive, [heights[k] for k in sensitive], "o", color=COLOURS[1], markersize=8, label=label)
    spread_ticks(axes, _labels(profile, plan), 250)
    split_parts(axes, _parts(profile, main))
    axes.set_xlabel("block, in the order in which they run")
    axes.set_ylabel(SQNR_AXIS)
    axes.grid(axis="y")
    axes.legend(fontsize=9)


def _labels(profile: Profile, plan: Plan) -> list[str]:
    """Names of the groups; '(float)' where the plan leaves the whole group in floating point."""
    blocks = blocks_by_name(profile.table)
    quantized = plan.quantized().keys()
    kept = [quantized.isdisjoint(n for b in group for n in blocks[b].layers) for group in profile.curve.groups]
    return [f"{name} (float)" if f else name for name, f in zip(_names(profile.curve.groups), kept, strict=True)]


def _draw_cut(axes: Any, plan: Plan, position: dict[str, int], columns: int) -> None:
    cut = plan.reasons.get("cut_off")
    if cut in position:
        start = position[cut] - 0.5
        label = "from the cut-off on: higher precision"
        axes.axvspan(start, columns - 0.5, color=COLOURS[2], alpha=0.12, label=label)
        axes.axvline(start, color=COLOURS[2], linestyle="--")


def _curve_label(curve: BlockCurve) -> str:
    kind = _KINDS.get(curve.part, f"{curve.part}, ")
    if curve.direction == "backward":
        return f"backward: {kind}all blocks from here on in {curve.scheme}"
    return f"forward: {kind}all blocks up to here in {curve.scheme}"


def added_noise_db(curve: BlockCurve) -> list[list[float]]:
    """[G][T] noise power that each group adds, in dB relative to the signal of that timestep.

    NaN where it adds none at all (nothing quantized), -inf where the noise falls (errors cancel).
    """
    rows = []
    before: Sequence[float] = [0.0] * len(curve.signal)
    for row in curve.noise:
        added = [after - b for after, b in zip(row, before, strict=True)]
        rows.append([_added_db(a, s) for a, s in zip(added, curve.signal, strict=True)])
        before = row
    return rows


def _added_db(added: float, signal: float) -> float:
    if abs(added) <= ROUNDING * signal:
        return math.nan
    return 10 * math.log10(added / signal) if added > 0 else -math.inf


def _draw_map(figure: Any, profile: Profile) -> None:
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    curve, timesteps = profile.curve, profile.timesteps
    grid = np.array(added_noise_db(curve)).T
    rises = grid[np.isfinite(grid)]
    # a few extreme cells must not wash out all others
    low, high = (np.percentile(rises, 5), rises.max()) if rises.size else (-60.0, 0.0)
    axes = figure.subplots()
    axes.set_facecolor("#eaeef2")
    axes.imshow(np.where(np.isneginf(grid), 1.0, np.nan), cmap=ListedColormap(["#7fb2f0"]), aspect="auto")
    shown = np.ma.masked_invalid(grid)
    image = axes.imshow(shown, cmap=colormaps["YlOrRd"], aspect="auto", vmin=low, vmax=max(high, low + 1))
    bar = figure.colorbar(image, ax=axes, pad=0.01, extend="min")
    bar.set_label("noise power added,\nrelative to the signal (dB)")
    spread_ticks(axes, _names(curve.groups), 250)
    axes.set_yticks(range(len(timesteps)), [f"{t:g}" for t in timesteps])
    axes.set_ylabel("diffusion timestep\n(pure noise on top)")
    axes.set_xlabel("block, in the order in which they run")
    split_parts(axes, _parts(profile, curve))
    patches = [Patch(color="#7fb2f0", label="cancels: the noise falls"), Patch(color="#eaeef2", label="adds nothing")]
    figure.legend(handles=patches, fontsize=9, loc="outside lower right", ncols=2)


def own_effect_db(profile: Profile, noise: LayerNoise, scheme: str) -> float | None:
    """SQNR in dB at the denoiser's output with this layer alone in `scheme`; None where it was not measured."""
    return sqnr_db(sum(profile.curve.signal), sum(noise.own[scheme])) if scheme in noise.own else None


def _ranked(profile: Profile, own: bool) -> list[tuple[str, float]]:
    """(layer, SQNR in dB) of the worst layers in the low-precision scheme, the worst first."""
    scheme = profile.curve.scheme
    found: dict[str, float | None] = {
        noise.name: own_effect_db(profile, noise, scheme)
        if own
        else (noise.power(scheme).sqnr_db if scheme in noise.noise else None)
        for noise in profile.layers
    }
    finite = [(name, db) for name, db in found.items() if db is not None and math.isfinite(db)]
    return sorted(finite, key=lambda pair: pair[1])[:RANKED]


def _draw_ranking(axes: Any, ranked: Sequence[tuple[str, float]], plan: Plan, axis: str) -> None:
    if not ranked:
        axes.text(0.5, 0.5, "no layer was measured in this scheme", ha="center", va="center")
        axes.set_axis_off()
        return
    values = [db for _, db in ranked]
    base = max(values) + max(2.0, 0.08 * (max(values) - min(values)))
    schemes = [plan.layers[name].scheme if name in plan.layers else "float" for name, _ in ranked]
    rows = range(len(ranked))
    axes.barh(rows, [db - base for db in values], left=base, color=[scheme_colour(s) for s in schemes])
    for row, db in zip(rows, values, strict=True):
        axes.text(db, row, f" {told_db(db)}", ha="left", va="center", fontsize=8)
    axes.set_yticks(rows, [clipped(name, 60) for name, _ in ranked], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(base, min(values) - 0.12 * (base - min(values)))
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    axes.set_xlabel(axis)
    axes.grid(axis="x")
    scheme_legend(axes, schemes, title="scheme in the plan", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_reports(axes: Any, reports: Mapping[str, Report]) -> None:
    for number, (name, report) in enumerate(reports.items()):
        label = f"{name}: {told_db(report.sqnr_db)} over all steps, worst {told_db(report.worst()[1])}"
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(report.timesteps, _finite(report.curve_db()), "o-", color=colour, markersize=4, label=label)
    axes.invert_xaxis()
    axes.set_xlabel(TIME_AXIS)
    axes.set_ylabel(SQNR_AXIS)
    axes.grid()


def _draw_prediction(axes: Any, plan: Plan) -> None:
    curve, whole = predicted_curve(plan), plan.predicted_sqnr_db
    if curve:
        ordered = sorted(curve.items(), reverse=True)
        heights = _finite([db for _, db in ordered])
        axes.plot([t for t, _ in ordered], heights, "s--", color="#24292f", label="predicted per timestep")
    if whole is not None and math.isfinite(whole):
        axes.axhline(whole, color="#24292f", linestyle=":", label=f"predicted over all steps: {told_db(whole)}")
