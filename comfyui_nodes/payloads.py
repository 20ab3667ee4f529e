"""What travels through this pack's sockets: plain JSON data with a "format" key, which ComfyUI can size and cache."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from diffusers_ldmq.artifacts import Plan, Profile

    from .native.ranges import InputRanges

PROFILE, PLAN, CALIBRATION = "ldmq_profile_1", "ldmq_plan_1", "ldmq_calibration_1"
SELECTIONS = ("first-step", "normal", "tdac", "uniform")
"""Which sampling steps a calibration looks at, as the library's registry has them, which is too heavy to be imported
before a node runs; the first one where a plan does not say."""
RECONSTRUCTIONS = ("none", "quick", "full")
"""How rounding is learned: not at all, or the library's presets."""
SELECTION = "calibration"
"""Among a plan's reasons."""
MADE_BY = {PROFILE: "LDM-Q Profile", PLAN: "LDM-Q Plan", CALIBRATION: "LDM-Q Calibrate"}


def from_profile(profile: "Profile") -> dict[str, Any]:
    """The profile for a PROFILE socket."""
    from diffusers_ldmq.serialization import to_json

    return {"format": PROFILE, "profile": to_json(profile)}


def to_profile(payload: Any) -> "Profile":
    """The profile that came through a PROFILE socket. Raises PlanError if it is none."""
    from diffusers_ldmq.artifacts import Profile
    from diffusers_ldmq.errors import PlanError
    from diffusers_ldmq.serialization import from_json

    return from_json(Profile, _content(payload, PROFILE).get("profile"), PlanError, "profile")


def from_plan(plan: "Plan") -> dict[str, Any]:
    """The plan for a PLAN socket."""
    return {"format": PLAN, "plan": plan.to_dict()}


def to_plan(payload: Any) -> "Plan":
    """The plan that came through a PLAN socket. Raises PlanError if it is none."""
    from diffusers_ldmq.artifacts import Plan

    return Plan.from_dict(_content(payload, PLAN).get("plan"))


def with_selection(plan: "Plan", selection: str) -> "Plan":
    """The plan that tells LDM-Q Calibrate which sampling steps to look at."""
    return replace(plan, reasons={**plan.reasons, SELECTION: selection})


def selection_of(plan: "Plan") -> str:
    """Which sampling steps a plan's calibration looks at. Raises PlanError for none that there is."""
    selection = plan.reasons.get(SELECTION, SELECTIONS[0])
    if selection not in SELECTIONS:
        _refuse(
            f"the plan asks for the calibration {selection!r} and there are {', '.join(SELECTIONS)}; choose one in "
            "LDM-Q Calibrate's selection"
        )
    return selection


def from_ranges(ranges: "InputRanges") -> dict[str, Any]:
    """Calibrated input ranges for a CALIBRATION socket."""
    return {
        "format": CALIBRATION,
        "fingerprint": ranges.fingerprint,
        "ranges": {name: [scale, zero_point] for name, (scale, zero_point) in ranges.ranges.items()},
        "selection": ranges.selection,
        "observer": ranges.observer,
        "samples": ranges.samples,
    }


def to_ranges(payload: Any) -> "InputRanges":
    """Calibrated input ranges that came through a CALIBRATION socket. Raises PlanError if they are none."""
    from .native.ranges import InputRanges

    content = _content(payload, CALIBRATION)
    try:
        return InputRanges(
            fingerprint=str(content["fingerprint"]),
            ranges={str(name): _range(pair) for name, pair in content["ranges"].items()},
            selection=str(content["selection"]),
            observer=str(content["observer"]),
            samples=int(content["samples"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as cause:
        _refuse(f"a calibration is damaged ({type(cause).__name__}: {cause}); make it again with LDM-Q Calibrate")


def _range(pair: Any) -> tuple[float, int]:
    scale, zero_point = float(pair[0]), int(pair[1])
    if not (math.isfinite(scale) and scale > 0 and -128 <= zero_point <= 127):
        raise ValueError(f"scale {scale} with zero point {zero_point}")
    return scale, zero_point


def _content(payload: Any, kind: str) -> Mapping[str, Any]:
    found = payload.get("format") if isinstance(payload, Mapping) else None
    if found != kind:
        told = repr(found) if found is not None else f"a {type(payload).__name__}"
        _refuse(f"expected {kind!r} and found {told}; connect the output of {MADE_BY[kind]}, of this version of LDM-Q")
    return payload


def _refuse(message: str) -> NoReturn:
    from diffusers_ldmq.errors import PlanError

    raise PlanError(message)
