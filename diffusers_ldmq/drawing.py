"""What every figure has in common: a canvas of its own, the colours of the schemes, names that are never markup."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from .tables import Block, LayerTable

DPI = 110
"""Pixels per inch of every figure."""
COLOURS = ("#1f6feb", "#d1495b", "#2a9d5c", "#8a5cd1", "#b07d12", "#0f7f8a", "#57606a")
"""Of curves, in turn; the second marks sensitive blocks, the third the cut-off."""
SCHEME_COLOURS = {
    "float": "#8c959f",
    "w8a16": "#e3a008",
    "w8a8-dyn": "#17a2a2",
    "w8a8": "#1f6feb",
    "w4a16": "#c46a1b",
    "w4a8-dyn": "#8e44ad",
    "w4a8": "#b96bd6",
    "w4a4-dyn": "#9c2c4a",
    "w4a4": "#d1495b",
}
"""Scheme (without its group size) -> colour, from the highest precision to the lowest."""
PARTS = ("encoder", "middle", "decoder")
STYLE = {
    "text.parse_math": False,  # a name with two dollar signs is a name, not a formula
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#d8dee4",
    "legend.frameon": True,
    "legend.framealpha": 0.9,
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure that is drawn when asked for. size: inches; explanation: how to read it, one or two sentences."""

    name: str
    title: str
    explanation: str
    size: tuple[float, float]
    draw: Callable[[Any], None]

    @property
    def width(self) -> int:
        """In pixels."""
        return round(self.size[0] * DPI)

    def png(self, *, titled: bool = False) -> bytes:
        """The figure as a PNG file. titled: with title and explanation above, for a picture that stands alone."""
        # Figure with its own canvas, not pyplot: the user's backend and open figures stay as they are
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        style: dict[Any, Any] = {k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith("backend")} | STYLE
        file = BytesIO()
        with mpl.rc_context(style):
            width, height = self.size
            lines = wrapped(f"{self.explanation}", round(width * 12)) if titled else []
            figure = Figure(
                figsize=(width, height + (0.35 + 0.2 * len(lines) if titled else 0)), dpi=DPI, layout="constrained"
            )
            FigureCanvasAgg(figure)
            self.draw(figure)
            if titled:
                figure.suptitle("\n".join([self.title, *lines]), fontsize=10.5, x=0.01, ha="left", linespacing=1.4)
            figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def wrapped(text: str, width: int) -> list[str]:
    """Lines of at most that many characters."""
    from textwrap import wrap

    return wrap(text, width)


def scheme_colour(scheme: str) -> str:
    """Colour of a scheme, whatever its group size."""
    return SCHEME_COLOURS.get(scheme.split("-g")[0], "#000000")


def in_precision_order(schemes: Iterable[str]) -> list[str]:
    """Each scheme once, the highest precision first."""
    order = list(SCHEME_COLOURS)
    return sorted(set(schemes), key=lambda s: (order.index(s.split("-g")[0]), s))


def scheme_legend(axes: Any, schemes: Iterable[str], **where: Any) -> None:
    """A legend that names the colours of those schemes."""
    from matplotlib.patches import Patch

    handles = [Patch(color=scheme_colour(scheme), label=scheme) for scheme in in_precision_order(schemes)]
    axes.legend(handles=handles, fontsize=9, **where)


def clipped(name: str, length: int) -> str:
    """A dotted name with its beginning left out where it is too long: its end tells layers apart."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def spread_ticks(axes: Any, labels: Sequence[str], room: int) -> None:
    """Upright labels under the columns 0, 1, ...; only every n-th where `room` columns or more would overlap."""
    step = max(-(-len(labels) // room), 1)
    shown = range(0, len(labels), step)
    axes.set_xticks(list(shown), [clipped(labels[k], 44) for k in shown], rotation=90, fontsize=7)
    axes.set_xlim(-0.5, len(labels) - 0.5)


def split_parts(axes: Any, parts: Sequence[str]) -> None:
    """Name encoder, middle and decoder above the columns 0, 1, ... and draw lines between them."""
    start = 0
    for k in range(1, len(parts) + 1):
        if k < len(parts) and parts[k] == parts[start]:
            continue
        centre = (start + k - 1) / 2
        axes.text(
            centre, 1.01, parts[start], transform=axes.get_xaxis_transform(), ha="center", va="bottom", fontsize=9
        )
        if k < len(parts):
            axes.axvline(k - 0.5, color="#57606a", linewidth=1)
        start = k


def blocks_by_name(table: LayerTable) -> dict[str, Block]:
    """Block name -> block."""
    return {block.name: block for block in table.blocks}


def part_of_layer(table: LayerTable) -> dict[str, str]:
    """Layer name -> encoder, middle or decoder."""
    return {name: block.part for block in table.blocks for name in block.layers}
