"""What the cheap estimate of a layer's own effect at the denoiser's output is worth, and what a profile costs.

Own effects from random probes (diffusers_ldmq/noise.py) against the noise that is measured when one layer at a time is
quantized; other ways to get them, at what cost; and how far a profile's figures move with the number of images.

    python benchmarks/own_effect.py --model bundled|sd15 [--size 32] [--timesteps 5] [--layers 40]

'sd15' is SD 1.5's architecture with random weights, one image (two rows), `--layers` of its layers at random.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, pstdev
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel
from measuring import GUIDANCE, STEPS, Results, call_costs, pipeline, recorded
from scipy.stats import spearmanr
from torch import nn

from diffusers_ldmq import make_plan, profile_sqnr, record_calls
from diffusers_ldmq.artifacts import Profile
from diffusers_ldmq.calibration import layer_state, observe_inputs
from diffusers_ldmq.calls import Batch, Call, Recording, run, tensor_key
from diffusers_ldmq.demo import demo_captions
from diffusers_ldmq.families import find_denoiser, quantizable_layers
from diffusers_ldmq.layers import quantize_layer
from diffusers_ldmq.metrics import Power, sqnr_db
from diffusers_ldmq.noise import NoiseProbes
from diffusers_ldmq.planners import predict
from diffusers_ldmq.profiling import ProfileSettings
from diffusers_ldmq.quantization import replace_layer
from diffusers_ldmq.selections import find_selection
from diffusers_ldmq.specs import parse_scheme
from diffusers_ldmq.terminal import quiet_libraries

SCHEMES = ("w8a8", "w4a8")
PROBES = (1, 2, 4)
COUNTS, FEW = (1, 2, 4, 8, 16, 32), 4
"""Images whose figures are compared with those of the last; points of the curves, of which only the end counts."""
SEED = 7


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """A float denoiser, its recording, how it is profiled, and the layers that are measured one at a time."""

    denoiser: nn.Module
    recording: Recording
    settings: ProfileSettings
    names: tuple[str, ...]

    def batches(self, timesteps: Sequence[float]) -> list[Batch]:
        """What the profile looks at."""
        select = self.recording.only("select")
        calls = [call for call in select.calls if call.run == select.calls[0].run and call.timestep in timesteps]
        return [self.recording.batch(call, list(range(min(self.settings.images, call.images)))) for call in calls]

    def ranges(self) -> dict[str, Any]:
        """Observers of every layer's calibrating inputs, as the profile's."""
        calibrating, names = self.recording.only("calibrate"), list(quantizable_layers(self.denoiser))
        picked = list(find_selection(self.settings.selection)(calibrating, None))
        return observe_inputs(self.denoiser, calibrating.batches(picked), names, self.settings.observer)


def bundled() -> Bench:
    """The bundled model with every layer."""
    pipe = pipeline("bundled")
    denoiser = find_denoiser(pipe)[1]
    recording = recorded("bundled", pipe, "first-step").recording
    return Bench(denoiser, recording, ProfileSettings(), tuple(quantizable_layers(denoiser)))


def sd15(size: int, timesteps: int, layers: int) -> Bench:
    """SD 1.5's architecture with random weights, calls on random latents, and some of its layers."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(sample_size=size, cross_attention_dim=768, attention_head_dim=8).eval()
    tensors, calls, generator = {}, [], torch.Generator().manual_seed(SEED)
    steps = [("calibrate", 0, 999.0)]
    steps += [("select", 1, 999.0 - round(998 * k / max(timesteps - 1, 1))) for k in range(timesteps)]
    for step, (kind, number, timestep) in enumerate(steps):
        kwargs = {
            "sample": torch.randn(1, 4, size, size, generator=generator).repeat(2, 1, 1, 1),
            "timestep": torch.tensor(timestep),
            "encoder_hidden_states": torch.randn(2, 77, 768, generator=generator),
        }
        output = run(model, Batch(kwargs, torch.empty(0), timestep))
        keys = {path: tensor_key(value) for path, value in kwargs.items()}
        tensors |= {keys[path]: value for path, value in kwargs.items()} | {tensor_key(output): output}
        calls.append(Call(kind, number, max(step - 1, 0), timestep, 1, keys, {}, tensor_key(output)))
    recording = Recording(type(model).__name__, tuple(calls), tensors, {"calibrate": 1})
    names = random.Random(SEED).sample(list(quantizable_layers(model)), layers)
    return Bench(model, recording, ProfileSettings(timesteps=timesteps), tuple(names))


