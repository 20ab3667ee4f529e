"""The table of benchmarks/paper1.py."""

from typing import Any

from rich.table import Table


def table(rows: dict[str, Any], model: str, uniform_row: str) -> Table:
    """The rows for people. uniform_row: whose bytes the others are compared with."""
    shown, uniform = Table(title=f"{model} model"), rows[uniform_row]["bytes"]
    names = (
        "output SQNR",
        "worst (t)",
        "predicted",
        "latents",
        "PSNR (worst)",
        "SSIM (worst)",
        "FID",
        "MB",
        "/uniform",
    )
    for name in ("", *names, "/fp32", "int8", "s/step", "speed", "cal. s", "sampler + forward calls"):
        shown.add_column(name)
    seconds = rows["times"]["seconds_per_step"]
    for name in seconds:
        row = rows[name]
        output, pictures = row["output_sqnr_db"], row["pictures"] or {}
        part = lambda key: f"{pictures.get(key, float('nan')):.4g}"  # noqa: B023, E731
        predicted, calls = row.get("predicted_sqnr_db"), "-"
        if "sampler_calls" in row:
            calls = f"{row['sampler_calls']} + {row['forward_calls']}"
        shown.add_row(
            name,
            f"{float(output['all']):.2f}",
            f"{float(output['worst']):.2f} ({output['worst_timestep']:g})",
            f"{predicted:.2f}" if predicted else "-",
            f"{float(row['latent_sqnr_db']):.2f}",
            f"{part('psnr_db_mean')} ({part('psnr_db_worst')})",
            f"{part('ssim_mean')} ({part('ssim_worst')})",
            "-" if row["fid"] is None else f"{row['fid']:.2f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bytes'] / uniform:.3f}",
            f"{row['of_fp32']:.3f}",
            f"{100 * row['int8_macs_share']:.1f} %",
            f"{seconds[name]:.4f}",
            f"{next(iter(seconds.values())) / seconds[name]:.2f}",
            f"{row.get('calibration_seconds', 0):.2f}",
            calls,
        )
    return shown
