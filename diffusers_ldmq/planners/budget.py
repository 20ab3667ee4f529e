"""The budget planner: an integer programme over layers x schemes.

Beyond the first paper's suffix rule: the objective is the noise power at the denoiser's output, which is a sum of the
layers' own effects (prediction.py), and bytes, measured milliseconds and the share of integer work are constraints; or
the reverse, the smallest model that reaches an SQNR. MixDQ (ECCV 2024) solves a like programme over a sum of decibels;
powers add, decibels do not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_array

from ..artifacts import LayerChoice, Plan, Profile
from ..errors import PlanError, TargetError
from ..specs import parse_scheme
from ..tables import LayerTable
from .contract import MIN_INTEGER_SHARE, Request, Target, fp32_bytes, integer_share, layer_bytes, plan_bytes
from .prediction import Prediction, predict
from .solver import least

MOST_BYTES = 1.08
"""Without a target: bytes a plan may take, of what every layer in the low-precision scheme would."""
FLOAT_PENALTY = 0.1
"""In the smallest model for an SQNR, work that is not integer weighs like this share of the fp32 bytes."""
MARGIN_DB = 0.2
"""What the smallest model for an SQNR must be predicted to spare."""


@dataclass(frozen=True, slots=True, eq=False)
class _Options:
    """One column per (group of layers, scheme). noise: noise-to-signal power; size: bytes; macs: integer ones;
    ms: None without times. Layers that share an input are one group."""

    groups: tuple[tuple[str, ...], ...]
    of_group: NDArray[np.int64]
    schemes: tuple[str, ...]
    noise: NDArray[np.float64]
    size: NDArray[np.float64]
    macs: NDArray[np.float64]
    ms: NDArray[np.float64] | None


@dataclass(frozen=True, slots=True)
class _Limits:
    """Constraints of a programme; None = none. size, ms (beyond the float layers'): at most; share, sqnr_db: least."""

    size: float | None = None
    ms: float | None = None
    share: float | None = None
    sqnr_db: float | None = None


def budget(table: LayerTable, profile: Profile | None, request: Request) -> Plan:
    """The least noise at the denoiser's output within the target's bytes, milliseconds and integer work; with an SQNR
    target, the smallest model that reaches it. Without a target: at most 1.08x the bytes of the low-precision scheme
    everywhere. At least 75 % of the work stays integer where that is possible and the target does not say.

    Every layer is free, also those that other planners keep float, unless request.keep_float names some.
    Raises PlanError without a profile with own effects, or saying what would be reachable if the target is not.
    """
    if profile is None:
        raise PlanError("the budget planner needs a profile; run `ldmq profile` first or choose --planner uniform")
    prediction, kept = predict(profile), request.keep_float or frozenset()
    request.kept(table)
    if kept >= {info.name for info in table.layers}:
        raise PlanError("keep-float names every layer, so there is nothing to quantize; leave some out")
    options = _options(table, profile, request, prediction, kept)
    limits = _limits(table, request)
    picked = None
    for attempt in (limits, replace(limits, share=request.target.min_integer_share if request.target else None)):
        picked = _solve(table, options, attempt)
        if picked is not None:
            break
    if picked is None:
        raise TargetError(_out_of_reach(table, options, limits, request))
    schemes = {n: options.schemes[c] for c in picked for n in options.groups[options.of_group[c]]}
    return _plan(table, request, prediction, schemes, kept)


def _plan(
    table: LayerTable, request: Request, prediction: Prediction, schemes: dict[str, str], kept: frozenset[str]
) -> Plan:
    quantized = {name: scheme for name, scheme in schemes.items() if scheme != "float"}
    if not quantized:
        raise PlanError(
            f"target {request.text!r} leaves every layer in floating point, so there is nothing to quantize; lower it"
        )
    whole = prediction.nsr(quantized)
    layers = {}
    for info in table.layers:
        scheme = schemes.get(info.name, "float")
        why = "kept float by request" if info.name in kept else "worth its bytes in float"
        if scheme != "float":
            share = prediction.total[info.name][scheme] / whole if whole > 0 else 0.0
            why = f"causes {100 * share:.2f} % of the noise at the output"
        layers[info.name] = LayerChoice(scheme, why)
    return Plan(
        denoiser=table.denoiser,
        fingerprint=table.fingerprint,
        planner="budget",
        layers=layers,
        target=request.text,
        reasons={
            "bytes": plan_bytes(table, quantized),
            "integer_share": integer_share(table, quantized),
            "predicted_ms": request.times.predicted_ms(quantized) if request.times else None,
            "predicted_curve_db": prediction.curve_db(quantized),
        },
        predicted_sqnr_db=prediction.sqnr_db(quantized),
    )


def candidates(scheme: str) -> tuple[str, ...]:
    """Schemes that a plan for `scheme` may mix: itself, its dynamic twin, 8-bit ones above it, float."""
    parsed = parse_scheme(scheme)
    found = [scheme]
    if parsed.is_static:
        found.append(f"{scheme}-dyn")
    if parsed.weight is not None and parsed.weight.bits < 8 and parsed.is_integer:
        found += ["w8a8", "w8a8-dyn"]
    return tuple(dict.fromkeys((*found, "w8a16", "float")))


def _options(
    table: LayerTable, profile: Profile, request: Request, prediction: Prediction, kept: frozenset[str]
) -> _Options:
    measured = set.intersection(*(set(schemes) for schemes in prediction.total.values())) | {"float"}
    if request.scheme not in measured:
        raise PlanError(f"the profile has not measured {request.scheme}; profile again with --scheme {request.scheme}")
    schemes = [scheme for scheme in candidates(request.scheme) if scheme in measured]
    infos = {info.name: info for info in table.layers}
    grouped = {name for group in profile.shared for name in group}
    groups = [tuple(n for n in group if n not in kept) for group in profile.shared]
    groups += [(name,) for name in infos if name not in grouped and name not in kept]
    columns = [(index, scheme) for index, group in enumerate(groups) if group for scheme in schemes]
    noise, size, macs, ms = [], [], [], []
    for index, scheme in columns:
        members = groups[index]
        is_float = scheme == "float"
        noise.append(0.0 if is_float else sum(prediction.total[name][scheme] for name in members))
        size.append(sum(layer_bytes(infos[name], scheme) for name in members))
        macs.append(sum(infos[name].macs for name in members) if parse_scheme(scheme).is_integer else 0)
        ms.append(sum(_extra_ms(request, name, scheme) for name in members))
    arrays = [np.array(values, dtype=np.float64) for values in (noise, size, macs, ms)]
    of_group = np.array([index for index, _ in columns], dtype=np.int64)
    names = tuple(scheme for _, scheme in columns)
    return _Options(tuple(groups), of_group, names, *arrays[:3], ms=arrays[3] if request.times else None)


def _extra_ms(request: Request, name: str, scheme: str) -> float:
    times = request.times.layers[name] if request.times else {}
    return times.get(scheme, math.inf) - times["float"] if times else 0.0


def _limits(table: LayerTable, request: Request) -> _Limits:
    target = request.target or Target("")
    everywhere = {info.name: request.scheme for info in table.layers if info.name not in (request.keep_float or ())}
    share = target.min_integer_share
    if share is None and parse_scheme(request.scheme).is_integer:
        share = MIN_INTEGER_SHARE * integer_share(table, everywhere)
    size: float | None = target.byte_limit(table)
    limit = request.limit_ms()
    limit = limit - request.times.step_ms if limit is not None and request.times else None
    if target.min_sqnr_db is None and size is None and limit is None:
        size = MOST_BYTES * plan_bytes(table, everywhere)
    return _Limits(size, limit, share, target.min_sqnr_db)


def _solve(table: LayerTable, options: _Options, limits: _Limits) -> list[int] | None:
    """Columns that are chosen, one per group; None if nothing fulfils the constraints."""
    usable = np.isfinite(options.ms) if options.ms is not None else np.ones(len(options.schemes), dtype=bool)
    all_macs = max(sum(info.macs for info in table.layers), 1)
    quantized = sum(options.size)  # any number of the right order: only the solver's scaling depends on it
    objective, rows = options.noise / max(options.noise.max(), 1e-300), []
    chosen = csr_array((np.ones(len(usable)), (options.of_group, np.arange(len(usable)))))
    present = np.unique(options.of_group)
    rows.append(LinearConstraint(chosen[present], 1, 1))  # pyright: ignore[reportArgumentType]
    fixed = plan_bytes(table, {}) - sum(
        layer_bytes(info, "float") for info in table.layers if info.name in {n for g in options.groups for n in g}
    )
    if limits.size is not None:
        rows.append(LinearConstraint(options.size / quantized, -np.inf, (limits.size - fixed) / quantized))
    if limits.share is not None:
        rows.append(LinearConstraint(options.macs / all_macs, limits.share, np.inf))
    if limits.ms is not None and options.ms is not None:
        finite = np.where(usable, options.ms, 0.0)
        rows.append(LinearConstraint(finite, -np.inf, limits.ms))
    if limits.sqnr_db is not None:
        most = 10 ** (-(limits.sqnr_db + MARGIN_DB) / 10)
        rows.append(LinearConstraint(options.noise / most, -np.inf, 1.0))
        work = FLOAT_PENALTY * fp32_bytes(table) * (options.macs / all_macs)
        objective = (options.size - work) / fp32_bytes(table)
    picked = least(objective, usable, rows)
    return None if picked is None else [int(index) for index in picked]


def _out_of_reach(table: LayerTable, options: _Options, limits: _Limits, request: Request) -> str:
    """The message for a target that nothing fulfils: what each demand alone could get."""
    told = []
    best = lambda values: sum(_best(options, values))  # noqa: E731
    float_size = plan_bytes(table, {})
    if limits.size is not None:
        grouped = {n for group in options.groups for n in group}
        fixed = float_size - sum(layer_bytes(i, "float") for i in table.layers if i.name in grouped)
        smallest = best(options.size) + fixed
        ratio = smallest / fp32_bytes(table)
        told.append(f"the smallest {request.scheme} plan takes {smallest / 1e6:.1f} MB ({ratio:.3f}x of fp32)")
    if limits.ms is not None and options.ms is not None and request.times is not None:
        fastest = request.times.step_ms + best(options.ms)
        told.append(f"the fastest is predicted at {request.times.fastest_ms / fastest:.2f}x of the fastest float")
    if limits.sqnr_db is not None:
        alone = replace(limits, sqnr_db=None, share=request.target.min_integer_share if request.target else None)
        picked = _solve(table, options, alone)
        if picked is not None:
            nsr = sum(options.noise[picked])
            told.append(
                "within the other demands " + (f"{-10 * math.log10(nsr):.1f} dB" if nsr else "float") + " is best"
            )
    if request.target is not None and request.target.min_integer_share is not None:
        share = -best(-options.macs) / max(sum(info.macs for info in table.layers), 1)
        told.append(f"at most {100 * share:.0f} % of the work can be integer")
    return (
        f"target {request.text!r} cannot be met: {', '.join(told)}; choose another target or another scheme (w4a8 is "
        f"smaller, w8a16 is more exact)"
    )


def _best(options: _Options, values: NDArray[np.float64]) -> Sequence[float]:
    """The least value of each group."""
    return [float(values[options.of_group == index].min()) for index in np.unique(options.of_group)]
