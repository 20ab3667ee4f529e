"""What attention on integers costs in output SQNR and saves in time.

    python benchmarks/attention.py quality [--results FOLDER]
    python benchmarks/attention.py speed [--results FOLDER]

'quality': the bundled model, float and under the hybrid W8A8 plan, on the calls that verify. Beside the package's own
way stand others, simulated: coarser scales, softmax weights on one scale for all rows, rows divided by the sum of the
codes, values as they are, keys less their mean. 'speed': the product alone at the sizes of SD 1.5 and of the bundled
model, and a step of SD 1.5's architecture with random weights; processor time, which other load on the machine changes
least.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from measuring import RESULTS, Results, pipeline, recorded
from step_time import Variant, float_model, made, measured_ranges, step, step_inputs
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from diffusers_ldmq import calibrate, make_plan, profile_sqnr, quantize, quantize_attention, restore_attention, verify
from diffusers_ldmq.attention import IntegerProduct, replace_product
from diffusers_ldmq.backends import fast_dtype
from diffusers_ldmq.families import find_denoiser
from diffusers_ldmq.integer_attention import STEPS, integer_attention
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.terminal import quiet_libraries

app = typer.Typer(add_completion=False)
ResultsFolder = Annotated[Path, typer.Option("--results", help="Where attention.json is written row by row.")]

SHAPES = {  # [rows, heads, queries, channels] and keys
    "SD 1.5, 64x64, self": ((2, 8, 4096, 40), 4096),
    "SD 1.5, 32x32, self": ((2, 8, 1024, 80), 1024),
    "SD 1.5, 16x16, self": ((2, 8, 256, 160), 256),
    "SD 1.5, 64x64, 77 words": ((2, 8, 4096, 40), 77),
    "bundled, 16x16, self": ((2, 4, 256, 32), 256),
}
ROUNDS = 5
KEYS = 256  # fewest keys of attention on integers


@dataclass(frozen=True, slots=True)
class Simulated:
    """A product with quantized operands in floating point.

    scales: of queries, keys and values: 'token' (values: channel), 'head' or 'tensor'; of_row: softmax weights are
    codes of their row's largest instead of 1; code_sum: rows are divided by the sum of their codes instead of their
    weights; keys_centred: keys less their mean over the tokens, which changes no softmax; values_centred: values less
    their mean, which is added again.
    """

    scales: str = "token"
    of_row: bool = True
    code_sum: bool = False
    keys_centred: bool = False
    values_centred: bool = True

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
        """Attention without a mask."""
        key = key - key.mean(-2, keepdim=True) if self.keys_centred else key
        axes = {"token": (-1,), "head": (-1, -2), "tensor": (0, 1, 2, 3)}[self.scales]
        q, k = rounded(query, axes), rounded(key, axes)
        centre = value.mean(-2, keepdim=True) * self.values_centred
        v = rounded(value - centre, (-2,) if self.scales == "token" else axes)
        scores = q @ k.mT * (options.get("scale") or query.shape[-1] ** -0.5)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = weights if self.of_row else weights / weights.sum(-1, keepdim=True)
        codes = (weights * STEPS).round()
        whole = (codes if self.code_sum else weights * STEPS).sum(-1, keepdim=True)
        return codes @ v / whole + centre


WAYS: dict[str, Callable[..., Tensor] | None] = {
    "float": None,
    "integers (the package)": IntegerProduct(fewest_keys=1),
    "simulated": Simulated(),
    "per head": Simulated("head"),
    "per tensor": Simulated("tensor"),
    "keys less their mean": Simulated(keys_centred=True),
    "per tensor, keys less their mean": Simulated("tensor", keys_centred=True),
    "values as they are": Simulated(values_centred=False),
    "values as they are, divided by the codes' sum": Simulated(code_sum=True, values_centred=False),
    "softmax of scale 1/255": Simulated(of_row=False, values_centred=False),
    "per tensor, softmax of scale 1/255": Simulated("tensor", of_row=False, values_centred=False),
}
FEW = ("float", "integers (the package)", "per tensor, softmax of scale 1/255")
"""Ways to measure beside quantized layers, too."""


def rounded(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """x after a round trip through symmetric int8 codes, with a scale for each slice along `axes`."""
    scale = x.abs().amax(axes, keepdim=True).clamp_min(1e-30) / 127
    return (x / scale).round() * scale


def measured_ways(denoiser: nn.Module, recording: Any, ways: Iterable[str] = WAYS) -> dict[str, float]:
    """Way -> output SQNR on the calls that verify."""
    found = {}
    for name in ways:
        product = WAYS[name]
        restore_attention(denoiser)
        if product is not None:
            replace_product(denoiser, product)
        found[name] = verify(denoiser, recording).sqnr_db
    quantize_attention(denoiser, fewest_keys=KEYS)
    found["integers, 256 keys and more"] = verify(denoiser, recording).sqnr_db
    restore_attention(denoiser)
    return found


@app.command()
def quality(results: ResultsFolder = RESULTS) -> None:
    """Output SQNR of the bundled model."""
    quiet_libraries()
    rows, pipe = Results("attention", results), pipeline("bundled")
    recording = recorded("bundled", pipe, "first-step").recording
    denoiser = find_denoiser(pipe)[1]
    shown(rows.row("bundled, float layers", lambda: measured_ways(denoiser, recording)), "dB")

    def hybrid() -> dict[str, float]:
        plan = make_plan(profile_sqnr(denoiser, recording))
        return measured_ways(quantize(denoiser, calibrate(denoiser, plan, recording)), recording, FEW)

    shown(rows.row("bundled, hybrid W8A8 plan", hybrid), "dB")


def processor_ms(calls: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Name -> median milliseconds of processor time, the calls taken in turn; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            found[name].append(1e3 * (time.process_time() - start))
    return {name: median(values[1:]) for name, values in found.items()}


@torch.inference_mode()
def product_times(shape: tuple[int, ...], keys: int) -> dict[str, float]:
    """One attention product in fp32, in bf16 and on integers."""
    rows, heads, queries, channels = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(rows, n, heads, channels, generator=generator).transpose(1, 2) for n in (queries, keys, keys)
    )
    halves = q.bfloat16(), k.bfloat16(), v.bfloat16()
    found = processor_ms(
        {
            "fp32": lambda: scaled_dot_product_attention(q, k, v),
            "bf16": lambda: scaled_dot_product_attention(halves[0], halves[1], halves[2]),
            "integers": lambda: integer_attention(q, k, v),
            "integers from bf16": lambda: integer_attention(halves[0], halves[1], halves[2]),
        }
    )
    found["sqnr_db"] = sqnr(scaled_dot_product_attention(q, k, v), integer_attention(q, k, v))
    return found


def step_times() -> dict[str, float]:
    """A step of SD 1.5's architecture, W8A8 and float, with attention on integers and not."""
    model = float_model("sd15")
    fast = fast_dtype("cpu")
    variants = (Variant("float fp32", torch.float32), Variant("w8a8", fast, "w8a8"))
    ranges = measured_ranges(model)
    models = {variant.name: (made(variant, model, ranges), variant.dtype) for variant in variants}
    calls: dict[str, Callable[[], Any]] = {}
    for name, (made_model, dtype) in models.items():
        inputs = step_inputs(made_model, dtype)

        def plain(of: Any = made_model, given: Any = inputs) -> Tensor:
            return step(restore_attention(of), given)  # pyright: ignore[reportArgumentType]

        def on_integers(of: Any = made_model, given: Any = inputs) -> Tensor:
            return step(quantize_attention(of, fewest_keys=KEYS), given)  # pyright: ignore[reportArgumentType]

        calls |= {name: plain, f"{name}, attention on integers": on_integers}
    found = processor_ms(calls, rounds=2)
    for name in list(models):
        found[f"{name}: sqnr_db of the change"] = sqnr(calls[name](), calls[f"{name}, attention on integers"]())
    return found


@app.command()
def speed(results: ResultsFolder = RESULTS) -> None:
    """Processor time on one thread."""
    torch.set_num_threads(1)
    rows = Results("attention", results)
    for name, (shape, keys) in SHAPES.items():
        typer.echo(name)
        shown(rows.row(name, lambda shape=shape, keys=keys: product_times(shape, keys)), "ms")
    typer.echo("step")
    shown(rows.row("step of sd15", step_times), "ms")


def shown(values: dict[str, float], unit: str) -> None:
    """One line a figure."""
    for line in lines(values.items(), unit):
        typer.echo(line)


def lines(values: Iterable[tuple[str, Any]], unit: str) -> list[str]:
    """'name: figure unit' of each."""
    return [f"  {name}: {float(value):.2f} {'dB' if 'db' in name else unit}" for name, value in values]


if __name__ == "__main__":
    app()
