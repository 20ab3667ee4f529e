"""Charts and pictures for IMAGE sockets: fp32 [1, H, W, 3] in 0..1, drawn to be read on a node."""

import math
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from diffusers_ldmq.artifacts import Plan, Profile

SIZE = (10.0, 8.4)
"""Inches of a chart; at 110 pixels an inch."""
WORST = 10
"""So many layers are named: more cannot be read on a node."""
FONT = 12
PART_COLOURS = {"encoder": "#1f6feb", "middle": "#8a5cd1", "decoder": "#d1495b"}


def profile_chart(profile: "Profile") -> "Tensor":
    """SQNR block after block, and below it the layers that quantization harms most. [1, H, W, 3]"""
    from diffusers_ldmq.drawing import Drawing

    def draw(figure: Any) -> None:
        upper, lower = figure.subfigures(2, 1, height_ratios=(5, 4))
        _draw_curve(upper, profile)
        _draw_worst(lower, profile)

    return _drawn(Drawing("profile", "", "", SIZE, draw))


def plan_chart(plan: "Plan", profile: "Profile | None") -> "Tensor":
    """Megabytes per block and scheme beside the 16-bit size, and below it the predicted SQNR over time; without a
    profile the number of layers of each scheme. [1, H, W, 3]"""
    from diffusers_ldmq.drawing import Drawing

    def draw(figure: Any) -> None:
        if profile is None:
            _draw_counts(figure, plan)
            return
        upper, lower = figure.subfigures(2, 1, height_ratios=(5, 4))
        _draw_blocks(upper, plan, profile)
        _draw_predicted(lower, plan)

    return _drawn(Drawing("plan", "", "", SIZE if profile else (10.0, 3.2), draw))


def side_by_side(columns: Sequence[tuple[str, "Tensor"]]) -> "Tensor":
    """Pictures beside each other with their names above. columns: (name, [B, h, w, 3] in 0..1) -> [B, H, W, 3].

    Raises LDMQError if two columns differ in size.
    """
    import torch

    from diffusers_ldmq.errors import LDMQError

    shapes = {tuple(pictures.shape) for _, pictures in columns}
    if len(shapes) != 1:
        raise LDMQError(f"pictures of different sizes {sorted(shapes)} cannot stand side by side")
    ((batch, height, width, _),) = shapes
    labels = torch.cat([_label(name, width, height) for name, _ in columns], dim=1)
    pictures = torch.cat([pictures.detach().float().cpu().clamp(0, 1) for _, pictures in columns], dim=2)
    return torch.cat([labels[None].expand(batch, -1, -1, -1), pictures], dim=1)


def difference(one: "Tensor", other: "Tensor", gain: float) -> "Tensor":
    """How far two pictures are apart, `gain` times as bright; black = equal. [B, h, w, 3]"""
    return ((one.detach().float().cpu() - other.detach().float().cpu()).abs() * gain).clamp(0, 1)


