"""ComfyUI's node API as this pack uses it: own socket types, and keywords that an older API lacks left out."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from comfy.samplers import KSampler
from comfy_api.latest import io

from .payloads import RECONSTRUCTIONS

T = TypeVar("T")

CATEGORY = "LDM-Q"
PROFILE = io.Custom("LDMQ_PROFILE")
PLAN = io.Custom("LDMQ_PLAN")
CALIBRATION = io.Custom("LDMQ_CALIBRATION")
PIPELINE = io.Custom("LDMQ_PIPELINE")

YOUNGER = frozenset({"advanced", "search_aliases", "is_dev_only", "has_intermediate_output"})
"""Keywords that came after the first V3 API. Leaving them out costs comfort, never function."""
LARGEST_SEED = 2**64 - 1
SELECTED = (
    "first-step: the first sampling step, where ranges are widest (the paper's way). The others look at the whole "
    "schedule. uniform: at all steps alike. normal: more at the later ones (PTQ4DM). tdac: more at steps whose inside "
    "looks like that of many others, or unlike all (EDA-DM)."
)
"""What each selection looks at, for tooltips."""
LEARNED = (
    "Learn how every weight is rounded and how wide the steps of inputs are, block by block (EDA-DM): what 4-bit "
    "weights need. none: round to nearest, at once. quick: about 4 dB more at the output of the bundled model in w4a8, "
    "in 2 minutes on two CPU cores. full: 0.4 dB more, three times as long."
)
"""What reconstruction brings and costs, for tooltips."""
AS_PLANNED = "as planned"
"""Choice of LDM-Q Calibrate: the sampling steps that the plan names, else the first ones."""


def accepted(make: Callable[..., T], *args: Any, **keywords: Any) -> T:
    """make(*args, **keywords) without those of YOUNGER that the installed API does not know."""
    known = inspect.signature(make).parameters
    return make(*args, **{key: value for key, value in keywords.items() if key in known or key not in YOUNGER})


def schema(node_id: str, **keywords: Any) -> io.Schema:
    """An io.Schema of this pack's category, with the node's own id among what it is told (for progress)."""
    return accepted(io.Schema, node_id=node_id, category=CATEGORY, hidden=[io.Hidden.unique_id], **keywords)


def text_output(tooltip: str) -> io.String.Output:
    """The last output of most nodes: what was done, in words."""
    return io.String.Output("text", tooltip=f"{tooltip} Wire it to Preview as Text to keep it on the canvas.")


def seed_input(name: str, tooltip: str, **keywords: Any) -> io.Input:
    """A seed. One whose id is 'seed' gets ComfyUI's "control after generate", which draws a new one after every run."""
    return accepted(io.Int.Input, name, default=0, min=0, max=LARGEST_SEED, tooltip=tooltip, **keywords)


def reconstruct_input(more: str = "") -> io.Input:
    """How rounding is learned. Optional, because workflows were saved before it was there."""
    return accepted(
        io.Combo.Input,
        "reconstruct",
        options=list(RECONSTRUCTIONS),
        default=RECONSTRUCTIONS[0],
        optional=True,
        tooltip=f"{LEARNED} {more}".strip(),
    )


def steps_input(tooltip: str, **keywords: Any) -> io.Input:
    """How many sampling steps."""
    return accepted(io.Int.Input, "steps", default=20, min=1, max=1000, tooltip=tooltip, **keywords)


def cfg_input(default: float, tooltip: str, **keywords: Any) -> io.Input:
    """The guidance scale."""
    limits = {"min": 0.0, "max": 100.0, "step": 0.1, "round": 0.01}
    return accepted(io.Float.Input, "cfg", default=default, **limits, tooltip=tooltip, **keywords)


def sampling_inputs(seed: str, seed_tooltip: str, **keywords: Any) -> list[io.Input]:
    """Inputs that say how to sample, with KSampler's names and defaults. seed: the id of the seed input; keywords: of
    every one."""
    steps = "Sampling steps. Use the number that you sample with: the noise differs from step to step."
    return [
        seed_input(seed, seed_tooltip, **keywords),
        steps_input(steps, **keywords),
        cfg_input(8.0, "Guidance scale. Use the one that you sample with.", **keywords),
        accepted(
            io.Combo.Input,
            "sampler_name",
            options=list(KSampler.SAMPLERS),
            default="euler",
            tooltip="Sampler. Use the one that you sample with; euler makes one model call per step.",
            **keywords,
        ),
        accepted(
            io.Combo.Input,
            "scheduler",
            options=list(KSampler.SCHEDULERS),
            default="normal",
            tooltip="Noise schedule. Use the one that you sample with.",
            **keywords,
        ),
    ]
