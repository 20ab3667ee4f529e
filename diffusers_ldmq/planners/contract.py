"""What planners are asked and how they count."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..artifacts import LayerInfo, LayerTable, Plan, Profile
from ..errors import PlanError
from ..specs import parse_scheme

STORAGE_BYTES = 2
"""Floating tensors are stored in 16 bits."""


@dataclass(frozen=True, slots=True)
class Target:
    """A demand on the quantized denoiser. text: as the user wrote it.

    min_sqnr_db: at its output; max_bytes: of its stored weights; max_ratio: of them to the fp32 weights.
    """

    text: str
    min_sqnr_db: float | None = None
    max_bytes: int | None = None
    max_ratio: float | None = None

    def byte_limit(self, table: LayerTable) -> int | None:
        """The size demand in bytes for this model; None if the target is none."""
        if self.max_ratio is not None:
            return int(self.max_ratio * fp32_bytes(table))
        return self.max_bytes


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SQNR = re.compile(r"sqnr\s*>=\s*(-?\d+(?:\.\d+)?)\s*(?:db)?", re.IGNORECASE)
_SIZE = re.compile(r"size\s*<=\s*(\d+(?:\.\d+)?)\s*(x|[kmg]i?b)", re.IGNORECASE)


def parse_target(text: str) -> Target:
    """Target of 'sqnr>=25dB', 'size<=0.3x' (of the fp32 weights) or 'size<=900MB'. Raises PlanError for others."""
    if match := _SQNR.fullmatch(text.strip()):
        return Target(text, min_sqnr_db=float(match[1]))
    if (match := _SIZE.fullmatch(text.strip())) and float(match[1]) > 0:
        value, unit = float(match[1]), match[2].upper()
        return Target(text, max_ratio=value) if unit == "X" else Target(text, max_bytes=int(value * _UNITS[unit]))
    raise PlanError(f"cannot read the target {text!r}; write 'sqnr>=25dB', 'size<=0.3x' (of fp32) or 'size<=900MB'")


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a planner. scheme: the low-precision one; keep_float: layers that stay in floating point
    (None = the family's defaults); target: None = the planner's own rule."""

    scheme: str = "w8a8"
    keep_float: frozenset[str] | None = None
    target: Target | None = None

    def kept(self, table: LayerTable) -> frozenset[str]:
        """Names of the layers that stay float. Raises PlanError for a name the model lacks."""
        if self.keep_float is None:
            return frozenset(info.name for info in table.layers if info.keep_float)
        unknown = sorted(self.keep_float - {info.name for info in table.layers})
        if unknown:
            raise PlanError(f"keep-float names {unknown[0]!r}, which {table.denoiser} lacks; see `ldmq info`")
        return self.keep_float


Planner = Callable[[LayerTable, Profile | None, Request], Plan]


def layer_bytes(info: LayerInfo, scheme: str) -> int:
    """Stored bytes of one layer: codes, fp32 scales, static range, 16-bit bias."""
    parsed, outputs = parse_scheme(scheme), info.shape[0]
    bias = STORAGE_BYTES * outputs * info.bias
    if parsed.weight is None:
        return STORAGE_BYTES * info.parameters + bias
    columns = info.parameters // outputs
    groups = math.ceil(columns / parsed.weight.group_size) if parsed.weight.group_size else 1
    codes = outputs * math.ceil(columns * parsed.weight.bits / 8)
    return codes + 4 * outputs * groups + bias + 8 * parsed.is_static


def plan_bytes(table: LayerTable, schemes: Mapping[str, str]) -> int:
    """Stored bytes of the denoiser's weights under a plan (layers not named are float)."""
    layers = sum(layer_bytes(info, schemes.get(info.name, "float")) for info in table.layers)
    return layers + STORAGE_BYTES * table.other_parameters


def fp32_bytes(table: LayerTable) -> int:
    """Bytes of all the denoiser's parameters at fp32."""
    layers = sum(info.parameters + info.shape[0] * info.bias for info in table.layers)
    return 4 * (layers + table.other_parameters)


def integer_share(table: LayerTable, schemes: Mapping[str, str]) -> float:
    """Share (0..1) of the Linear and Conv2d multiply-accumulates that are integer x integer under a plan."""
    integer = sum(i.macs for i in table.layers if parse_scheme(schemes.get(i.name, "float")).is_integer)
    return integer / max(sum(i.macs for i in table.layers), 1)
