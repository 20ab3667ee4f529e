"""Stage 3: from a profile and a target to the scheme of every layer, and one block higher when that was not enough."""

from collections.abc import Iterator
from dataclasses import replace

from .artifacts import LayerChoice, Plan, Profile
from .errors import PlanError
from .planners import PLANNERS, Request, Target, higher_precision, parse_target, plan_bytes
from .specs import parse_scheme
from .tables import LayerTable, LayerTimes

FORETOLD = ("predicted_curve_db", "bytes", "integer_share", "predicted_ms")
"""Reasons of a plan that no longer hold when it is raised."""
RAISED = ", raised"
"""Added to the planner's name where blocks were raised after measuring."""


def make_plan(
    profile: Profile | LayerTable,
    target: str | Target | None = None,
    *,
    planner: str = "hybrid",
    scheme: str = "w8a8",
    keep_float: str | tuple[str, ...] = "default",
    times: LayerTimes | None = None,
) -> Plan:
    """The plan of a named planner. profile: a LayerTable is enough for 'uniform'.

    keep_float: 'default' (the family's for 'hybrid', no layer for the others), 'none', or names of layers or blocks;
    times: what a target on speed is planned with.
    Raises PlanError if the target cannot be read or met, or a name is unknown.
    """
    table = profile if isinstance(profile, LayerTable) else profile.table
    parsed = parse_scheme(scheme)
    if parsed.is_float:
        raise PlanError("the low-precision scheme is 'float': nothing would be quantized; choose one such as w8a8")
    wanted = parse_target(target) if isinstance(target, str) else target
    request = Request(parsed.name, kept_layers(table, keep_float), wanted, times)
    return PLANNERS[planner](table, None if isinstance(profile, LayerTable) else profile, request)


def kept_layers(table: LayerTable, keep_float: str | tuple[str, ...]) -> frozenset[str] | None:
    """Layer names of a keep-float choice; None = the planner's own default.

    Raises PlanError for a name that is neither a layer nor the beginning of a layer's dotted name.
    """
    if keep_float == "default":
        return None
    if keep_float == "none":
        return frozenset()
    names = keep_float.split(",") if isinstance(keep_float, str) else keep_float
    found: set[str] = set()
    for name in (n.strip() for n in names):
        matching = {i.name for i in table.layers if i.name == name or i.name.startswith(f"{name}.")}
        if not matching:
            raise PlanError(f"keep-float names {name!r}, but {table.denoiser} has no such layer or block")
        found |= matching
    return frozenset(found)


def raise_plan(plan: Plan, profile: Profile) -> Plan | None:
    """The plan with one more block, counted from the output, in higher precision; None if that would leave nothing
    quantized.

    When every block is raised, weight-only layers become float, again block by block.
    """
    for block, choices in _steps(plan, profile):
        raised = _with(plan, choices, block)
        if raised.quantized():
            return raised
    return None


def _steps(plan: Plan, profile: Profile) -> Iterator[tuple[str, dict[str, LayerChoice]]]:
    """(block, choices) of every single raise that the plan allows, the next one first."""
    quantized, blocks = plan.quantized(), profile.table.blocks[::-1]
    for block in blocks:
        low = [n for n in block.layers if n in quantized and parse_scheme(quantized[n]).is_integer]
        if low:
            yield block.name, {n: _raised(profile, n) for n in low}
    for block in blocks:
        coarse = [n for n in block.layers if n in quantized]
        if coarse:
            yield block.name, {n: LayerChoice("float", "raised to meet the target") for n in coarse}


def _raised(profile: Profile, name: str) -> LayerChoice:
    choice = higher_precision(profile, name, "w8a8")
    return LayerChoice(choice.scheme, f"raised to meet the target; {choice.reason}")


def _with(plan: Plan, choices: dict[str, LayerChoice], block: str) -> Plan:
    raised = [*plan.reasons.get("raised_after_measuring", []), block]
    known = {key: value for key, value in plan.reasons.items() if key not in FORETOLD}
    reasons = {**known, "raised_after_measuring": raised}
    planner = plan.planner if plan.planner.endswith(RAISED) else plan.planner + RAISED
    layers = {**plan.layers, **choices}
    return replace(plan, planner=planner, layers=layers, reasons=reasons, predicted_sqnr_db=None)


def meets_size(plan: Plan, table: LayerTable, target: Target) -> bool:
    """True if the plan's stored bytes are within a size target (or the target is none)."""
    limit = target.byte_limit(table)
    return limit is None or plan_bytes(table, plan.quantized()) <= limit
