"""What a recording holds: the denoiser's own calls, replayable, as safetensors and JSON."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import RecordingError
from .serialization import from_json, read_json, write_json

FORMAT_VERSION = 1
UNBATCHED = ("img_ids", "txt_ids", "image_rotary_emb")
"""Arguments without a batch axis, whatever their length."""
FEATURES = "features"
"""Name of the features among a file's tensors, whose other names are hashes."""
SetName = Literal["calibrate", "select", "verify"]


class SampleId(NamedTuple):
    """One image's rows of one step, both guidance halves. trajectory: (run, image in the run)."""

    trajectory: tuple[int, int]
    step: int


@dataclass(frozen=True, slots=True, eq=False)
class InMemory:
    """An argument that is neither a tensor nor plain JSON, such as options that hold functions. It is replayed, never
    saved.

    value: handed to the denoiser, a dict as a shallow copy, because denoisers write into theirs;
    rows: (value, rows to keep, rows in all) -> the value for those rows; None = it belongs to all rows alike.
    """

    value: Any
    rows: Callable[[Any, Tensor, int], Any] | None = None

    def fresh(self) -> Any:
        """The value as one replay may have it."""
        return dict(self.value) if isinstance(self.value, dict) else self.value

    def chosen(self, keep: Tensor, rows: int) -> "InMemory":
        """The argument for some rows of the batch."""
        return self if self.rows is None else InMemory(self.rows(self.value, keep, rows), self.rows)


@dataclass(frozen=True, slots=True)
class Call:
    """One recorded denoiser call. A call of B rows for n images holds B / n rows of each (guidance halves).

    run: which pipeline call made it; step: counts distinct timesteps of a run from 0 (noisiest);
    tensors: argument path -> key in Recording.tensors; constants: argument path -> JSON value or InMemory;
    output: key of the float output; signal: its power.
    """

    set: str
    run: int
    step: int
    timestep: float
    images: int
    tensors: dict[str, str]
    constants: dict[str, Any]
    output: str


class Batch(NamedTuple):
    """Arguments for one replay of the denoiser, its float output (fp32), and the timestep."""

    kwargs: dict[str, Any]
    output: Tensor
    timestep: float


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """Calls with nested arguments flattened by path, equal tensors stored once.

    sampler_calls: set -> denoiser calls the sampler made to obtain that set.
    features: fp32 [steps, B, C, h, w], what went into the denoiser's middle (Family.middle) at every step of the first
    calibrating run, tokens as [steps, B, C, tokens, 1]; None where no selection asked for them.
    """

    denoiser: str
    calls: tuple[Call, ...]
    tensors: dict[str, Tensor]
    sampler_calls: dict[str, int] = field(default_factory=dict)
    features: Tensor | None = None

    def only(self, name: SetName) -> "Recording":
        """The calls of one of the three disjoint sets. Raises RecordingError if it has none."""
        calls = tuple(call for call in self.calls if call.set == name)
        if not calls:
            raise RecordingError(f"the recording has no calls for the set {name!r}; record again")
        return replace(self, calls=calls)

    def timesteps(self) -> tuple[float, ...]:
        """Distinct timesteps, noisiest first."""
        return tuple(sorted({call.timestep for call in self.calls}, reverse=True))

    def at(self, timesteps: tuple[float, ...]) -> "Recording":
        """Only the calls at those timesteps."""
        return replace(self, calls=tuple(c for c in self.calls if c.timestep in timesteps))

    def samples(self) -> list[SampleId]:
        """All samples in order of recording."""
        return list(dict.fromkeys(SampleId((c.run, i), c.step) for c in self.calls for i in range(c.images)))

    def batch(self, call: Call, images: list[int] | None = None) -> Batch:
        """The call's arguments and output; of some images' rows only, where `images` is given."""
        output = self.tensors[call.output]
        rows = output.shape[0]
        keep = None
        if images is not None and len(images) < call.images:
            halves = rows // call.images
            keep = torch.tensor([half * call.images + i for half in range(halves) for i in images])
        flat = {**call.constants, **{path: self.tensors[key] for path, key in call.tensors.items()}}
        return Batch(_chosen(flat, rows, keep), _rows(output, "", rows, keep), call.timestep)

    def batches(self, samples: list[SampleId] | None = None) -> Iterator[Batch]:
        """Batches of the chosen samples, call by call; of everything where `samples` is None."""
        wanted: dict[tuple[int, int], list[int]] = {}
        for sample in samples or self.samples():
            wanted.setdefault((sample.trajectory[0], sample.step), []).append(sample.trajectory[1])
        for call in self.calls:
            if (call.run, call.step) in wanted:
                yield self.batch(call, sorted(wanted[call.run, call.step]))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write recording.safetensors and recording.json into an existing folder. Raises RecordingError where an
        argument lives in memory only."""
        for call in self.calls:
            for path, value in call.constants.items():
                if isinstance(value, InMemory):
                    raise RecordingError(
                        f"argument {path!r} of the recorded {self.denoiser} holds Python objects that no file can "
                        f"keep; use this recording in the process that made it"
                    )
        tensors = {**self.tensors, **({} if self.features is None else {FEATURES: self.features})}
        save_file({k: t.contiguous() for k, t in tensors.items()}, Path(folder) / "recording.safetensors")
        head = {"format_version": FORMAT_VERSION, "denoiser": self.denoiser, "sampler_calls": self.sampler_calls}
        write_json(Path(folder) / "recording.json", {**head, "calls": self.calls})

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> "Recording":
        """Inverse of save. Raises RecordingError for a missing, damaged or foreign file."""
        data = read_json(Path(folder) / "recording.json", RecordingError)
        if not isinstance(data, dict) or data.pop("format_version", None) != FORMAT_VERSION:
            raise RecordingError(f"{folder}: not a recording of format_version {FORMAT_VERSION}; record again")
        try:
            tensors = load_file(Path(folder) / "recording.safetensors")
        except (OSError, SafetensorError) as cause:
            raise RecordingError(f"{folder}/recording.safetensors: cannot be read ({cause})") from None
        features = tensors.pop(FEATURES, None)
        recording = Recording(
            from_json(str, data.get("denoiser"), RecordingError, "denoiser"),
            from_json(tuple[Call, ...], data.get("calls"), RecordingError, "calls"),
            tensors,
            from_json(dict[str, int], data.get("sampler_calls"), RecordingError, "sampler_calls"),
            features,
        )
        needed = {key for call in recording.calls for key in (*call.tensors.values(), call.output)}
        if not needed <= set(tensors):
            raise RecordingError(f"{folder}: recording.safetensors lacks {len(needed - set(tensors))} tensors")
        return recording


def _rows(value: Any, path: str, rows: int, keep: Tensor | None) -> Any:
    """The kept rows of a batched argument; what belongs to all rows alike comes back as it is."""
    if keep is None:
        return value
    if isinstance(value, InMemory):
        return value.chosen(keep, rows)
    batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
    return value[keep] if batched and path.split("/")[0] not in UNBATCHED else value


def _chosen(flat: dict[str, Any], rows: int, keep: Tensor | None) -> dict[str, Any]:
    """Arguments by path as one replay takes them, of the kept rows."""
    return unflatten({path: _rows(value, path, rows, keep) for path, value in flat.items()})


def parts(batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch in parts of at most so many rows."""
    whole = batch.output.shape[0]
    if rows >= whole:
        yield batch
        return
    flat = flatten(batch.kwargs)
    for start in range(0, whole, rows):
        keep = torch.arange(start, min(start + rows, whole))
        yield Batch(_chosen(flat, whole, keep), batch.output[keep], batch.timestep)


