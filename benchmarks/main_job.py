"""What the hybrid plan buys on the bundled model, beside the papers' baseline and beside bfloat16.

20 DDIM steps, guidance 5; 32 captions to record, 8 other prompts at equal seeds to draw; output SQNR against the
float32 model on captions and seeds that nothing before has seen. Rows:

* float bf16: the whole pipeline in bfloat16;
* uniform W8A8: every Linear and Conv2d, static symmetric min-max ranges from the first step;
* hybrid: the defaults of `ldmq quantize` in float32.

    python benchmarks/main_job.py [--out result.json] [--sheet pictures.png]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from diffusers_ldmq import Recording, Report, calibrate, make_plan, quantize, verify
from diffusers_ldmq.backends import cpu_kind
from diffusers_ldmq.demo import demo_model, demo_prompts
from diffusers_ldmq.demo.job import GUIDANCE, PICTURE_SEED, STEPS, recorded_inputs
from diffusers_ldmq.families import find_denoiser, layer_table
from diffusers_ldmq.pictures import PictureScores, comparison_sheet, picture_scores
from diffusers_ldmq.pipeline import Outcome, Settings, load_pipeline, quantize_pipeline
from diffusers_ldmq.sampling import Sampling, sample_pictures
from diffusers_ldmq.serialization import write_json
from diffusers_ldmq.summary import mb, sqnr_data
from diffusers_ldmq.terminal import quiet_libraries

REFERENCE, UNIFORM = "float fp32", "uniform W8A8"


@dataclass(frozen=True, slots=True)
class Row:
    """One version of the model."""

    report: Report
    pictures: list[Image.Image]
    scores: PictureScores


def main(
    out: Annotated[Path | None, typer.Option(help="also write the numbers as JSON")] = None,
    sheet: Annotated[Path | None, typer.Option(help="also write all pictures side by side")] = None,
) -> None:
    """Measure and print the table."""
    quiet_libraries()
    pipe = pipeline()
    reference = draw(pipe)
    outcome = quantize_pipeline(pipe, recorded_inputs(pipe), Settings(dtype=torch.float32))
    rows = {
        "float bf16": row(pipeline(torch.bfloat16), outcome.recording, reference),
        UNIFORM: row(uniform(outcome.recording), outcome.recording, reference),
        "hybrid": Row(outcome.report, hybrid := draw(pipe), picture_scores(reference, hybrid)),
    }
    Console().print(table(rows, outcome))
    if sheet:
        pictures = {REFERENCE: reference, **{name: row.pictures for name, row in rows.items()}}
        comparison_sheet(sheet, pictures, demo_prompts())
    if out:
        write_json(out, {"cpu": cpu_kind(), "torch": torch.__version__, "rows": data(rows)})


def pipeline(dtype: torch.dtype = torch.float32) -> Any:
    """The bundled model, quiet."""
    pipe = load_pipeline(demo_model(), dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any) -> list[Image.Image]:
    """The 8 prompts at the seeds that every row uses."""
    return sample_pictures(pipe, demo_prompts(), Sampling(STEPS, GUIDANCE, PICTURE_SEED))


def row(pipe: Any, recording: Recording, reference: list[Image.Image]) -> Row:
    """A pipeline, measured."""
    pictures = draw(pipe)
    return Row(verify(find_denoiser(pipe)[1], recording), pictures, picture_scores(reference, pictures))


def uniform(recording: Recording) -> Any:
    """The papers' baseline."""
    pipe = pipeline()
    _, denoiser = find_denoiser(pipe)
    plan = make_plan(layer_table(denoiser), planner="uniform")
    quantize(denoiser, calibrate(denoiser, plan, recording, observer="minmax"))
    return pipe


def table(rows: dict[str, Row], outcome: Outcome) -> Table:
    """The rows for people."""
    facts = outcome.report.calibration
    shown = Table(
        title=f"bundled model, {STEPS} DDIM steps, guidance {GUIDANCE:g}",
        caption=f"hybrid: {outcome.plan.counts()}, from block {outcome.plan.reasons['cut_off']}; "
        f"{facts['forward_calls']} calibrating denoiser calls on {facts['samples']} first-step samples; "
        f"CPU {cpu_kind()}, torch {torch.__version__}",
    )
    for name in ("", "output SQNR", "worst step", "bytes", "of uniform", "int8 share", "PSNR (worst)", "SSIM (worst)"):
        shown.add_column(name)
    for name, row in rows.items():
        report, scores = row.report, row.scores
        shown.add_row(
            name,
            f"{report.sqnr_db:.2f} dB",
            f"{report.worst()[1]:.2f} dB",
            mb(report.bytes),
            f"{report.bytes / rows[UNIFORM].report.bytes:.3f}x",
            f"{100 * report.int8_macs:.1f} %",
            f"{scores.mean_psnr_db:.2f} ({scores.worst_psnr_db:.2f}) dB",
            f"{scores.mean_ssim:.4f} ({scores.worst_ssim:.4f})",
        )
    return shown


def data(rows: dict[str, Row]) -> dict[str, Any]:
    """The rows as plain JSON data."""
    return {
        name: {
            "output_sqnr_db": sqnr_data(row.report),
            "bytes": row.report.bytes,
            "ratio_uniform": row.report.bytes / rows[UNIFORM].report.bytes,
            "int8_macs_share": row.report.int8_macs,
            "schemes": row.report.schemes,
            "pictures": row.scores.data(),
            "psnr_db": row.scores.psnr_db,
        }
        for name, row in rows.items()
    }


if __name__ == "__main__":
    typer.run(main)
