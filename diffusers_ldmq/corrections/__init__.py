"""Noise corrections of single layers, none of which slows down a layer it is not applied to. One file, one idea.

Whether a correction is applied is decided elsewhere (`correction.correct`), by measuring.
"""

from ..registry import Registry
from .bias import bias
from .contract import Correction, LayerInputs, output_power
from .dilate import dilate
from .low_rank import low_rank
from .rotate import rotate
from .skip_split import skip_split
from .smooth import smooth

CORRECTIONS: Registry[Correction] = Registry("correction")
CORRECTIONS.add("bias", bias)
CORRECTIONS.add("dilate", dilate)
CORRECTIONS.add("low-rank", low_rank)
CORRECTIONS.add("rotate", rotate)
CORRECTIONS.add("skip-split", skip_split)
CORRECTIONS.add("smooth", smooth)

__all__ = ["CORRECTIONS", "Correction", "LayerInputs", "output_power"]
