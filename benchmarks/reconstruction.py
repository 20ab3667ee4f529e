"""What each part of block reconstruction brings: held-out output SQNR at W4A8 and W8A8 of one model.

    python benchmarks/reconstruction.py [--model bundled]

Rows: which steps the samples come from (TDAC, uniform, normal, first step) at equal numbers of samples, for ranges
alone and for learning; the losses (block + layers, block alone, layers alone; plain or Hessian); the rounding
(straight through, AdaRound with and without its push to a decision). All learn for as long, and briefly, so that rows
can be compared, and block by block alone but for "then all scales together"; the presets (`--only preset`) learn as
`ldmq quantize --reconstruct quick` and `full` do. Besides, what corrections of the output or of the time path would
bring (PTQD, TFMQ-DM).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import typer
from eda_dm_rows import FOLDERS, plan_of, recording_of
from measuring import Results, pipeline, timed

from diffusers_ldmq import Recording, calibrate, make_plan, verify
from diffusers_ldmq.artifacts import Calibration, Report
from diffusers_ldmq.calls import run
from diffusers_ldmq.families import find_denoiser, layer_table
from diffusers_ldmq.learning import LearningSettings
from diffusers_ldmq.metrics import Power, total
from diffusers_ldmq.quantization import quantized_for_now
from diffusers_ldmq.reconstruction import PRESETS, ReconstructionSettings, reconstruct
from diffusers_ldmq.terminal import quiet_libraries, stages

BRIEF = ReconstructionSettings(LearningSettings(iterations=60), samples=64, selection="tdac", together=0)
SELECTIONS = ("tdac", "uniform", "normal", "first-step")
SOFT = {"rounding": "soft", "weight_rate": 0.1}
LEARNING: dict[str, dict[str, Any]] = {
    "block + layers, gamma 0.8": {},
    "block alone, gamma 0": {"gamma": 0.0},
    "layers alone": {"block": 0.0, "gamma": 1.0},
    "half of the inputs unrounded or float (QDrop)": {"drop": 0.5, "mix": 0.5},
    "without scales and biases": {"vector_rate": 0.0},
    "AdaRound, pushed to decide": {**SOFT, "decide": 30.0},
    "AdaRound, not pushed": {**SOFT, "decide": 0.0},
    "AdaRound, not pushed, rate 0.5": {**SOFT, "decide": 0.0, "weight_rate": 0.5},
}


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """A float denoiser and its recording."""

    denoiser: Any
    recording: Recording
    progress: Callable[[str], Any]

    def start(self, scheme: str, selection: str = "tdac") -> Calibration:
        """Rounding to nearest, MSE scales."""
        plan = plan_of(self.denoiser, scheme)
        return calibrate(self.denoiser, plan, self.recording, selection=selection, observer="mse")

    def report(self, calibration: Calibration) -> Report:
        with quantized_for_now(self.denoiser, calibration):
            return verify(self.denoiser, self.recording)

    def ranges(self, scheme: str, selection: str) -> dict[str, Any]:
        """Ranges alone, as many samples as there are trajectories."""
        return {"output_sqnr_db": self.report(self.start(scheme, selection)).sqnr_db}

    def learned(self, name: str, settings: ReconstructionSettings, scheme: str = "w4a8") -> dict[str, Any]:
        """A reconstruction that starts from the same ranges as all others."""
        start = self.start(scheme)
        (found, units), seconds = timed(
            lambda: reconstruct(self.denoiser, start, self.recording, settings, progress=self.progress(name))
        )
        gaps = [unit.soft_db - unit.after_db for unit in units]
        return {
            "output_sqnr_db": self.report(found).sqnr_db,
            "mean_gap_db": sum(gaps) / len(gaps),
            "seconds": round(seconds, 1),
        }

    def affine_output(self, scheme: str) -> dict[str, Any]:
        """PTQD's correction of the mean and the correlated part, per timestep: fitted on calibrating calls."""
        before, after = list[Power](), list[Power]()
        fits: dict[float, tuple[float, float]] = {}
        with quantized_for_now(self.denoiser, self.start(scheme)):
            for timestep in self.recording.timesteps():
                calls = self.recording.only("calibrate").at((timestep,)).calls
                pairs = [self._pair(call) for call in calls]
                fits[timestep] = fit_affine(torch.cat([q for q, _ in pairs]), torch.cat([f for _, f in pairs]))
            for call in self.recording.only("verify").calls:
                quantized, exact = self._pair(call)
                gain, bias = fits[call.timestep]
                before.append(Power.between(exact, quantized))
                after.append(Power.between(exact, gain * quantized + bias))
        return {"before_db": total(before).sqnr_db, "after_db": total(after).sqnr_db}

    def _pair(self, call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.recording.batch(call, list(range(min(call.images, 16))))
        return run(self.denoiser, batch), batch.output

    def time_path(self, scheme: str) -> dict[str, Any]:
        """TFMQ-DM's table of time embeddings makes that path exact: what quantizing it costs, the rest the same."""
        table = layer_table(self.denoiser)
        ends = tuple(i.name for i in table.layers if i.keep_float and "time" not in i.name and "emb" not in i.name)
        plan = make_plan(table, planner="uniform", scheme=scheme, keep_float=ends)
        found = calibrate(self.denoiser, plan, self.recording, selection="tdac", observer="mse")
        return {"quantized_db": self.report(found).sqnr_db, "table_db": self.report(self.start(scheme)).sqnr_db}


def fit_affine(quantized: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(gain, bias) with the least squared error of gain * quantized + bias."""
    q, f = quantized.double().flatten(), exact.double().flatten()
    spread = q - q.mean()
    gain = float((spread * (f - f.mean())).sum() / spread.square().sum())
    return gain, float(f.mean() - gain * q.mean())


def rows(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every row of the table by its name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for scheme in ("w8a8", "w4a8"):
        for selection in SELECTIONS:
            found[f"{scheme} ranges: {selection}"] = lambda c=scheme, s=selection: bench.ranges(c, s)
        found[f"{scheme} affine output (PTQD)"] = lambda c=scheme: bench.affine_output(c)
        found[f"{scheme} time path (TFMQ-DM)"] = lambda c=scheme: bench.time_path(c)
    for name, change in LEARNING.items():
        settings = replace(BRIEF, learning=replace(BRIEF.learning, **change))
        found[f"w4a8 learned: {name}"] = lambda n=name, s=settings: bench.learned(n, s)
    others = {
        "Hessian": {"weighting": "hessian"},
        "then all scales together": {"together": 40, "together_samples": 512},
    }
    for name, change in others.items():
        settings = replace(BRIEF, **change)
        found[f"w4a8 learned: {name}"] = lambda n=name, s=settings: bench.learned(n, s)
    for selection in SELECTIONS[1:]:
        chosen = replace(BRIEF, selection=selection)
        found[f"w4a8 learned on: {selection}"] = lambda n=selection, s=chosen: bench.learned(n, s)
    for name, preset in PRESETS.items():
        found[f"w4a8 preset: {name}"] = lambda n=name, s=preset: bench.learned(n, s)
    return found


def main(
    model: Annotated[str, typer.Option(help=" | ".join(FOLDERS))] = "bundled",
    only: Annotated[str, typer.Option(help="rows whose name contains this")] = "",
) -> None:
    """Measure and print."""
    quiet_libraries()
    results, pipe = Results(f"reconstruction-{model}"), pipeline(model)
    recording = recording_of(model, pipe)
    with stages() as told:
        for name, measure in rows(Bench(find_denoiser(pipe)[1], recording, told.of)).items():
            if only in name:
                figures = results.row(name, measure)
                told.bars.console.print(f"{name:48s} " + "  ".join(f"{k} {v:.2f}" for k, v in figures.items()))


if __name__ == "__main__":
    typer.run(main)
