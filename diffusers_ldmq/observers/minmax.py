"""Min-max: the codes cover exactly what was seen."""

import torch
from torch import Tensor

from ..affine import QParams, affine_qparams, symmetric_qparams
from ..errors import CalibrationError
from ..specs import QuantSpec
from .contract import Observer

ONE_SIDED = 2.0
"""A range whose longer side is this many times the shorter one gets a zero point (after SiLU, GELU)."""


class MinMaxObserver(Observer):
    """Symmetric: the highest code stands for the largest magnitude seen. The papers' baseline."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        if x.numel():
            low, high = (value.float().cpu() for value in torch.aminmax(x.detach()))
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)

    def merge(self, other: "MinMaxObserver") -> None:
        for seen in (other.low, other.high):
            if seen is not None:
                self.update(seen)

    def seen(self) -> tuple[Tensor, Tensor]:
        """(low, high): fp32 [] each. Raises CalibrationError if nothing was seen."""
        if self.low is None or self.high is None:
            raise CalibrationError("no data was observed; calibrate on at least one call that reaches the layer")
        return self.low, self.high

    def qparams(self, spec: QuantSpec) -> QParams:
        low, high = self.seen()
        return symmetric_qparams(torch.maximum(-low, high), spec)


class OneSidedMinMaxObserver(MinMaxObserver):
    """Min-max with a zero point where the range is one-sided, which buys such a tensor nearly a bit for nothing."""

    def qparams(self, spec: QuantSpec) -> QParams:
        low, high = self.seen()
        below, above = float(-low.clamp_max(0)), float(high.clamp_min(0))
        if max(below, above) >= ONE_SIDED * min(below, above):
            return affine_qparams(low, high, spec)
        return super().qparams(spec)
