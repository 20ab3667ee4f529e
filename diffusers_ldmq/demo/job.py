"""The whole job on the bundled model, from recording to pictures, into one folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..artifacts import Report
from ..backends import cpu_kind
from ..calibration import calibrate
from ..calls import Recording
from ..errors import OutputError
from ..families import find_denoiser, layer_table
from ..inputs import default_inputs
from ..output import folder_beside, refuse_folder
from ..pictures import comparison_sheet, picture_scores
from ..pipeline import (
    Outcome,
    QuantizedLDMPipeline,
    Settings,
    denoiser_loader,
    load_pipeline,
    quantize_pipeline,
    save_pipeline,
)
from ..planning import make_plan
from ..plots import plot_sqnr
from ..progress import StageProgress as Progress
from ..quantization import quantize
from ..report import ReportInputs, write_report
from ..sampling import Sampling, sample_pictures
from ..serialization import write_json
from ..summary import FLOAT, FLOAT_BEST, QUANTIZED, QUANTIZED_BEST, Summary, summary_data
from ..timing import StepTimes, fastest_float, layer_times, seconds_per_step
from ..verification import floating_dtype, verify
from . import MODEL, demo_captions, demo_model, demo_prompts

TIMED = ("w8a8", "w8a8-dyn", "w8a16")
"""Schemes that the default plan uses."""
MARKER = ".ldmq-demo"
"""The file by which a later demo knows that it may replace the folder."""
STEPS, GUIDANCE = 20, 5.0
PICTURE_SEED = 1000
"""Seed of the first picture; the recorded ones begin at 0."""
DTYPE = torch.float32
"""The same on every CPU, so that the demo's numbers do not depend on the machine."""


def refuse_demo_folder(folder: Path) -> None:
    """Raise OutputError unless the demo may write there: a new or empty folder, or one that a demo wrote."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise OutputError(
            f"{folder}: the folder exists, is not empty, and no earlier demo wrote it; name another one with --out"
        )
    refuse_folder(folder, overwrite=True)


def run_demo(folder: Path, progress: Progress) -> Summary:
    """Record, profile, plan, calibrate, quantize, verify, save, load again and sample 8 prompts with both models.

    Leaves in `folder`: quantized/ (an ordinary diffusers folder), report.html, plan.json, profile.json,
    comparison.png, sqnr.png and summary.json.
    Raises OutputError if the folder is neither new nor an earlier demo's, or cannot be written.
    """
    refuse_demo_folder(folder)
    sampling = Sampling(STEPS, GUIDANCE, PICTURE_SEED)
    pipe = load_pipeline(demo_model(), dtype=DTYPE)
    pipe.set_progress_bar_config(disable=True)
    before = sample_pictures(pipe, demo_prompts(), sampling, progress=_stage(progress, "sample float"))
    outcome = quantize_pipeline(pipe, recorded_inputs(pipe), Settings(dtype=DTYPE), progress=progress)
    reload = denoiser_loader(demo_model())
    uniform = uniform_report(reload(), outcome.recording)
    with folder_beside(folder, overwrite=True) as beside:
        saved = beside / "quantized"
        save_pipeline(pipe, saved, outcome=outcome)
        loaded = QuantizedLDMPipeline.from_pretrained(saved)  # what is shown below is what the folder holds
        loaded.set_progress_bar_config(disable=True)
        after = sample_pictures(loaded, demo_prompts(), sampling, progress=_stage(progress, "sample quantized"))
        times = _times(loaded, saved, reload, outcome, _stage(progress, "time steps"))
        summary = Summary(
            model=MODEL,
            denoiser=outcome.recording.denoiser,
            plan=outcome.plan,
            report=outcome.report,
            uniform=uniform,
            times=times,
            pictures=picture_scores(before, after),
            file_bytes=component_bytes(saved, loaded),
            cpu=cpu_kind(),
        )
        pictures = {"float": before, "quantized": after}
        comparison_sheet(beside / "comparison.png", pictures, demo_prompts())
        _write_figures(beside, outcome, uniform)
        write_report(beside / "report.html", _report_inputs(outcome, uniform, pictures, reload))
        write_json(beside / "summary.json", summary_data(summary))
        (beside / MARKER).write_text("Written by `ldmq demo`, which may replace this folder.\n", encoding="utf-8")
    return summary


def recorded_inputs(pipe: Any) -> list[dict[str, Any]]:
    """Arguments to record the bundled model with: its 32 captions at the demo's steps and guidance."""
    inputs = default_inputs(pipe, demo_captions(), steps=STEPS)
    return [{**entry, "guidance_scale": GUIDANCE} for entry in inputs]


def uniform_report(denoiser: nn.Module, recording: Recording, scheme: str = "w8a8") -> Report:
    """Quantize a float denoiser, in place, as the papers' baseline does (every Linear and Conv2d, static symmetric
    min-max ranges), and measure it."""
    plan = make_plan(layer_table(denoiser), planner="uniform", scheme=scheme)
    calibration = calibrate(denoiser, plan, recording, observer="minmax")
    return verify(quantize(denoiser, calibration), recording)


def component_bytes(folder: Path, pipe: Any) -> int:
    """Bytes of the saved denoiser's folder (weights, scales, manifest) and of plan.json."""
    component, _ = find_denoiser(pipe)
    files = [*(folder / component).iterdir(), folder / "plan.json"]
    return sum(file.stat().st_size for file in files)


def _times(
    loaded: Any, saved: Path, reload: Callable[[], nn.Module], outcome: Outcome, progress: Callable[[int, int], None]
) -> StepTimes:
    batch = outcome.recording.batch(outcome.recording.only("verify").calls[0])
    progress(0, 2)
    best = fastest_float(reload(), batch)
    versions = {FLOAT: reload(), FLOAT_BEST: best, QUANTIZED: find_denoiser(loaded)[1]}
    if floating_dtype(best) != DTYPE:
        other = QuantizedLDMPipeline.from_pretrained(saved, dtype=floating_dtype(best))
        versions[QUANTIZED_BEST] = find_denoiser(other)[1]
    progress(1, 2)
    times = seconds_per_step(versions, batch)
    progress(2, 2)
    return times


def _write_figures(folder: Path, outcome: Outcome, uniform: Report) -> None:
    assert outcome.profile is not None  # the hybrid planner always has one
    outcome.plan.save(folder / "plan.json")
    outcome.profile.save(folder / "profile.json")
    reports = {f"{outcome.plan.planner} plan": outcome.report, "every layer W8A8": uniform}
    plot_sqnr(folder / "sqnr.png", outcome.profile, outcome.plan, reports)


def _report_inputs(
    outcome: Outcome, uniform: Report, pictures: dict[str, list[Image.Image]], reload: Callable[[], nn.Module]
) -> ReportInputs:
    assert outcome.profile is not None
    batch = outcome.recording.batch(outcome.recording.only("verify").calls[0])
    return ReportInputs(
        model=MODEL,
        table=outcome.profile.table,
        plan=outcome.plan,
        report=outcome.report,
        profile=outcome.profile,
        times=layer_times(reload, batch, TIMED, DTYPE),
        others={"every layer W8A8": uniform},
        pictures=pictures,
        captions=tuple(demo_prompts()),
    )


def _stage(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, whole: progress(name, done, whole)
