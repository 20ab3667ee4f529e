"""Memory and time of loading the SD 1.5 U-Net (full-size config, random weights), each load in a fresh process: float
folders, folders of ours, and quantizing while a float folder is loaded.

    python benchmarks/load.py [--work DIR] [--rounds 5] [--variant NAME ...] [--json OUT]

Memory: growth of the resident high-water mark from the end of the imports to the end of from_pretrained. Pages of a
mapped file count as resident; 'anonymous' is the growth without them at the end. Time: from_pretrained alone, and with
one step of 32 x 32 latents; variants alternate, files are in the page cache, medians of the rounds.
"""

import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from memory import sd15_unet
from rich.console import Console
from rich.table import Table

app = typer.Typer(add_completion=False)
MB = 1e6


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to load. folder: below --work; dtype: asked for; scheme: quantized to meanwhile."""

    name: str
    folder: str
    dtype: str
    scheme: str | None = None


VARIANTS = (
    Variant("float fp32", "fp32", "float32"),
    Variant("float fp16 as bf16", "fp16", "bfloat16"),
    Variant("float fp16 as fp32", "fp16", "float32"),
    Variant("w8a16", "w8a16", "float32"),
    Variant("w8a16 as bf16", "w8a16", "bfloat16"),
    Variant("w4a16", "w4a16", "float32"),
    Variant("fp32 to w8a16", "fp32", "float32", "w8a16"),
    Variant("fp16 to w8a16", "fp16", "float32", "w8a16"),
    Variant("fp32 to w4a16", "fp32", "float32", "w4a16"),
    Variant("fp16 to w4a16", "fp16", "float32", "w4a16"),
)


def prepare(work: Path) -> None:
    """Save the folders that are loaded."""
    from diffusers import UNet2DConditionModel

    from diffusers_ldmq import LDMQConfig

    if not (work / "fp32" / "config.json").exists():
        unet = sd15_unet()
        unet.save_pretrained(work / "fp32")
        unet.half().save_pretrained(work / "fp16")
        del unet
    for scheme in ("w8a16", "w4a16"):
        if not (work / scheme / "config.json").exists():
            config = LDMQConfig(scheme)
            unet = UNet2DConditionModel.from_pretrained(work / "fp32", quantization_config=config)
            unet.save_pretrained(work / scheme)
            del unet


def status() -> dict[str, float]:
    """MB of this process: highest so far, mapped files, own memory."""
    text = Path("/proc/self/status").read_text()
    return {key: int(re.search(rf"{key}:\s+(\d+)", text)[1]) * 1024 / MB for key in ("VmHWM", "RssFile", "RssAnon")}  # pyright: ignore


def measured(variant: Variant, work: Path) -> dict[str, float]:
    """In the fresh process."""
    from diffusers import UNet2DConditionModel

    from diffusers_ldmq import LDMQConfig

    options: dict[str, Any] = {"torch_dtype": getattr(torch, variant.dtype)}
    if variant.scheme is not None:
        options["quantization_config"] = LDMQConfig(variant.scheme)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status()
    start = time.perf_counter()
    unet = UNet2DConditionModel.from_pretrained(work / variant.folder, **options)
    loaded = time.perf_counter() - start
    after = status()
    inputs = (torch.randn(1, 4, 32, 32).to(unet.dtype), torch.tensor(500), torch.randn(1, 77, 768).to(unet.dtype))
    with torch.no_grad():
        unet(*inputs)
    return {
        "load_seconds": loaded,
        "with_step_seconds": time.perf_counter() - start,
        "high_water_mb": after["VmHWM"] - before["VmHWM"],
        "anonymous_mb": after["RssAnon"] - before["RssAnon"],
    }


@app.command()
def main(
    work: Annotated[Path, typer.Option(help="folders are kept here")] = Path("load-sizes"),
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    json_out: Annotated[Path | None, typer.Option("--json", help="also write the figures there")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="only these, by name")] = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print medians."""
    if one is not None:
        typer.echo(json.dumps(measured(next(v for v in VARIANTS if v.name == one), work)))
        return
    prepare(work)
    chosen = [way for way in VARIANTS if variant is None or way.name in variant]
    found: dict[str, list[dict[str, float]]] = {way.name: [] for way in chosen}
    for number in range(rounds + 1):
        for way in chosen:
            command = [sys.executable, __file__, "--work", str(work), "--one", way.name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            if number:  # round 0 warms the page cache
                found[way.name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = [_row(way, found[way.name], work) for way in chosen]
    _show(rows)
    if json_out is not None:
        json_out.write_text(json.dumps(rows, indent=1) + "\n")


def _row(variant: Variant, rounds: list[dict[str, float]], work: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in (work / variant.folder).glob("*.safetensors")) / MB
    medians = {key: statistics.median(entry[key] for entry in rounds) for key in rounds[0]}
    return asdict(variant) | {"checkpoint_mb": size, "limit_mb": 1.15 * size + 300} | medians


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for column in ("variant", "checkpoint MB", "high-water MB", "limit MB", "anonymous MB", "load s", "with a step s"):
        table.add_column(column)
    for row in rows:
        memory = [f"{row[key]:.0f}" for key in ("checkpoint_mb", "high_water_mb", "limit_mb", "anonymous_mb")]
        table.add_row(row["name"], *memory, f"{row['load_seconds']:.2f}", f"{row['with_step_seconds']:.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    app()
