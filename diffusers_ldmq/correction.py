"""Stage 4b: correct the worst layers, and keep of it what two measurements on held-out calls approve of.

The layer gate asks whether the layer's own output gets better (relative SQNR), the model gate whether the denoiser's
does: a correction that helps a layer can still harm the output, where its noise had cancelled another layer's.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .artifacts import Calibration, Trial
from .calls import Batch, Recording, run
from .corrections import CORRECTIONS, LayerInputs, output_power
from .errors import CalibrationError
from .families import family_of
from .layers import quantize_layer
from .metrics import Power, total
from .observers import OBSERVERS
from .progress import Progress
from .quantization import quantized_for_now, refuse_unfit, replace_layer
from .selections import Selection, find_selection
from .specs import LayerState
from .verification import stored_bytes

DEFAULT = ("skip-split", "dilate", "smooth", "rotate", "low-rank", "bias")
"""What is tried on every layer, the cheapest at run time first: of two equals the first wins."""
LEAST_GAIN_DB = 0.1
"""What a correction must bring at the layer's own output."""
CALIBRATING_CALLS = 8
SELECT_CALLS = 5
IMAGES = 2
"""How much of the recording is looked at: calls of each set, spread evenly, and images of each."""
CANDIDATES = 3
"""How many corrections of a layer, best first, may be tried at the model gate until one passes."""
CAPTURE_BYTES = 2**28
"""Layer inputs held in memory at a time, as long as one layer's alone are not more."""


def correct(  # noqa: PLR0913 (options of one stage)
    denoiser: nn.Module,
    calibration: Calibration,
    recording: Recording,
    *,
    layers: Sequence[str],
    corrections: Sequence[str] = DEFAULT,
    observer: str | None = None,
    selection: str | Selection | None = None,
    most_bytes: int | None = None,
    progress: Progress | None = None,
) -> tuple[Calibration, tuple[Trial, ...]]:
    """Try corrections on `layers`, worst first, and return the calibration with those that passed both gates, and
    every trial. The denoiser is the float one and unchanged afterwards.

    observer: derives static ranges again from the transformed inputs; selection: picks the calls to calibrate with (of
    both, None = the calibration's); most_bytes: that all kept corrections together may add to what is stored (None =
    any). Inputs of as many layers as fit into CAPTURE_BYTES are held at a time, of one at least; the denoiser runs
    CALIBRATING_CALLS + SELECT_CALLS times for each such group and SELECT_CALLS times for each of a layer's CANDIDATES
    at the model gate.

    Raises CalibrationError for a layer that is not quantized, or not called, LDMQError for an unknown correction or
    observer or a denoiser that is quantized already.
    """
    observer, selection = observer or calibration.observer, selection or calibration.selection
    stage = _Stage(denoiser, calibration, recording, tuple(corrections), observer, selection)
    stage.check(layers)
    trials: list[Trial] = []
    room = _Room(math.inf if most_bytes is None else most_bytes)
    for group in stage.groups(layers):
        tried = [stage.at_layer(name, inputs, held_out) for name, inputs, held_out in stage.captured(group)]
        calibration, decided = _at_output(denoiser, calibration, stage.select, tried, room)
        trials.extend(decided)
        if progress:
            progress(len({trial.layer for trial in trials}), len(set(layers)))
    return calibration, tuple(trials)


def apply_everywhere(
    denoiser: nn.Module, calibration: Calibration, recording: Recording, correction: str = "smooth"
) -> Calibration:
    """The calibration with one correction on every layer it applies to, measured by nobody: what the gates are
    compared with. Raises as `correct`."""
    stage = _Stage(denoiser, calibration, recording, (correction,), calibration.observer, calibration.selection)
    stage.check(list(calibration.states))
    states = dict(calibration.states)
    for group in stage.groups(list(states)):
        for name, inputs, _ in stage.captured(group):
            corrected = CORRECTIONS[correction](denoiser.get_submodule(name), states[name], inputs)
            states[name] = corrected or states[name]
    return replace(calibration, states=states)


@dataclass(slots=True)
class _Room:
    """Bytes that corrections may still add."""

    bytes: float


@dataclass(frozen=True, slots=True)
class _Tried:
    """All trials of one layer at its own output; candidates: (index in trials, state) of the good ones, best first."""

    layer: str
    trials: tuple[Trial, ...]
    candidates: tuple[tuple[int, LayerState], ...]


