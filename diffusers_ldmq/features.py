"""Features of sets of pictures; those of real pictures are computed once and kept in the cache."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .cache import cache_folder, is_on
from .errors import EvaluationError, LDMQError, OutputError
from .extractors import FeatureExtractor
from .output import folder_beside
from .picture_sets import BATCH, PictureSet, evenly
from .progress import Progress
from .scores import Moments
from .serialization import read_json, write_json

logger = logging.getLogger(__name__)

KEPT = 10_000
"""Pictures whose features are kept for precision and recall, at equal distances among all."""
FORMAT = 1
"""Of a cached file and of what its name is made of."""
ENTRY, TENSORS = "entry.json", "statistics.safetensors"


@dataclass(frozen=True, slots=True)
class Measured:
    """One set of pictures as an extractor sees it. pictures: digest of the set; count: of all; pooled, spatial:
    moments; kept: pooled features fp32 [m, d] of at most KEPT pictures; logits: fp32 [count, classes] or None."""

    pictures: str
    count: int
    pooled: Moments
    spatial: Moments
    kept: Tensor
    logits: Tensor | None = None


def measure(pictures: PictureSet, extractor: FeatureExtractor, *, progress: Progress | None = None) -> Measured:
    """Features of every picture of a set. Raises EvaluationError for pictures that cannot be read or do not fit the
    extractor, and for features that are not finite."""
    extractor.check_size(pictures.size[1], pictures.size[0])
    chosen = set(evenly(len(pictures), KEPT))
    pooled, spatial, kept, logits, done = None, None, [], [], 0
    for batch in pictures.batches(BATCH):
        found = extractor(batch)
        if not (found.pooled.isfinite().all() and found.spatial.isfinite().all()):
            raise EvaluationError(
                f"{extractor.name}: its features of {pictures.path} hold NaN or Inf; check its weights"
            )
        pooled = _added(pooled, Moments.of(found.pooled))
        spatial = _added(spatial, Moments.of(found.spatial))
        kept.append(found.pooled[[i for i in range(len(batch)) if done + i in chosen]])
        logits += [] if found.logits is None else [found.logits]
        done += len(batch)
        if progress:
            progress(done, len(pictures))
    if pooled is None or spatial is None:
        raise EvaluationError(f"{pictures.path}: there are no pictures to measure")
    every = torch.cat(logits) if logits else None
    return Measured(pictures.digest, done, pooled, spatial, torch.cat(kept), every)


def _added(before: Moments | None, more: Moments) -> Moments:
    return more if before is None else before + more


def measure_reference(
    pictures: PictureSet,
    extractor: FeatureExtractor,
    *,
    folder: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Measured:
    """The same without logits, kept in `folder` (default: 'references' in this library's cache, unless that is turned
    off) under the hash of pictures, their size and the extractor, and read from there the next time. What is damaged
    or belongs to other pictures is computed anew, with a warning."""
    where = Path(folder) if folder is not None else cache_folder() / "references" if is_on() else None
    made_of = {
        "format": FORMAT,
        "pictures": pictures.digest,
        "size": list(pictures.size),
        "extractor": extractor.digest,
    }
    place = None if where is None else where / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]
    found = None if place is None else _stored(place, made_of)
    if found is not None:
        if progress:
            progress(len(pictures), len(pictures))
        return found
    measured = measure(pictures, extractor, progress=progress)
    if place is not None:
        _store(place, made_of, measured)
    return Measured(measured.pictures, measured.count, measured.pooled, measured.spatial, measured.kept)


def _store(place: Path, made_of: dict[str, Any], measured: Measured) -> None:
    tensors = {
        "pooled_total": measured.pooled.total,
        "pooled_products": measured.pooled.products,
        "spatial_total": measured.spatial.total,
        "spatial_products": measured.spatial.products,
        "kept": measured.kept.contiguous(),
    }
    try:
        with folder_beside(place, overwrite=True) as beside:
            save_file(tensors, beside / TENSORS)
            entry = {"made_of": made_of, "count": measured.count, "digest": _file_digest(beside / TENSORS)}
            write_json(beside / ENTRY, entry)
    except OutputError as cause:
        logger.warning("statistics of the reference pictures are not kept: %s", cause)


def _stored(place: Path, made_of: dict[str, Any]) -> Measured | None:
    """What is kept there; None if nothing is, or, with a warning, if it cannot be used."""
    if not place.exists():
        return None
    try:
        entry = read_json(place / ENTRY, EvaluationError)
        if not isinstance(entry, dict) or entry.get("made_of") != made_of:
            raise EvaluationError(f"{place}: was made of other pictures or by another extractor")
        if entry.get("digest") != _file_digest(place / TENSORS):
            raise EvaluationError(f"{place}: {TENSORS} is not the file that was written")
        found, count = load_file(place / TENSORS), int(entry["count"])
        pooled = Moments(count, found["pooled_total"], found["pooled_products"])
        spatial = Moments(count, found["spatial_total"], found["spatial_products"])
        return Measured(made_of["pictures"], count, pooled, spatial, found["kept"])
    except (LDMQError, OSError, SafetensorError, LookupError, TypeError, ValueError) as cause:
        reason = " ".join(str(cause).split())[:300]
        logger.warning("kept statistics of the reference pictures are damaged (%s); they are computed anew", reason)
        return None


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
