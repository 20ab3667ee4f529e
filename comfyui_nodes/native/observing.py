"""Ranges of layers' inputs, kept sample by sample while a MODEL samples; which samples count is chosen afterwards, when
the schedule and the denoiser's features are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from diffusers_ldmq.calls import Call, Recording, SampleId
from diffusers_ldmq.observers import OBSERVERS, Observer
from diffusers_ldmq.recording import Middle
from diffusers_ldmq.selections import Selection, first_step, uniform

from .capture import arguments, refuse_not_finite, timestep_of


class SampleRanges:
    """A wrapper around a denoiser that observes what goes into some of its layers, sample by sample.

    names: of the layers; images: that are sampled at once; selection: of the samples that count; observer: its name.
    """

    def __init__(self, names: list[str], images: int, selection: Selection, observer: str) -> None:
        self.names, self.images, self.selection, self.kind = names, images, selection, OBSERVERS[observer]
        self.seen: dict[SampleId, dict[str, Observer]] = {}
        self.rows: Counter[SampleId] = Counter()
        self.calls: list[Call] = []
        self.steps: dict[float, int] = {}
        self.middle: Middle | None = None

    def wrap(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser and look at its layers' inputs."""
        found = arguments(executor, args, kwargs)
        timestep, rows = timestep_of(found), len(next(iter(found.values())))
        step = self.steps.setdefault(timestep, len(self.steps))
        images = self.images if rows % self.images == 0 else rows
        samples = [SampleId((0, image), step) for image in range(images)]
        denoiser: nn.Module = executor.class_obj
        if self.middle is None and getattr(self.selection, "needs_features", False):
            self.middle = Middle(denoiser)
        with ExitStack() as hooks:
            for name in self.names:
                hook = denoiser.get_submodule(name).register_forward_pre_hook(self._hook(name, samples, rows))
                hooks.callback(hook.remove)
            if self.middle is not None:
                hooks.callback(self.middle.listen().remove)
            output = executor(*args, **kwargs)
        refuse_not_finite(output, timestep)
        if self.middle is not None:
            self.middle.keep(step)
        self.calls.append(Call("calibrate", 0, step, timestep, images, {}, {}, ""))
        for sample in samples:
            self.rows[sample] += rows // images
        return output

    def _hook(self, name: str, samples: list[SampleId], rows: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            # rows come conditioning by conditioning; what has no axis of rows belongs to every sample
            each = x.unflatten(0, (-1, len(samples))).unbind(1) if x.shape[0] == rows else [x] * len(samples)
            for sample, part in zip(samples, each, strict=True):
                self.seen.setdefault(sample, {}).setdefault(name, self.kind()).update(part)

        return see

    def chosen(self) -> tuple[dict[str, Observer], int]:
        """(layer name -> observer of what the chosen samples saw, rows of calls that these are). Of the first step and
        with 'uniform' every sample counts, otherwise half of them, so that there is a choice.

        Raises CalibrationError where the selection cannot choose among these calls.
        """
        features = self.middle.features() if self.middle is not None else None
        recording = Recording("", tuple(self.calls), {}, {}, features)
        every = len(recording.samples())
        picked = self.selection(recording, every if self.selection in (first_step, uniform) else max(every // 2, 1))
        merged: dict[str, Observer] = {}
        for sample in picked:
            for name, observer in self.seen.get(sample, {}).items():
                merged.setdefault(name, self.kind()).merge(observer)
        return merged, sum(self.rows[sample] for sample in picked)
