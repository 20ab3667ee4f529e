"""How much noise every layer makes under every scheme: at its own output, and by itself at the denoiser's.

The second, a layer's own effect, would take one run of the denoiser per layer and scheme. Random probes give it in one
backward pass: to first order an error e at a layer's output becomes J e at the denoiser's, and for u of independent
random signs E[(u . J e)^2] = |J e|^2 (Hutchinson 1990). As u . J e = (J^T u) . e, the backward pass that starts from u
brings J^T u to all layers at once, and each forms its error under every scheme there and then. Every row of a batch is
an independent sample, so that the relative standard error is sqrt(2 / rows).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .affine import QParams, qdq, token_qparams, weight_rows
from .allocator import give_back
from .artifacts import LayerNoise
from .calibration import weight_scales
from .calls import Batch, evaluating, forward, parts, repeated, run
from .errors import PlanError
from .metrics import energy
from .observers import Observer
from .specs import QuantSpec, Scheme, parse_scheme

ACTIVATION_ONLY = "a8"
"""Key of the noise of an 8-bit static input against a float weight."""
ROOM = 2**28
"""Bytes of layer outputs that a probing pass may go through at a time: more rows are taken one part after another."""
TRIM = 2**27
"""After so many bytes of layer outputs freed memory goes back to the system: it would add up to gigabytes."""


@dataclass(slots=True)
class NoiseProbes:
    """Measures batch after batch; running powers are kept, never activations.

    ranges: layer -> observer of its calibrating inputs; shared: groups of layers that were seen to read one tensor;
    told: called several times for every layer, also where one takes seconds; it may raise.
    """

    layers: dict[str, nn.Linear | nn.Conv2d]
    ranges: dict[str, Observer]
    schemes: tuple[str, ...]
    signal: dict[tuple[str, float], float] = field(default_factory=dict)
    noise: dict[tuple[str, str, float], float] = field(default_factory=dict)
    own: dict[tuple[str, str, float], float] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    readers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    qparams: dict[tuple[str, str, QuantSpec], QParams] = field(default_factory=dict)
    row_bytes: list[int] = field(default_factory=list)
    told: Callable[[], None] | None = None

    def measure(self, denoiser: nn.Module, batch: Batch, generator: torch.Generator, probes: int = 1) -> None:
        """Add one batch's powers; own effects as the mean over up to `probes` random probes of each of its rows, as
        many as fit. Every probe is a copy of the rows in the backward pass; errors are formed once for all of them.

        The passes run with gradient checkpointing where the denoiser offers it, and on few rows at a time where layers
        give much, so that they take little more memory than a call.
        """
        fitting = max(1, ROOM // self._bytes_per_row(denoiser, batch))
        copies = min(probes, fitting)
        for part in parts(batch, fitting // copies):
            self._measure(denoiser, part, generator, copies)

    def _bytes_per_row(self, denoiser: nn.Module, batch: Batch) -> int:
        """Bytes that all the layers' outputs take for one row of the batch; measured once."""
        if not self.row_bytes:
            found: list[int] = []
            look = lambda module, args, output: found.append(output.numel() * output.element_size())  # noqa: E731
            handles = [layer.register_forward_hook(look) for layer in self.layers.values()]
            try:
                run(denoiser, batch)
            finally:
                for handle in handles:
                    handle.remove()
            self.row_bytes.append(max(sum(found) // batch.output.shape[0], 1))
        return self.row_bytes[0]

    def _measure(self, denoiser: nn.Module, batch: Batch, generator: torch.Generator, copies: int) -> None:
        passing = _Pass(self, batch, copies)
        # what is recomputed in the backward pass must be without dropout, too
        with self._listening(passing), differentiable(denoiser), evaluating(denoiser), torch.enable_grad():
            output = forward(denoiser, repeated(batch, copies))
            signs = torch.randint(0, 2, output.shape, generator=generator) * 2 - 1
            output.backward(signs.to(output))

    @contextmanager
    def _listening(self, passing: "_Pass") -> Iterator[None]:
        handles = [layer.register_forward_hook(passing.hook(name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def errors(self, name: str, x: Tensor, output: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(scheme, the layer's output under it minus `output`), every input and weight rounded once."""
        layer = self.layers[name]
        parsed = [parse_scheme(scheme) for scheme in self.schemes]
        parsed.append(Scheme(ACTIVATION_ONLY, None, QuantSpec(8, "tensor")))
        rounded = {spec: self._input(name, x, spec) for spec in dict.fromkeys(s.activation for s in parsed)}
        for spec in dict.fromkeys(s.weight for s in parsed):
            if self.told is not None:
                self.told()
            weight = self._weight(name, spec)
            for scheme in parsed:
                if scheme.weight == spec:
                    yield scheme.name, dense(layer, rounded[scheme.activation], weight).sub_(output)

    def _weight(self, name: str, spec: QuantSpec | None) -> Tensor:
        weight = self.layers[name].weight.detach()
        if spec is None:
            return weight
        key = ("weight", name, spec)
        if key not in self.qparams:
            self.qparams[key] = weight_scales(weight, spec, self.told)
        rows = qdq(weight_rows(weight, spec), self.qparams[key], spec).flatten(1)
        return rows[:, : weight[0].numel()].reshape(weight.shape).to(weight.dtype)

    def _input(self, name: str, x: Tensor, spec: QuantSpec | None) -> Tensor:
        if spec is None:
            return x
        if spec.granularity == "token":
            return qdq(x, token_qparams(x, spec), spec).to(x.dtype)
        key = ("input", name, spec)
        if key not in self.qparams:
            scale, zero_point = self.ranges[name].qparams(spec)
            self.qparams[key] = QParams(scale.to(x.device), zero_point.to(x.device))
        return qdq(x, self.qparams[key], spec).to(x.dtype)

    def macs_per_image(self, rows: int) -> dict[str, int]:
        """Multiply-accumulates of each layer per row of the batch, where `rows` rows were measured in all."""
        return {name: macs // rows for name, macs in self.macs.items()}

    def shared(self) -> tuple[tuple[str, ...], ...]:
        """Layers of one module that read one and the same tensor (q, k, v of an attention), in order."""
        order = {name: index for index, name in enumerate(self.layers)}
        groups = {tuple(sorted(names, key=order.__getitem__)) for names in self.readers.values()}
        return tuple(sorted((group for group in groups if len(group) > 1), key=lambda group: order[group[0]]))

    def row(self, timestep: float) -> tuple[float, ...]:
        """Everything measured at a timestep as plain numbers, in a fixed order; 0 for a layer that was not called."""
        found = []
        for name in self.layers:
            found.append(self.signal.get((name, timestep), 0.0))
            keys = [(name, scheme, timestep) for scheme in (*self.schemes, ACTIVATION_ONLY)]
            found.extend(powers.get(key, 0.0) for key in keys for powers in (self.noise, self.own))
        return tuple(found)

    def add(self, timestep: float, row: tuple[float, ...]) -> None:
        """Add what `row` gave. Raises PlanError for a row of another model or scheme set."""
        schemes = (*self.schemes, ACTIVATION_ONLY)
        if len(row) != len(self.layers) * (1 + 2 * len(schemes)):
            raise PlanError("the remembered part of the profile does not fit this model; delete it and start anew")
        numbers = iter(row)
        for name in self.layers:
            self.signal[name, timestep] = self.signal.get((name, timestep), 0.0) + next(numbers)
            for key in [(name, scheme, timestep) for scheme in schemes]:
                self.noise[key] = self.noise.get(key, 0.0) + next(numbers)
                self.own[key] = self.own.get(key, 0.0) + next(numbers)

    def result(self, timesteps: tuple[float, ...]) -> tuple[LayerNoise, ...]:
        """Signal and noise powers of each layer."""
        schemes = sorted((*self.schemes, ACTIVATION_ONLY))
        return tuple(
            LayerNoise(
                name,
                tuple(self.signal[name, t] for t in timesteps),
                {scheme: tuple(self.noise[name, scheme, t] for t in timesteps) for scheme in schemes},
                {scheme: tuple(self.own[name, scheme, t] for t in timesteps) for scheme in schemes},
            )
            for name in self.layers
        )


@dataclass(slots=True)
class _Pass:
    """One forward and backward pass of one batch, whose rows run `copies` times, each with random signs of its own."""

    probes: NoiseProbes
    batch: Batch
    copies: int
    inputs: dict[str, tuple[ReferenceType[Tensor], list[str]]] = field(default_factory=dict)
    passed: int = 0

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def tap(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self._note_reader(name, args[0])
            self._tidy(output)
            if not output.requires_grad:  # nothing before this layer depends on what is differentiated
                output = output.detach().requires_grad_()
            return _Tap.apply(output, args[0], lambda *seen: self.see(name, *seen))  # pyright: ignore

        return tap

    def _note_reader(self, name: str, x: Tensor) -> None:
        """Remember which layers of one module read the very same tensor object one after another."""
        parent = name.rpartition(".")[0]
        seen, names = self.inputs.get(parent, (None, []))
        if seen is None or seen() is not x:
            names = []
            self.inputs[parent] = (ref(x), names)
        if name not in names:
            names.append(name)
        self.probes.readers.update(dict.fromkeys(names, tuple(names)))

    def _tidy(self, output: Tensor) -> None:
        self.passed += output.numel() * output.element_size()
        if self.passed > TRIM:
            give_back()
            self.passed = 0

    def see(self, name: str, output: Tensor, x: Tensor, gradient: Tensor) -> None:
        """Add what the layer's errors are here and what they would become at the denoiser's output."""
        self._tidy(output)
        found, t = self.probes, self.batch.timestep
        rows = self.batch.output.shape[0]
        # what does not come row by row (or copy by copy) is one sample: its errors do not arrive independently
        if output.shape[0] % (rows * self.copies):
            rows, copies = 1, 1
        else:
            copies = self.copies
        first, inputs = output[: len(output) // copies], x[: len(x) // copies]
        weight = found.layers[name].weight
        found.macs[name] = found.macs.get(name, 0) + first.numel() * weight[0].numel()
        found.signal[name, t] = found.signal.get((name, t), 0.0) + energy(first)
        gradient = gradient.reshape(copies, *first.shape)
        for scheme, error in found.errors(name, inputs, first):
            key = (name, scheme, t)
            found.noise[key] = found.noise.get(key, 0.0) + energy(error)
            effect = float((error * gradient).reshape(copies * rows, -1).double().sum(1).square().sum())
            found.own[key] = found.own.get(key, 0.0) + effect / self.copies


class _Tap(torch.autograd.Function):
    """The identity, whose backward looks at the gradient. What it needs is saved as autograd saves it, so that
    checkpointing frees and recomputes it like any other activation."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, see: Callable[[Tensor, Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(output, x)
        ctx.see = see
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.see(*(saved.detach() for saved in ctx.saved_tensors), grads[0])
        return grads[0], None, None


@contextmanager
def differentiable(denoiser: nn.Module) -> Iterator[None]:
    """Gradients reach activations but no parameters; activations are recomputed where the denoiser can do that."""
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    model: Any = denoiser
    switch = getattr(model, "_supports_gradient_checkpointing", False) and not model.is_gradient_checkpointing
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        if switch:
            model.enable_gradient_checkpointing()
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        if switch:
            model.disable_gradient_checkpointing()


def dense(layer: nn.Module, x: Tensor, weight: Any) -> Tensor:
    """The layer's float operation with another input and weight."""
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, layer.bias)
    bias = layer.bias
    return F.linear(x, weight, bias if isinstance(bias, Tensor) else None)