class _Stage:
    """The layer gate and what feeds it."""

    def __init__(  # noqa: PLR0913
        self,
        denoiser: nn.Module,
        calibration: Calibration,
        recording: Recording,
        corrections: tuple[str, ...],
        observer: str,
        selection: str | Selection,
    ) -> None:
        refuse_unfit(denoiser)
        self.corrections = {name: CORRECTIONS[name] for name in corrections}
        self.denoiser, self.states, self.observer = denoiser, calibration.states, observer
        self.floats = {name: denoiser.get_submodule(name) for name in calibration.states}
        self.split = family_of(denoiser).skip_split
        calibrating = recording.only("calibrate")
        picked = list(find_selection(selection)(calibrating, None))
        self.calibrate = list(_evenly(list(calibrating.batches(picked)), CALIBRATING_CALLS))
        self.select = held_out_batches(recording)

    def check(self, layers: Sequence[str]) -> None:
        """Raise for a layer that is not quantized and for an unknown observer."""
        _ = OBSERVERS[self.observer]
        for name in layers:
            if name not in self.states:
                raise CalibrationError(
                    f"layer {name!r} is not among the {len(self.states)} quantized layers of the calibration, so there "
                    f"is nothing to correct; name layers that the plan quantizes"
                )

    def groups(self, layers: Sequence[str]) -> Iterator[list[str]]:
        """The layers in their order, as many at a time as CAPTURE_BYTES allows."""
        seen = self._inputs(dict.fromkeys(layers), self.select[:1])
        calls = len(self.calibrate) + len(self.select)
        sizes = {name: calls * sum(x.numel() * x.element_size() for x in inputs) for name, inputs in seen.items()}
        group: list[str] = []
        for name, size in sizes.items():
            if group and sum(sizes[other] for other in group) + size > CAPTURE_BYTES:
                yield group
                group = []
            group.append(name)
        yield from [group] if group else []

    def captured(self, names: list[str]) -> Iterator[tuple[str, LayerInputs, tuple[Tensor, ...]]]:
        """(layer, its calibrating inputs, its held-out inputs)."""
        calibrating, held_out = self._inputs(names, self.calibrate), self._inputs(names, self.select)
        for name in names:
            given = LayerInputs(calibrating.pop(name), self.observer, self.split(name, self.denoiser))
            yield name, given, held_out.pop(name)

    def _inputs(self, names: Iterable[str], batches: list[Batch]) -> dict[str, tuple[Tensor, ...]]:
        """What the float layers are given in a run over the batches. Raises CalibrationError for one never called."""
        found: dict[str, list[Tensor]] = {name: [] for name in names}

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, args: found[name].append(args[0].detach().clone())

        handles = [self.floats[name].register_forward_pre_hook(hook(name)) for name in found]
        try:
            for batch in batches:
                run(self.denoiser, batch)
        finally:
            for handle in handles:
                handle.remove()
        for name, inputs in found.items():
            if not inputs:
                raise CalibrationError(f"layer {name!r} was never called, so nothing can be measured; leave it out")
        return {name: tuple(inputs) for name, inputs in found.items()}

    def at_layer(self, name: str, inputs: LayerInputs, held_out: tuple[Tensor, ...]) -> _Tried:
        """Every correction alone, then bias on top of the best, at the layer's own output."""
        layer, state = self.floats[name], self.states[name]
        without = output_power(layer, state, held_out).sqnr_db
        trials, states = [], []

        def attempt(label: str, correction: str, start: LayerState) -> None:
            new = self.corrections[correction](layer, start, inputs)
            if new is None:
                trials.append(Trial(name, label, (without, without), None, False, "does not apply to this layer"))
            else:
                reached = output_power(layer, new, held_out).sqnr_db
                trials.append(Trial(name, label, (without, reached), None, False, ""))
            states.append(new)

        for correction in self.corrections:
            attempt(correction, correction, state)
        best = _best(trials, states)
        if best is not None and "bias" in self.corrections and trials[best].correction != "bias":
            attempt(f"{trials[best].correction} + bias", "bias", states[best] or state)
            best = _best(trials, states)
        told = [replace(trial, reason=trial.reason or _against(trial, trials, best)) for trial in trials]
        # best stands first: a little more at the layer is no reason to prefer what costs more
        good = sorted(range(len(trials)), key=lambda i: (i != best, -trials[i].layer_db[1]))
        good = [i for i in good if best is not None and trials[i].layer_db[1] >= without + LEAST_GAIN_DB]
        candidates = [(i, found) for i in good[:CANDIDATES] if (found := states[i]) is not None]
        return _Tried(name, tuple(told), tuple(candidates))


