"""Who decides the scheme of every layer: one file, one rule. (LayerTable, Profile or None, Request) -> Plan."""

from ..registry import Registry
from .budget import budget, candidates
from .contract import Planner, Request, Target, fp32_bytes, integer_share, layer_bytes, parse_target, plan_bytes
from .hybrid import higher_precision, hybrid
from .low_precision import low_precision
from .prediction import Prediction, predict
from .uniform import uniform

PLANNERS: Registry[Planner] = Registry("planner")
PLANNERS.add("budget", budget)
PLANNERS.add("hybrid", hybrid)
PLANNERS.add("uniform", uniform)

__all__ = [
    "PLANNERS",
    "Planner",
    "Prediction",
    "Request",
    "Target",
    "candidates",
    "fp32_bytes",
    "higher_precision",
    "hybrid",
    "integer_share",
    "layer_bytes",
    "low_precision",
    "parse_target",
    "plan_bytes",
    "predict",
    "uniform",
]
