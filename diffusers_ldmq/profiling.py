"""Stage 2: where quantization noise arises, per layer and scheme and per block, over time.

Sources: "Efficient Quantization Strategies for Latent Diffusion Models" (arXiv 2312.05431), global and local
analysis; its equations could not be consulted, these are a reconstruction from its abstract and figure captions.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .allocator import give_back
from .artifacts import LayerNoise, Profile
from .calibration import observe_inputs
from .calls import Batch, Recording
from .curves import DIRECTIONS, PARTS, CurveInputs, Memory, block_curve, group_blocks
from .errors import PlanError, RecordingError
from .families import layer_table, quantizable_layers
from .noise import NoiseProbes
from .planners import candidates, low_precision
from .progress import Progress
from .quantization import refuse_unfit
from .selections import Selection, find_selection, selection_name
from .serialization import to_json
from .specs import parse_scheme
from .version import __version__

logger = logging.getLogger(__name__)

PASS_COST = 9
"""What one probing pass costs, in denoiser calls, for the progress bar."""
ENOUGH_ROWS = 16
"""Rows of a batch from which one random probe each is enough; smaller batches get up to four."""
FEW_ROWS = 40
"""Below so many rows in all, own effects are so uncertain that it is worth telling."""


@dataclass(frozen=True, slots=True)
class ProfileSettings:
    """How to profile. timesteps: how many of the recorded ones; images: how many of each recorded call's; groups: most
    points of the block curve; scheme: of the block curve; schemes: of the layers' noise; keep_float: None = the
    family's defaults; full: every timestep, block, direction and part, whatever it takes."""

    timesteps: int = 5
    images: int = 8
    groups: int = 20
    scheme: str = "w8a8"
    schemes: tuple[str, ...] = ("w8a16", "w8a8", "w8a8-dyn", "w4a16", "w4a8", "w4a8-dyn")
    selection: str | Selection = "first-step"
    observer: str = "minmax-affine"
    keep_float: frozenset[str] | None = None
    full: bool = False


