"""Figures of a plan: which scheme every layer has, and where bytes and milliseconds went."""

from collections.abc import Callable, Mapping
from typing import Any

from .artifacts import Plan
from .drawing import (
    PARTS,
    Drawing,
    clipped,
    in_precision_order,
    part_of_layer,
    scheme_colour,
    scheme_legend,
    split_parts,
    spread_ticks,
)
from .planners import fp32_bytes, layer_bytes
from .tables import LayerTable, LayerTimes

BEFORE, OTHER = "#dde2e8", "#b6bfc9"
"""Colours of the model as it was, and of what is in no layer."""


def plan_map(table: LayerTable, plan: Plan) -> Drawing:
    """The network as the plan sees it: a column per block, a cell per layer, the colour its scheme."""
    explanation = (
        "One column per block in the order in which they run, one cell per Linear or Conv2d layer (top to bottom in "
        "the block's own order), coloured by the scheme that the plan gives it."
    )
    tallest = max((len(block.layers) for block in table.blocks), default=1)
    size = min(max(11.0, 1.5 + 0.32 * len(table.blocks)), 36.0), 2.2 + min(0.3 * max(tallest, 4), 7.0)

    def draw(figure: Any) -> None:
        _draw_map(figure.subplots(), table, plan)

    return Drawing("plan-map", "The plan as a map of the network", explanation, size, draw)


def byte_bars(table: LayerTable, plan: Plan) -> Drawing:
    """Stored bytes per part of the network before and after, stacked by scheme."""
    layers = {info.name: info for info in table.layers}

    def before(name: str) -> float:
        info = layers[name]
        return 4 * (info.parameters + info.shape[0] * info.bias) / 1e6

    def after(name: str, scheme: str) -> float:
        return layer_bytes(layers[name], scheme) / 1e6

    held = sum(layer_bytes(i, _scheme(plan, i.name)) for i in table.layers) / 1e6 + 2 * table.other_parameters / 1e6
    explanation = (
        f"Grey: the model as it is in fp32 ({fp32_bytes(table) / 1e6:.1f} MB in all); coloured: what is stored under "
        f"the plan ({held:.1f} MB), scales and biases included. 'other' are norms and embeddings, stored in 16 bits."
    )

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        bars = _Bars(table, plan, before, after)
        bars.draw(axes, (4 * table.other_parameters / 1e6, 2 * table.other_parameters / 1e6), "fp32 model")
        axes.set_xlabel("stored weights (MB, 10⁶ bytes)")

    return Drawing("bytes", "Where the bytes went", explanation, (11, 3.6), draw)


def time_bars(table: LayerTable, plan: Plan, times: LayerTimes) -> Drawing:
    """Milliseconds of one denoiser call per part of the network before and after, stacked by scheme."""
    rest = max(times.step_ms - sum(row.get("float", 0.0) for row in times.layers.values()), 0.0)
    missing = sum(1 for i in table.layers if _scheme(plan, i.name) not in times.layers.get(i.name, {}))
    fastest = "the fastest there"
    if times.fastest_dtype != times.dtype:
        fastest = f"as in the plan; the fastest float is {times.fastest_dtype} with {times.fastest_ms:.4g} ms in all"
    explanation = (
        f"One denoiser call on {times.rows} rows on {times.device}, layers measured one by one. Grey: all in floating "
        f"point ({times.dtype}, {fastest}); coloured: with the plan's schemes. 'other' is what happens outside "
        "Linear and Conv2d layers (norms, activations, attention), the same before and after."
    )
    if missing:
        explanation += f" {missing} layers were not timed in their scheme and are left out."

    def before(name: str) -> float:
        return times.layers.get(name, {}).get("float", 0.0)

    def after(name: str, scheme: str) -> float:
        return times.layers.get(name, {}).get(scheme, 0.0)

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        _Bars(table, plan, before, after).draw(axes, (rest, rest), f"float model ({times.dtype})")
        axes.set_xlabel("time of one denoiser call (milliseconds)")

    return Drawing("milliseconds", "Where the milliseconds went", explanation, (11, 3.6), draw)


