"""The whole table of the first paper: what single-step calibration, the global hybrid plan, local corrections and the
budget planner reach alone and together, on two trained models.

Output SQNR is measured on held-out calls, latents and pictures at seeds (and prompts) that nothing else uses, time
interleaved with the float fp32 model. Rows are kept as they come; the command goes on where it stopped.

    python benchmarks/paper1.py bundled|unconditional [--threads 2] [--rounds 15]
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import torch
import typer
from measuring import Recorded, Results, drawn, pipeline, recorded, timed
from paper1_table import table
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from diffusers_ldmq import calibrate, make_plan, profile_sqnr, quantize, verify
from diffusers_ldmq.artifacts import Calibration, Plan, Profile, Trial
from diffusers_ldmq.correction import apply_everywhere, correct
from diffusers_ldmq.families import find_denoiser
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.pictures import picture_scores
from diffusers_ldmq.planners import Target, fp32_bytes, integer_share, plan_bytes, predict
from diffusers_ldmq.planners.budget import MOST_BYTES
from diffusers_ldmq.settings import Settings
from diffusers_ldmq.specs import parse_scheme
from diffusers_ldmq.summary import sqnr_data
from diffusers_ldmq.terminal import quiet_libraries
from diffusers_ldmq.timing import seconds_per_step

FIRST, EVERY = "first-step", "uniform"
FP32, BF16, UNIFORM = "float fp32", "float bf16", "min-max W8A8, single-step"
ALL = "all (budget + gated corrections)"
MIXED = 0.2
LEFT, LEFT_WORK = 0.03, 0.04
"""Of the fp32 weights, what a mixed plan may take; and what of its bytes and of all work a plan leaves to corrections,
whose low-rank branches are float work."""


class Model(StrEnum):
    """What is measured."""

    BUNDLED = "bundled"
    UNCONDITIONAL = "unconditional"


class Local(StrEnum):
    """Corrections of single layers."""

    NONE = "none"
    EVERYWHERE = "smoothing everywhere"
    GATED = "gated"


@dataclass(frozen=True, slots=True)
class Version:
    """How a quantized row is made. most_bytes: that gated corrections may fill up; None = any."""

    plan: Callable[[], Plan]
    observer: str = "minmax-affine"
    selection: str = FIRST
    local: Local = Local.NONE
    most_bytes: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What every row of one model needs. recordings: selection -> what was recorded for it."""

    model: str
    pipe: Any
    recordings: dict[str, Recorded]
    profile: Profile
    profile_seconds: float
    pictures: list[Image.Image]
    latents: Tensor
    threads: int
    rounds: int

    @property
    def float_denoiser(self) -> nn.Module:
        """The denoiser in fp32, which no row changes."""
        return find_denoiser(self.pipe)[1]

    def planned(self, target: Target | str | None = None, **options: Any) -> Plan:
        """A plan of the profile."""
        return make_plan(self.profile, target, **options)

    def like(self, plan: Plan) -> Target:
        """At most the bytes and at least the integer work of another plan."""
        schemes, table = plan.quantized(), self.profile.table
        return Target("as another plan", max_bytes=plan_bytes(table, schemes), min_integer_share=self.share(plan))

    def share(self, plan: Plan) -> float:
        """Integer share of a plan, a rounding error less."""
        return integer_share(self.profile.table, plan.quantized()) - 1e-9

    def limit(self) -> int:
        """1.08x the bytes of W8A8 everywhere."""
        table = self.profile.table
        return int(MOST_BYTES * plan_bytes(table, {info.name: "w8a8" for info in table.layers}))

    def within(self, share: float, size: float) -> Target:
        """At most so many bytes, and a share of integer work."""
        return Target(f"{size:.0f} bytes, int8>={100 * share:g}%", max_bytes=int(size), min_integer_share=share)


def bench(model: str, threads: int, rounds: int) -> Bench:
    """Record, profile and draw with the float model."""
    pipe = pipeline(model)
    recordings = {selection: recorded(model, pipe, selection) for selection in (FIRST, EVERY)}
    profile, seconds = timed(lambda: profile_sqnr(find_denoiser(pipe)[1], recordings[FIRST].recording))
    return Bench(model, pipe, recordings, profile, seconds, *drawn(model, pipe), threads, rounds)