def profile_sqnr(
    denoiser: nn.Module,
    recording: Recording,
    settings: ProfileSettings | None = None,
    *,
    memory: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Noise of every Linear and Conv2d under every scheme, at its own output and at the denoiser's, and the accumulated
    noise of the block curve, all per timestep, on the recording's 'select' set; static ranges come from 'calibrate'.

    The denoiser must be the float one, best in fp32; it is unchanged afterwards. memory: a file in which finished parts
    are kept, so that an interrupted profile goes on. Raises PlanError for unusable settings or another profile's
    memory, CalibrationError or RecordingError if the recording does not suit the denoiser.
    """
    settings = _checked(settings or ProfileSettings())
    refuse_unfit(denoiser)
    if recording.denoiser != type(denoiser).__name__:
        raise RecordingError(f"the recording is of a {recording.denoiser}, not of this {type(denoiser).__name__}")
    selected = _one_run(recording.only("select"))
    batches = _spread(selected, settings)
    rows = sum(batch.output.shape[0] for batch in batches)
    if rows < FEW_ROWS:
        logger.warning("only %d rows to profile: predictions may be off by several dB; record more inputs", rows)
    table, layers = layer_table(denoiser), quantizable_layers(denoiser)
    kept = {info.name for info in table.layers if info.keep_float}
    kept = kept if settings.keep_float is None else set(settings.keep_float)
    calibrating = recording.only("calibrate")
    picked = calibrating.batches(list(find_selection(settings.selection)(calibrating, None)))
    ranges = observe_inputs(denoiser, picked, list(layers), settings.observer, optional=kept)
    kinds = [(d, p) for d in DIRECTIONS for p in PARTS] if settings.full else [("forward", "both")]
    rows = sum(1 for block in table.blocks if set(block.layers) - kept)
    rows = rows if settings.full else min(rows, settings.groups)
    count = _Counter(len(batches) * (PASS_COST + len(kinds) * rows), progress)
    remembered = Memory.at(Path(memory), _key(recording, settings)) if memory is not None else Memory()
    probes = NoiseProbes(dict(layers), ranges, settings.schemes, told=lambda: count.up(0))
    _probe(denoiser, batches, probes, remembered, count)
    give_back()
    timesteps = tuple(sorted({b.timestep for b in batches}, reverse=True))
    table = layer_table(denoiser, probes.macs_per_image(batches[0].output.shape[0]))
    noises = probes.result(timesteps)
    schemes = {n.name: low_precision(n, settings.scheme).scheme for n in noises if n.name not in kept}
    given = CurveInputs(table, batches, timesteps, ranges, schemes, settings.scheme)
    most = len(table.blocks) if settings.full else settings.groups
    groups = group_blocks(table, _effects(noises, schemes), most)
    curves = [block_curve(denoiser, given, groups, kind, memory=remembered, done=count.up) for kind in kinds]
    return Profile(
        table=table,
        timesteps=timesteps,
        layers=noises,
        curve=curves[0],
        settings=_describe(settings, len(batches)),
        shared=probes.shared(),
        schedule=selected.timesteps(),
        curves=tuple(curves[1:]),
    )


def _checked(settings: ProfileSettings) -> ProfileSettings:
    for name in ("timesteps", "images", "groups"):
        if getattr(settings, name) < 1:
            raise PlanError(f"a profile of {getattr(settings, name)} {name} measures nothing; ask for at least 1")
    if any(parse_scheme(scheme).is_float for scheme in (settings.scheme, *settings.schemes)):
        raise PlanError("the scheme 'float' makes no noise; profile schemes such as w8a8")
    schemes = tuple(dict.fromkeys((*settings.schemes, *candidates(settings.scheme)[:-1])))
    return replace(settings, schemes=schemes)


def _one_run(recording: Recording) -> Recording:
    """The calls of the first recorded pipeline call."""
    first = recording.calls[0].run
    return replace(recording, calls=tuple(call for call in recording.calls if call.run == first))


def _spread(recording: Recording, settings: ProfileSettings) -> list[Batch]:
    """Batches of a few images at a few timesteps: the last, where noise jumps, and the others evenly before it."""
    every = recording.timesteps()
    if not every:
        raise RecordingError("the recording has no timesteps to profile; record again")
    n = len(every) if settings.full else min(settings.timesteps, len(every))
    before = [every[round(i * (len(every) - 2) / max(n - 2, 1))] for i in range(n - 1)]
    calls = recording.at((*before, every[-1])).calls
    return [recording.batch(call, list(range(min(settings.images, call.images)))) for call in calls]


def _probe(
    denoiser: nn.Module, batches: Sequence[Batch], probes: NoiseProbes, memory: Memory, count: "_Counter"
) -> None:
    """Measure every batch, or take over what is remembered of it. The first is always measured: it also tells the
    layers' work and which of them share an input."""
    generator = torch.Generator()
    for number, batch in enumerate(batches):
        name = f"layers {number}"
        if number == 0 or name not in memory.rows:
            generator.manual_seed(number)  # so that a resumed profile draws the same signs
            measured = replace(probes, signal={}, noise={}, own={}, macs=probes.macs if number == 0 else {})
            measured.measure(denoiser, batch, generator, min(max(ENOUGH_ROWS // batch.output.shape[0], 1), 4))
            memory.keep(name, measured.row(batch.timestep))
        probes.add(batch.timestep, memory.rows[name])
        give_back()
        count.up(PASS_COST)


def _effects(noises: tuple[LayerNoise, ...], schemes: dict[str, str]) -> dict[str, float]:
    """Layer -> the noise power it causes at the output under its scheme, over the profiled timesteps."""
    return {noise.name: sum(noise.own[schemes[noise.name]]) for noise in noises if noise.name in schemes}


def _key(recording: Recording, settings: ProfileSettings) -> str:
    """Hash of what a profile depends on. Of the recorded tensors only the size of what each run began with, to three
    digits: another number of threads changes the last bits of everything, and must not make a profile another."""
    calls = [(c.set, c.run, c.step, c.timestep, c.images) for c in recording.calls]
    began = [
        {path: f"{float(recording.tensors[key].double().norm()):.3g}" for path, key in call.tensors.items()}
        for call in recording.calls
        if call.step == 0
    ]
    text = json.dumps(
        to_json([__version__, recording.denoiser, calls, began, _describe(settings, 0), settings.timesteps]),
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _describe(settings: ProfileSettings, calls: int) -> dict[str, Any]:
    kept = sorted(settings.keep_float) if settings.keep_float is not None else "default"
    return {
        "selection": selection_name(settings.selection),
        "observer": settings.observer,
        "scheme": settings.scheme,
        "schemes": list(settings.schemes),
        "keep_float": kept,
        "calls": calls,
        "images": settings.images,
        "groups": settings.groups,
        "full": settings.full,
    }


class _Counter:
    """Counts work, in denoiser calls, and reports it; no work is reported too, as a sign of life."""

    def __init__(self, work: int, progress: Progress | None) -> None:
        self.work, self.done, self.progress = work, 0, progress

    def up(self, amount: int = 1) -> None:
        self.done = min(self.done + amount, self.work)
        if self.progress:
            self.progress(self.done, self.work)
