"""Calibration from a single step against all steps, at equal numbers of samples: output SQNR over time, relative SQNR
per class of layers, and what each costs.

Rows: static ranges of the first step, of samples spread over all steps, of four groups of steps (a measurement only:
no runtime switches ranges), and dynamic ranges; and the single step with the tool's own exceptions, layers for which
the profile finds dynamic ranges better.

    python benchmarks/calibration.py [--model bundled|unconditional] [--rounds 5]
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from measuring import CALIBRATING_CALLS, FOLDERS, Results, call_costs, pipeline, recorded, timed

from diffusers_ldmq import Recording, calibrate, make_plan, profile_sqnr, verify
from diffusers_ldmq.artifacts import Calibration, LayerChoice, Plan, Profile, Report
from diffusers_ldmq.calibration import layer_state, observe_inputs
from diffusers_ldmq.calls import run
from diffusers_ldmq.families import find_denoiser, quantizable_layers
from diffusers_ldmq.metrics import Power, energy
from diffusers_ldmq.noise import NoiseProbes
from diffusers_ldmq.planners import low_precision
from diffusers_ldmq.quantization import quantized_for_now
from diffusers_ldmq.selections import SELECTIONS
from diffusers_ldmq.specs import parse_scheme
from diffusers_ldmq.terminal import quiet_libraries

OBSERVERS = ("minmax", "minmax-affine")
GROUPS = 4
FIRST, EVERY = "first-step", "uniform"
IMAGES = 4
"""Of each held-out call, where layers are looked at one by one."""
CLASSES = {
    "attention q/k/v": r"\.to_[qkv]$",
    "attention out": r"\.to_out\.0$",
    "ff in": r"\.ff\.net\.0\.proj$",
    "ff.net.2": r"\.ff\.net\.2$",
    "conv 1x1, shortcut": r"\.(conv_shortcut|proj_in|proj_out)$",
    "conv 3x3": r"\.(conv[12]|conv)$",
}


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """A float denoiser, a recording with every step of the calibrating runs, and its profile."""

    model: str
    pipe: Any
    denoiser: Any
    recording: Recording
    profile: Profile

    @property
    def samples(self) -> int:
        """How many samples calibrate in every row: all trajectories of the calibrating runs, one step of each."""
        return len(SELECTIONS[FIRST](self.recording.only("calibrate"), None))

    def plan(self, keep_float: str, scheme: str = "w8a8") -> Plan:
        """One scheme for every layer but those kept float: 'none', or 'default' for the family's."""
        kept = tuple(info.name for info in self.profile.table.layers if info.keep_float)
        return make_plan(
            self.profile.table, planner="uniform", scheme=scheme, keep_float=kept if keep_float == "default" else "none"
        )

    def with_exceptions(self, plan: Plan) -> Plan:
        """The plan with dynamic ranges where the profile finds them better."""
        chosen = {name: low_precision(self.profile.noise_of(name), "w8a8").scheme for name in plan.quantized()}
        return replace(plan, layers=plan.layers | {n: LayerChoice(s, "") for n, s in chosen.items()})