def held_out_batches(recording: Recording) -> list[Batch]:
    """A few calls of the recording's 'select' set, evenly from the noisiest timestep to the cleanest, of a few images
    each. Raises RecordingError if there is no such set."""
    calls = sorted(recording.only("select").calls, key=lambda call: (-call.timestep, call.run))
    return [recording.batch(call, list(range(min(IMAGES, call.images)))) for call in _evenly(calls, SELECT_CALLS)]


def _evenly(items: list, most: int) -> Iterator:
    """At most so many of the items, spread over all of them; first and last included."""
    n = min(most, len(items))
    return (items[round(i * (len(items) - 1) / max(n - 1, 1))] for i in range(n))


def _best(trials: list[Trial], states: list[LayerState | None]) -> int | None:
    """Index of the trial with the highest SQNR at the layer, if it gains enough; a later one must gain that much over
    the one before it, since what is tried later costs more."""
    best: int | None = None
    for index, trial in enumerate(trials):
        least = trial.layer_db[0] if best is None else trials[best].layer_db[1]
        if states[index] is not None and trial.layer_db[1] >= least + LEAST_GAIN_DB:
            best = index
    return best


def _against(trial: Trial, trials: list[Trial], best: int | None) -> str:
    """Why a trial lost at the layer; '' for the one that won."""
    if best is not None and trial is trials[best]:
        return ""
    gain = trial.layer_db[1] - trial.layer_db[0]
    if not gain >= LEAST_GAIN_DB:
        return f"layer SQNR changes by {gain:+.2f} dB, less than the {LEAST_GAIN_DB:g} dB that it must bring"
    assert best is not None
    won = trials[best]
    return f"{won.correction!r} brings more: {won.layer_db[1] - won.layer_db[0]:+.2f} dB instead of {gain:+.2f} dB"


def _at_output(
    denoiser: nn.Module, calibration: Calibration, batches: list[Batch], tried: list[_Tried], room: _Room
) -> tuple[Calibration, list[Trial]]:
    """The model gate: one layer after another into the quantized denoiser, kept where its output is no worse."""
    decided: list[Trial] = []
    kept = dict(calibration.states)
    if not any(entry.candidates for entry in tried):
        return calibration, [trial for entry in tried for trial in entry.trials]
    originals = {entry.layer: denoiser.get_submodule(entry.layer) for entry in tried}
    with quantized_for_now(denoiser, calibration):
        now = _output_power(denoiser, batches)
        for entry in tried:
            trials, before = list(entry.trials), denoiser.get_submodule(entry.layer)
            for index, state in entry.candidates:
                layer = quantize_layer(originals[entry.layer], state)
                more = stored_bytes(layer) - stored_bytes(before)
                if more > room.bytes:
                    trials[index] = replace(trials[index], reason=f"takes {more} bytes, {room.bytes:.0f} are left")
                    continue
                replace_layer(denoiser, entry.layer, layer)
                new = _output_power(denoiser, batches)
                trials[index] = _judged(trials[index], now, new)
                if trials[index].kept:
                    now, kept[entry.layer] = new, state
                    room.bytes -= more
                    break
                replace_layer(denoiser, entry.layer, before)
            decided.extend(trials)
    return replace(calibration, states=kept), decided


def _judged(trial: Trial, now: Power, new: Power) -> Trial:
    """The trial after the model gate."""
    db, gain = (now.sqnr_db, new.sqnr_db), trial.layer_db[1] - trial.layer_db[0]
    told = f"layer SQNR {gain:+.2f} dB, output SQNR {db[1] - db[0]:+.3f} dB"
    good = new.noise <= now.noise
    return replace(trial, output_db=db, kept=good, reason=told if good else f"{told}: the output gets worse")


def _output_power(denoiser: nn.Module, batches: list[Batch]) -> Power:
    with torch.no_grad():
        return total([Power.between(batch.output, run(denoiser, batch)) for batch in batches])
