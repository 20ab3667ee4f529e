"""What planners are asked and how they count."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..artifacts import Plan, Profile
from ..errors import PlanError
from ..specs import parse_scheme
from ..tables import LayerInfo, LayerTable, LayerTimes

MIN_INTEGER_SHARE = 0.75
"""Share of the work that planners leave integer x integer where the target does not say, if it can be met so."""
STORAGE_BYTES = 2
"""Floating tensors are stored in 16 bits."""


@dataclass(frozen=True, slots=True)
class Target:
    """A demand on the quantized denoiser, or several. text: as the user wrote it.

    min_sqnr_db: at its output; max_bytes: of its stored weights; max_ratio: of them to the fp32 weights; min_speedup:
    of a call over the float model's in its fastest dtype; min_integer_share: 0..1 of the multiply-accumulates.
    """

    text: str
    min_sqnr_db: float | None = None
    max_bytes: int | None = None
    max_ratio: float | None = None
    min_speedup: float | None = None
    min_integer_share: float | None = None

    def byte_limit(self, table: LayerTable) -> int | None:
        """The size demand in bytes for this model; None if there is none."""
        if self.max_ratio is not None:
            return int(self.max_ratio * fp32_bytes(table))
        return self.max_bytes


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NUMBER = r"(\d+(?:\.\d+)?)"
_DEMANDS = {
    "sqnr": re.compile(r"sqnr\s*>=\s*(-?\d+(?:\.\d+)?)\s*(?:db)?", re.IGNORECASE),
    "size": re.compile(rf"size\s*<=\s*{_NUMBER}\s*(x|[kmg]i?b)", re.IGNORECASE),
    "speed": re.compile(rf"speed\s*>=\s*{_NUMBER}\s*x", re.IGNORECASE),
    "int8": re.compile(rf"int8\s*>=\s*{_NUMBER}\s*%", re.IGNORECASE),
}
_EXAMPLES = "'sqnr>=25dB', 'size<=0.3x' (of fp32), 'size<=900MB', 'speed>=1.5x' (of the fastest float) or 'int8>=80%'"


def parse_target(text: str) -> Target:
    """Target of 'sqnr>=25dB', 'size<=0.3x' (of the fp32 weights), 'size<=900MB', 'speed>=1.5x' or 'int8>=80%' (of the
    multiply-accumulates), or of several with commas between. Raises PlanError for others."""
    if not isinstance(text, str):
        raise PlanError(f"target is {text!r}; write {_EXAMPLES}, in quotes")
    found: dict[str, float | int] = {}
    for part in text.split(","):
        demand = _demand(part.strip())
        if demand is None or demand.keys() & found.keys() or {"max_ratio", "max_bytes"} <= demand.keys() | found.keys():
            raise PlanError(f"cannot read the target {text!r}; write {_EXAMPLES}, each at most once, commas between")
        found |= demand
    return Target(text, **found)  # pyright: ignore[reportArgumentType]


def _demand(part: str) -> dict[str, float | int] | None:
    """The Target field of one demand; None if it cannot be read."""
    matches = {name: match for name, pattern in _DEMANDS.items() if (match := pattern.fullmatch(part))}
    if not matches:
        return None
    ((name, match),) = matches.items()
    value = float(match[1])
    if name == "sqnr":
        return {"min_sqnr_db": value}
    if name == "int8":
        return {"min_integer_share": value / 100} if value <= 100 else None
    if value <= 0:
        return None
    if name == "speed":
        return {"min_speedup": value}
    unit = match[2].upper()
    return {"max_ratio": value} if unit == "X" else {"max_bytes": int(value * _UNITS[unit])}


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a planner. scheme: the low-precision one; keep_float: layers that stay in floating point
    (None = the planner's defaults); target: None = the planner's own rule; times: needed where it asks for speed."""

    scheme: str = "w8a8"
    keep_float: frozenset[str] | None = None
    target: Target | None = None
    times: LayerTimes | None = None

    @property
    def text(self) -> str | None:
        """The target as the user wrote it."""
        return self.target.text if self.target else None

    def limit_ms(self) -> float | None:
        """Milliseconds that a call may take; None without a demand on speed. Raises PlanError without times."""
        if self.target is None or self.target.min_speedup is None:
            return None
        if self.times is None:
            raise PlanError(
                f"target {self.target.text!r} asks for speed, which needs times measured on this device; "
                "`ldmq quantize` and QuantizedLDMPipeline measure them, a plan from a profile alone cannot"
            )
        return self.times.fastest_ms / self.target.min_speedup

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
