"""Time of one denoiser step, eager and compiled by torch.compile's default backend, float and quantized, on CPU.

    python benchmarks/compile_time.py --model bundled --rounds 15

Models, schemes and inputs are those of step_time.py. Eager and compiled calls of all variants run interleaved, because
a machine's speed drifts by more than they differ. SQNR is that of the compiled output against the eager one.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from step_time import Variant, float_model, made, measured_ranges, step, step_inputs
from torch import Tensor, nn

from diffusers_ldmq.backends import cpu_kind, fast_dtype
from diffusers_ldmq.metrics import sqnr


@dataclass(frozen=True, slots=True)
class Compiled:
    """One variant of the denoiser and how its compiled form was made. seconds: of compiling, with the first call."""

    model: Any
    compiled: Any
    inputs: dict[str, Tensor]
    seconds: float
    sqnr_db: float


def variants(schemes: list[str]) -> list[Variant]:
    fast = fast_dtype("cpu")
    floats = [Variant("float fp32", torch.float32), Variant("float bf16", torch.bfloat16)]
    return [*floats, *(Variant(scheme, fast, scheme) for scheme in schemes)]


def compiled(model: nn.Module, inputs: dict[str, Tensor]) -> Compiled:
    """The model in one graph (fullgraph=True). Its compiled form shares its tensors."""
    eager: Any = model
    truth = step(eager, inputs)
    whole: Any = torch.compile(model, fullgraph=True)
    start = time.perf_counter()
    out = step(whole, inputs)
    return Compiled(eager, whole, inputs, time.perf_counter() - start, sqnr(truth, out))


def milliseconds(call: Any, inputs: dict[str, Tensor]) -> float:
    start = time.perf_counter()
    step(call, inputs)
    return (time.perf_counter() - start) * 1e3


def main(
    model: Annotated[str, typer.Option(help="bundled | sd15")] = "bundled",
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    scheme: Annotated[list[str] | None, typer.Option(help="may be repeated")] = None,
) -> None:
    """Time eager and compiled steps of every variant, interleaved."""
    reference = float_model(model)
    ranges, wanted = measured_ranges(reference), variants(scheme or ["w8a8", "w8a8-dyn", "w8a16"])
    found: dict[str, Compiled] = {}
    for variant in wanted:
        inputs = step_inputs(reference, variant.dtype)
        found[variant.name] = compiled(made(variant, reference, ranges), inputs)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, one in found.items():
            times[name].append((milliseconds(one.model, one.inputs), milliseconds(one.compiled, one.inputs)))
    table = Table(title=f"{model}: {cpu_kind()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for column in ("variant", "eager ms", "compiled ms", "compiled / eager", "SQNR dB", "compiling s"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, one in found.items():
        eager, fast = (statistics.median(pair[i] for pair in times[name]) for i in (0, 1))
        ratio = statistics.median(after / before for before, after in times[name])
        shown = (f"{eager:.1f}", f"{fast:.1f}", f"{ratio:.2f}", f"{one.sqnr_db:.1f}", f"{one.seconds:.0f}")
        table.add_row(name, *shown)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
