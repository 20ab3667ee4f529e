"""The exception to single-step calibration: where the range of the first step serves later steps badly."""

import math

from ..artifacts import LayerChoice, LayerNoise
from ..specs import parse_scheme

DYNAMIC_GAIN_DB = 3.0
"""A layer takes its range from each call where that raises its relative SQNR by this much."""


def low_precision(noise: LayerNoise, scheme: str) -> LayerChoice:
    """`scheme`, or its dynamic twin where the calibrated static range loses DYNAMIC_GAIN_DB or more."""
    dynamic = f"{scheme}-dyn"
    if parse_scheme(scheme).is_static and {scheme, dynamic} <= set(noise.noise):
        static_db, dynamic_db = noise.power(scheme).sqnr_db, noise.power(dynamic).sqnr_db
        if math.isfinite(static_db) and dynamic_db >= static_db + DYNAMIC_GAIN_DB:
            why = f"static range fits later steps badly: {static_db:.1f} dB, {dynamic_db:.1f} dB with dynamic ranges"
            return LayerChoice(dynamic, why)
    return LayerChoice(scheme, "before the cut-off")
