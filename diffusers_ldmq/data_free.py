"""Quantizing while loading, without data: what a `quantization_config` may ask for, and the scheme of each layer."""

import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .artifacts import Plan
from .calibration import check_plan
from .errors import PlanError
from .families import FAMILIES, QUANTIZABLE, quantizable_layers
from .serialization import read_json
from .specs import SCHEMES, parse_scheme

PlanLike = str | os.PathLike[str] | Plan | dict[str, Any]

OTHERS_KEEP_FLOAT = (
    r"(^|\.)(conv_in|conv_out|quant_conv|post_quant_conv|lm_head|text_projection|visual_projection|time_emb_proj)$"
    r"|\.norm\w*\.(linear|emb\.)|^(\w*embed\w*|time_proj|adaln\w*|caption_projection|\w+_in|proj_out|norm_out|head)(\.|$)"
)
"""What stays float in models that are no denoisers we know (autoencoders, ControlNets, text encoders, the newest
transformers): their ends and what embeds time and conditions."""


def plan_data(plan: PlanLike | None) -> Any:
    """A plan as plain JSON data that names no path: a scheme's name, {layer, block or pattern: scheme}, or a whole
    plan.json. None stays None.

    plan: one of these, a Plan, or the path of a file with such an object. Raises PlanError or LDMQError for what is
    none, and for schemes that need calibration.
    """
    if plan is None:
        return None
    if isinstance(plan, os.PathLike) or (isinstance(plan, str) and (plan.endswith(".json") or os.sep in plan)):
        plan = read_json(plan, PlanError)
    if isinstance(plan, Plan):
        plan = plan.to_dict()
    if isinstance(plan, str):
        _refuse_calibrated({plan: plan})
        return plan
    if not isinstance(plan, dict):
        raise PlanError(
            f"quantization_config: plan is a {type(plan).__name__}; expected a scheme's name, a Plan, the path of a "
            f"plan.json, or a dict of layer: scheme"
        )
    if "format_version" in plan or "fingerprint" in plan:
        _refuse_calibrated(Plan.from_dict(plan).quantized())
        return plan
    for name, scheme in plan.items():
        if not isinstance(scheme, str) or not isinstance(name, str):
            raise PlanError(f"quantization_config, plan, {name!r}: the scheme is {scheme!r}, expected e.g. w8a16")
    if not plan:
        raise PlanError("quantization_config: the plan is empty, so nothing would be quantized; name a scheme")
    _refuse_calibrated(plan)
    return dict(plan)


def schemes_of(
    data: Any, model: nn.Module, keep: Sequence[str] = (), kinds: tuple[type[nn.Module], ...] = QUANTIZABLE
) -> dict[str, str]:
    """Layer name -> scheme for a float model. data: of `plan_data`; keep: names of layers or blocks, or patterns, that
    stay float in any case; kinds: classes of layers that can be quantized in this model.

    Raises PlanError for a name that fits no layer of the model, another model's plan, or if nothing would be quantized.
    """
    modules = dict(model.named_modules())
    layers = [name for name, layer in quantizable_layers(model).items() if isinstance(layer, kinds)]
    if isinstance(data, str):
        chosen = {name: data for name in layers if not re.search(_kept_by_default(model), name)}
    elif "format_version" in data:
        plan = Plan.from_dict(data)
        check_plan(plan, model)
        chosen = plan.quantized()
    else:
        chosen = {}
        for pattern, scheme in data.items():
            found = _matching(pattern, layers)
            if not found:
                raise PlanError(_no_match(pattern, model, "plan", kinds))
            chosen |= dict.fromkeys(found, scheme)
    for pattern in keep:
        if not _matching(pattern, layers) and pattern not in modules:  # a norm, say, is not converted anyway
            raise PlanError(_no_match(pattern, model, "modules_to_not_convert", kinds))
        chosen = {name: scheme for name, scheme in chosen.items() if name not in _matching(pattern, layers)}
    chosen = {name: scheme for name, scheme in chosen.items() if not parse_scheme(scheme).is_float}
    if not chosen:
        raise PlanError(f"quantization_config: no layer of {type(model).__name__} is left to quantize")
    return chosen


def _refuse_calibrated(schemes: dict[str, str]) -> None:
    for name, scheme in schemes.items():
        if parse_scheme(scheme).is_static:
            free = [known for known in SCHEMES if known != "float" and not parse_scheme(known).is_static]
            where = "" if name == scheme else f", layer {name!r}"
            raise PlanError(
                f"quantization_config{where}: scheme {scheme} has calibrated activations, and from_pretrained has no "
                f"data to calibrate them; use QuantizedLDMPipeline.from_pretrained or `ldmq quantize`, or one of "
                f"{', '.join(free)}"
            )


def _kept_by_default(model: nn.Module) -> str:
    for _, family in FAMILIES.items():
        if family.matches(model):
            return family.keep_float
    return OTHERS_KEEP_FLOAT


def _matching(pattern: str, layers: Iterable[str]) -> list[str]:
    """Layers called so, wherever they are, or inside of what is called so, or that a shell-like pattern matches."""
    return [name for name in layers if f".{pattern}." in f".{name}." or fnmatchcase(name, pattern)]


def _no_match(pattern: str, model: nn.Module, key: str, kinds: tuple[type[nn.Module], ...]) -> str:
    reason, modules = "has no such layer or block", dict(model.named_modules())
    if pattern in modules:
        names = " and ".join(kind.__name__ for kind in kinds)
        reason = f"has a {type(modules[pattern]).__name__} there; only {names} layers are quantized"
    return f"quantization_config, {key}: {pattern!r} fits nothing, {type(model).__name__} {reason}"
