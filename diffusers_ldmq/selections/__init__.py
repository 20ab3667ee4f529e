"""Which recorded samples calibrate: one file, one rule. (Recording, n) -> n samples."""

from collections.abc import Callable

from ..calls import Recording, SampleId
from ..registry import Registry
from .first_step import first_step
from .uniform import uniform

Selection = Callable[[Recording, int | None], tuple[SampleId, ...]]

SELECTIONS: Registry[Selection] = Registry("selection")
SELECTIONS.add("first-step", first_step)
SELECTIONS.add("uniform", uniform)

__all__ = ["SELECTIONS", "Selection", "first_step", "uniform"]
