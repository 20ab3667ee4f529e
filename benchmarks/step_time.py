"""Time and memory of one denoiser step on CPU: float, W8A8 with and without the compiled quantize step, 4 bit unpacked
once or in every call, and others.

    python benchmarks/step_time.py --model sd15 --rounds 5 --json step_time.json [w8a8 w4a8 ...]

Variants run interleaved, because a machine's speed drifts by more than they differ. Weights of 'sd15' are random: its
times are real, its SQNR only shows that the numbers are computed right. Memory is measured in a fresh process each.
"""

import copy
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusers_ldmq import affine
from diffusers_ldmq.backends import cpu_kind, fast_dtype
from diffusers_ldmq.backends.native import native_status
from diffusers_ldmq.layers import QuantConv2d, QuantLinear, quantize_layer, quantized_layers, set_low_memory
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.specs import LayerState, Scheme, parse_scheme

BUNDLED = Path(__file__).parents[1] / "diffusers_ldmq" / "demo" / "emoji-sd" / "unet"
STAY_FLOAT = re.compile(r"^(time_embedding|conv_in$|conv_out$)|\.time_emb_proj$")
QUANTIZABLE = {nn.Linear: QuantLinear, nn.Conv2d: QuantConv2d}
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the denoiser. scheme: of all layers but STAY_FLOAT's; native: the compiled quantize step;
    low_memory: 4-bit weights stay in 4 bits."""

    name: str
    dtype: torch.dtype
    scheme: str = "float"
    native: bool = True
    low_memory: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Results of one variant. ms: median of the rounds; growth_mib: RSS after loading and one step, minus imports."""

    name: str
    ms: float
    rounds_ms: list[float]
    sqnr_db: float
    growth_mib: float | None = None
    peak_mib: float | None = None


def variants() -> list[Variant]:
    fast = fast_dtype("cpu")
    return [
        Variant("float fp32", torch.float32),
        Variant("float bf16", torch.bfloat16),
        Variant("w8a8", fast, "w8a8"),
        Variant("w8a8 without native", fast, "w8a8", native=False),
        Variant("w8a8-dyn", fast, "w8a8-dyn"),
        Variant("w8a16", fast, "w8a16"),
        Variant("w4a8", fast, "w4a8"),
        Variant("w4a8 low_memory", fast, "w4a8", low_memory=True),
        Variant("w4a16", fast, "w4a16"),
        Variant("w4a16 low_memory", fast, "w4a16", low_memory=True),
        Variant("w4a16-g64", fast, "w4a16-g64"),
        Variant("w4a16-g64 low_memory", fast, "w4a16-g64", low_memory=True),
    ]


def float_model(kind: str) -> UNet2DConditionModel:
    """The bundled trained model, or SD 1.5's architecture (the class's defaults but these) with random weights."""
    if kind == "bundled":
        return UNet2DConditionModel.from_pretrained(BUNDLED).eval()
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()


