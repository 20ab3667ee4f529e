"""The first paper's hybrid precision: from a cut-off block on, the rest of the network runs in higher precision.

"Efficient Quantization Strategies for Latent Diffusion Models" (arXiv 2312.05431), global step, as reconstructed:
N_k = noise-to-signal power at the output with blocks 1..k quantized, delta_n_k = N_k - N_(k-1); a block is sensitive
when delta_n_k exceeds 4x the median. Beyond the paper, a layer whose static range from calibration serves later
steps badly takes its range from each call (w8a8-dyn), which is still integer x integer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..artifacts import LayerChoice, Plan, Profile
from ..errors import PlanError, TargetError
from ..specs import parse_scheme
from ..tables import LayerTable
from .contract import MIN_INTEGER_SHARE, Request, fp32_bytes, integer_share, plan_bytes
from .low_precision import low_precision
from .prediction import Prediction, predict

SENSITIVE = 4.0
"""A block is sensitive when its added noise exceeds this many times the median."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """The block curve, read. delta_n: [G]; sensitive: group indices; starts: [G] index of each group's first block."""

    delta_n: tuple[float, ...]
    threshold: float
    sensitive: tuple[int, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Hybrid:
    """One profile and one request. cut: index of the first block in higher precision; whole: index of the first block
    that is left in floating point altogether (the number of blocks = none)."""

    table: LayerTable
    profile: Profile
    request: Request
    prediction: Prediction

    def choices(self, cut: int, whole: int) -> dict[str, LayerChoice]:
        kept = self.request.kept(self.table)
        found: dict[str, LayerChoice] = {}
        for index, block in enumerate(self.table.blocks):
            for name in block.layers:
                if name in kept:
                    why = "kept float by request" if self.request.keep_float else "family default"
                    found[name] = LayerChoice("float", why)
                elif index >= whole:
                    found[name] = LayerChoice("float", "in the suffix; nothing less reaches the target")
                elif index >= cut:
                    found[name] = higher_precision(self.profile, name, self.request.scheme)
                else:
                    found[name] = low_precision(self.profile.noise_of(name), self.request.scheme)
        for group in self.profile.shared:
            found.update(_alike({name: found[name] for name in group if found[name].scheme != "float"}))
        return {info.name: found[info.name] for info in self.table.layers}

    def schemes(self, cut: int, whole: int) -> dict[str, str]:
        return {name: c.scheme for name, c in self.choices(cut, whole).items() if c.scheme != "float"}

    def cuts(self) -> Iterator[tuple[int, int]]:
        """(cut, whole) from the lowest precision to the highest that quantizes anything."""
        count = len(self.table.blocks)
        yield from ((cut, count) for cut in range(count, -1, -1))
        yield from ((0, whole) for whole in range(count - 1, 0, -1) if self.schemes(0, whole))


def hybrid(table: LayerTable, profile: Profile | None, request: Request) -> Plan:
    """Without a target, the blocks from the first sensitive decoder block on run in higher precision, at least 75 %
    of the work staying integer; with demands on size, speed or integer work, as much of that suffix as fits; with an
    SQNR target, the shortest suffix that is predicted to meet it.

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
    state = _Hybrid(table, profile, request, predict(profile))
    curve = read_curve(profile, kept)
    cut, whole = _cut(state, curve)
    layers = state.choices(cut, whole)
    raised = sum(1 for name, c in layers.items() if c.scheme == "float" and name not in kept)
    schemes = state.schemes(cut, whole)
    return Plan(
        denoiser=table.denoiser,
        fingerprint=table.fingerprint,
        planner="hybrid",
        layers=layers,
        target=request.text,
        reasons={
            **_reasons(table, profile, curve, cut, raised),
            "predicted_curve_db": state.prediction.curve_db(schemes),
        },
        predicted_sqnr_db=state.prediction.sqnr_db(schemes),
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
    """delta_n, threshold and sensitive groups of a profile; negative delta_n (errors cancel) count as 0.

    Raises PlanError for a curve whose groups are not the model's blocks in order.
    """
    blocks = {block.name: block for block in profile.table.blocks}
    groups, nsr = profile.curve.groups, profile.curve.nsr()
    if [name for group in groups for name in group] != list(blocks) or len(nsr) != len(groups):
        raise PlanError("the profile's block curve does not cover the model's blocks in order; profile again")
    delta = [after - before for before, after in zip([0.0, *nsr], nsr, strict=False)]
    holds = [any(set(blocks[name].layers) - kept for name in group) for group in groups]
    counted = [max(d, 0.0) for d, quantized in zip(delta, holds, strict=True) if quantized]
    threshold = SENSITIVE * median(counted) if counted else 0.0
    starts = [sum(map(len, groups[:index])) for index in range(len(groups))]
    return _Curve(tuple(delta), threshold, tuple(k for k, d in enumerate(delta) if d > threshold), tuple(starts))


def _cut(state: _Hybrid, curve: _Curve) -> tuple[int, int]:
    """(cut, whole) that the request asks for."""
    blocks, target, count = state.table.blocks, state.request.target, len(state.table.blocks)
    share = lambda cut: integer_share(state.table, state.schemes(cut, count))  # noqa: E731
    if target is None:
        decoder = [curve.starts[k] for k in curve.sensitive if blocks[curve.starts[k]].part == "decoder"]
        first = decoder[0] if decoder else count
        if not parse_scheme(state.request.scheme).is_integer:
            return first, count
        return next((k for k in range(first, count) if share(k) >= MIN_INTEGER_SHARE), count), count
    fitting = [cut for cut in state.cuts() if _fits(state, *cut)]
    if not fitting:
        raise TargetError(_out_of_reach(state))
    if target.min_sqnr_db is None:
        suffixes = [cut for cut, whole in fitting if whole == count]
        integer = [cut for cut in suffixes if share(cut) >= MIN_INTEGER_SHARE]
        return (min(integer or suffixes), count) if suffixes else max(fitting, key=lambda cut: cut[1])
    reached = [(cut, state.prediction.sqnr_db(state.schemes(*cut)) or 0.0) for cut in fitting]
    for cut, db in reached:
        if db >= target.min_sqnr_db:
            return cut
    best = max(db for _, db in reached)
    raise TargetError(
        f"target {target.text!r} cannot be met: the best {state.request.scheme} plan that still quantizes anything is "
        f"predicted to reach {best:.1f} dB, {target.min_sqnr_db - best:.1f} dB short; lower the target"
    )


def _fits(state: _Hybrid, cut: int, whole: int) -> bool:
    """Whether a plan keeps the demands on size, speed and integer work."""
    target, schemes = state.request.target, state.schemes(cut, whole)
    assert target is not None
    size, limit = target.byte_limit(state.table), state.request.limit_ms()
    if size is not None and plan_bytes(state.table, schemes) > size:
        return False
    if target.min_integer_share is not None and integer_share(state.table, schemes) < target.min_integer_share:
        return False
    return limit is None or state.request.times is None or state.request.times.predicted_ms(schemes) <= limit


def _out_of_reach(state: _Hybrid) -> str:
    count, request = len(state.table.blocks), state.request
    schemes = state.schemes(count, count)
    least = plan_bytes(state.table, schemes)
    told = [f"{least / 1e6:.1f} MB ({least / fp32_bytes(state.table):.3f}x of fp32)"]
    told.append(f"{100 * integer_share(state.table, schemes):.0f} % integer work")
    if request.times is not None:
        told.append(f"{request.times.fastest_ms / request.times.predicted_ms(schemes):.2f}x the fastest float's speed")
    return (
        f"target {request.text!r} cannot be met: the smallest {request.scheme} plan has {', '.join(told)}; choose a "
        f"smaller scheme such as --scheme w4a8, --keep-float none or a larger target"
    )


def _alike(choices: dict[str, LayerChoice]) -> dict[str, LayerChoice]:
    """One scheme for layers that share an input: the dynamic one where any of them wants it."""
    wanted = {choice.scheme for choice in choices.values()}
    dynamic = [scheme for scheme in wanted if parse_scheme(scheme).is_dynamic]
    if len(wanted) < 2 or not dynamic:
        return choices
    why = "shares its input with a layer whose static range fits later steps badly"
    return {n: c if c.scheme == dynamic[0] else LayerChoice(dynamic[0], why) for n, c in choices.items()}


def higher_precision(profile: Profile, name: str, scheme: str) -> LayerChoice:
    """w8a16 where activation noise dominates, float where weight noise does."""
    noise = profile.noise_of(name)
    weight_only = "w8a16" if "w8a16" in noise.noise else None
    if weight_only is None or "a8" not in noise.noise:
        raise PlanError("the profile lacks weight noise (w8a16) or activation noise (a8); profile again")
    weight_db, activation_db = noise.power("w8a16").sqnr_db, noise.power("a8").sqnr_db
    told = f"weight noise {weight_db:.1f} dB, activation noise {activation_db:.1f} dB"
    if not parse_scheme(scheme).is_integer and parse_scheme(scheme) == parse_scheme("w8a16"):
        return LayerChoice("float", "in the suffix; above w8a16 there is only float")
    if activation_db <= weight_db:
        return LayerChoice("w8a16", f"in the suffix; activation noise dominates ({told})")
    return LayerChoice("float", f"in the suffix; weight noise dominates ({told})")


def _reasons(table: LayerTable, profile: Profile, curve: _Curve, cut: int, raised: int) -> dict[str, Any]:
    names = [" + ".join(group) for group in profile.curve.groups]
    return {
        "delta_n": dict(zip(names, curve.delta_n, strict=True)),
        "threshold": curve.threshold,
        "sensitive_blocks": [name for k in curve.sensitive for name in profile.curve.groups[k]],
        "cut_off": table.blocks[cut].name if cut < len(table.blocks) else None,
        "suffix_layers_in_float": raised,
    }