def repeated(batch: Batch, times: int) -> Batch:
    """The batch with all its rows so many times, one copy after the other."""
    whole = batch.output.shape[0]
    keep = torch.arange(whole).repeat(times)
    if times == 1:
        return batch
    flat = flatten(batch.kwargs)
    return Batch(_chosen(flat, whole, keep), batch.output[keep], batch.timestep)


def run(denoiser: nn.Module, batch: Batch) -> Tensor:
    """The denoiser's output for a batch, without dropout, at its own dtype and device, as fp32 on the CPU."""
    with torch.no_grad():
        return forward(denoiser, batch).float().cpu()


def forward(denoiser: nn.Module, batch: Batch) -> Tensor:
    """The denoiser's output for a batch as it comes, without dropout; differentiable where gradients are enabled."""
    reference = next((p for p in denoiser.parameters() if p.is_floating_point()), None)
    dtype = reference.dtype if reference is not None else torch.float32
    device = reference.device if reference is not None else torch.device("cpu")
    with evaluating(denoiser):
        output = denoiser(**_cast(batch.kwargs, dtype, device))
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, (tuple, list)) else output.sample


@contextmanager
def evaluating(denoiser: nn.Module) -> Iterator[None]:
    """The denoiser without dropout while the context is open; models built by hand are in training mode."""
    training = [module for module in denoiser.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _cast(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Nested arguments on the device, floating ones at the dtype; timesteps of rank <= 1 keep theirs."""
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() and value.dim() > 1 else value.to(device)
    if isinstance(value, dict):
        return {key: _cast(item, dtype, device) for key, item in value.items()}
    if isinstance(value, list):
        return [_cast(item, dtype, device) for item in value]
    return value.fresh() if isinstance(value, InMemory) else value


def tensor_key(value: Tensor) -> str:
    """Name of a tensor by its content, so that equal tensors are stored once."""
    data = value.contiguous().flatten().view(torch.uint8).numpy() if value.numel() else b""
    return hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode() + bytes(data)).hexdigest()[:24]


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts and lists as {path: leaf}. Path parts are joined by '/', list positions are '#0', '#1', ...

    Raises RecordingError for a leaf that is neither a tensor nor plain JSON nor marked as InMemory.
    """
    if isinstance(value, dict):
        parts = {str(key): item for key, item in value.items()}
    elif isinstance(value, (list, tuple)):
        parts = {f"#{i}": item for i, item in enumerate(value)}
    elif isinstance(value, (Tensor, bool, int, float, str, InMemory)) or value is None:
        return {path: value}
    else:
        raise RecordingError(f"denoiser argument {path!r} is a {type(value).__name__}, which cannot be recorded")
    if not parts:
        return {}
    return {p: v for key, item in parts.items() for p, v in flatten(item, f"{path}/{key}" if path else key).items()}


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """Inverse of flatten; tuples come back as lists, empty containers not at all."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return {key: _lists(item) for key, item in tree.items()}


def _lists(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    items = {key: _lists(item) for key, item in node.items()}
    if items and all(key.startswith("#") for key in items):
        return [items[f"#{i}"] for i in range(len(items))]
    return items
