"""Quantized results under the Hugging Face cache, so that quantizing the same model in the same way again is a load.

An entry is found by content: the source's files, everything that was asked for, and what it was computed with. A hit
gives exactly what computing would give (a plan made for a target on speed: what was measured when it was computed, on
this kind of CPU and with as many threads). Deleting the folder, or any entry in it, is always safe.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoModel, DiffusionPipeline, SchedulerMixin
from huggingface_hub import constants
from PIL import Image
from torch import nn

from .artifacts import Plan, Profile, Report
from .backends.cpu import cpu_kind
from .calls import tensor_key
from .checkpoints import HUB_OPTIONS, side_files
from .config import LDMQConfig
from .errors import CheckpointError, LDMQError, OutputError
from .families import find_denoiser
from .folders import write_side_files
from .output import folder_beside
from .request import Request
from .selections import selection_name
from .serialization import read_json, to_json, write_json
from .version import __version__

logger = logging.getLogger(__name__)

FORMAT = 1
"""Of an entry's files and of what its name is made of."""
SWITCH = "LDMQ_CACHE"
"""Environment variable; '0' turns the cache off."""
_NEUTRAL = (*HUB_OPTIONS, "use_safetensors", "disable_mmap", "low_cpu_mem_usage")
"""Options of loading that say where files come from or how they are read: their content counts, not they."""
_PLACING = (
    "custom_pipeline",
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_state_dict",
    "quantization_config",
)
"""Options with which nothing is cached: what they do is not in the source's files, or places parts of the model."""


def cache_folder() -> Path:
    """Where entries are: 'ldmq' in the Hugging Face home, which the environment variable HF_HOME names."""
    return Path(constants.HF_HOME) / "ldmq"


def is_on() -> bool:
    """False where the environment turns the cache off."""
    return os.environ.get(SWITCH, "1") != "0"


def place_for_reconstruction(name: str) -> Path | None:
    """A folder of that name in the cache; None, with a warning, where nothing can be written."""
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        logger.warning("an interrupted reconstruction will begin anew: %s; name a writable folder by HF_HOME", cause)
        return None
    return folder


