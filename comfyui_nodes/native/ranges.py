"""Input ranges of a MODEL's layers: what LDM-Q Calibrate finds and LDM-Q Quantize uses."""

from dataclasses import dataclass


@dataclass(frozen=True)
class InputRanges:
    """ranges: layer name -> (scale, zero point) of its input's codes, signed domain; fingerprint: of the model's
    layers; selection, observer: how they were found; samples: rows of denoiser calls that were seen."""

    fingerprint: str
    ranges: dict[str, tuple[float, int]]
    selection: str
    observer: str
    samples: int
