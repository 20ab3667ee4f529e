"""Which recorded samples calibrate: one file, one rule. (Recording, n) -> n samples."""

from ..errors import LDMQError
from ..registry import Registry
from .contract import Selection
from .first_step import first_step
from .normal import normal
from .tdac import TDAC, TDACScores
from .uniform import uniform

SELECTIONS: Registry[Selection] = Registry("selection")
SELECTIONS.add("first-step", first_step)
SELECTIONS.add("normal", normal)
SELECTIONS.add("tdac", TDAC())
SELECTIONS.add("uniform", uniform)


def find_selection(selection: str | Selection) -> Selection:
    """The selection of that name, or the one given. Raises LDMQError for an unknown name and for what is neither."""
    if isinstance(selection, str):
        return SELECTIONS[selection]
    if not callable(selection):
        raise LDMQError(
            f"selection is {selection!r}; expected one of {', '.join(SELECTIONS)} or a Selection, as TDAC()"
        )
    return selection


def selection_name(selection: str | Selection) -> str:
    """The name that is written down: the registered one, else what tells a function or a dataclass from others."""
    if isinstance(selection, str):
        return selection
    known = (name for name, member in SELECTIONS.items() if member == selection)
    return next(known, None) or getattr(selection, "__name__", None) or repr(selection)


__all__ = [
    "SELECTIONS",
    "TDAC",
    "Selection",
    "TDACScores",
    "find_selection",
    "first_step",
    "normal",
    "selection_name",
    "uniform",
]
