"""Which steps TDAC (EDA-DM) chooses for a trained model, as a picture, and output SQNR on held-out calls with static
ranges from each selection at equal N: every layer in w8a8, and the default float layers kept.

    python benchmarks/tdac.py [--model bundled|unconditional] [--picture OUT.png] [--strength 1.0] [--radius 0.3]

Rows are kept in benchmarks/results/tdac-MODEL.json; a repeated command goes on where it stopped.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from measuring import FOLDERS, Results, pipeline, recorded
from torch import nn

from diffusers_ldmq import Recording, calibrate, make_plan, verify
from diffusers_ldmq.families import find_denoiser, layer_table
from diffusers_ldmq.quantization import quantized_for_now
from diffusers_ldmq.selection_plots import chosen_steps
from diffusers_ldmq.selections import SELECTIONS, TDAC, Selection, TDACScores
from diffusers_ldmq.serialization import to_json
from diffusers_ldmq.terminal import quiet_libraries

app = typer.Typer(add_completion=False)
SEEDS = (0, 1, 2)
"""Of the trajectories' order: how far chance moves a figure of TDAC."""
STRENGTHS = (1.0, 1.2, 5.0)
"""All published lambdas."""


def scored(recording: Recording, selection: TDAC) -> TDACScores:
    """TDAC's scores, one sample per calibrating trajectory."""
    assert recording.features is not None
    trajectories = {sample.trajectory for sample in recording.only("calibrate").samples()}
    return selection.scores(recording.features, len(trajectories))


def contenders() -> dict[str, Selection]:
    """Name -> selection: every registered one, and TDAC with other seeds, strengths and the published radius."""
    found = dict(SELECTIONS.items())
    found |= {f"tdac, seed {seed}": TDAC(seed=seed) for seed in SEEDS[1:]}
    found |= {f"tdac, strength {strength:g}": TDAC(strength=strength) for strength in STRENGTHS[1:]}
    return found | {"tdac, radius 0.3": TDAC(radius=0.3)}


def measured(denoiser: nn.Module, recording: Recording, selection: Selection, keep_float: str) -> dict[str, Any]:
    """Output SQNR of uniform W8A8 with ranges from the samples of one selection."""
    table = layer_table(denoiser)
    kept = ",".join(info.name for info in table.layers if info.keep_float)
    plan = make_plan(table, planner="uniform", keep_float=kept if keep_float == "default" else "none")
    calibration = calibrate(denoiser, plan, recording, selection=selection, observer="mse")
    with quantized_for_now(denoiser, calibration):
        report = verify(denoiser, recording)
    timestep, worst = report.worst()
    return {
        "samples": calibration.samples,
        "output_sqnr_db": round(report.sqnr_db, 2),
        "worst_db": round(worst, 2),
        "at": timestep,
    }


@app.command()
def main(
    model: Annotated[str, typer.Option(help=" | ".join(FOLDERS))] = "bundled",
    picture: Annotated[Path | None, typer.Option(help="PNG of density, variety and counts over the steps")] = None,
    strength: Annotated[float, typer.Option(help="of the picture: lambda")] = 1.0,
    quantile: Annotated[float, typer.Option(help="of the picture: of the pairwise differences")] = TDAC().quantile,
    radius: Annotated[float | None, typer.Option(help="of the picture: an absolute one instead")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="of the picture: N (one per trajectory)")] = None,
) -> None:
    """Draw, measure and print."""
    quiet_libraries()
    results, pipe = Results(f"tdac-{model}"), pipeline(model)
    denoiser, recording = find_denoiser(pipe)[1], recorded(model, pipe, "tdac").recording
    assert recording.features is not None
    if picture is not None:
        chosen = TDAC(strength=strength, quantile=quantile, radius=radius)
        shown = chosen.scores(recording.features, samples) if samples else scored(recording, chosen)
        picture.write_bytes(chosen_steps(shown).png(titled=True))
    results.row("scores", lambda: to_json(scored(recording, TDAC())))
    for keep_float in ("none", "default"):
        for name, selection in contenders().items():
            row = results.row(
                f"{keep_float} float: {name}",
                lambda s=selection, k=keep_float: measured(denoiser, recording, s, k),
            )
            typer.echo(
                f"{keep_float:8s} {name:20s} N={row['samples']} {row['output_sqnr_db']:6.2f} dB, "
                f"worst {row['worst_db']:6.2f} dB at t={row['at']:g}"
            )


if __name__ == "__main__":
    app()
