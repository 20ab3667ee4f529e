"""Rows of activations, in memory or, beyond a budget, in files that are mapped into it."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .calls import UNBATCHED, Batch, flatten, parts
from .errors import CalibrationError, OutputError
from .units import Unit, in_place, row_bytes, watch, watch_arguments

ACTIVATIONS = "ldmq-activations-"
"""How the names of folders with activations begin."""


@dataclass(slots=True)
class ActivationStore:
    """Gives out tensors for many rows of activations; the first `budget` bytes lie in memory, the rest in `folder`."""

    folder: Path
    budget: int
    used: int = 0
    files: list[Path] = field(default_factory=list)

    @staticmethod
    @contextmanager
    def open(budget: int, folder: str | os.PathLike[str] | None = None) -> Iterator["ActivationStore"]:
        """A store whose files are gone when the context ends. folder: where they are made (default: the system's)."""
        with TemporaryDirectory(prefix=ACTIVATIONS, dir=folder) as made:
            yield ActivationStore(Path(made), budget)

    def empty(self, rows: int, like: Tensor) -> Tensor:
        """An uninitialised CPU tensor of `like`'s dtype: [rows, *like.shape[1:]]. Raises OutputError on a full disk."""
        shape = (rows, *like.shape[1:])
        size = max(torch.Size(shape).numel(), 1) * like.element_size()
        if self.used + size <= self.budget:
            self.used += size
            return torch.empty(shape, dtype=like.dtype)
        path = self.folder / f"{len(self.files)}.bin"  # mapped pages live on after the name is gone, and only they
        self.files.append(path)
        self._reserve(path, size)
        flat = torch.from_file(str(path), shared=True, size=torch.Size(shape).numel(), dtype=like.dtype)
        return flat.reshape(shape)

    def _reserve(self, path: Path, size: int) -> None:
        """Take the space at once: a mapped file that grows on a full disk kills the process."""
        try:
            with path.open("wb") as file:
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
        except OSError as cause:
            full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
            raise OutputError(
                f"{self.folder}: {'no space left on the disk' if full else cause.strerror} for {size / 1e6:.0f} MB of "
                f"activations; free some, or reconstruct from fewer samples or with a larger memory budget"
            ) from cause

    @contextmanager
    def passing(self) -> Iterator[None]:
        """What is given out while the context is open is gone afterwards."""
        used, files = self.used, len(self.files)
        try:
            yield
        finally:
            self.used = used
            for path in self.files[files:]:
                path.unlink(missing_ok=True)
            del self.files[files:]


@dataclass(frozen=True, slots=True, eq=False)
class UnitRows:
    """What a unit is given and should give, for all rows of the samples. R rows.

    exact: arguments by path in the float run, tensors [R, ...] or what belongs to all rows alike; rounded: those of
    them that the quantized layers before the unit change, [R, ...]; outputs: by path, layers: by name, in the float
    run, [R, ...].
    """

    exact: dict[str, Any]
    rounded: dict[str, Tensor]
    outputs: dict[str, Tensor]
    layers: dict[str, Tensor]
    count: int

    def arguments(self, rows: Tensor, mask: Callable[[Tensor], Tensor | None] | None = None) -> dict[str, Any]:
        """Arguments by path for some rows, int64 [n], behind quantized layers. mask: True where an element comes from
        the float run instead."""
        found = {p: v[rows] if self.has_rows(p) else v for p, v in self.exact.items()}
        for path, values in self.rounded.items():
            given = values[rows]
            keep = mask(given) if mask is not None else None
            found[path] = given if keep is None else torch.where(keep, found[path], given)
        return found

    def has_rows(self, path: str) -> bool:
        """True for an argument with one entry per row."""
        return _has_rows(path, self.exact[path], self.count)


def gather_exact(
    denoiser: nn.Module, units: Sequence[Unit], batches: Sequence[Batch], store: ActivationStore
) -> dict[str, UnitRows]:
    """What each of the units, given in execution order, sees over the batches in the float denoiser."""
    count = sum(batch.output.shape[0] for batch in batches)
    kinds = ("argument", "output", "layer")
    found = {unit.name: [_Columns(f"{unit.name!r}, {kind}", count, store) for kind in kinds] for unit in units}
    for batch in batches:
        for name, seen in watch(denoiser, units, batch).items():
            for columns, values in zip(found[name], (seen.arguments, seen.outputs, seen.layers), strict=True):
                columns.add(values, batch)
    return {
        name: UnitRows({**given.constants, **given.columns}, {}, outputs.columns, layers.columns, count)
        for name, (given, outputs, layers) in ((n, [c.complete() for c in three]) for n, three in found.items())
    }


def gather_calls(batches: Sequence[Batch], path: str, layers: dict[str, Tensor], store: ActivationStore) -> UnitRows:
    """The denoiser itself as a unit, from what the batches hold. path: of its output; layers: as in UnitRows, of any
    number of rows."""
    count = sum(batch.output.shape[0] for batch in batches)
    given, outputs = _Columns("the denoiser, argument", count, store), _Columns("the denoiser, output", count, store)
    for batch in batches:
        given.add(flatten(batch.kwargs), batch)
        outputs.add({path: batch.output}, batch)
    found = given.complete()
    return UnitRows({**found.constants, **found.columns}, {}, outputs.complete().columns, layers, count)


def with_rounded(
    rows: UnitRows,
    denoiser: nn.Module,
    unit: Unit,
    batches: Sequence[Batch],
    before: Mapping[str, nn.Module],
    store: ActivationStore,
) -> UnitRows:
    """The rows with the arguments that the unit gets where the quantized layers `before` it are in their places.

    What has no axis beside rows and channels, as time embeddings have, stays that of the float run."""
    if not before:
        return rows
    rounded = _Columns(f"{unit.name!r}, argument", rows.count, store)
    with in_place(denoiser, before):
        for batch in batches:
            given = watch_arguments(denoiser, unit, batch)
            rounded.add({p: v for p, v in given.items() if rows.has_rows(p) and v.dim() > 2}, batch)
    changed = {p: v for p, v in rounded.columns.items() if not torch.equal(v, rows.exact[p])}
    return replace(rows, rounded=changed)


def windows(
    denoiser: nn.Module, units: Sequence[Unit], batch: Batch, rows: int, budget: int
) -> Iterator[tuple[Unit, ...]]:
    """The units in groups whose activations in the float run fit into `budget` bytes for so many rows; one at least."""
    one = next(parts(batch, 1))
    sizes = row_bytes(denoiser, units, one)
    group: list[Unit] = []
    room = float(budget)
    for unit in units:
        size = sizes[unit.name] * rows / one.output.shape[0]
        if group and size > room:
            yield tuple(group)
            group, room = [], float(budget)
        group.append(unit)
        room -= size
    yield tuple(group)


@dataclass(slots=True)
class _Columns:
    """Tensors with one entry per row, filled batch after batch; what comes otherwise is a constant.

    what: names the values in errors.
    """

    what: str
    count: int
    store: ActivationStore
    columns: dict[str, Tensor] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    filled: dict[str, int] = field(default_factory=dict)

    def add(self, values: Mapping[str, Any], batch: Batch) -> None:
        """Raises CalibrationError for a value that belongs to no row and differs from call to call."""
        rows = batch.output.shape[0]
        for path, value in values.items():
            if not _has_rows(path, value, rows):
                self._keep_constant(path, value)
                continue
            if path not in self.columns:
                self.columns[path] = self.store.empty(self.count, value)
            start, column = self.filled.get(path, 0), self.columns[path]
            if column.shape[1:] != value.shape[1:]:
                raise self._differs(path, f"has shape {list(column.shape[1:])} in one and {list(value.shape[1:])}")
            column[start : start + rows] = value
            self.filled[path] = start + rows

    def _keep_constant(self, path: str, value: Any) -> None:
        known = self.constants.setdefault(path, value)
        alike = torch.equal(known, value) if isinstance(value, Tensor) and isinstance(known, Tensor) else known == value
        if isinstance(value, Tensor) != isinstance(known, Tensor) or not alike:
            raise self._differs(path, "is one thing for all rows in one and another")

    def complete(self) -> "_Columns":
        """Itself. Raises CalibrationError where a value was there in some calls only."""
        for path, filled in self.filled.items():
            if filled != self.count or path in self.constants:
                raise self._differs(path, "is a tensor of rows in one and none")
        return self

    def _differs(self, path: str, how: str) -> CalibrationError:
        return CalibrationError(
            f"{self.what} {path!r} {how} in another recorded call, so they cannot be learned from together; record "
            f"inputs of one kind and size"
        )


def _has_rows(path: str, value: Any, rows: int) -> bool:
    batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
    return batched and path.split("/")[0] not in UNBATCHED