def profiled(on: Bench) -> dict[str, Any]:
    """Cost of a profile in calls of its own batch, by processor time, which other load on the machine changes least,
    and by the clock; and the own effects that it found."""
    first = on.recording.only("select").calls[0]
    before = call_costs(on.denoiser, on.batches([first.timestep])[0])
    cpu, wall = time.process_time(), time.perf_counter()
    profile = profile_sqnr(on.denoiser, on.recording, on.settings)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    batches = on.batches(profile.timesteps)
    after = call_costs(on.denoiser, batches[0])
    call_cpu, call = (fmean(pair) for pair in zip(before, after, strict=True))
    return {
        "timesteps": profile.timesteps,
        "rows": batches[0].output.shape[0],
        "shape": list(batches[0].output.shape),
        "threads": torch.get_num_threads(),
        "curve_points": len(profile.curve.groups),
        "seconds": wall,
        "call_seconds": call,
        "calls_by_clock": wall / call,
        "calls": cpu / call_cpu,
        "call_cpu_seconds": call_cpu,
        "own": {noise.name: {scheme: noise.own[scheme] for scheme in SCHEMES} for noise in profile.layers},
    }


def exact(on: Bench, name: str, batches: Sequence[Batch], ranges: dict[str, Any]) -> dict[str, list[float]]:
    """Scheme -> [T] noise power at the output with that layer alone quantized."""
    layer, found = quantizable_layers(on.denoiser)[name], {}
    for scheme in SCHEMES:
        state = layer_state(name, layer, parse_scheme(scheme), ranges[name])
        replace_layer(on.denoiser, name, quantize_layer(layer, state))
        found[scheme] = [Power.between(batch.output, run(on.denoiser, batch)).noise for batch in batches]
        replace_layer(on.denoiser, name, layer)
    return found


def joint(on: Bench, batches: Sequence[Batch], ranges: dict[str, Any]) -> dict[str, list[float]]:
    """Scheme -> [T] noise power with all measured layers quantized together."""
    layers, found = quantizable_layers(on.denoiser), {}
    for scheme in SCHEMES:
        for name in on.names:
            state = layer_state(name, layers[name], parse_scheme(scheme), ranges[name])
            replace_layer(on.denoiser, name, quantize_layer(layers[name], state))
        found[scheme] = [Power.between(batch.output, run(on.denoiser, batch)).noise for batch in batches]
        for name in on.names:
            replace_layer(on.denoiser, name, layers[name])
    return found


def agreement(estimated: Sequence[float], truth: Sequence[float]) -> dict[str, float]:
    """How well estimates of own effects agree with what was measured; layers without any effect are left out."""
    pairs = [(one, other) for one, other in zip(estimated, truth, strict=True) if one > 0 and other > 0]
    errors = [sqnr_db(one, other) for one, other in pairs]
    rank = spearmanr([one for one, _ in pairs], [other for _, other in pairs])
    return {
        "layers": len(pairs),
        "spearman": float(rank.statistic),  # pyright: ignore[reportAttributeAccessIssue]
        "mean_error_db": fmean(errors),
        "spread_db": pstdev(errors),
        "median_abs_error_db": median(map(abs, errors)),
        "worst_abs_error_db": max(map(abs, errors)),
        "error_of_the_sum_db": sqnr_db(sum(one for one, _ in pairs), sum(other for _, other in pairs)),
    }


def probed(on: Bench, batches: Sequence[Batch], ranges: dict[str, Any], passes: int, call: float) -> dict[str, Any]:
    """Own effects from so many probing passes, and their cost in calls (call: processor seconds of one)."""
    probes = NoiseProbes(dict(quantizable_layers(on.denoiser)), ranges, on.settings.schemes)
    generator = torch.Generator().manual_seed(SEED)

    start = time.process_time()
    for batch in batches:
        probes.measure(on.denoiser, batch, generator, passes)
    calls = (time.process_time() - start) / call
    noises = {noise.name: noise for noise in probes.result(tuple(batch.timestep for batch in batches))}
    own = {name: {scheme: noises[name].own[scheme] for scheme in SCHEMES} for name in on.names}
    return {"calls": calls, "own": own}


def compared(on: Bench, profile: dict[str, Any], layers: dict[str, Any]) -> dict[str, Any]:
    """Against the exact effects at all timesteps, per scheme: the profile's, and exact ones at fewer timesteps with
    their cost in calls."""
    steps, found = len(profile["timesteps"]), {}
    for scheme in SCHEMES:
        truth = [sum(layers[name][scheme]) for name in on.names]
        found[f"{scheme}, the profile's"] = agreement(summed(on, profile, scheme), truth)
        for count in range(1, steps + 1):
            kept = [round(k * (steps - 1) / max(count - 1, 1)) for k in range(count)]
            part = [sum(layers[name][scheme][k] for k in kept) for name in on.names]
            calls = len(on.names) * count
            found[f"{scheme}, exact at {count} of {steps} timesteps"] = {"calls": calls, **agreement(part, truth)}
    return found


def compared_probes(on: Bench, probes: dict[str, Any], layers: dict[str, Any]) -> dict[str, Any]:
    """Own effects of some probing passes against the exact ones; the cost in calls is that of all schemes."""
    truth = {scheme: [sum(layers[name][scheme]) for name in on.names] for scheme in SCHEMES}
    calls = {"calls": probes["calls"]}
    return {scheme: calls | agreement(summed(on, probes, scheme), truth[scheme]) for scheme in SCHEMES}