def amounts(
    table: LayerTable, plan: Plan, amount: Callable[[str, str], float]
) -> tuple[dict[str, dict[str, float]], list[str]]:
    """(part -> scheme -> summed amount of its layers, the schemes that occur, the highest precision first)."""
    part = part_of_layer(table)
    found: dict[str, dict[str, float]] = {name: {} for name in PARTS}
    for info in table.layers:
        scheme = _scheme(plan, info.name)
        row = found.setdefault(part.get(info.name, "other"), {})
        row[scheme] = row.get(scheme, 0.0) + amount(info.name, scheme)
    return found, in_precision_order(scheme for row in found.values() for scheme in row)


class _Bars:
    """Two bars per part: all float, and the plan's schemes stacked."""

    def __init__(
        self,
        table: LayerTable,
        plan: Plan,
        before: Callable[[str], float],
        after: Callable[[str, str], float],
    ) -> None:
        self.before, _ = amounts(table, plan, lambda name, scheme: before(name))
        self.after, self.schemes = amounts(table, plan, after)

    def draw(self, axes: Any, other: tuple[float, float], reference: str) -> None:
        """other: what is in no layer, before and after; reference: what the grey bars are."""
        from matplotlib.patches import Patch

        rows = [part for part in self.after if self.after[part]]
        longest = max([sum(self.before[part].values()) for part in rows] + [*other, 1e-12])
        for y, part in enumerate(rows):
            _bar(axes, y - 0.2, {"before": sum(self.before[part].values())}, longest)
            _bar(axes, y + 0.2, {s: self.after[part][s] for s in self.schemes if s in self.after[part]}, longest)
        _bar(axes, len(rows) - 0.2, {"before": other[0]}, longest)
        _bar(axes, len(rows) + 0.2, {"other": other[1]}, longest)
        axes.set_yticks(range(len(rows) + 1), [*rows, "other"])
        axes.set_ylim(len(rows) + 0.6, -0.6)
        axes.margins(x=0.1)
        axes.grid(axis="x")
        patches = [Patch(color=scheme_colour(s), label=s) for s in self.schemes]
        fixed = [
            Patch(color=BEFORE, label=reference),
            Patch(facecolor=OTHER, hatch="//", edgecolor="white", label="other"),
        ]
        axes.legend(handles=[fixed[0], *patches, fixed[1]], fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _bar(axes: Any, y: float, pieces: Mapping[str, float], longest: float) -> None:
    left = 0.0
    for name, value in pieces.items():
        colour = {"before": BEFORE, "other": OTHER}.get(name) or scheme_colour(name)
        hatch = "//" if name == "other" else None
        axes.barh(y, value, left=left, height=0.36, color=colour, hatch=hatch, edgecolor="white", linewidth=0.6)
        left += value
    axes.text(left + 0.008 * longest, y, f"{left:.3g}", va="center", fontsize=8)


def _scheme(plan: Plan, name: str) -> str:
    return plan.layers[name].scheme if name in plan.layers else "float"


def _draw_map(axes: Any, table: LayerTable, plan: Plan) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    cells, colours = [], []
    tallest = max((len(block.layers) for block in table.blocks), default=1)
    for column, block in enumerate(table.blocks):
        for row, name in enumerate(block.layers):
            cells.append(Rectangle((column - 0.47, row), 0.94, 0.94))
            colours.append(scheme_colour(_scheme(plan, name)))
    axes.add_collection(PatchCollection(cells, facecolors=colours))
    spread_ticks(axes, [clipped(block.name, 44) for block in table.blocks], 300)
    split_parts(axes, [block.part for block in table.blocks])
    axes.set_ylim(tallest, 0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("layers of the block (one cell each)")
    axes.set_xlabel("block, in the order in which they run")
    scheme_legend(axes, (_scheme(plan, i.name) for i in table.layers), loc="center left", bbox_to_anchor=(1.0, 0.5))
