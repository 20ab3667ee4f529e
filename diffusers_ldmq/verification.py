"""Stage 6: what quantization did to the denoiser's output, on calls that nothing before has seen."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .artifacts import Report
from .calls import Recording, SetName, run
from .errors import VerificationError
from .families import float_shape, quantizable_layers
from .layers import QuantizedLayer, quantized_layers
from .metrics import Power
from .progress import Progress
from .quantization import STORAGE_DTYPE, fits_storage


def verify(
    denoiser: nn.Module, recording: Recording, *, on: SetName = "verify", progress: Progress | None = None
) -> Report:
    """Output SQNR per timestep against the recorded fp32 float outputs, at the denoiser's own dtype.

    Raises RecordingError if the recording lacks the set `on`, VerificationError for an output with NaN or Inf.
    """
    recording = recording.only(on)
    macs = _MacCounter(denoiser)
    powers: dict[float, Power] = {}
    for done, call in enumerate(recording.calls):
        batch = recording.batch(call)
        with macs.listening(only_if=done == 0):
            output = run(denoiser, batch)
        if not torch.isfinite(output).all():
            raise VerificationError(
                f"the {floating_dtype(denoiser)} {type(denoiser).__name__} gives NaN or Inf at timestep "
                f"{call.timestep:g}, the float32 model does not; choose --dtype float32 or bfloat16"
            )
        powers[call.timestep] = powers.get(call.timestep, Power()) + Power.between(batch.output, output)
        if progress:
            progress(done + 1, len(recording.calls))
    timesteps = tuple(sorted(powers, reverse=True))
    return Report(
        timesteps=timesteps,
        signal=tuple(powers[t].signal for t in timesteps),
        noise=tuple(powers[t].noise for t in timesteps),
        dtype=str(floating_dtype(denoiser)).removeprefix("torch."),
        schemes=scheme_counts(denoiser),
        backends=backend_counts(denoiser),
        int8_macs=macs.integer_share(),
        bytes=stored_bytes(denoiser),
        fp32_bytes=4 * float_parameters(denoiser),
    )


def floating_dtype(denoiser: nn.Module) -> torch.dtype:
    """Dtype of the denoiser's first floating parameter."""
    return next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.float32)


def scheme_counts(denoiser: nn.Module) -> dict[str, int]:
    """Scheme -> number of Linear and Conv2d layers."""
    names = [m.scheme.name if isinstance(m, QuantizedLayer) else "float" for m in quantizable_layers(denoiser).values()]
    return {name: names.count(name) for name in sorted(set(names))}


def backend_counts(denoiser: nn.Module) -> dict[str, int]:
    """'scheme on backend' -> number of quantized layers."""
    names = [f"{m.scheme.name} on {m.backend_name}" for m in quantized_layers(denoiser).values()]
    return {name: names.count(name) for name in sorted(set(names))}


def float_parameters(denoiser: nn.Module) -> int:
    """Number of parameters of the float model that this denoiser is or was."""
    layers = quantizable_layers(denoiser)
    own = {id(p) for layer in layers.values() for p in layer.parameters(recurse=False)}
    rest = sum(p.numel() for p in denoiser.parameters() if id(p) not in own)
    return rest + sum(math.prod(float_shape(m)) + (0 if m.bias is None else m.bias.numel()) for m in layers.values())


def stored_bytes(denoiser: nn.Module) -> int:
    """Bytes of the tensors that saving would write: codes, fp32 scales, the float rest in 16 bits."""
    total, seen = 0, set[tuple[int, torch.Size]]()
    for name, value in denoiser.state_dict().items():
        key = (value.data_ptr(), value.shape)
        if not value.is_meta and value.numel() and key in seen:
            continue  # tied to one that was counted
        seen.add(key)
        small = value.dtype == torch.float32 and not name.endswith("_scale") and fits_storage(value)
        total += value.numel() * (STORAGE_DTYPE.itemsize if small else value.element_size())
    return total


class _MacCounter:
    """Counts the multiply-accumulates of every Linear and Conv2d in one call."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.layers = quantizable_layers(denoiser)
        self.macs: dict[str, int] = {}
        self.branches = 0

    @contextmanager
    def listening(self, *, only_if: bool) -> Iterator[None]:
        handles = [m.register_forward_hook(self._hook(n)) for n, m in self.layers.items()] if only_if else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            outputs, *inputs = float_shape(self.layers[name])
            each = math.prod(inputs)
            self.macs[name] = self.macs.get(name, 0) + output.numel() * each
            if isinstance(module, QuantizedLayer) and module.rank:  # a low-rank branch runs in floating point
                self.branches += output.numel() // outputs * module.rank * (each + outputs)

        return count

    def integer_share(self) -> float:
        """Share (0..1) of the counted multiply-accumulates that are integer x integer."""
        integer = [n for n, m in self.layers.items() if isinstance(m, QuantizedLayer) and m.scheme.is_integer]
        return sum(self.macs.get(n, 0) for n in integer) / max(sum(self.macs.values()) + self.branches, 1)
