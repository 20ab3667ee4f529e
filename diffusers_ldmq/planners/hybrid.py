"""The first paper's hybrid precision: from a cut-off block on, the rest of the network runs in higher precision.

"Efficient Quantization Strategies for Latent Diffusion Models" (arXiv 2312.05431), global step, as reconstructed:
N_k = noise-to-signal power at the output with blocks 1..k quantized, delta_n_k = N_k - N_(k-1); a block is sensitive
when delta_n_k exceeds 4x the median. Beyond the paper, a layer whose static range from calibration serves later
steps badly takes its range from each call (w8a8-dyn), which is still integer x integer.
"""

import math
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..artifacts import LayerChoice, LayerNoise, LayerTable, Plan, Profile
from ..errors import PlanError
from ..metrics import sqnr_db
from ..specs import parse_scheme
from .contract import Request, fp32_bytes, integer_share, plan_bytes

SENSITIVE = 4.0
"""A block is sensitive when its added noise exceeds this many times the median."""
MIN_INTEGER_SHARE = 0.75
"""Without a target the suffix stops growing where less than this share of the work would stay integer x integer."""
DYNAMIC_GAIN_DB = 3.0
"""A layer takes its range from each call where that raises its relative SQNR by this much."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """The block curve, read. delta_n: [K]; sensitive: block indices; predicted: [K + 1], entry c in dB at the output
    with blocks 0..c-1 in low precision and the rest float."""

    delta_n: tuple[float, ...]
    threshold: float
    sensitive: tuple[int, ...]
    predicted: tuple[float, ...]


def hybrid(table: LayerTable, profile: Profile | None, request: Request) -> Plan:
    """Without a target, the blocks from the first sensitive decoder block on run in higher precision, at least 75 %
    of the work staying integer; with a size target, as much of that suffix as fits; with an SQNR target, the
    shortest suffix that meets it.

    Raises PlanError without a profile, or if no suffix meets the target.
    """
    if profile is None:
        raise PlanError("the hybrid planner needs a profile; run `ldmq profile` first or choose --planner uniform")
    if profile.curve.scheme != request.scheme:
        raise PlanError(
            f"the profile's block curve is for {profile.curve.scheme}, the plan asks for {request.scheme}; "
            f"profile again with --scheme {request.scheme}"
        )
    kept = request.kept(table)
    _refuse_unmeasured(profile, kept)
    curve = read_curve(profile, kept)
    cut = _cut(table, profile, curve, request)
    layers = _choices(table, profile, request, cut)
    raised = sum(1 for name, c in layers.items() if c.scheme == "float" and name not in kept)
    return Plan(
        denoiser=table.denoiser,
        fingerprint=table.fingerprint,
        planner="hybrid",
        layers=layers,
        target=request.target.text if request.target else None,
        reasons=_reasons(table, curve, cut, raised),
        # with no block left in low precision the curve says nothing: the noise of w8a16 weights is not in it
        predicted_sqnr_db=curve.predicted[cut] if math.isfinite(curve.predicted[cut]) else None,
    )


def _refuse_unmeasured(profile: Profile, kept: frozenset[str]) -> None:
    """Keeping more layers float than were profiled only makes the prediction cautious; keeping fewer makes it wrong."""
    stored = profile.settings.get("keep_float", "default")
    default = {info.name for info in profile.table.layers if info.keep_float}
    unmeasured = sorted((default if stored == "default" else set(stored)) - kept)
    if unmeasured:
        raise PlanError(
            f"the plan would quantize {unmeasured[0]!r} ({len(unmeasured)} such layers), which the profile's curve "
            f"left float; profile again with the same --keep-float"
        )


def read_curve(profile: Profile, kept: frozenset[str]) -> _Curve:
    """delta_n, threshold and sensitive blocks of a profile; negative delta_n (errors cancel) count as 0."""
    blocks, nsr = profile.table.blocks, profile.curve.nsr()
    delta = [after - before for before, after in zip([0.0, *nsr], nsr, strict=False)]
    counted = [max(d, 0.0) for d, block in zip(delta, blocks, strict=True) if set(block.layers) - kept]
    threshold = SENSITIVE * median(counted) if counted else 0.0
    sensitive = tuple(k for k, d in enumerate(delta) if d > threshold)
    predicted = tuple(sqnr_db(1.0, n) for n in (0.0, *nsr))
    return _Curve(tuple(delta), threshold, sensitive, predicted)


def _cut(table: LayerTable, profile: Profile, curve: _Curve, request: Request) -> int:
    """Index of the first block of the suffix; number of blocks = no suffix."""
    blocks, target = table.blocks, request.target
    every = range(len(blocks), -1, -1)
    if target is None:
        starts = [k for k in curve.sensitive if blocks[k].part == "decoder"]
        first = starts[0] if starts else len(blocks)
        if not parse_scheme(request.scheme).is_integer:
            return first
        share = lambda cut: integer_share(table, _schemes(table, profile, request, cut))  # noqa: E731
        return next((k for k in range(first, len(blocks)) if share(k) >= MIN_INTEGER_SHARE), len(blocks))
    if target.min_sqnr_db is not None:
        return next(cut for cut in every if curve.predicted[cut] >= target.min_sqnr_db)
    limit = target.byte_limit(table)
    assert limit is not None
    fitting = [cut for cut in every if plan_bytes(table, _schemes(table, profile, request, cut)) <= limit]
    if not fitting:
        least = plan_bytes(table, _schemes(table, profile, request, len(blocks)))
        raise PlanError(
            f"target {target.text!r} cannot be met: the smallest {request.scheme} plan takes {least / 1e6:.1f} MB "
            f"({least / fp32_bytes(table):.3f}x of fp32); choose a smaller scheme such as --scheme w4a8, "
            f"--keep-float none, or a larger target"
        )
    default = _cut(table, profile, curve, Request(request.scheme, request.keep_float))
    return min(fitting, key=lambda cut: (abs(cut - default), -cut))


def _schemes(table: LayerTable, profile: Profile, request: Request, cut: int) -> dict[str, str]:
    return {name: choice.scheme for name, choice in _choices(table, profile, request, cut).items()}


def _choices(table: LayerTable, profile: Profile, request: Request, cut: int) -> dict[str, LayerChoice]:
    kept = request.kept(table)
    found: dict[str, LayerChoice] = {}
    for index, block in enumerate(table.blocks):
        for name in block.layers:
            if name in kept:
                found[name] = LayerChoice("float", "kept float by request" if request.keep_float else "family default")
            elif index >= cut:
                found[name] = higher_precision(profile, name, request.scheme)
            else:
                found[name] = low_precision(profile.noise_of(name), request.scheme)
    return {info.name: found[info.name] for info in table.layers}


def low_precision(noise: LayerNoise, scheme: str) -> LayerChoice:
    """`scheme`, or its dynamic twin where the calibrated static range loses DYNAMIC_GAIN_DB or more."""
    dynamic = f"{scheme}-dyn"
    if parse_scheme(scheme).is_static and {scheme, dynamic} <= set(noise.noise):
        static_db, dynamic_db = noise.power(scheme).sqnr_db, noise.power(dynamic).sqnr_db
        if dynamic_db >= static_db + DYNAMIC_GAIN_DB:
            why = f"static range fits later steps badly: {static_db:.1f} dB, {dynamic_db:.1f} dB with dynamic ranges"
            return LayerChoice(dynamic, why)
    return LayerChoice(scheme, "before the cut-off")


def higher_precision(profile: Profile, name: str, scheme: str) -> LayerChoice:
    """w8a16 where activation noise dominates, float where weight noise does."""
    noise = profile.noise_of(name)
    weight_only = "w8a16" if "w8a16" in noise.noise else None
    if weight_only is None or "a8" not in noise.noise:
        raise PlanError("the profile lacks weight noise (w8a16) or activation noise (a8); profile again")
    weight_db, activation_db = noise.power("w8a16").sqnr_db, noise.power("a8").sqnr_db
    told = f"weight noise {weight_db:.1f} dB, activation noise {activation_db:.1f} dB"
    if activation_db <= weight_db:
        return LayerChoice("w8a16", f"in the suffix; activation noise dominates ({told})")
    return LayerChoice("float", f"in the suffix; weight noise dominates ({told})")


def _reasons(table: LayerTable, curve: _Curve, cut: int, raised: int) -> dict[str, Any]:
    names = [block.name for block in table.blocks]
    return {
        "delta_n": dict(zip(names, curve.delta_n, strict=True)),
        "threshold": curve.threshold,
        "sensitive_blocks": [names[k] for k in curve.sensitive],
        "cut_off": names[cut] if cut < len(names) else None,
        "suffix_layers_in_float": raised,
    }
