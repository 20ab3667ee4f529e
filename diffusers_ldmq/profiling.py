"""Stage 2: where quantization noise arises, per layer and scheme (relative) and per block (accumulated), over time.

Sources: "Efficient Quantization Strategies for Latent Diffusion Models" (arXiv 2312.05431), global and local
analysis; its equations could not be consulted, these are a reconstruction from its abstract and figure captions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .affine import QParams, qdq, token_qparams, weight_rows
from .allocator import give_back
from .artifacts import BlockCurve, LayerNoise, LayerTable, Profile
from .calibration import layer_state, observe_inputs, weight_scales
from .calls import Batch, Recording, run
from .families import layer_table, quantizable_layers
from .layers import quantize_layer
from .metrics import Power
from .observers import Observer
from .planners import low_precision
from .progress import Progress
from .quantization import replace_layer
from .selections import SELECTIONS
from .specs import SCHEMES, QuantSpec, parse_scheme

ACTIVATION_ONLY = "a8"
"""Key of the noise of an 8-bit static input against a float weight."""


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """How to profile. timesteps: how many of the recorded ones; images: how many of each recorded call's.

    scheme: of the block curve; schemes: of the relative noise; keep_float: None = the family's defaults.
    """

    timesteps: int = 5
    images: int = 4
    scheme: str = "w8a8"
    schemes: tuple[str, ...] = SCHEMES[1:]
    selection: str = "first-step"
    observer: str = "mse"
    keep_float: frozenset[str] | None = None


def profile_sqnr(
    denoiser: nn.Module,
    recording: Recording,
    settings: ProfileSettings | None = None,
    *,
    progress: Progress | None = None,
) -> Profile:
    """Relative noise of every Linear and Conv2d under every scheme and the accumulated noise of the block curve, both
    per timestep, on the recording's 'select' set; static ranges come from its 'calibrate' set.

    The denoiser must be the float one, best in fp32; it is unchanged afterwards. Running powers are kept, never
    activations. Raises CalibrationError or RecordingError if the recording does not suit the denoiser.
    """
    settings = settings or ProfileSettings()
    batches = _spread(recording.only("select"), settings)
    calibrating = recording.only("calibrate")
    picked = SELECTIONS[settings.selection](calibrating, None)
    ranges = observe_inputs(
        denoiser, calibrating.batches(list(picked)), list(quantizable_layers(denoiser)), settings.observer
    )
    layers = quantizable_layers(denoiser)
    work = len(batches) * (1 + len(layer_table(denoiser).blocks))
    count = _Counter(work, progress)
    local = _LocalNoise(layers, ranges, settings.schemes)
    with local.listening():
        for batch in batches:
            local.timestep = batch.timestep
            run(denoiser, batch)
            count.up()
    give_back()
    table = layer_table(denoiser, local.macs_per_image(sum(b.output.shape[0] for b in batches)))
    timesteps = tuple(sorted({b.timestep for b in batches}, reverse=True))
    noises = local.result(timesteps)
    schemes = {noise.name: low_precision(noise, settings.scheme).scheme for noise in noises}
    curve = _block_curve(denoiser, _CurveInputs(table, batches, timesteps, ranges, schemes), settings, count)
    return Profile(table, timesteps, noises, curve, _describe(settings, len(batches)))


def _describe(settings: ProfileSettings, calls: int) -> dict[str, Any]:
    kept = sorted(settings.keep_float) if settings.keep_float is not None else "default"
    return {
        "selection": settings.selection,
        "observer": settings.observer,
        "scheme": settings.scheme,
        "keep_float": kept,
        "calls": calls,
        "images": settings.images,
    }


def _spread(recording: Recording, settings: ProfileSettings) -> list[Batch]:
    """Batches of a few images of one run at a few of its timesteps, evenly from the noisiest to the cleanest."""
    first = recording.calls[0].run
    recording = replace(recording, calls=tuple(call for call in recording.calls if call.run == first))
    every = recording.timesteps()
    n = min(settings.timesteps, len(every))
    chosen = tuple(every[round(i * (len(every) - 1) / max(n - 1, 1))] for i in range(n))
    calls = recording.at(chosen).calls
    return [recording.batch(call, list(range(min(settings.images, call.images)))) for call in calls]


class _Counter:
    """Counts work and reports it."""

    def __init__(self, work: int, progress: Progress | None) -> None:
        self.work, self.done, self.progress = work, 0, progress

    def up(self, amount: int = 1) -> None:
        self.done += amount
        if self.progress:
            self.progress(self.done, self.work)


@dataclass(slots=True)
class _LocalNoise:
    """Forward hooks that quantize each layer's own weight and input beside the float run, all layers in one pass."""

    layers: dict[str, nn.Linear | nn.Conv2d]
    ranges: dict[str, Observer]
    schemes: tuple[str, ...]
    timestep: float = 0.0
    powers: dict[tuple[str, str, float], Power] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    qparams: dict[tuple[str, str, QuantSpec], QParams] = field(default_factory=dict)

    @contextmanager
    def listening(self) -> Iterator[None]:
        handles = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def measure(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            self.macs[name] = self.macs.get(name, 0) + output.numel() * weight[0].numel()
            for scheme, measured in self._variants(name, module, args[0]):
                key = (name, scheme, self.timestep)
                self.powers[key] = self.powers.get(key, Power()) + Power.between(output, measured)

        return measure

    def _variants(self, name: str, layer: nn.Module, x: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(scheme, the layer's output under it), grouped by weight so that each is quantized once."""
        parsed = [parse_scheme(name) for name in self.schemes]
        for spec in dict.fromkeys(scheme.weight for scheme in parsed):
            weight = self._weight(name, layer, spec) if spec else layer.weight
            for scheme in parsed:
                if scheme.weight == spec:
                    yield scheme.name, dense(layer, self._input(name, x, scheme.activation), weight)
        yield ACTIVATION_ONLY, dense(layer, self._input(name, x, QuantSpec(8, "tensor")), layer.weight)

    def _weight(self, name: str, layer: nn.Module, spec: QuantSpec) -> Tensor:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        key = ("weight", name, spec)
        if key not in self.qparams:
            self.qparams[key] = weight_scales(weight, spec)
        rows = qdq(weight_rows(weight, spec), self.qparams[key], spec).flatten(1)
        return rows[:, : weight[0].numel()].reshape(weight.shape).to(weight.dtype)

    def _input(self, name: str, x: Tensor, spec: QuantSpec | None) -> Tensor:
        if spec is None:
            return x
        if spec.granularity == "token":
            return qdq(x, token_qparams(x, spec), spec).to(x.dtype)
        key = ("input", name, spec)
        if key not in self.qparams:
            self.qparams[key] = self.ranges[name].qparams(spec)
        return qdq(x, self.qparams[key], spec).to(x.dtype)

    def macs_per_image(self, rows: int) -> dict[str, int]:
        """Multiply-accumulates of each layer per row of the batch."""
        return {name: macs // rows for name, macs in self.macs.items()}

    def result(self, timesteps: tuple[float, ...]) -> tuple[LayerNoise, ...]:
        """Signal and noise powers of each layer."""
        found = []
        for name in self.layers:
            keys = {scheme for layer, scheme, _ in self.powers if layer == name}
            noise = {k: tuple(self.powers[name, k, t].noise for t in timesteps) for k in sorted(keys)}
            signal = tuple(self.powers[name, ACTIVATION_ONLY, t].signal for t in timesteps)
            found.append(LayerNoise(name, signal, noise))
        return tuple(found)


def dense(layer: nn.Module, x: Tensor, weight: Any) -> Tensor:
    """The layer's float operation with another input and weight."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, layer.bias)
    bias = layer.bias
    return F.linear(x, weight, bias if isinstance(bias, Tensor) else None)


@dataclass(frozen=True, slots=True)
class _CurveInputs:
    table: LayerTable
    batches: list[Batch]
    timesteps: tuple[float, ...]
    ranges: dict[str, Observer]
    schemes: dict[str, str]


def _block_curve(denoiser: nn.Module, given: _CurveInputs, settings: ProfileSettings, count: _Counter) -> BlockCurve:
    """Accumulated noise with blocks 1..k really quantized, k = 1..K. A block without quantized layers adds none."""
    kept = settings.keep_float
    kept = frozenset(i.name for i in given.table.layers if i.keep_float) if kept is None else kept
    layers = quantizable_layers(denoiser)
    rows: list[tuple[float, ...]] = []
    powers = {t: Power() for t in given.timesteps}
    try:
        for block in given.table.blocks:
            names = [name for name in block.layers if name not in kept]
            for name in names:
                state = layer_state(name, layers[name], parse_scheme(given.schemes[name]), given.ranges[name])
                replace_layer(denoiser, name, quantize_layer(layers[name], state))
            if names or not rows:
                powers = _output_powers(denoiser, given.batches)
            rows.append(tuple(powers[t].noise for t in given.timesteps))
            give_back()
            count.up(len(given.batches))
    finally:
        for name, layer in layers.items():
            replace_layer(denoiser, name, layer)
    groups = tuple((block.name,) for block in given.table.blocks)
    return BlockCurve(settings.scheme, tuple(powers[t].signal for t in given.timesteps), tuple(rows), groups)


def _output_powers(denoiser: nn.Module, batches: list[Batch]) -> dict[float, Power]:
    powers: dict[float, Power] = {}
    for batch in batches:
        power = Power.between(batch.output, run(denoiser, batch))
        powers[batch.timestep] = powers.get(batch.timestep, Power()) + power
    return powers
