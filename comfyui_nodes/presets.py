"""Three plans in words: what LDM-Q Plan offers."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers_ldmq.artifacts import Plan, Profile


@dataclass(frozen=True, slots=True)
class Preset:
    """What one word asks the budget planner for. target: None = the planner's own rule; explanation: for tooltips."""

    scheme: str
    target: str | None
    explanation: str


PRESETS = {
    "Safe": Preset(
        "w8a16",
        "size<=0.3x",
        "Safe: 8-bit weights, all arithmetic in floating point. About 0.6x of an fp16 model; pictures as good as the "
        "same. Needs no LDM-Q Calibrate. Saves memory, not time.",
    ),
    "Balanced": Preset(
        "w8a8",
        None,
        "Balanced: at least three quarters of the arithmetic in 8-bit integers where the model bears it. About 0.54x "
        "of an fp16 model and the fastest; small details may differ.",
    ),
    "Smallest": Preset(
        "w4a8",
        "size<=0.2x",
        "Smallest: 4-bit weights where they do least harm, 8 bits elsewhere. 0.4x of an fp16 model as a file; details "
        "differ. On a CPU 4-bit layers run as fast as 8-bit ones, and take their memory meanwhile.",
    ),
}
DEFAULT = "Balanced"
"""Name -> preset, from the most exact to the smallest."""


def preset_plan(profile: "Profile", name: str) -> tuple["Plan", str]:
    """The plan that a preset makes of a profile, and in words what the preset asked for.

    A size that this model cannot be brought to gives way to the planner's own rule for the scheme, and the words say
    so; every preset works on every model. Raises PlanError if nothing can be quantized.
    """
    from diffusers_ldmq.errors import TargetError
    from diffusers_ldmq.planning import make_plan

    preset = PRESETS[name]
    try:
        return make_plan(profile, preset.target, planner="budget", scheme=preset.scheme), preset.explanation
    except TargetError:
        if preset.target is None:
            raise
        words = (
            f"{name}: this model cannot be brought to the preset's {preset.target} (of fp32). Instead the planner's "
            f"own rule for {preset.scheme} made this plan, which takes what is said under Size."
        )
        return make_plan(profile, None, planner="budget", scheme=preset.scheme), words