def versions(on: Bench) -> dict[str, Version]:
    """The quantized rows."""
    uniform = partial(on.planned, planner="uniform")
    hybrid, budget = partial(on.planned, planner="hybrid"), partial(on.planned, planner="budget")
    found = {
        "min-max W8A8, multi-step": Version(uniform, "minmax", EVERY),
        UNIFORM: Version(uniform, "minmax"),
        "W8A8, single-step, one-sided ranges": Version(uniform),
        "+ hybrid, symmetric min-max": Version(hybrid, "minmax"),
        "+ hybrid": Version(hybrid),
        "+ hybrid + smoothing everywhere": Version(hybrid, local=Local.EVERYWHERE),
        "+ hybrid + gated corrections": Version(hybrid, local=Local.GATED),
        "budget": Version(budget),
        "budget + gated corrections of any size": Version(budget, local=Local.GATED),
        ALL: corrected_within(on, on.limit(), 0.75),
        "all, >= 88 % int8": corrected_within(on, on.limit(), 0.88),
        "budget as hybrid": Version(lambda: budget(on.like(hybrid()))),
    }
    for share in (88, 95):
        suffix = partial(hybrid, f"int8>={share}%")
        found[f"hybrid, int8 >= {share} %"] = Version(suffix)
        found[f"budget as hybrid, int8 >= {share} %"] = Version(lambda s=suffix: budget(on.like(s())))
    return found | {
        "min-max W4A8, single-step": Version(partial(uniform, scheme="w4a8"), "minmax"),
        "W4A8, single-step, one-sided ranges": Version(partial(uniform, scheme="w4a8")),
        "mixed 4/8 bit, <= 0.2x": Version(partial(budget, f"size<={MIXED}x", scheme="w4a8")),
        "mixed 4/8 bit, <= 0.2x, + gated corrections": corrected_within(
            on, int(MIXED * fp32_bytes(on.profile.table)), 0.75, scheme="w4a8"
        ),
    }


def corrected_within(on: Bench, limit: int, share: float, scheme: str = "w8a8") -> Version:
    """A budget plan that leaves part of the bytes and of the work that may be float to gated corrections."""
    target = on.within(share + LEFT_WORK, (1 - LEFT) * limit)
    plan = partial(on.planned, target, planner="budget", scheme=scheme)
    return Version(plan, local=Local.GATED, most_bytes=limit)


def made(on: Bench, version: Version) -> tuple[nn.Module, dict[str, Any]]:
    """The quantized denoiser of a version, and what making it took."""
    plan, denoiser = version.plan(), copy.deepcopy(on.float_denoiser)
    record = on.recordings[version.selection]
    calibration, seconds = timed(
        lambda: calibrate(denoiser, plan, record.recording, selection=version.selection, observer=version.observer)
    )
    (calibration, trials), correcting = timed(lambda: corrected(on, calibration, version))
    return quantize(denoiser, calibration), {
        "predicted_sqnr_db": plan.predicted_sqnr_db,
        "planned_bytes": plan_bytes(on.profile.table, plan.quantized()),
        "samples": calibration.samples,
        "calibration_seconds": record.calibrating_seconds + seconds,
        "sampler_calls": calibration.sampler_calls,
        "forward_calls": calibration.forward_calls,
        "profile_seconds": on.profile_seconds if plan.planner != "uniform" else 0.0,
        "correction_seconds": correcting,
        "corrections_tried": len({trial.layer for trial in trials}),
        "corrections_kept": [f"{trial.layer}: {trial.correction}" for trial in trials if trial.kept],
    }


def quantized_row(on: Bench, version: Version) -> dict[str, Any]:
    """One quantized version, measured."""
    denoiser, facts = made(on, version)
    return {**measured(on, denoiser), **facts}


