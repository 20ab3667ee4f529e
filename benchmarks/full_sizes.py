"""The papers' models at full size (random weights): quantized while they are loaded and with one calibrated step,
saved, loaded again, sampled for two steps; sizes beside the papers'.

    python benchmarks/full_sizes.py run [MODEL ...] [--work DIR]      # MODEL: ldm4 ldm8 ldm4-class sd15
    python benchmarks/full_sizes.py table

Every way runs in a fresh process and is kept in benchmarks/results/full_sizes-MODEL.json, so that the command goes on
where it stopped. Weights are random: what a trained model loses is not measured here.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from full_size_models import MODELS, FullSize, call_inputs, drawn
from measuring import RESULTS, Results
from rich.console import Console
from rich.table import Table

from diffusers_ldmq import LDMQConfig
from diffusers_ldmq.artifacts import LayerChoice, Plan
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.job import Settings, quantize_pipeline
from diffusers_ldmq.layers import quantized_layers
from diffusers_ldmq.pipeline import save_pipeline

app = typer.Typer(add_completion=False)
LOADING = {"w8a16 while loading": "w8a16", "w4a16 while loading": "w4a16"}
BOTH = "w8a16 while loading, autoencoder too"
SINGLE_STEP = {"w8a8 single step": "w8a8", "w4a8 single step": "w4a8", "mixed single step": "mixed"}
WAYS = (*LOADING, BOTH, *SINGLE_STEP)
MB = 1e6


def mixed_plan(denoiser: Any) -> Plan:
    """Large weights in 4 bit, the family's float layers float, the rest of the decoder without integer activations."""
    table = layer_table(denoiser)
    decoder = {name for block in table.blocks if block.part == "decoder" for name in block.layers}
    layers = {}
    for info in table.layers:
        scheme = "w4a8" if info.shape[0] >= 640 else "w8a16" if info.name in decoder else "w8a8"
        layers[info.name] = LayerChoice("float" if info.keep_float else scheme, "by its size and place")
    return Plan(table.denoiser, table.fingerprint, "by hand", layers)


def float_folder(model: str, work: Path) -> Path:
    """The pipeline with random weights, saved in fp32 once."""
    folder = work / model
    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        MODELS[model].make().save_pretrained(folder)
    return folder


def loaded(model: FullSize, folder: Path, **options: Any) -> Any:
    """The pipeline in a folder, quiet. Without text encoders where texts are given as embeddings."""
    if model.tokens is not None:
        options |= {"text_encoder": None, "tokenizer": None}
    pipe = DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quantized(model: FullSize, way: str, folder: Path, into: Path) -> tuple[Any, dict[str, Any]]:
    """The quantized pipeline, saved `into` a folder, and what the job said of it."""
    if way in SINGLE_STEP:
        pipe = loaded(model, folder)
        scheme = SINGLE_STEP[way]
        settings = Settings(planner="uniform", scheme=scheme, keep_float="none")
        if scheme == "mixed":
            settings = Settings(plan=mixed_plan(pipe.unet))
        outcome = quantize_pipeline(pipe, [call_inputs(model, number) for number in range(4)], settings)
        save_pipeline(pipe, into, outcome=outcome)
        report = outcome.report
        return pipe, {"output_sqnr_db": report.sqnr_db, "int8_macs": report.int8_macs, "bytes": report.bytes}
    wanted = {"unet": LDMQConfig(LOADING.get(way, "w8a16"))}
    if way == BOTH:
        wanted[model.autoencoder] = LDMQConfig("w8a16")
    options: Any = {"quantization_config": PipelineQuantizationConfig(quant_mapping=dict(wanted))}
    pipe = loaded(model, folder, **options)
    pipe.save_pretrained(into)
    return pipe, {}


def measured(model: FullSize, way: str, folder: Path) -> dict[str, Any]:
    """One row: quantize, save, load again, draw with both."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        into = Path(scratch) / "quantized"
        start = time.perf_counter()
        pipe, told = quantized(model, way, folder, into)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        files = {name: _file_bytes(into / name) for name in ("unet", model.autoencoder)}
        schemes = sorted({layer.scheme.name for layer in quantized_layers(pipe.unet).values()})
        layers = len(quantized_layers(pipe.unet))
        first = drawn(pipe, model)
        del pipe
        again = loaded(model, into)
        second = drawn(again, model)
        weights = {name: getattr(again, name).num_parameters() for name in ("unet", model.autoencoder)}
    return told | {
        "denoiser_parameters": weights["unet"],
        "autoencoder_parameters": weights[model.autoencoder],
        "denoiser_file_bytes": files["unet"],
        "autoencoder_file_bytes": files[model.autoencoder],
        "quantized_layers": layers,
        "schemes": schemes,
        "reload_is_bit_identical": torch.equal(first, second),
        "picture_is_finite": bool(torch.isfinite(first).all()),
        "seconds_to_quantize_and_save": round(seconds, 1),
        "peak_bytes": peak,
    }


def _file_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@app.command()
def run(
    models: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(MODELS)}; all without")] = None,
    work: Annotated[Path, typer.Option(help="float models are kept here")] = Path("full-sizes"),
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure what is not measured yet."""
    for name in models or MODELS:
        folder = float_folder(name, work)
        if one is not None:
            typer.echo(json.dumps(measured(MODELS[name], one, folder)))
            return
        results = Results(f"full_sizes-{name}")
        for way in WAYS:
            row = results.row(way, lambda name=name, way=way: _in_a_process(name, way, work))
            typer.echo(f"{name}, {way}: {row}")


def _in_a_process(model: str, way: str, work: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "run", model, "--work", str(work), "--one", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@app.command()
def table() -> None:
    """Sizes in MB beside the papers', as a table for docs/results.md."""
    shown = Table(title="MB: denoiser, and with its autoencoder")
    for column in ("model", "way", "schemes", "denoiser", "whole", "of fp32", "paper", "SQNR dB", "reloads", "peak GB"):
        shown.add_column(column)
    for name, model in MODELS.items():
        path = RESULTS / f"full_sizes-{name}.json"
        rows = json.loads(path.read_text()) if path.exists() else {}
        for way in WAYS:
            if way in rows:
                shown.add_row(model.title, way, *_cells(rows[way], model, way))
    Console(width=200).print(shown)


def _cells(row: dict[str, Any], model: FullSize, way: str) -> list[str]:
    fp32 = 4 * row["denoiser_parameters"]
    whole = row["denoiser_file_bytes"] + row["autoencoder_file_bytes"]
    papers = {"w8a8 single step": model.paper_mb[1], BOTH: model.paper_mb[1], "w4a8 single step": model.paper_mb[2]}
    return [
        " ".join(row["schemes"]),
        f"{row['denoiser_file_bytes'] / MB:.1f}",
        f"{whole / MB:.1f}",
        f"{row['denoiser_file_bytes'] / fp32:.3f}",
        f"{papers[way]:.1f} ({model.paper_mb[0]:.1f} fp32)" if way in papers else "-",
        f"{row['output_sqnr_db']:.1f}" if "output_sqnr_db" in row else "-",
        "bit-identical" if row["reload_is_bit_identical"] and row["picture_is_finite"] else "NO",
        f"{row['peak_bytes'] / 1e9:.2f}",
    ]


if __name__ == "__main__":
    app()
