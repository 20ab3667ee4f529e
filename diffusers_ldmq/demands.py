"""Whether a plan or a measured model keeps a target's demands, and what is said when it does not."""

from .artifacts import Plan, Report
from .errors import PlanError
from .planners import Target, integer_share, plan_bytes
from .tables import LayerTable, LayerTimes


def short_db(target: Target | None, report: Report) -> float:
    """By how many dB an SQNR target is missed; 0 or less where it holds or there is none."""
    return 0.0 if target is None or target.min_sqnr_db is None else target.min_sqnr_db - report.sqnr_db


def keeps(target: Target | None, plan: Plan, table: LayerTable) -> bool:
    """Whether a plan keeps the demands on size and integer work. table: with the layers' work."""
    if target is None:
        return True
    limit, schemes = target.byte_limit(table), plan.quantized()
    small = limit is None or plan_bytes(table, schemes) <= limit
    return small and integer_share(table, schemes) >= (target.min_integer_share or 0.0)


def refuse_overrun(target: Target | None, table: LayerTable, report: Report) -> None:
    """Raise PlanError for a measured model that is too large, as corrections can make it, or has too little integer
    work, as a plan that was given can have."""
    if target is None:
        return
    limit = target.byte_limit(table)
    missed = []
    if limit is not None and report.bytes > limit:
        missed.append(f"{report.bytes / 1e6:.1f} MB ({report.bytes / report.fp32_bytes:.3f}x of fp32)")
    if target.min_integer_share is not None and report.int8_macs < target.min_integer_share - 1e-6:
        missed.append(f"{100 * report.int8_macs:.0f} % integer work")
    if missed:
        raise PlanError(
            f"target {target.text!r} is missed: {', '.join(missed)} measured; lower the target, or choose another "
            f"plan, --planner, --scheme or --corrections none"
        )


def too_slow(target: Target, report: Report, times: LayerTimes | None) -> str:
    """The message for a demand on speed that is given up."""
    told = f"target {target.text!r} is missed: {report.speedup or 0.0:.2f}x measured"
    if times is not None:
        gains = [min(ms.values()) - ms["float"] for ms in times.layers.values()]
        best = times.fastest_ms / max(times.step_ms + sum(gains), 1e-9)
        told += f"; with every layer in its fastest scheme {best:.2f}x is predicted"
    return f"{told}. Lower the target, or choose another --dtype, --scheme or --keep-float none"