def summed(on: Bench, source: dict[str, Any], scheme: str) -> list[float]:
    """Own effects over all timesteps."""
    return [sum(source["own"][name][scheme]) for name in on.names]


def additivity(on: Bench, results: Results, layers: dict[str, Any]) -> dict[str, Any]:
    """Sums of effects over the noise that the layers make together, in dB; 0 = they add up."""
    found = {}
    for scheme in SCHEMES:
        together = sum(results.rows["joint"][scheme])
        parts = sum(sum(layers[name][scheme]) for name in on.names)
        own = sum(sum(results.rows["profile"]["own"][name][scheme]) for name in on.names)
        found[scheme] = {"exact_db": sqnr_db(parts, together), "own_db": sqnr_db(own, together)}
    return found


def figures(profile: Profile, schemes: dict[str, str]) -> dict[str, Any]:
    """The figures of a profile whose stability is asked for, in dB; schemes: of a fixed hybrid plan."""
    signal = sum(profile.curve.signal)
    return {
        "relative SQNR": [noise.power("w8a8").sqnr_db for noise in profile.layers],
        "own effect": [sqnr_db(signal, sum(noise.own["w8a8"])) for noise in profile.layers],
        "end of the curve": [sqnr_db(1.0, profile.curve.nsr()[-1])],
        "predicted output SQNR": [predict(profile).sqnr_db(schemes)],
    }


def convergence(on: Bench) -> dict[str, Any]:
    """Figure -> number of images (each at the profile's timesteps) -> median absolute change in dB against the most."""
    pipe, options = pipeline("bundled"), {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    captions = demo_captions()
    parts = (captions[:8], captions[8:16], captions, captions[24:])
    inputs = [{"prompt": part, **options} for part in parts]
    recording = record_calls(pipe, inputs, selection="first-step")
    settings = replace(on.settings, groups=FEW, schemes=("w8a16", "w8a8", "w8a8-dyn"))
    profiles = {
        count: profile_sqnr(find_denoiser(pipe)[1], recording, replace(settings, images=count)) for count in COUNTS
    }
    schemes = make_plan(profiles[COUNTS[-1]]).quantized()
    rows = {count: figures(profile, schemes) for count, profile in profiles.items()}
    most = rows[COUNTS[-1]]
    return {
        name: {
            str(count): median(abs(a - b) for a, b in zip(row[name], most[name], strict=True))
            for count, row in rows.items()
        }
        for name in most
    }


def print_probes(on: Bench, results: Results, layers: dict[str, Any]) -> None:
    """Own effects of few and many passes."""
    profile, ranges = results.rows["profile"], on.ranges()
    batches, call = on.batches(profile["timesteps"]), profile["call_cpu_seconds"]
    for passes in PROBES:
        name = f"{passes} probing passes"
        probes = results.row(name, lambda n=passes: probed(on, batches, ranges, n, call))
        rows = results.row(f"agreement, {name}", lambda p=probes: compared_probes(on, p, layers))
        for label, row in rows.items():
            show(f"{label}, {name}", row)


def show(label: str, row: dict[str, float]) -> None:
    """One row for people."""
    typer.echo(f"{label:36s} " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()))


def main(
    model: Annotated[str, typer.Option(help="bundled | sd15")] = "bundled",
    size: Annotated[int, typer.Option(min=8, help="sd15: of the latents")] = 32,
    timesteps: Annotated[int, typer.Option(min=1, help="sd15: profiled ones")] = 5,
    layers: Annotated[int, typer.Option(min=2, help="sd15: measured one at a time")] = 40,
) -> None:
    """Measure and print."""
    quiet_libraries()
    on = bundled() if model == "bundled" else sd15(size, timesteps, layers)
    results, single = Results(f"own_effect-{model}"), Results(f"own_effect-{model}-layers")
    profile = results.row("profile", lambda: profiled(on))
    typer.echo(f"profile: {profile['calls']:.0f} calls of {profile['call_seconds']:.2f} s")
    batches, ranges = on.batches(profile["timesteps"]), on.ranges()
    for name in on.names:
        single.row(name, lambda n=name: exact(on, n, batches, ranges))
    results.row("joint", lambda: joint(on, batches, ranges))
    typer.echo(str(results.row("additivity", lambda: additivity(on, results, single.rows))))
    for label, row in results.row("agreement", lambda: compared(on, profile, single.rows)).items():
        show(label, row)
    if model == "bundled":
        print_probes(on, results, single.rows)
        for name, row in results.row("convergence", lambda: convergence(on)).items():
            typer.echo(f"{name:22s} " + ", ".join(f"{count} images {value:.2f} dB" for count, value in row.items()))


if __name__ == "__main__":
    typer.run(main)