def by_groups(on: Bench, plan: Plan, observer: str) -> Report:
    """Ranges of the group of timesteps that a call belongs to; the samples are shared out among the groups."""
    steps, names = on.recording.timesteps(), list(plan.quantized())
    size = -(-len(steps) // GROUPS)
    reports = []
    for timesteps in (steps[k : k + size] for k in range(0, len(steps), size)):
        there = on.recording.at(timesteps)
        calibrating = there.only("calibrate")
        picked = list(SELECTIONS[EVERY](calibrating, on.samples // GROUPS))
        ranges = observe_inputs(on.denoiser, calibrating.batches(picked), names, observer)
        layers = quantizable_layers(on.denoiser)
        states = {n: layer_state(n, layers[n], parse_scheme(s), ranges[n]) for n, s in plan.quantized().items()}
        with quantized_for_now(on.denoiser, Calibration(plan, states, EVERY, observer, len(picked), len(picked), 0)):
            reports.append(verify(on.denoiser, there))
    merged = {name: sum((getattr(r, name) for r in reports), ()) for name in ("timesteps", "signal", "noise")}
    return replace(reports[0], **merged)


def verified(on: Bench, plan: Plan, selection: str, observer: str) -> Report:
    """The report of a plan calibrated in the ordinary way."""
    calibration = calibrate(on.denoiser, plan, on.recording, selection=selection, observer=observer)
    with quantized_for_now(on.denoiser, calibration):
        return verify(on.denoiser, on.recording)


def output_rows(on: Bench, keep_float: str) -> dict[str, Callable[[], Report]]:
    """The rows of the table over time."""
    plan, dynamic = on.plan(keep_float), on.plan(keep_float, "w8a8-dyn")
    excepted = on.with_exceptions(plan)
    rows: dict[str, Callable[[], Report]] = {}
    for kind in OBSERVERS:
        rows[f"{kind}, single step"] = lambda o=kind: verified(on, plan, FIRST, o)
        rows[f"{kind}, multi-step"] = lambda o=kind: verified(on, plan, EVERY, o)
        rows[f"{kind}, {GROUPS} groups of steps"] = lambda o=kind: by_groups(on, plan, o)
        rows[f"{kind}, single step with exceptions"] = lambda o=kind: verified(on, excepted, FIRST, o)
        rows[f"{kind}, multi-step with exceptions"] = lambda o=kind: verified(on, excepted, EVERY, o)
    return {**rows, "dynamic": lambda: verified(on, dynamic, FIRST, OBSERVERS[0])}


def report_data(report: Report) -> dict[str, Any]:
    """A report as plain data."""
    curve = {f"{t:g}": db for t, db in zip(report.timesteps, report.curve_db(), strict=True)}
    return {"output_sqnr_db": report.sqnr_db, "curve_db": curve, "schemes": report.schemes}


def class_of(name: str) -> str:
    """The class of a layer."""
    return next((label for label, pattern in CLASSES.items() if re.search(pattern, name)), "others")


def class_table(on: Bench, observer: str) -> dict[str, dict[str, float]]:
    """Class -> relative SQNR in dB on the float run's own inputs of held-out calls, powers summed over the class."""
    layers = quantizable_layers(on.denoiser)
    probes = {s: NoiseProbes(layers, ranges_of(on, s, observer), ("w8a8", "w8a8-dyn")) for s in (FIRST, EVERY)}
    powers: dict[tuple[str, str], Power] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            signal = energy(output)
            for selection, measured in probes.items():
                for scheme, error in measured.errors(name, args[0], output):
                    key = (class_of(name), f"{scheme}, {selection}")
                    powers[key] = powers.get(key, Power()) + Power(signal, energy(error))

        return see

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    for call in on.recording.only("verify").calls:
        run(on.denoiser, on.recording.batch(call, list(range(IMAGES))))
    for handle in handles:
        handle.remove()
    columns = {
        "single step": f"w8a8, {FIRST}",
        "multi-step": f"w8a8, {EVERY}",
        "dynamic": f"w8a8-dyn, {FIRST}",
        "inputs alone, single step": f"a8, {FIRST}",
        "inputs alone, multi-step": f"a8, {EVERY}",
    }
    found = {label: {name: powers[label, key].sqnr_db for name, key in columns.items()} for label in _classes(layers)}
    return {label: {"layers": sum(class_of(n) == label for n in layers), **row} for label, row in found.items()}


def _classes(layers: dict[str, Any]) -> list[str]:
    present = {class_of(name) for name in layers}
    return [label for label in (*CLASSES, "others") if label in present]


def ranges_of(on: Bench, selection: str, observer: str) -> dict[str, Any]:
    """Observers of every layer's calibrating inputs."""
    calibrating = on.recording.only("calibrate")
    picked = list(SELECTIONS[selection](calibrating, None))
    return observe_inputs(on.denoiser, calibrating.batches(picked), list(quantizable_layers(on.denoiser)), observer)


def costs(on: Bench, rounds: int) -> dict[str, Any]:
    """Sampler calls, forward calls and median seconds of calibration with its sampling, taken in turn."""
    plan = on.plan("none")
    seconds: dict[str, list[float]] = {FIRST: [], EVERY: []}
    sampling: dict[str, list[float]] = {FIRST: [], EVERY: []}
    facts: dict[str, Calibration] = {}
    for _ in range(rounds):
        for selection in (FIRST, EVERY):
            made = recorded(on.model, on.pipe, selection)
            facts[selection], calibrating = timed(
                lambda s=selection, r=made.recording: calibrate(on.denoiser, plan, r, selection=s)
            )
            sampling[selection].append(made.calibrating_seconds)
            seconds[selection].append(made.calibrating_seconds + calibrating)
    middle = lambda values: sorted(values)[rounds // 2]  # noqa: E731
    found: dict[str, Any] = {
        selection: {
            "samples": fact.samples,
            "sampler_calls": fact.sampler_calls,
            "forward_calls": fact.forward_calls,
            "sampling_seconds": middle(sampling[selection]),
            "seconds": middle(seconds[selection]),
        }
        for selection, fact in facts.items()
    }
    ratios = [every / first for first, every in zip(seconds[FIRST], seconds[EVERY], strict=True)]
    batch = on.recording.batch(on.recording.only("calibrate").calls[0])
    return {
        **found,
        "times_less": middle(ratios),
        "call_seconds": call_costs(on.denoiser, batch)[1],
        "prompt_batches": CALIBRATING_CALLS,
    }


def main(
    model: Annotated[str, typer.Option(help=" | ".join(FOLDERS))] = "bundled",
    rounds: Annotated[int, typer.Option(min=1, help="how often calibration is timed")] = 5,
) -> None:
    """Measure and print."""
    quiet_libraries()
    results, pipe = Results(f"calibration-{model}"), pipeline(model)
    denoiser, recording = find_denoiser(pipe)[1], recorded(model, pipe).recording
    on = Bench(model, pipe, denoiser, recording, profile_sqnr(denoiser, recording))
    for keep_float in ("none", "default"):
        for name, report in output_rows(on, keep_float).items():
            row = results.row(f"{keep_float} float: {name}", lambda r=report: report_data(r()))
            shown = [db for index, db in enumerate(row["curve_db"].values()) if index % 5 in (0, 4)]
            typer.echo(f"{keep_float:8s} {name:42s} {row['output_sqnr_db']:6.2f} dB  " + _numbers(shown))
    for kind in OBSERVERS:
        for label, row in results.row(f"classes, {kind}", lambda o=kind: class_table(on, o)).items():
            typer.echo(f"{kind:14s} {label:20s} " + _numbers(row.values()))
    typer.echo(str(results.row("costs", lambda: costs(on, rounds))))


def _numbers(values: Any) -> str:
    return " ".join(f"{float(value):6.2f}" for value in values)


if __name__ == "__main__":
    typer.run(main)
