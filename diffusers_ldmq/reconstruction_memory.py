"""The finished units of a reconstruction on disk, so that an interrupted one goes on where it stopped.

A folder: `identity.json` says what was reconstructed, from what and how; `unit-0007.safetensors` holds one unit's
states, its figures as JSON in the header. Every file is complete or not there.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .activations import ACTIVATIONS
from .artifacts import Reconstructed
from .calls import Recording, tensor_key
from .errors import CheckpointError
from .output import file_beside
from .serialization import from_json, read_json, to_json, write_json
from .specs import LayerState, check_state, geometry_of
from .units import Unit
from .version import __version__

FREE = ("memory_bytes",)
"""Settings that the result does not depend on, but for the order of sums where few rows fit into a pass."""
LEARNED = ("weight", "weight_scale", "bias", "input_scale")
"""Tensors of a state that reconstruction changes."""


def identity_of(
    denoiser: nn.Module, states: Mapping[str, LayerState], recording: Recording, settings: Any
) -> dict[str, Any]:
    """Everything that the result follows from, as plain data: equal identities give equal results."""
    weights = {name: denoiser.get_submodule(name).weight for name in states}
    schemes = {name: state.scheme.name for name, state in states.items()}
    tensors = {f"{name}.{part}": value for name, state in states.items() for part, value in state.tensors().items()}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "settings": {name: value for name, value in to_json(settings).items() if name not in FREE},
        "weights": _digest(weights),
        "recording": hashlib.sha256("".join(call.output for call in recording.calls).encode()).hexdigest()[:16],
        "schemes": hashlib.sha256(json.dumps(schemes, sort_keys=True).encode()).hexdigest()[:16],
        "calibration": _digest(tensors),  # last: it follows from those above, which say more to people
    }


def _digest(tensors: Mapping[str, Any]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tensor_key(tensors[name].detach().cpu())}\n".encode())
    return found.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ReconstructionMemory:
    """Where finished units are kept; None = nowhere."""

    folder: Path | None

    @staticmethod
    def at(folder: str | os.PathLike[str] | None, identity: dict[str, Any]) -> "ReconstructionMemory":
        """The memory in a folder, made where it is absent. Raises CheckpointError, naming what differs, for a folder in
        which another reconstruction began, or that is none of ours."""
        if folder is None:
            return ReconstructionMemory(None)
        path = Path(folder)
        if (path / "identity.json").exists():
            _refuse_other(path, read_json(path / "identity.json", CheckpointError), identity)
            for stale in path.glob(f"{ACTIVATIONS}*"):  # of a run that was killed
                shutil.rmtree(stale, ignore_errors=True)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{path}: holds something else than a reconstruction; name a new or empty folder")
        else:
            with file_beside(path / "identity.json") as beside:
                write_json(beside, identity)
        return ReconstructionMemory(path)

    def load(
        self, index: int, unit: Unit, states: Mapping[str, LayerState], denoiser: nn.Module
    ) -> tuple[dict[str, LayerState], Reconstructed] | None:
        """The unit's states and figures; None if it is not finished. Raises CheckpointError for a damaged file."""
        path = self._file(index)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                figures = from_json(Reconstructed, json.loads(file.metadata()["unit"]), CheckpointError, str(path))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            found = {name: _state(states[name], name, tensors) for name in unit.layers}
            for name, state in found.items():
                check_state(state, geometry_of(denoiser.get_submodule(name)))
            if figures.unit != unit.label:
                raise CheckpointError(f"holds unit {figures.unit!r}, expected {unit.label!r}")
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as cause:
            raise CheckpointError(f"{path}: is damaged ({cause}); delete it, and that unit is learned again") from None
        return found, figures

    def save(self, index: int, states: Mapping[str, LayerState], figures: Reconstructed) -> None:
        """Keep a finished unit. Raises OutputError where that fails, a full disk among the reasons."""
        path = self._file(index)
        if path is None:
            return
        parts = {f"{name}.{part}": state.tensors().get(part) for name, state in states.items() for part in LEARNED}
        tensors = {name: value.detach().cpu().contiguous() for name, value in parts.items() if value is not None}
        with file_beside(path) as beside:
            save_file(tensors, beside, metadata={"unit": json.dumps(to_json(figures))})

    def _file(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"unit-{index:04d}.safetensors"


def _state(before: LayerState, name: str, tensors: Mapping[str, Tensor]) -> LayerState:
    return replace(before, **{part: tensors[f"{name}.{part}"] for part in LEARNED if part in before.tensors()})


def _refuse_other(folder: Path, found: Any, expected: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise CheckpointError(f"{folder}/identity.json: is damaged; name another folder, or delete this one")
    now, then = _flat(to_json(expected)), _flat(found)
    for name in {**now, **then}:
        if now.get(name) != then.get(name):
            raise CheckpointError(
                f"{folder}: a reconstruction with {name} = {then.get(name)!r} began there, this one has "
                f"{now.get(name)!r}; use the same again, name another folder, or delete this one"
            )


def _flat(data: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found
