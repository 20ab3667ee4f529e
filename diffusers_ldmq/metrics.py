"""How far two tensors or images are apart: SQNR (powers add, decibels do not), PSNR, SSIM."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def sqnr_db(signal: float, noise: float) -> float:
    """10 * log10(signal / noise) in dB, of two powers (sums of squares). +inf without noise, -inf without signal."""
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def told_db(db: float | None) -> str:
    """Decibels for people: '37.5 dB', 'exact' without noise, 'no signal', 'not measured' for None and NaN."""
    if db is None or math.isnan(db):
        return "not measured"
    if math.isinf(db):
        return "exact" if db > 0 else "no signal"
    return f"{db:.1f} dB"


@dataclass(frozen=True, slots=True)
class Power:
    """Running signal and noise power of one place in the network; adding two gives that of both samples together."""

    signal: float = 0.0
    noise: float = 0.0

    @staticmethod
    def between(reference: Tensor, measured: Tensor) -> "Power":
        """Sum |reference|^2 and sum |measured - reference|^2 over all elements, accumulated in fp64."""
        reference = reference.detach().float()
        noise = measured.detach().float() - reference
        return Power(energy(reference), energy(noise))

    def __add__(self, other: "Power") -> "Power":
        return Power(self.signal + other.signal, self.noise + other.noise)

    @property
    def nsr(self) -> float:
        """Noise power over signal power (linear); 0 = exact."""
        return self.noise / self.signal if self.signal > 0 else (math.inf if self.noise > 0 else 0.0)

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio in dB."""
        return sqnr_db(self.signal, self.noise)


def energy(x: Tensor) -> float:
    """Sum of squares of all elements, in fp64 across rows."""
    # fp32 partial sums of one row each, fp64 across rows: as exact as fp64 throughout at a fraction of the cost
    rows = x.reshape(x.shape[0], -1) if x.dim() > 1 else x.reshape(1, -1)
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def total(powers: Sequence[Power]) -> Power:
    """Sum of powers over samples or timesteps."""
    return sum(powers, Power())


def sqnr(reference: Tensor, measured: Tensor) -> float:
    """SQNR of `measured` against `reference` in dB; any shape, any floating dtype."""
    return Power.between(reference, measured).sqnr_db


def image_tensor(image: Image.Image) -> Tensor:
    """A picture as fp32 [3, h, w] in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def psnr_db(reference: Image.Image, measured: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size in dB (peak = 1); inf where they are equal."""
    error = float((image_tensor(reference) - image_tensor(measured)).double().square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(reference: Image.Image, measured: Image.Image) -> float:
    """Structural similarity (Wang 2004, Gaussian window) of two pictures of one size; 1 = equal."""
    # torchmetrics takes a second to import and only pictures need it
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(
        image_tensor(measured)[None], image_tensor(reference)[None], data_range=1.0
    )
    assert isinstance(value, Tensor)
    return float(value)
