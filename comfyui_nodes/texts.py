"""What nodes say: plain text for artists."""

import math
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffusers_ldmq.artifacts import Plan, Profile, Reconstructed

    from .native.comparing import Comparison
    from .native.ranges import InputRanges

_WORDS = (
    (r"run `ldmq profile` first or choose --planner uniform", "connect an LDM-Q Profile or choose the planner uniform"),
    (r"`ldmq profile MODEL` makes one", "LDM-Q Profile makes one"),
    (r"`ldmq plan PROFILE\.json` makes one", "LDM-Q Plan makes one"),
    (r"`ldmq quantize` makes one", "LDM-Q Quantize makes one"),
    (r"; see `ldmq info`", ""),
    (r"`ldmq quantize` and QuantizedLDMPipeline measure them", "LDM-Q Pipeline loader measures them"),
    (r"profile again with --scheme (\S+)", r"choose the planner budget, or the scheme that was profiled"),
    (r"profile again with the same --keep-float", "leave keep_float as it is, or choose the planner budget"),
    (r"--keep-float none", "keep_float none"),
    (r"--(planner|scheme|corrections|dtype) (\w+)", r"the \1 \2"),
    (r"--(planner|scheme|corrections|dtype)", r"\1"),
    (r"keep-float names", "keep_float names"),
    (r"pass --overwrite \(overwrite=True\) to replace", "switch overwrite on to replace it"),
)
"""What the library says about its commands -> the same about nodes."""


def in_node_words(message: str) -> str:
    """A message of diffusers_ldmq whose advice names commands, with advice that names nodes."""
    for pattern, words in _WORDS:
        message = re.sub(pattern, words, message)
    return message


def worst_layers(profile: "Profile", count: int) -> list[tuple[str, float]]:
    """(layer, SQNR in dB at the output with this layer alone quantized as in the block curve), the worst first: in the
    profiled scheme, with dynamic ranges where plans would take those. Layers that stay float are left out."""
    from diffusers_ldmq.planners import low_precision
    from diffusers_ldmq.plots import own_effect_db

    kept, scheme = {layer.name for layer in profile.table.layers if layer.keep_float}, profile.curve.scheme
    measured = [noise for noise in profile.layers if noise.name not in kept]
    found = [(noise.name, own_effect_db(profile, noise, low_precision(noise, scheme).scheme)) for noise in measured]
    known = [(name, db) for name, db in found if db is not None and math.isfinite(db)]
    return sorted(known, key=lambda pair: pair[1])[:count]


def profile_text(profile: "Profile") -> str:
    """What a profile found, and what to do with it."""
    from diffusers_ldmq.metrics import sqnr_db
    from diffusers_ldmq.planners import fp32_bytes

    table, scheme = profile.table, profile.curve.scheme
    kept = sum(layer.keep_float for layer in table.layers)
    whole = sqnr_db(1.0, profile.curve.nsr()[-1])
    lines = [
        f"{table.denoiser}: {len(table.layers)} Linear and Conv2d layers in {len(table.blocks)} blocks, "
        f"{fp32_bytes(table) / 1e6:.0f} MB in fp32.",
        f"In {scheme}, with dynamic ranges where calibrated ones would not last and {kept} layers left float: "
        f"{decibels(whole)} at the output ({closeness(whole)}).",
        "Layers that suffer most (SQNR with this one alone quantized so):",
        *(f"  {decibels(db):>8}  {name}" for name, db in worst_layers(profile, 8)),
        f"Measured at {len(profile.timesteps)} of {len(profile.schedule)} timesteps{_cost(profile)}.",
        "Next: LDM-Q Plan chooses a precision for every layer.",
    ]
    return "\n".join(lines)


