"""The contract of a feature extractor: it turns pictures into what FID and its relatives are computed from."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import EvaluationError
from ..serialization import read_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
"""Files of an extractor's folder."""


@dataclass(frozen=True, slots=True)
class Features:
    """What one batch of pictures looks like. pooled: fp32 [n, d]; spatial: fp32 [n, s], the first channels of an
    earlier map, flattened; logits: fp32 [n, classes], None where the network names no classes."""

    pooled: Tensor
    spatial: Tensor
    logits: Tensor | None


class FeatureExtractor(ABC):
    """A frozen network. name: as results show it; digest: of its files; pixels: side of the pictures that it takes,
    None = any (it resizes them itself)."""

    name: str
    digest: str
    pixels: int | None

    @abstractmethod
    def __call__(self, pictures: Tensor) -> Features:
        """Features of pictures, uint8 [n, 3, h, w]. Raises EvaluationError for pictures of a size it does not take."""

    @abstractmethod
    def to(self, device: str) -> "FeatureExtractor":
        """The same extractor, computing on that device."""

    def check_size(self, height: int, width: int) -> None:
        """Raise EvaluationError for pictures that the network was not made for."""
        if self.pixels is not None and (height, width) != (self.pixels, self.pixels):
            raise EvaluationError(
                f"the extractor {self.name} takes pictures of {self.pixels}x{self.pixels} pixels, these have "
                f"{width}x{height}; choose an extractor for that size (inception and clip take any)"
            )


def leading_channels(map_: Tensor, values: int) -> Tensor:
    """The first channels of a map [n, c, h, w], flattened to [n, s] with s <= `values`.

    sFID (Nash 2021, arXiv 2103.03841, as computed by ADM's evaluator) takes the first 7 channels of Inception's 17x17
    map: as many as keep it no longer than the 2048 pooled features. The same rule serves every extractor here.
    """
    channels = max(1, values // (map_.shape[2] * map_.shape[3]))
    return map_[:, :channels].flatten(1)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """An extractor's config.json. Raises EvaluationError, naming the folder and what is wrong."""
    path = Path(folder)
    if not path.is_dir():
        raise EvaluationError(f"{path}: no such folder; an extractor is a folder with {CONFIG} and {WEIGHTS}")
    config = read_json(path / CONFIG, EvaluationError)
    if not isinstance(config, dict):
        raise EvaluationError(f"{path / CONFIG}: expected an object, found {type(config).__name__}")
    return config


def load_weights(network: nn.Module, folder: str | os.PathLike[str], ignored: Iterable[str] = ()) -> None:
    """Fill a network from the folder's weights, of any floating dtype. ignored: names that may be missing or left over.

    Raises EvaluationError for a file that is missing, damaged, of another network or not finite.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file; the extractor's weights belong there, as safetensors")
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as cause:
        raise EvaluationError(f"{path}: cannot be read as safetensors ({' '.join(str(cause).split())[:200]})") from None
    own, free = network.state_dict(), tuple(ignored)
    for name in sorted((found.keys() ^ own.keys()) - {n for n in found.keys() | own.keys() if n.endswith(free)}):
        problem = "is missing" if name in own else "belongs to another network"
        raise EvaluationError(f"{path}: {name} {problem}; give the weights of {type(network).__name__}")
    for name, value in found.items():
        if name in own and value.shape != own[name].shape:
            shapes = f"{list(value.shape)}, expected {list(own[name].shape)}"
            raise EvaluationError(f"{path}: {name} has the shape {shapes}; give the weights that belong to {CONFIG}")
        if value.is_floating_point() and not value.isfinite().all():
            raise EvaluationError(f"{path}: {name} holds NaN or Inf; the file is damaged, fetch or train it again")
    network.load_state_dict({name: value for name, value in found.items() if name in own}, strict=not free)


def files_digest(folder: str | os.PathLike[str]) -> str:
    """Hash of an extractor's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.suffix in (".json", ".safetensors"):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
