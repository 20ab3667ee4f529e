"""The contract of a family of denoisers."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of denoiser.

    components: pipeline attributes to look at, empty for denoisers that no diffusers pipeline has; classes: class
    names (a subclass counts too);
    place: layer name -> (sort key in execution order, block name, part); keep_float: regular expression that is
    searched in a layer's name, matches stay in floating point by default;
    skip_split: layer name -> how many of its input channels come from the layer before it, the rest from the skip
    connection that is concatenated behind them; None where nothing is;
    units: class names of the modules that are reconstructed as one (EDA-DM's and BRECQ's blocks);
    middle: denoiser -> name of the module whose input stands for what a sampling step looks like inside (the features
    of Recording), '' if it has none: where EDA-DM looks, the attention in the middle.
    """

    name: str
    components: tuple[str, ...]
    classes: tuple[str, ...]
    place: Callable[[str, nn.Module], tuple[tuple[int, ...], str, str]]
    keep_float: str
    skip_split: Callable[[str, nn.Module], int | None]
    units: tuple[str, ...]
    middle: Callable[[nn.Module], str]

    def matches(self, module: nn.Module) -> bool:
        """True if `module` is of this family, by class name."""
        return any(cls.__name__ in self.classes for cls in type(module).__mro__)