def plan_text(plan: "Plan", profile: "Profile | None", explanation: str = "") -> str:
    """What a plan decides, what is expected of it, what comes next. explanation: of the preset, if one made it."""
    counts = ", ".join(f"{count} {scheme}" for scheme, count in sorted(plan.counts().items()))
    lines = [explanation] if explanation else []
    lines.append(f"Layers: {counts} (planner {plan.planner}{f', target {plan.target}' if plan.target else ''}).")
    if profile is not None:
        lines.append(_size_line(plan, profile))
    if plan.predicted_sqnr_db is not None:
        db = plan.predicted_sqnr_db
        lines.append(f"Predicted: {decibels(db)} at the output ({closeness(db)}).")
    lines.append(_next_after(plan))
    return "\n".join(lines)


def calibration_text(ranges: "InputRanges") -> str:
    """What a calibration saw."""
    how = "the first sampling step" if ranges.selection == "first-step" else f"{ranges.selection} steps"
    return (
        f"Input ranges of {len(ranges.ranges)} layers from {ranges.samples} samples of {how} ({ranges.observer}).\n"
        "Next: LDM-Q Quantize, with this and the same plan."
    )


def model_text(schemes: "Mapping[str, int]", size: int) -> str:
    """What a quantized MODEL holds. schemes: scheme -> number of layers; size: bytes of the whole denoiser."""
    counts = ", ".join(f"{count} {scheme}" for scheme, count in sorted(schemes.items()))
    return f"Quantized MODEL: {counts} layers, {size / 1e6:.1f} MB."


def reconstruction_text(units: "Sequence[Reconstructed]") -> str:
    """What learning the rounding brought, as a line to append; empty where nothing was learned."""
    from diffusers_ldmq.summary import reconstruction_told

    return f"\nrounding learned: {reconstruction_told(units)}" if units else ""


def comparison_text(comparison: "Comparison") -> str:
    """How far apart two MODELs are."""
    worst, worst_db = comparison.worst()
    curve = sorted(zip(comparison.timesteps, comparison.curve_db(), strict=True), reverse=True)
    lines = [
        f"At the model's output, on the reference's own inputs: {decibels(comparison.output_db)} over all steps "
        f"({closeness(comparison.output_db)}), worst {decibels(worst_db)} at timestep {worst:g}.",
        f"Of the final latent: {decibels(comparison.latent_db)}; small differences add up from step to step, so this "
        "is lower.",
        "Per timestep: " + ", ".join(f"{t:g}: {decibels(db)}" for t, db in curve),
    ]
    return "\n".join(lines)


def closeness(db: float) -> str:
    """An output SQNR in words for someone who looks at pictures.

    From pictures of the bundled models at equal seeds: 43 dB gave PSNR 44 dB, 38 dB 40, 33 dB 37, 26 dB 30, 20 dB 24.
    """
    steps = ((40, "cannot be told from the original"), (33, "small details may differ"), (24, "details differ"))
    return next((words for least, words in steps if db >= least), "the picture itself may change")


def _cost(profile: "Profile") -> str:
    """What measuring took, where the profile tells."""
    calls = profile.settings.get("cost_in_calls")
    return "" if calls is None else f", in {calls} calls of the model (as {calls / 20:.0f} pictures of 20 steps)"


def _size_line(plan: "Plan", profile: "Profile") -> str:
    from diffusers_ldmq.planners import fp32_bytes, integer_share, plan_bytes

    table, schemes = profile.table, plan.quantized()
    size, whole = plan_bytes(table, schemes), fp32_bytes(table)
    return (
        f"Size: {size / 1e6:.1f} MB = {size / whole:.2f}x of fp32, {2 * size / whole:.2f}x of fp16; "
        f"{100 * integer_share(table, schemes):.0f} % of the work in integers."
    )


def _next_after(plan: "Plan") -> str:
    from diffusers_ldmq.specs import parse_scheme

    static = sum(1 for scheme in plan.quantized().values() if parse_scheme(scheme).is_static)
    if static:
        return (
            f"Next: LDM-Q Calibrate measures the input ranges of {static} layers; LDM-Q Quantize without it gives "
            "these a range in every call instead."
        )
    return "Next: LDM-Q Quantize; this plan needs no LDM-Q Calibrate."


def decibels(value: float) -> str:
    """A ratio for people to read; an infinite one is 'exact'."""
    return f"{value:.1f} dB" if math.isfinite(value) else "exact"
