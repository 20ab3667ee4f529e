"""The block curve: noise accumulated at the denoiser's output as group after group of blocks is quantized, over time.

Source: the global analysis of "Efficient Quantization Strategies for Latent Diffusion Models" (arXiv 2312.05431), whose
equations could not be consulted: a reconstruction. Decibels fall with every block that adds noise, sensitive or not;
what a group adds is therefore read as a difference of noise powers, which takes that natural fall out.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .affine import qdq, token_qparams
from .allocator import give_back
from .artifacts import BlockCurve
from .calibration import layer_state
from .calls import Batch, run
from .errors import PlanError
from .families import quantizable_layers
from .layers import quantize_layer
from .metrics import Power
from .observers import Observer
from .quantization import replace_layer
from .serialization import from_json, read_json, write_json
from .specs import parse_scheme
from .tables import LayerTable

DIRECTIONS = ("forward", "backward")
PARTS = ("both", "weight", "activation")
MISFIT = "the remembered part of the profile does not fit this model; delete it and start anew"


@dataclass(frozen=True, slots=True)
class CurveInputs:
    """What every curve of one profile shares. schemes: layer -> scheme of the layers that are quantized at all;
    timesteps: [T] of the batches, noisiest first."""

    table: LayerTable
    batches: Sequence[Batch]
    timesteps: tuple[float, ...]
    ranges: dict[str, Observer]
    schemes: dict[str, str]
    scheme: str


@dataclass(slots=True)
class Memory:
    """Rows that are done, kept in a file so that a long profile goes on where it stopped. path: None = nowhere.

    key: of everything that the rows depend on; rows of another key are refused.
    """

    path: Path | None = None
    key: str = ""
    rows: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @staticmethod
    def at(path: Path, key: str) -> "Memory":
        """The memory in a file; empty where there is none yet. Raises PlanError if it belongs to something else."""
        if not path.exists():
            return Memory(path, key)
        data = read_json(path, PlanError)
        rows = data.get("rows") if isinstance(data, dict) else None
        if isinstance(data, dict) and data.get("key") == key:
            return Memory(path, key, from_json(dict[str, tuple[float, ...]], rows, PlanError, f"{path}: rows"))
        raise PlanError(
            f"{path}: holds the beginning of another profile (other model, inputs, settings or version); "
            f"delete it to start anew, or repeat the command that began it"
        )

    def keep(self, name: str, row: tuple[float, ...]) -> None:
        """Remember a row, on disk too."""
        self.rows[name] = row
        if self.path is not None:
            write_json(self.path, {"key": self.key, "rows": self.rows})


def group_blocks(table: LayerTable, effects: dict[str, float], most: int) -> tuple[tuple[str, ...], ...]:
    """Neighbouring blocks of one part as groups, at most `most` of which hold quantized layers. The quietest
    neighbours are joined, so that sensitive blocks stand alone.

    effects: quantized layer -> its own noise power at the output; blocks without any cost no run and stay single.
    """
    groups: list[tuple[tuple[str, ...], str, list[float]]]
    groups = [((block.name,), block.part, [effects[n] for n in block.layers if n in effects]) for block in table.blocks]
    while sum(1 for *_, noise in groups if noise) > most:
        pairs = [
            (sum(one[2]) + sum(two[2]), index)
            for index, (one, two) in enumerate(zip(groups, groups[1:], strict=False))
            if one[1] == two[1] and one[2] and two[2]
        ]
        if not pairs:
            break
        index = min(pairs)[1]
        one, two = groups[index : index + 2]
        groups[index : index + 2] = [((*one[0], *two[0]), one[1], one[2] + two[2])]
    return tuple(names for names, *_ in groups)


def block_curve(
    denoiser: nn.Module,
    given: CurveInputs,
    groups: tuple[tuple[str, ...], ...],
    kind: tuple[str, str] = ("forward", "both"),
    *,
    memory: Memory | None = None,
    done: Callable[[int], None] = lambda calls: None,
) -> BlockCurve:
    """Measure one curve. kind: (direction, part), see BlockCurve; done: told the number of calls of every finished
    row, and 0 for every layer that is replaced.

    Quantizing from the input on and restoring from the output on pass through the same models, so 'backward' restores
    from the input on: row g is what groups g.. make alone. The denoiser is unchanged afterwards.
    """
    memory = memory or Memory()
    direction, part = kind
    order = range(len(groups)) if direction == "forward" else range(len(groups) - 1, -1, -1)
    rows: dict[int, tuple[float, ...]] = {}
    row = (0.0,) * len(given.timesteps)
    with ExitStack() as stack:
        for index in order:
            layers = {layer for block in given.table.blocks if block.name in groups[index] for layer in block.layers}
            names = [info.name for info in given.table.layers if info.name in layers & given.schemes.keys()]
            for name in names:
                stack.enter_context(_rounded(denoiser, name, given, part))
                done(0)
            name = f"{direction} {part} {index}"
            if name in memory.rows:
                row = memory.rows[name]
                if len(row) != len(given.timesteps):
                    raise PlanError(MISFIT)
            elif names:
                row = _output_noise(denoiser, given)
                memory.keep(name, row)
            rows[index] = row
            give_back()
            if names:
                done(len(given.batches))
    noise = tuple(rows[index] for index in range(len(groups)))
    return BlockCurve(given.scheme, _signal(given), noise, groups, direction, part)


@contextmanager
def _rounded(denoiser: nn.Module, name: str, given: CurveInputs, part: str) -> Iterator[None]:
    """One layer quantized: as it will run, or its weight alone, or its input alone."""
    layer, scheme = quantizable_layers(denoiser)[name], parse_scheme(given.schemes[name])
    if part == "activation":
        spec = scheme.activation
        if spec is None:
            yield
            return
        static = None if scheme.is_dynamic else given.ranges[name].qparams(spec)

        def around(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
            qparams = static or token_qparams(args[0], spec, isinstance(module, nn.Conv2d))
            return (qdq(args[0], qparams, spec).to(args[0].dtype), *args[1:])

        handle = layer.register_forward_pre_hook(around)
        try:
            yield
        finally:
            handle.remove()
        return
    if part == "weight" and scheme.weight is not None:
        scheme = parse_scheme(f"w{scheme.weight.bits}a16")
    replace_layer(denoiser, name, quantize_layer(layer, layer_state(name, layer, scheme, given.ranges.get(name))))
    try:
        yield
    finally:
        replace_layer(denoiser, name, layer)


def _output_noise(denoiser: nn.Module, given: CurveInputs) -> tuple[float, ...]:
    """[T] noise power at the output of the denoiser as it stands."""
    noise = dict.fromkeys(given.timesteps, 0.0)
    for batch in given.batches:
        noise[batch.timestep] += Power.between(batch.output, run(denoiser, batch)).noise
    return tuple(noise[t] for t in given.timesteps)


def _signal(given: CurveInputs) -> tuple[float, ...]:
    signal = dict.fromkeys(given.timesteps, 0.0)
    for batch in given.batches:
        signal[batch.timestep] += Power.between(batch.output, batch.output).signal
    return tuple(signal[t] for t in given.timesteps)
