"""Which observer and which samples calibrate best: output SQNR of the bundled model on held-out calls for every
observer and selection, uniform W8A8 of every layer and the same with the family's layers kept float.

    python benchmarks/observers.py [--json OUT]
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline

from diffusers_ldmq import calibrate, default_inputs, make_plan, record_calls, verify
from diffusers_ldmq.demo import demo_captions, demo_model
from diffusers_ldmq.families import find_denoiser, layer_table
from diffusers_ldmq.observers import OBSERVERS
from diffusers_ldmq.quantization import quantized_for_now
from diffusers_ldmq.selections import SELECTIONS

app = typer.Typer(add_completion=False)


@app.command()
def main(json_out: Annotated[Path | None, typer.Option("--json", help="also write the figures there")] = None) -> None:
    """Print one row per observer, selection and set of float layers."""
    pipe: Any = DiffusionPipeline.from_pretrained(demo_model(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    inputs = [{**entry, "guidance_scale": 5.0} for entry in default_inputs(pipe, demo_captions(), steps=20)]
    recording = record_calls(pipe, inputs, selection="tdac")  # every step, and what TDAC looks at
    denoiser = find_denoiser(pipe)[1]
    table = layer_table(denoiser)
    kept = tuple(info.name for info in table.layers if info.keep_float)
    rows = []
    for label, keep_float in (("every layer", "none"), ("default float layers", kept)):
        plan = make_plan(table, planner="uniform", keep_float=keep_float)
        for observer in OBSERVERS:
            for selection in SELECTIONS:
                calibration = calibrate(denoiser, plan, recording, selection=selection, observer=observer)
                with quantized_for_now(denoiser, calibration):
                    report = verify(denoiser, recording)
                timestep, worst = report.worst()
                rows.append((label, observer, selection, round(report.sqnr_db, 2), round(worst, 2), timestep))
                typer.echo("{:22s} {:14s} {:11s} {:6.2f} dB, worst {:6.2f} dB at t={:g}".format(*rows[-1]))
    if json_out is not None:
        json_out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app()
