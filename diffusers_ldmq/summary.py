"""What a quantization run comes down to: one table for the terminal, the same numbers as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from .artifacts import TOGETHER, Plan, Reconstructed, Report
from .companions import Companion
from .metrics import told_db
from .pictures import PictureScores
from .timing import StepTime, StepTimes

FLOAT, FLOAT_BEST = "float", "float, fastest dtype"
QUANTIZED, QUANTIZED_BEST = "quantized", "quantized, fastest dtype"
"""Names of the versions in Summary.times."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The numbers of one run; None = not measured.

    uniform: report of the same model with every layer in the low-precision scheme; cpu: kind of CPU that was timed;
    file_bytes: of the denoiser's folder as saved, plan and scales included; companions: quantized models beside it.
    """

    model: str
    denoiser: str
    plan: Plan
    report: Report
    uniform: Report | None = None
    times: StepTimes | None = None
    pictures: PictureScores | None = None
    file_bytes: int | None = None
    cpu: str | None = None
    companions: tuple[Companion, ...] = ()


def summary_data(summary: Summary) -> dict[str, Any]:
    """The summary as plain JSON data, the unit in every name."""
    report = summary.report
    data: dict[str, Any] = {
        "model": summary.model,
        "denoiser": summary.denoiser,
        "planner": summary.plan.planner,
        "target": summary.plan.target,
        "dtype": report.dtype,
        "size": size_data(report, summary.file_bytes),
        "output_sqnr_db": sqnr_data(report),
        "predicted_output_sqnr_db": summary.plan.predicted_sqnr_db,
        "speedup": report.speedup,
        "corrections": [trial for trial in report.corrections if trial.kept],
        "reconstruction": report.reconstruction,
        "int8_macs_share": report.int8_macs,
        "schemes": report.schemes,
        "backends": report.backends,
        "calibration": report.calibration,
    }
    if summary.uniform:
        data["uniform_output_sqnr_db"] = sqnr_data(summary.uniform)
    if summary.times:
        data["seconds_per_step"] = _times_data(summary.times, summary.cpu)
    if summary.pictures:
        data["pictures"] = summary.pictures.data()
    if summary.companions:
        data["components"] = companions_data(summary.companions)
    return data


def companions_data(found: Sequence[Companion]) -> dict[str, Any]:
    """Bytes and schemes of the quantized models beside the denoiser, by name."""
    return {
        one.name: {"class": one.kind, "schemes": one.schemes, "fp32_bytes": one.fp32_bytes, "bytes": one.bytes}
        for one in found
    }


def companion_lines(found: Sequence[Companion]) -> list[tuple[str, str, str]]:
    """For each quantized model beside the denoiser: its name, its size as fp32, and size and layers now."""
    return [(one.name, f"{mb(one.fp32_bytes)} fp32", _companion_told(one)) for one in found]


def _companion_told(one: Companion) -> str:
    layers = ", ".join(f"{count} {scheme}" for scheme, count in one.schemes.items())
    return f"{mb(one.bytes)} = {one.bytes / one.fp32_bytes:.3f}x of fp32; {layers}; not in the SQNR"


def size_data(report: Report, file_bytes: int | None = None) -> dict[str, Any]:
    """Bytes of the denoiser before and after, and the ratios to fp32 and fp16."""
    data: dict[str, Any] = {
        "fp32_bytes": report.fp32_bytes,
        "fp16_bytes": report.fp32_bytes // 2,
        "bytes": report.bytes,
        "ratio_fp32": report.bytes / report.fp32_bytes,
        "ratio_fp16": 2 * report.bytes / report.fp32_bytes,
    }
    if file_bytes is not None:
        data["file_bytes"] = file_bytes
        data["file_ratio_fp32"] = file_bytes / report.fp32_bytes
    return data


def sqnr_data(report: Report) -> dict[str, float]:
    """Output SQNR over all recorded calls and at the worst timestep."""
    timestep, db = report.worst()
    return {"all": report.sqnr_db, "worst": db, "worst_timestep": timestep}


def _times_data(times: StepTimes, cpu: str | None) -> dict[str, Any]:
    versions = {
        name: {"seconds": time.seconds, "dtype": time.dtype, "layout": time.layout}
        for name, time in times.versions.items()
    }
    return {
        "versions": versions,
        "speedup_same_dtype": times.speedup(QUANTIZED, FLOAT),
        "speedup_fastest": times.speedup(_best(times), FLOAT_BEST),
        "batch_rows": times.rows,
        "rounds": times.rounds,
        "device": times.device,
        "threads": times.threads,
        "cpu": cpu,
    }


def summary_table(summary: Summary) -> Table:
    """The summary for people; a line about speed that says why, where the quantized model is not the faster one."""
    table = Table(title=f"{summary.model}: {summary.denoiser} with a {summary.plan.planner} plan", title_justify="left")
    for name in ("", "float", "quantized"):
        table.add_column(name, overflow="fold")
    report = summary.report
    table.add_row("size", *_sizes(report))
    if summary.file_bytes is not None:
        ratio = summary.file_bytes / report.fp32_bytes
        table.add_row("  on disk, plan included", "", f"{mb(summary.file_bytes)} = {ratio:.3f}x of fp32")
    if summary.times:
        for row in _time_rows(summary.times):
            table.add_row(*row)
        table.caption, table.caption_justify = _timed_how(summary.times, summary.cpu), "left"
    table.add_row("output SQNR", "", _sqnr(report))
    if summary.plan.predicted_sqnr_db is not None:
        table.add_row("  predicted by the plan", "", told_db(summary.plan.predicted_sqnr_db))
    if report.speedup is not None:
        table.add_row("speed", "", f"{report.speedup:.2f}x of the fastest float")
    if summary.uniform:
        table.add_row("  uniform plan instead", "", _sqnr(summary.uniform))
    if summary.pictures:
        scores = summary.pictures
        psnr = f"mean {scores.mean_psnr_db:.1f} dB, worst {scores.worst_psnr_db:.1f} dB"
        table.add_row(f"PSNR, {len(scores.ssim)} pictures", "", psnr)
        table.add_row(f"SSIM, {len(scores.ssim)} pictures", "", _ssim(scores))
    table.add_row("int8 multiply-adds", "0 %", f"{100 * report.int8_macs:.1f} %")
    table.add_row("layers", f"{sum(report.schemes.values())} Linear and Conv2d", layer_lines(report))
    table.add_row("calibration", "", calibration_told(report))
    for row in (*companion_lines(summary.companions), *_correction_lines(report), *_reconstruction_lines(report)):
        table.add_row(*row)
    return table


def _correction_lines(report: Report) -> list[tuple[str, str, str]]:
    if not report.corrections:
        return []
    kept = sum(trial.kept for trial in report.corrections)
    tried = len({trial.layer for trial in report.corrections})
    return [("corrections", "", f"{kept} kept, on the {tried} layers that cause most noise")]


def _reconstruction_lines(report: Report) -> list[tuple[str, str, str]]:
    return [("reconstruction", "", reconstruction_told(report.reconstruction))] if report.reconstruction else []


def reconstruction_told(units: Sequence[Reconstructed]) -> str:
    """What learning the rounding of these blocks, and then their scales together, brought, as text."""
    blocks = [unit for unit in units if unit.unit != TOGETHER]
    kept = [unit for unit in blocks if unit.kept]
    gain = sum(unit.after_db - unit.before_db for unit in kept) / max(len(kept), 1)
    told = f"{len(kept)} of {len(blocks)} blocks better, by {gain:.1f} dB on average at their own output"
    for last in (unit for unit in units if unit.unit == TOGETHER):
        what = f"{last.after_db - last.before_db:.1f} dB more" if last.kept else "no more"
        told += f"; then {what} at the denoiser's, all scales together"
    return told


def mb(count: int) -> str:
    """A number of bytes in MB (10^6), as text."""
    return f"{count / 1e6:.1f} MB"


def _sizes(report: Report) -> tuple[str, str]:
    data = size_data(report)
    before = f"{mb(report.fp32_bytes)} fp32, {mb(report.fp32_bytes // 2)} fp16"
    return before, f"{mb(report.bytes)} = {data['ratio_fp32']:.3f}x of fp32, {data['ratio_fp16']:.3f}x of fp16"


def _sqnr(report: Report) -> str:
    timestep, db = report.worst()
    return f"{report.sqnr_db:.1f} dB, worst step {db:.1f} dB (t = {timestep:g})"


def _ssim(scores: PictureScores) -> str:
    return f"mean {scores.mean_ssim:.3f}, worst {scores.worst_ssim:.3f}"


def layer_lines(report: Report) -> str:
    """One line per scheme and backend with the number of layers."""
    kept = {"float": report.schemes["float"]} if "float" in report.schemes else {}
    return "\n".join(f"{count} {name}" for name, count in {**report.backends, **kept}.items())


def calibration_told(report: Report) -> str:
    """How much calibration took, in one line."""
    facts = report.calibration
    if not facts.get("samples"):
        return "none needed (no static ranges)"
    return (
        f"{facts['samples']} pictures, {facts['selection']}: {facts['forward_calls']} denoiser calls to calibrate, "
        f"{facts['sampler_calls']} to sample"
    )


def _timed_how(times: StepTimes, cpu: str | None) -> str:
    where = f"{cpu or 'CPU'}, {times.threads} threads" if times.device == "cpu" else times.device
    return (
        f"A step is one denoiser call on {times.rows} rows (guidance makes two rows per picture), measured on {where}; "
        f"median of {times.rounds}, versions in turn."
    )


def _time_rows(times: StepTimes) -> list[tuple[str, str, str]]:
    same = times.speedup(QUANTIZED, FLOAT)
    best, speedup = times.versions[FLOAT_BEST], times.speedup(_best(times), FLOAT_BEST)
    rows = [
        ("seconds per step", _time(times.versions[FLOAT]), f"{_time(times.versions[QUANTIZED])}: {_faster(same)}"),
        ("  fastest dtype", _time(best), f"{_time(times.versions[_best(times)])}: {_faster(speedup)}"),
    ]
    if speedup < 0.995:  # shown as 0.99x or less
        rows.append(("  why not faster", "", _why_slower(times)))
    return rows


def _why_slower(times: StepTimes) -> str:
    milliseconds = 1000 * times.versions[FLOAT_BEST].seconds / times.rows
    return (
        f"a picture's step takes {milliseconds:.1f} ms: the model is so small that rounding its activations to int8 "
        "costs more than the integer products save; larger models gain"
    )


def _best(times: StepTimes) -> str:
    """The quantized version that is fastest."""
    names = [name for name in (QUANTIZED, QUANTIZED_BEST) if name in times.versions]
    return min(names, key=lambda name: times.versions[name].seconds)


def _time(time: StepTime) -> str:
    layout = ", channels_last" if time.layout == "channels_last" else ""
    return f"{time.seconds:.4f} s ({time.dtype}{layout})"


def _faster(ratio: float) -> str:
    return f"{ratio:.2f}x as fast"


def scores_table(scores: PictureScores, captions: Sequence[str]) -> Table:
    """PSNR and SSIM of every pair of pictures, their mean and the worst."""
    table = Table(show_edge=False)
    for name in ("prompt", "PSNR (dB)", "SSIM"):
        table.add_column(name, overflow="fold")
    for caption, db, similarity in zip(captions, scores.psnr_db, scores.ssim, strict=True):
        table.add_row(caption, f"{db:.1f}", f"{similarity:.3f}")
    table.add_section()
    table.add_row("mean", f"{scores.mean_psnr_db:.1f}", f"{scores.mean_ssim:.3f}")
    table.add_row("worst", f"{scores.worst_psnr_db:.1f}", f"{scores.worst_ssim:.3f}")
    return table


def scores_data(scores: PictureScores, captions: Sequence[str]) -> list[dict[str, Any]]:
    """PSNR and SSIM of every pair of pictures as plain JSON data."""
    rows = zip(captions, scores.psnr_db, scores.ssim, strict=True)
    return [{"prompt": caption, "psnr_db": db, "ssim": similarity} for caption, db, similarity in rows]