@dataclass(frozen=True, slots=True)
class Cached:
    """A quantized denoiser, its name in the pipeline and what stands beside it."""

    component: str
    denoiser: nn.Module
    artifacts: dict[str, Plan | Report | Profile | None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One place in the cache, filled or not. made_of: what the place's name is the hash of."""

    folder: Path
    made_of: dict[str, Any]

    def load(self) -> Cached | None:
        """What is stored; None if nothing is, or, with a warning, if it is damaged."""
        if not self.folder.is_dir():
            return None
        try:
            return _read(self.folder)
        except (LDMQError, OSError, ValueError, LookupError, TypeError) as cause:
            reason = " ".join(str(cause).split())
            logger.warning("%s: this cached result is damaged (%s); it is computed anew", self.folder, reason[:300])
            return None

    def reconstruction(self) -> Path | None:
        """A folder for what a reconstruction has finished, so that an interrupted one goes on; None, with a warning,
        where nothing can be written."""
        return place_for_reconstruction(f".{self.folder.name}.reconstruction")

    def store(self, pipe: Any, outcome: Any) -> None:
        """Fill the place, completely or not at all; a cache that cannot be written costs one warning."""
        component, denoiser = find_denoiser(pipe)
        if getattr(diffusers, type(denoiser).__name__, None) is not type(denoiser):
            logger.warning("the result is not cached: %s is no class of diffusers", type(denoiser).__name__)
            return
        try:
            with folder_beside(self.folder, overwrite=True) as beside:
                denoiser.save_pretrained(beside / "denoiser")  # pyright: ignore[reportCallIssue]
                write_side_files(beside, outcome)
                files = {name: _file_digest(path) for name, path in _files(beside)}
                write_json(beside / "entry.json", {"component": component, "files": files, "made_of": self.made_of})
        except OutputError as cause:
            if not self.folder.is_dir():  # else another process was first
                logger.warning(
                    "the result is not cached: %s; name a writable folder by HF_HOME, or pass cache=False", cause
                )


def find_entry(model: str, request: Request, options: dict[str, Any]) -> Entry | None:
    """The place of what quantizing this model as asked gives; None, with a warning, where that depends on something
    that cannot be compared between runs. options: of loading the model."""
    if request.settings.components:  # what quantizes them while loading is part of the entry's name by itself
        options = {name: value for name, value in options.items() if name != "quantization_config"}
    placing = [name for name in _PLACING if options.get(name) is not None]
    if placing:
        logger.warning("the result is not cached: it depends on %s", placing[0])
        return None
    given = {name: value for name, value in options.items() if name not in (*_NEUTRAL, "kind")}
    try:
        selected = [selection_name(request.settings.calibration), to_json(request.settings.calibration)]
        asked = {"inputs": comparable(request.inputs), "options": comparable(given), "selected": comparable(selected)}
    except TypeError as cause:
        logger.warning("the result is not cached: %s", cause)
        return None
    source = _source(model, options)
    if source is None:
        return None
    made_of = {
        "format": FORMAT,
        "versions": _versions(),
        "source": source,
        "settings": to_json(replace(request.settings, dtype=None, components={}, calibration="")),
        "components": {name: LDMQConfig(plan).to_dict() for name, plan in request.settings.components.items()},
        "dtype": str(request.settings.dtype),
        "steps": request.steps,
        "device": _device_kind(request.device),
        "threads": torch.get_num_threads(),
        "class": getattr(options.get("kind"), "__name__", None),
        **{name: _digest(value) for name, value in asked.items()},
    }
    return Entry(cache_folder() / _digest(made_of)[:32], made_of)


def comparable(value: Any) -> Any:
    """`value` as JSON data that is equal exactly where values are: numbers, texts, lists, dicts, tensors, arrays,
    pictures by their pixels, schedulers by their configuration.

    Raises TypeError naming what cannot be compared between runs.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return ["float", repr(value)]
    if isinstance(value, (list, tuple)):
        return ["list", *(comparable(item) for item in value)]
    if isinstance(value, dict):
        return {f"{type(key).__name__} {key}": comparable(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return ["tensor", tensor_key(value.detach().cpu())]
    if isinstance(value, np.ndarray) and value.dtype != object:
        return ["array", str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, Image.Image):
        pixels = hashlib.sha256(value.tobytes() + bytes(value.getpalette() or ())).hexdigest()
        return ["picture", value.mode, list(value.size), pixels]
    if isinstance(value, (torch.dtype, torch.device)):
        return [type(value).__name__, str(value)]
    if isinstance(value, SchedulerMixin):
        return ["scheduler", type(value).__name__, comparable(dict(value.config))]  # pyright: ignore
    raise TypeError(f"{type(value).__name__} objects cannot be compared between runs")


def _read(folder: Path) -> Cached:
    entry = read_json(folder / "entry.json", CheckpointError)
    found = {name: _file_digest(path) for name, path in _files(folder) if name != "entry.json"}
    if not isinstance(entry, dict) or entry.get("files") != found:
        raise CheckpointError(f"{folder}: its files are not those that were written")
    config = read_json(folder / "denoiser" / "config.json", CheckpointError)
    dtype = getattr(torch, config["quantization_config"]["compute_dtype"])
    denoiser: Any = AutoModel.from_pretrained(os.fspath(folder / "denoiser"), torch_dtype=dtype)
    denoiser.register_to_config(_name_or_path=config.get("_name_or_path"))  # not where it was cached
    return Cached(entry["component"], denoiser, side_files(folder))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below `folder` with its name from there, in order."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _source(model: str, options: dict[str, Any]) -> dict[str, str] | None:
    """Name -> hash of the content of every file that the pipeline in this folder or repository may be loaded from; None
    if it cannot be had (loading then says why). Nothing is downloaded that loading with these options would not."""
    folder, options = Path(model), dict(options)
    kind = options.pop("kind", DiffusionPipeline)
    try:
        if not folder.exists():
            folder = Path(kind.download(model, **options))
        index = read_json(folder / "model_index.json", CheckpointError)
        parts = index.keys() - options.keys()  # components that are given are not read
        chosen = {name: path for name, path in _files(folder) if name.split("/")[0] in parts or "/" not in name}
        kept = {name: path for name, path in chosen.items() if "/" in name or path.suffix in (".json", ".py")}
        return {name: _content(path) for name, path in kept.items()}
    except (LDMQError, OSError, ValueError):
        return None


def _content(path: Path) -> str:
    """Hash of a file's content; in the hub's cache the name of the file that a link leads to is one already."""
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs":
        return f"blob {blob.name}"
    return _file_digest(path)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _device_kind(device: str | None) -> str:
    kind = torch.device(device or "cpu")
    return torch.cuda.get_device_name(kind) if kind.type == "cuda" else f"{kind.type}, {cpu_kind()}"


@lru_cache
def _versions() -> dict[str, str]:
    """Of what computes a result. Ours with a hash of the code, which changes between versions while it is worked on."""
    code = {name: _file_digest(path) for name, path in _files(Path(__file__).parent) if path.suffix == ".py"}
    return {
        "ldmq": f"{__version__} {_digest(code)[:16]}",
        "torch": str(torch.__version__),
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