def step_inputs(model: UNet2DConditionModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Batch 2 (both guidance halves), 77 tokens."""
    generator = torch.Generator().manual_seed(1)
    size, width = int(model.config["sample_size"]), int(model.config["cross_attention_dim"])
    sample = torch.randn(2, 4, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    text = torch.randn(2, 77, width, generator=generator)
    return {"sample": sample.to(dtype), "timestep": torch.tensor(500), "encoder_hidden_states": text.to(dtype)}


def step(model: UNet2DConditionModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model(**inputs, return_dict=False)[0]


def measured_ranges(model: UNet2DConditionModel) -> dict[str, tuple[Tensor, Tensor]]:
    """(lowest, highest) input of every quantizable layer in one float step."""
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def looking_at(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: ranges.update([(name, (inputs[0].amin(), inputs[0].amax()))])

    hooks = [layer.register_forward_pre_hook(looking_at(name)) for name, layer in quantizable(model).items()]
    step(model, step_inputs(model, torch.float32))
    for hook in hooks:
        hook.remove()
    return ranges


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if type(m) in QUANTIZABLE and not STAY_FLOAT.search(n)}


def min_max_state(layer: nn.Module, scheme: Scheme, limits: tuple[Tensor, Tensor], dtype: torch.dtype) -> LayerState:
    """State of a float layer by simple min-max: affine where the input is one-sided or not."""
    assert scheme.weight is not None
    weight, bias = layer.get_parameter("weight"), layer._parameters["bias"]
    codes, scale = affine.quantize_weight(weight, affine.weight_qparams(weight, scheme.weight), scheme.weight)
    held = None if bias is None else bias.detach().to(dtype)
    if not scheme.is_static or scheme.activation is None:
        return LayerState(scheme, codes, scale, held)
    qparams = affine.affine_qparams(*limits, scheme.activation)
    return LayerState(scheme, codes, scale, held, qparams.scale.clone(), qparams.zero_point.clone())


def made(variant: Variant, model: UNet2DConditionModel, ranges: dict[str, Any]) -> UNet2DConditionModel:
    """`variant` of the float model, packed and warm."""
    replaced = quantizable(model) if variant.scheme != "float" else {}
    shared = {id(p): p for layer in replaced.values() for p in layer.parameters()}
    # the float variant in fp32 is the model itself: a copy of it all would only take memory
    changed = model if variant.dtype == torch.float32 and not replaced else copy.deepcopy(model, shared)
    if replaced:
        for name, layer in quantizable(changed).items():
            state = min_max_state(layer, parse_scheme(variant.scheme), ranges[name], variant.dtype)
            changed.set_submodule(name, quantize_layer(layer, state))
        set_low_memory(changed, variant.low_memory)
    # not diffusers' own .to(), which warns about dtypes
    nn.Module.to(changed, dtype=variant.dtype, memory_format=torch.channels_last)  # pyright: ignore
    with native(variant.native):
        step(changed, step_inputs(changed, variant.dtype))
    return changed


@contextmanager
def native(on: bool) -> Iterator[None]:
    """Layers packed inside use the compiled quantize step or not."""
    before = os.environ.get("LDMQ_NATIVE")
    os.environ["LDMQ_NATIVE"] = "1" if on else "0"
    native_status.cache_clear()
    yield
    os.environ.pop("LDMQ_NATIVE") if before is None else os.environ.update(LDMQ_NATIVE=before)
    native_status.cache_clear()


def timed(models: dict[str, UNet2DConditionModel], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of one step per variant and round."""
    inputs = {name: step_inputs(model, model.conv_in.weight.dtype) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            step(model, inputs[name])
            if number:  # round 0 warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def save_for_memory(variant: Variant, model: UNet2DConditionModel, folder: Path) -> None:
    states = {name: layer.scheme.name for name, layer in quantized_layers(model).items()}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
    head = {
        "config": {k: v for k, v in model.config.items() if not k.startswith("_")},
        "schemes": states,
        "dtype": str(variant.dtype)[6:],
        "native": variant.native,
        "low_memory": variant.low_memory,
    }
    (folder / "head.json").write_text(json.dumps(head, default=str))


def grown(folder: Path) -> tuple[float, float] | None:
    """(RSS, its peak) in MiB that loading and one step add to a fresh process; None where the system does not tell."""
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, __file__, "--grow-from", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def grow(folder: Path) -> tuple[float, float]:
    """In the fresh process: load onto a meta model, run one step, look."""
    before = rss()[0]
    head = json.loads((folder / "head.json").read_text())
    with torch.device("meta"):
        model = UNet2DConditionModel(**head["config"]).eval()
    # loading casts the float rest, so that only codes still point into the mapped file
    file = load_file(folder / "model.safetensors")
    tensors = {key: tensor.clone() if tensor.is_floating_point() else tensor for key, tensor in file.items()}
    for name, scheme in head["schemes"].items():
        layer = model.get_submodule(name)
        fresh = QUANTIZABLE[type(layer)].__new__(QUANTIZABLE[type(layer)])
        fresh.__dict__.update(layer.__dict__)
        own = {key.rpartition(".")[2] for key in tensors if key.rpartition(".")[0] == name}
        fresh.prepare(parse_scheme(scheme), own)
        model.set_submodule(name, fresh)
    model.load_state_dict(tensors, assign=True)
    del tensors, file
    if head["schemes"]:
        set_low_memory(model, head["low_memory"])
    nn.Module.to(model, memory_format=torch.channels_last)  # pyright: ignore
    with native(head["native"]):
        step(model, step_inputs(model, getattr(torch, head["dtype"])))
    now, peak = rss()
    return now - before, peak - before


def rss() -> tuple[float, float]:
    """(resident now, highest so far) in MiB."""
    status = Path("/proc/self/status").read_text()
    now, peak = (int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("VmRSS", "VmHWM"))  # pyright: ignore
    return now / 1024, peak / 1024


def allocator() -> str:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "unknown"
    return next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in maps), "system")


def show(rows: list[Row], weights_mib: float) -> None:
    table = Table(
        title=f"{cpu_kind()}, {torch.get_num_threads()} threads, torch {torch.__version__}, allocator {allocator()}, "
        f"native step: {native_status().reason if native_status().library is None else 'yes'}; "
        f"fp32 weights {weights_mib:.0f} MiB"
    )
    for column in ("variant", "ms", "vs fp32", "vs bf16", "SQNR dB", "RSS growth MiB", "peak MiB", "of fp32 weights"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    fp32, bf16 = rows[0].ms, rows[1].ms
    for row in rows:
        memory = ["-", "-", "-"]
        if row.growth_mib is not None and row.peak_mib is not None:
            memory = [f"{row.growth_mib:.0f}", f"{row.peak_mib:.0f}", f"{row.growth_mib / weights_mib:.2f}"]
        speed = [f"{row.ms:.1f}", f"{fp32 / row.ms:.2f}", f"{bf16 / row.ms:.2f}"]
        table.add_row(row.name, *speed, f"{row.sqnr_db:.1f}", *memory)
    Console().print(table)


def main(
    only: Annotated[list[str] | None, typer.Argument(help="variants besides float; all without")] = None,
    model: Annotated[str, typer.Option(help="bundled | sd15")] = "sd15",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="also write the rows here")] = None,
    memory: Annotated[bool, typer.Option(help="measure memory, one process per variant")] = True,
    grow_from: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time one denoiser step of every variant, interleaved."""
    if grow_from is not None:
        typer.echo(json.dumps(grow(grow_from)))
        return
    reference = float_model(model)
    weights_mib = sum(p.numel() for p in reference.parameters()) * 4 / MIB
    ranges = measured_ranges(reference)
    wanted = {v.name: v for v in variants() if v.scheme == "float" or v.name in (only or (v.name,))}
    models = {name: made(variant, reference, ranges) for name, variant in wanted.items()}
    times = timed(models, rounds)
    truth = step(reference, step_inputs(reference, torch.float32))
    rows = []
    for name, variant in wanted.items():
        growth = None
        quality = sqnr(truth, step(models[name], step_inputs(reference, variant.dtype)))
        if memory:
            with tempfile.TemporaryDirectory() as folder:
                save_for_memory(variant, models[name], Path(folder))
                growth = grown(Path(folder))
        rows.append(Row(name, statistics.median(times[name]), times[name], quality, *(growth or ())))
    show(rows, weights_mib)
    if json_path:
        json_path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