def corrected(on: Bench, calibration: Calibration, version: Version) -> tuple[Calibration, tuple[Trial, ...]]:
    """The calibration with local corrections, and what was tried."""
    recording = on.recordings[FIRST].recording
    if version.local is Local.EVERYWHERE:
        return apply_everywhere(on.float_denoiser, calibration, recording), ()
    if version.local is Local.NONE:
        return calibration, ()
    schemes, effects = calibration.plan.quantized(), predict(on.profile).total
    integer = [name for name, scheme in schemes.items() if parse_scheme(scheme).is_integer]
    worst = sorted(integer, key=lambda name: -effects[name][schemes[name]])[: Settings().corrected_layers]
    left = None if version.most_bytes is None else version.most_bytes - plan_bytes(on.profile.table, schemes)
    return correct(on.float_denoiser, calibration, recording, layers=worst, most_bytes=left)


def measured(on: Bench, denoiser: nn.Module) -> dict[str, Any]:
    """What a version reaches: at the output, in latents and pictures, and its size and speed."""
    recording = on.recordings[FIRST].recording
    report, (pictures, latents) = verify(denoiser, recording), sampled(on, denoiser)
    scores = picture_scores(on.pictures, pictures)
    same = scores.worst_psnr_db == float("inf")
    return {
        "output_sqnr_db": sqnr_data(report),
        "latent_sqnr_db": sqnr(on.latents, latents),
        "pictures": None if same else {**scores.data(), "psnr_db": scores.psnr_db},
        "fid": None,
        "bytes": report.bytes,
        "of_fp32": report.bytes / report.fp32_bytes,
        "int8_macs_share": report.int8_macs,
        "schemes": report.schemes,
    }


def sampled(on: Bench, denoiser: nn.Module) -> tuple[list[Image.Image], Tensor]:
    """Pictures and latents of the pipeline with another denoiser, which is given fp32 and gives fp32."""
    dtype = next(p.dtype for p in denoiser.parameters() if p.is_floating_point())
    handles = [
        denoiser.register_forward_pre_hook(partial(_cast_inputs, dtype), with_kwargs=True),
        denoiser.register_forward_hook(_cast_output),
    ]
    name, original = find_denoiser(on.pipe)
    on.pipe.register_modules(**{name: denoiser})
    try:
        return drawn(on.model, on.pipe)
    finally:
        on.pipe.register_modules(**{name: original})
        for handle in handles:
            handle.remove()


def _cast_inputs(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    wanted = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1 else v  # noqa: E731
    return tuple(map(wanted, args)), {key: wanted(value) for key, value in kwargs.items()}


def _cast_output(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (output[0].float(), *output[1:])
    return type(output)(sample=output.sample.float())


def step_seconds(on: Bench) -> dict[str, Any]:
    """Median seconds per denoiser call of every version, all in turn in one run."""
    recording, before = on.recordings[FIRST].recording, torch.get_num_threads()
    batch = recording.batch(recording.only("verify").calls[0])
    denoisers = {FP32: on.float_denoiser, BF16: copy.deepcopy(on.float_denoiser).to(torch.bfloat16)}
    denoisers |= {name: made(on, version)[0] for name, version in versions(on).items()}
    torch.set_num_threads(on.threads)
    try:
        times = seconds_per_step(denoisers, batch, on.rounds)
    finally:
        torch.set_num_threads(before)
    seconds = {name: time.seconds for name, time in times.versions.items()}
    return {"rows": times.rows, "threads": times.threads, "rounds": times.rounds, "seconds_per_step": seconds}


def main(
    model: Model,
    threads: Annotated[int, typer.Option(min=1, help="of the timed calls")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="timed calls of each version")] = 15,
) -> None:
    """Measure and print the table of one model."""
    quiet_libraries()
    results, on = Results(f"paper1-{model}"), bench(model, threads, rounds)
    results.row(FP32, lambda: measured(on, on.float_denoiser))
    results.row(BF16, lambda: measured(on, copy.deepcopy(on.float_denoiser).to(torch.bfloat16)))
    for name, version in versions(on).items():
        row = results.row(name, lambda v=version: quantized_row(on, v))
        typer.echo(f"{name}: {row['output_sqnr_db']['all']:.2f} dB")
    results.row("times", lambda: step_seconds(on))
    Console(width=240).print(table(results.rows, model, UNIFORM))


if __name__ == "__main__":
    typer.run(main)