def _label(name: str, width: int, height: int) -> "Tensor":
    """[h, width, 3] a name on white, as large as fits."""
    import torch
    from PIL import Image, ImageDraw

    from diffusers_ldmq.pictures import picture_font

    size = max(min(height // 16, 28), 9)
    strip = Image.new("RGB", (width, 2 * size), "white")
    font = picture_font(size)
    while font.getlength(name) > width - 4 and size > 6:
        size -= 1
        font = picture_font(size)
    ImageDraw.Draw(strip).text((width // 2, strip.height // 2), name, fill="black", font=font, anchor="mm")
    return torch.frombuffer(bytearray(strip.tobytes()), dtype=torch.uint8).view(strip.height, width, 3).float() / 255


def _drawn(drawing: Any) -> "Tensor":
    import torch
    from PIL import Image

    with Image.open(BytesIO(drawing.png())) as file:
        image = file.convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).float() / 255


def _draw_curve(figure: Any, profile: "Profile") -> None:
    from diffusers_ldmq.drawing import blocks_by_name, split_parts
    from diffusers_ldmq.metrics import sqnr_db

    curve, blocks = profile.curve, blocks_by_name(profile.table)
    heights = [_finite(sqnr_db(1.0, nsr)) for nsr in curve.nsr()]
    axes = _panel(figure, f"Blocks quantized one after another to {curve.scheme}: where it falls, noise enters")
    axes.plot(range(len(heights)), heights, "o-", color="#1f6feb", linewidth=2, markersize=6)
    split_parts(axes, [blocks[group[0]].part for group in curve.groups])
    _block_ticks(axes, [group[-1] for group in curve.groups])
    axes.set_ylabel("SQNR at the output (dB)", fontsize=FONT)
    axes.grid(axis="y")


def _draw_worst(figure: Any, profile: "Profile") -> None:
    from diffusers_ldmq.drawing import clipped, part_of_layer

    from .texts import worst_layers

    ranked, parts = worst_layers(profile, WORST), part_of_layer(profile.table)
    axes = _panel(
        figure, "The layers that suffer most (SQNR with this one alone quantized; the longer the bar, the more noise)"
    )
    if not ranked:
        axes.text(0.5, 0.5, "no layer was measured", ha="center", va="center", fontsize=FONT)
        axes.set_axis_off()
        return
    values = [db for _, db in ranked]
    base = max(values) + max(2.0, 0.15 * (max(values) - min(values)))
    rows = range(len(ranked))
    colours = [PART_COLOURS.get(parts.get(name, ""), "#57606a") for name, _ in ranked]
    axes.barh(rows, [db - base for db in values], left=base, color=colours)
    for row, db in zip(rows, values, strict=True):
        axes.text(db, row, f" {db:.1f} dB", ha="left", va="center", fontsize=FONT - 1)
    axes.set_yticks(rows, [clipped(name, 48) for name, _ in ranked], fontsize=FONT - 2)
    axes.set_xlim(base, min(values) - 0.16 * (base - min(values)))
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    axes.set_xticks([])
    _legend(axes, {part: colour for part, colour in PART_COLOURS.items() if part in parts.values()}, loc="lower right")


def _draw_blocks(figure: Any, plan: "Plan", profile: "Profile") -> None:
    from diffusers_ldmq.drawing import in_precision_order, scheme_colour, split_parts
    from diffusers_ldmq.planners.contract import layer_bytes

    table = profile.table
    infos = {info.name: info for info in table.layers}
    schemes = {name: choice.scheme for name, choice in plan.layers.items()}
    before = [sum(layer_bytes(infos[n], "float") for n in block.layers) / 1e6 for block in table.blocks]
    axes = _panel(figure, "Size of every block by scheme; outlines: in 16 bit")
    axes.bar(range(len(before)), before, width=0.86, color="none", edgecolor="#57606a", linewidth=1)
    bottom = [0.0] * len(before)
    order = in_precision_order(schemes.values())
    for scheme in reversed(order):
        sizes = [
            sum(layer_bytes(infos[n], scheme) for n in block.layers if schemes.get(n) == scheme) / 1e6
            for block in table.blocks
        ]
        axes.bar(range(len(sizes)), sizes, width=0.86, bottom=bottom, color=scheme_colour(scheme))
        bottom = [one + other for one, other in zip(bottom, sizes, strict=True)]
    split_parts(axes, [block.part for block in table.blocks])
    _block_ticks(axes, [block.name for block in table.blocks])
    axes.set_ylabel("MB", fontsize=FONT)
    axes.grid(axis="y")
    _legend(axes, {scheme: scheme_colour(scheme) for scheme in order}, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_predicted(figure: Any, plan: "Plan") -> None:
    from diffusers_ldmq.plots import predicted_curve

    curve = sorted(predicted_curve(plan).items(), reverse=True)
    whole = plan.predicted_sqnr_db
    told = f": {whole:.1f} dB over all steps" if whole is not None and math.isfinite(whole) else ""
    axes = _panel(figure, f"Predicted SQNR at the output{told}")
    if not curve:
        axes.text(0.5, 0.5, "this planner predicts nothing;\nLDM-Q Compare measures", ha="center", fontsize=FONT)
        axes.set_axis_off()
        return
    axes.plot([t for t, _ in curve], [_finite(db) for _, db in curve], "s-", color="#24292f", linewidth=2)
    axes.invert_xaxis()
    axes.set_xlabel("timestep (pure noise on the left, finished picture on the right)", fontsize=FONT)
    axes.set_ylabel("dB", fontsize=FONT)
    axes.grid()


def _draw_counts(figure: Any, plan: "Plan") -> None:
    from diffusers_ldmq.drawing import in_precision_order, scheme_colour

    counts = plan.counts()
    order = in_precision_order(counts)
    axes = _panel(figure, "Layers of each scheme")
    axes.barh(range(len(order)), [counts[s] for s in order], color=[scheme_colour(s) for s in order])
    axes.set_yticks(range(len(order)), order, fontsize=FONT)
    axes.invert_yaxis()
    axes.set_xlabel("layers", fontsize=FONT)
    axes.grid(axis="x")


def _panel(figure: Any, title: str) -> Any:
    """Axes with a title over their whole figure, however long the labels beside them are."""
    figure.suptitle(title, fontsize=FONT + 2, x=0.01, ha="left", fontweight="bold")
    return figure.subplots()


def _block_ticks(axes: Any, names: Sequence[str]) -> None:
    """Block names, only every n-th where they would overlap."""
    from diffusers_ldmq.drawing import clipped

    step = max(-(-len(names) // 26), 1)
    shown = range(0, len(names), step)
    axes.set_xticks(list(shown), [clipped(names[k], 24) for k in shown], rotation=45, ha="right", fontsize=FONT - 3)
    axes.set_xlim(-0.6, len(names) - 0.4)


def _legend(axes: Any, colours: dict[str, str], **where: Any) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    axes.legend(handles=handles, fontsize=FONT - 2, **where)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan
