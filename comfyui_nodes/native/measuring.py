"""Profiling and calibrating ComfyUI's MODEL: the stages of diffusers_ldmq on what its own sampler asks of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_ldmq.allocator import give_back
from diffusers_ldmq.artifacts import Plan, Profile
from diffusers_ldmq.calibration import input_qparams
from diffusers_ldmq.calls import Recording
from diffusers_ldmq.errors import CalibrationError
from diffusers_ldmq.profiling import FEW_ROWS, ProfileSettings, profile_sqnr
from diffusers_ldmq.progress import Progress
from diffusers_ldmq.recording import with_reference
from diffusers_ldmq.selections import SELECTIONS, first_step, uniform
from diffusers_ldmq.specs import parse_scheme

from .capture import Sampling, Scene, checked_scene, explained, listening, sample
from .float_copy import alive, copy_dtype, differentiable, float_copy, placed
from .observing import SampleRanges
from .patching import check_plan, refuse_unfit_model, source_layers
from .ranges import InputRanges
from .recorder import Recorder

OBSERVER = "minmax-affine"
MOST_IMAGES = 8
"""Of a profile: more seeds than these make predictions little better and everything slower."""
CALIBRATING = 4
"""Images of a single step that calibrates, or whose steps are chosen, where the latent's batch is smaller ..."""
POSITIONS = 128 * 128
"""... and all of them together have no more positions than this: one picture of 1024 x 1024."""
PARTS = 1000
"""Of which a stage's progress is made."""
TOLD_EVERY = 0.1
"""Seconds between two signs of life."""
RECORDED = 150
"""Parts of a profile's progress that are over when its calls are recorded."""


@dataclass(slots=True)
class Share:
    """A part of a progress bar, which can be told again where it is: a sign of life, and a chance to stop."""

    progress: Progress | None
    start: int = 0
    end: int = PARTS
    at: int = -1
    told: float = 0.0

    def __call__(self, done: int, total: int) -> None:
        at = self.start + (self.end - self.start) * done // max(total, 1)
        if at == self.at:
            self.again()
            return
        self.at = at
        self._tell()

    def again(self) -> None:
        """Tell the same once more, ten times a second at most."""
        if time.monotonic() - self.told >= TOLD_EVERY:
            self._tell()

    def _tell(self) -> None:
        self.told = time.monotonic()
        if self.progress is not None:
            self.progress(max(self.at, self.start), PARTS)


def profile_model(
    model: Any, positive: Any, negative: Any, latent: Any, sampling: Sampling, progress: Progress | None = None
) -> Profile:
    """Where quantization noise arises in this MODEL (LoRAs included): static ranges from the first step of some images
    at `sampling.seed`, noise at five steps of a whole run of as many at the next seed.

    So many images are sampled that estimates rest on FEW_ROWS rows, whatever the latent's batch. Layers are named as
    inside of the denoiser; `settings` of the result tells images, copy and cost in calls of the latent's own batch.
    Raises LDMQError for a MODEL or inputs that cannot be measured.
    """
    refuse_unfit_model(model)
    scene = checked_scene(model, positive, negative, latent)
    settings = ProfileSettings(observer=OBSERVER)
    copies = _copies(scene, sampling, settings.timesteps)
    denoiser, recording = record_model(model, scene.times(copies), sampling, Share(progress, 0, RECORDED))
    settings = replace(settings, images=scene.images * copies)
    told = Share(progress, RECORDED, PARTS)
    calls = [0]

    def count(done: int, total: int) -> None:
        calls[0] = total
        told(done, total)

    with measuring(denoiser, told):
        recording = with_reference(recording, denoiser)
        profile = profile_sqnr(denoiser, recording, settings, progress=count)
    facts = {
        "images": scene.images * copies,
        "copy": str(next(denoiser.parameters()).dtype).removeprefix("torch."),
        "cost_in_calls": copies * (sum(recording.sampler_calls.values()) + len(recording.calls) + calls[0]),
    }
    return replace(profile, settings={**profile.settings, **facts})


def _copies(scene: Scene, sampling: Sampling, timesteps: int) -> int:
    """How often each image of the latent is sampled, so that a profile sees FEW_ROWS rows."""
    halves = 1 if math.isclose(sampling.cfg, 1.0) else 2
    rows = scene.images * halves * min(timesteps, sampling.steps)
    return max(1, min(math.ceil(FEW_ROWS / rows), MOST_IMAGES // scene.images))


def record_model(model: Any, scene: Scene, sampling: Sampling, progress: Share) -> tuple[nn.Module, Recording]:
    """(float copy of the denoiser, recording of its calls): the set 'calibrate' holds the first step at the sampling's
    seed, 'select' a whole run at the next one. The MODEL stays as it is."""
    runs = (("calibrate", sampling.from_noise(), True), ("select", sampling.next_seed(), False))
    return record_runs(model, scene, runs, progress)


def record_runs(
    model: Any, scene: Scene, runs: Sequence[tuple[str, Sampling, bool]], progress: Share
) -> tuple[nn.Module, Recording]:
    """The same of any runs: (set, sampling, True to end after the first step), the last of which tells progress."""
    own: list[torch.dtype] = []

    def made(executor: Any, latent: Tensor) -> nn.Module:
        own.append(latent.dtype)
        return float_copy(executor, latent.device, copy_dtype(executor.class_obj, latent.dtype), progress.again)

    recorder = Recorder(made)
    with listening(model, recorder.wrap) as clone:
        for number, (name, sampling, first_step) in enumerate(runs):
            recorder.start(name, number, scene.images)
            last = progress if number == len(runs) - 1 else None
            sample(clone, scene, sampling, first_step=first_step, progress=last)
    recording, denoiser = recorder.result(), recorder.copy
    assert denoiser is not None
    return placed(denoiser, torch.device(model.load_device), own[0]), recording


@contextmanager
def measuring(denoiser: nn.Module, progress: Share) -> Iterator[None]:
    """Around what computes on a float copy: with gradients where they are asked for, and interruptible."""
    try:
        with torch.inference_mode(False), alive(denoiser, progress.again), differentiable(), explained("measured"):
            yield
    finally:
        give_back()


def calibrate_model(  # noqa: PLR0913  (what the node is given)
    model: Any,
    plan: Plan,
    positive: Any,
    negative: Any,
    latent: Any,
    sampling: Sampling,
    selection: str = "first-step",
    progress: Progress | None = None,
) -> InputRanges:
    """Input ranges of the plan's static layers, seen while this MODEL samples: during one step from pure noise of a few
    images, or with another selection during the whole schedule: with 'uniform' every step of the latent's own images,
    with others half of what a few images give, from the steps that they choose. The MODEL stays as it is; no layer is
    copied or replaced.

    Raises PlanError for a plan of another model, CalibrationError for a layer that was never called or saw NaN,
    LDMQError for a MODEL or inputs that cannot be sampled.
    """
    chosen = SELECTIONS[selection]
    refuse_unfit_model(model)
    check_plan(plan, source_layers(model), None)
    schemes = {name: parse_scheme(scheme) for name, scheme in plan.quantized().items()}
    static = [name for name, scheme in schemes.items() if scheme.is_static]
    if not static:
        return InputRanges(plan.fingerprint, {}, selection, OBSERVER, 0)
    scene = checked_scene(model, positive, negative, latent)
    scene = scene if chosen is uniform else scene.times(_calibrating(scene))
    seen = SampleRanges(static, scene.images, chosen, OBSERVER)
    with listening(model, seen.wrap) as clone:
        sample(clone, scene, sampling.from_noise(), first_step=chosen is first_step, progress=Share(progress))
    observers, samples = seen.chosen()
    ranges: dict[str, tuple[float, int]] = {}
    for name in static:
        try:
            found = input_qparams(observers.get(name), schemes[name])
        except CalibrationError as cause:
            raise CalibrationError(f"layer {name!r}: {cause}") from None
        assert found is not None
        ranges[name] = (float(found.scale), int(found.zero_point))
    return InputRanges(plan.fingerprint, ranges, selection, OBSERVER, samples)


def _calibrating(scene: Scene) -> int:
    """How often each image of the latent is sampled, each from noise of its own, where steps are few or chosen."""
    positions = scene.latent["samples"][0, 0].numel()
    return max(1, min(CALIBRATING, POSITIONS // positions) // scene.images)
