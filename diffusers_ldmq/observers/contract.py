"""The contract of an observer: it sees tensors and gives the scale and zero point that quantize their like."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from ..affine import QParams
from ..specs import QuantSpec


class Observer(ABC):
    """Range of one tensor over many calls. Memory does not grow with the number of calls."""

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Take note of x: any shape, any floating dtype. NaN and Inf are remembered and refused by qparams."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Take note of everything that `other`, of the same class, has seen."""

    @abstractmethod
    def qparams(self, spec: QuantSpec) -> QParams:
        """scale fp32 [] and zero_point int32 [] for per-tensor codes of `spec`.

        Raises CalibrationError if nothing or something that is not finite was seen.
        """
