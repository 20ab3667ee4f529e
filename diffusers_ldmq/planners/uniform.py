"""Every Linear and Conv2d in one scheme: the papers' baseline. Needs no profile."""

from ..artifacts import LayerChoice, Plan, Profile
from ..errors import TargetError
from ..tables import LayerTable
from .contract import Request, fp32_bytes, plan_bytes


def uniform(table: LayerTable, profile: Profile | None, request: Request) -> Plan:
    """`request.scheme` for every layer but those the user keeps float (default: none).

    Raises PlanError if a size target is below what the scheme gives. An SQNR target is checked by measuring.
    """
    kept = request.kept(table) if request.keep_float is not None else frozenset()
    layers = {
        info.name: LayerChoice("float", "kept float by request")
        if info.name in kept
        else LayerChoice(request.scheme, "uniform")
        for info in table.layers
    }
    plan = Plan(table.denoiser, table.fingerprint, "uniform", layers, request.target.text if request.target else None)
    limit = request.target.byte_limit(table) if request.target else None
    size = plan_bytes(table, plan.quantized())
    if limit is not None and size > limit:
        raise TargetError(
            f"target {plan.target!r} cannot be met: uniform {request.scheme} takes {size / 1e6:.1f} MB "
            f"({size / fp32_bytes(table):.3f}x of fp32); choose a smaller scheme such as w4a8 or a larger target"
        )
    return plan
