"""How long one sampling step takes, and each layer in it under each scheme."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from .calibration import layer_state
from .calls import Batch, run
from .families import quantizable_layers
from .layers import quantize_layer
from .observers import OBSERVERS
from .specs import geometry_of, parse_scheme
from .tables import LayerTimes
from .verification import floating_dtype

WARM_UP = 2
"""Untimed calls of each version: the first packs weights, the second fills caches."""
TRIALS = 3
"""Timed calls of each dtype and layout when the fastest one is searched."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Median seconds of one denoiser call. dtype: of its floating tensors; layout: of its convolutions' weights."""

    seconds: float
    dtype: str
    layout: str


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Times of several versions, taken in turn in one run. rows: batch of the call (guidance doubles the images);
    threads: that torch used."""

    versions: dict[str, StepTime]
    rows: int
    rounds: int
    device: str
    threads: int

    def speedup(self, version: str, over: str) -> float:
        """How many times faster `version` is than `over`; below 1 = slower."""
        return self.versions[over].seconds / self.versions[version].seconds


def seconds_per_step(versions: Mapping[str, nn.Module], batch: Batch, rounds: int = 7) -> StepTimes:
    """Median seconds of one call of each denoiser on the same arguments, interleaved so that a change in the
    machine's load or clock meets all of them."""
    for denoiser in versions.values():
        for _ in range(WARM_UP):
            run(denoiser, batch)
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(rounds):
        for name, denoiser in versions.items():
            seconds[name].append(_timed(denoiser, batch))
    first = next(iter(versions.values()))
    times = {name: StepTime(median(seconds[name]), dtype_name(d), layout_name(d)) for name, d in versions.items()}
    device = next(first.parameters()).device.type
    return StepTimes(times, batch.output.shape[0], rounds, device, torch.get_num_threads())


def fastest_float(denoiser: nn.Module, batch: Batch, dtypes: tuple[torch.dtype, ...] | None = None) -> nn.Module:
    """Bring a float denoiser, in place, into the dtype and memory layout in which this device runs `batch` fastest.

    dtypes: to choose from (default: float32 and bfloat16, the other 16-bit type too on a GPU). Only one copy is ever
    held, so weights end up rounded to the coarsest dtype that was tried: good for timing, not for results.
    """
    if dtypes is None:
        on_cpu = next(denoiser.parameters()).device.type == "cpu"
        dtypes = (torch.float32, torch.bfloat16) + (() if on_cpu else (torch.float16,))
    choices = [(dtype, layout) for dtype in dtypes for layout in (torch.contiguous_format, torch.channels_last)]
    found: dict[tuple[torch.dtype, torch.memory_format], float] = {}
    for dtype, layout in choices:
        denoiser.to(dtype=dtype).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        run(denoiser, batch)
        found[dtype, layout] = min(_timed(denoiser, batch) for _ in range(TRIALS))
    dtype, layout = min(found, key=lambda choice: found[choice])
    return denoiser.to(dtype=dtype).to(memory_format=layout)  # pyright: ignore[reportCallIssue]


def layer_times(
    load: Callable[[], nn.Module], batch: Batch, schemes: tuple[str, ...], dtype: torch.dtype | None = None
) -> LayerTimes:
    """Milliseconds of every Linear and Conv2d in float and under every scheme, at the shapes of `batch`, and of the
    whole float call. load: gives the float denoiser, as often as asked; dtype: of the quantized model's float rest.

    Layers of one shape are timed once, on random numbers: times depend on shapes, not on values.
    """
    fastest = fastest_float(load(), batch)
    fastest_ms = 1000 * min(_timed(fastest, batch) for _ in range(TRIALS))
    fastest_dtype = floating_dtype(fastest)
    dtype = dtype or fastest_dtype
    denoiser = load().to(dtype=dtype) if dtype != fastest_dtype else fastest
    run(denoiser, batch)
    step_ms = 1000 * min(_timed(denoiser, batch) for _ in range(TRIALS)) if denoiser is not fastest else fastest_ms
    known: dict[tuple[object, ...], dict[str, float]] = {}
    found: dict[str, dict[str, float]] = {}
    for name, (layer, x) in _inputs(denoiser, batch).items():
        key = (geometry_of(layer), layer.bias is None, x.shape, x.stride())
        if key not in known:
            known[key] = _layer_ms(layer, x, schemes)
        found[name] = known[key]
    device = next(denoiser.parameters()).device.type
    name = str(dtype).removeprefix("torch.")
    best = str(fastest_dtype).removeprefix("torch.")
    return LayerTimes(device, name, batch.output.shape[0], step_ms, found, fastest_ms, best)


def _inputs(denoiser: nn.Module, batch: Batch) -> dict[str, tuple[nn.Linear | nn.Conv2d, Tensor]]:
    """Name -> (layer, an empty tensor of the shape, layout, dtype and device of its input)."""
    found: dict[str, tuple[nn.Linear | nn.Conv2d, Tensor]] = {}

    def hook(name: str, layer: nn.Linear | nn.Conv2d) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = (layer, torch.empty_like(args[0], device="meta"))

        return look

    handles = [layer.register_forward_pre_hook(hook(n, layer)) for n, layer in quantizable_layers(denoiser).items()]
    try:
        run(denoiser, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _layer_ms(layer: nn.Linear | nn.Conv2d, like: Tensor, schemes: tuple[str, ...]) -> dict[str, float]:
    """'float' and every scheme -> milliseconds of one call of the layer."""
    device = layer.weight.device
    x = torch.randn(like.shape, device=device).to(like.dtype).as_strided(like.shape, like.stride())
    observer = OBSERVERS["minmax"]()
    observer.update(x)
    versions: dict[str, nn.Module] = {"float": layer}
    for scheme in schemes:
        versions[scheme] = quantize_layer(layer, layer_state("timed layer", layer, parse_scheme(scheme), observer))
    times: dict[str, list[float]] = {name: [] for name in versions}
    with torch.no_grad():
        for number in range(WARM_UP + TRIALS):
            for name, version in versions.items():
                start = time.perf_counter()
                version(x)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if number >= WARM_UP:
                    times[name].append(1000 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def measured_speedup(denoiser: nn.Module, load: Callable[[], nn.Module], batch: Batch, rounds: int = 5) -> float:
    """How many times faster a call of `denoiser` is than the float model's in its fastest dtype, in turn."""
    times = seconds_per_step({"float": fastest_float(load(), batch), "quantized": denoiser}, batch, rounds)
    return times.speedup("quantized", "float")


def _timed(denoiser: nn.Module, batch: Batch) -> float:
    start = time.perf_counter()
    run(denoiser, batch)  # ends with the output on the CPU, so a GPU has finished too
    return time.perf_counter() - start


def dtype_name(denoiser: nn.Module) -> str:
    """Such as 'float32': of the denoiser's first floating parameter."""
    return str(floating_dtype(denoiser)).removeprefix("torch.")


def layout_name(denoiser: nn.Module) -> str:
    """'channels_last' if any convolution's weight lies so in memory, else 'contiguous'."""
    weights = [p for p in denoiser.parameters() if p.dim() == 4 and min(p.shape[1], p.shape[2] * p.shape[3]) > 1]
    last = any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)
    return "channels_last" if last else "contiguous"
