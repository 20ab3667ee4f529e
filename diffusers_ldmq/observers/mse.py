"""Least squares: the clipping range whose round trip through codes has the least squared error on what was seen."""

import math

import torch
from torch import Tensor

from ..affine import QParams, affine_qparams, qdq, symmetric_qparams
from ..errors import CalibrationError
from ..specs import QuantSpec
from .contract import Observer
from .minmax import ONE_SIDED

BINS = 4096
FRACTIONS = 60


class MSEObserver(Observer):
    """Histogram over [-2^e, 2^e], exact under merging: when the range doubles, pairs of bins become one."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.exponent: int | None = None
        self.low, self.high = math.inf, -math.inf

    def update(self, x: Tensor) -> None:
        if not x.numel():
            return
        x = x.detach().float().cpu()
        low, high = (float(v) for v in torch.aminmax(x))
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not math.isfinite(low) or not math.isfinite(high):
            self.low = math.nan
            return
        self._grow(math.frexp(max(abs(low), abs(high)))[1])
        assert self.exponent is not None
        limit = 2.0**self.exponent
        self.counts += torch.histc(x, bins=BINS, min=-limit, max=limit).double()

    def _grow(self, exponent: int) -> None:
        """Widen the histogram so that it covers [-2^exponent, 2^exponent]."""
        exponent = max(exponent, -120)  # fp32 has no room for finer bins
        if self.exponent is None:
            self.exponent = exponent
        while self.exponent < exponent:
            halves = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(halves, (BINS // 4, BINS // 4))
            self.exponent += 1

    def merge(self, other: "MSEObserver") -> None:
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        if math.isnan(other.low):
            self.low = math.nan
        if other.exponent is None:
            return
        if self.exponent is None:
            self.exponent = other.exponent
        self._grow(other.exponent)
        other._grow(self.exponent)
        self.counts += other.counts

    def qparams(self, spec: QuantSpec) -> QParams:
        if self.exponent is None or not math.isfinite(self.low):
            seen = "nothing" if self.exponent is None and not math.isnan(self.low) else "NaN or Inf"
            raise CalibrationError(f"{seen} was observed; calibration needs finite values that reach the layer")
        limit = 2.0**self.exponent
        centres = (torch.arange(BINS, dtype=torch.float32) + 0.5) * (2 * limit / BINS) - limit
        keep = self.counts > 0
        centres, counts = centres[keep], self.counts[keep]
        candidates = self._candidates(spec)
        errors = torch.stack([((qdq(centres, q, spec) - centres).double().square() * counts).sum() for q in candidates])
        return candidates[int(errors.argmin())]

    def _candidates(self, spec: QuantSpec) -> list[QParams]:
        """QParams of shrinking ranges, the full range first."""
        fractions = [1 - i / (FRACTIONS + 4) for i in range(FRACTIONS)]
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if max(-low, high) >= ONE_SIDED * min(-low, high):
            return [affine_qparams(torch.tensor(low * f), torch.tensor(high * f), spec) for f in fractions]
        return [symmetric_qparams(torch.tensor(max(-low, high) * f), spec) for f in fractions]
