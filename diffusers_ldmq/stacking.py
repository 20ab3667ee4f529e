"""Calls of different timesteps as one batch, so that few samples of each do not cost a whole call."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .calls import UNBATCHED, Batch, flatten, parts, unflatten

TIMESTEP = "timestep"


def stacked(batches: Iterable[Batch], rows: int) -> Iterator[Batch]:
    """The rows of all batches in order, about so many at a time, each with its own timestep; larger batches are parted.

    Batches whose other arguments differ (shapes, what is no tensor) stay apart. The timestep of the result is the
    first one's.
    """
    group: list[tuple[dict[str, Any], Batch]] = []
    for batch in (part for whole in batches for part in parts(whole, rows)):
        flat = _with_row_timesteps(batch)
        whole = sum(other.output.shape[0] for _, other in group)
        if group and (whole >= rows or not _fit(group[0], (flat, batch))):
            yield _stack(group)
            group = []
        group.append((flat, batch))
    if group:
        yield _stack(group)


def _with_row_timesteps(batch: Batch) -> dict[str, Any]:
    """Arguments by path, the timestep as a tensor of one per row."""
    flat, rows = flatten(batch.kwargs), batch.output.shape[0]
    if TIMESTEP in flat:
        flat[TIMESTEP] = torch.as_tensor(flat[TIMESTEP]).flatten()[:rows].expand(rows)
    return flat


def _fit(one: tuple[dict[str, Any], Batch], other: tuple[dict[str, Any], Batch]) -> bool:
    (a, first), (b, second) = one, other
    if a.keys() != b.keys() or first.output.shape[1:] != second.output.shape[1:]:
        return False
    return all(_alike(path, (a[path], first), (b[path], second)) for path in a)


def _alike(path: str, one: tuple[Any, Batch], other: tuple[Any, Batch]) -> bool:
    (a, _), (b, _) = one, other
    if _has_rows(path, *one) and _has_rows(path, *other):
        return a.shape[1:] == b.shape[1:] and a.dtype == b.dtype
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)


def _has_rows(path: str, value: Any, batch: Batch) -> bool:
    batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch.output.shape[0]
    return batched and path.split("/")[0] not in UNBATCHED


def _stack(group: list[tuple[dict[str, Any], Batch]]) -> Batch:
    flat, first = group[0]
    rows = {
        path: torch.cat([other[path] for other, _ in group]) if _has_rows(path, value, first) else value
        for path, value in flat.items()
    }
    return Batch(unflatten(rows), torch.cat([batch.output for _, batch in group]), first.timestep)
