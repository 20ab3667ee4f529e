"""Two MODELs side by side: the same noise sampled by both, and the same denoiser calls answered by both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusers_ldmq.calls import InMemory, Recording
from diffusers_ldmq.errors import LDMQError, VerificationError
from diffusers_ldmq.families import float_shape
from diffusers_ldmq.metrics import Power, sqnr, total
from diffusers_ldmq.progress import Progress

from .capture import Sampling, arguments, checked_scene, listening, sample
from .layer import LDMQLayer
from .measuring import PARTS, Share
from .patching import source_layers
from .recorder import OPTIONS, Recorder

CALL_OPTIONS = ("cond_or_uncond", "uuids", "sigmas", "sample_sigmas")
"""Options that belong to one call rather than to a MODEL."""
SAMPLED = (400, 600)
"""Parts of a comparison's progress at which the first MODEL has been sampled and the second one has answered."""


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """latents: [B, C, h, w] of both MODELs from the same noise; latent_db: SQNR of the second's against the first's.

    timesteps: noisiest first; signal, noise: [T] power of the first's denoiser output and of the second's error on the
    same inputs.
    """

    latents: tuple[Tensor, Tensor]
    latent_db: float
    timesteps: tuple[float, ...]
    signal: tuple[float, ...]
    noise: tuple[float, ...]

    @property
    def output_db(self) -> float:
        """Output SQNR in dB: powers summed over all calls."""
        return total([Power(s, n) for s, n in zip(self.signal, self.noise, strict=True)]).sqnr_db

    def curve_db(self) -> list[float]:
        """[T] output SQNR in dB per timestep."""
        return [Power(s, n).sqnr_db for s, n in zip(self.signal, self.noise, strict=True)]

    def worst(self) -> tuple[float, float]:
        """(timestep, output SQNR in dB) of the worst timestep."""
        db, timestep = min(zip(self.curve_db(), self.timesteps, strict=True))
        return timestep, db


def compare_models(  # noqa: PLR0913  (what the node is given)
    a: Any,
    b: Any,
    positive: Any,
    negative: Any,
    latent: Any,
    sampling: Sampling,
    progress: Progress | None = None,
) -> Comparison:
    """Sample both MODELs with the same noise, and give `b` the inputs that `a` had at every step.

    Raises LDMQError for MODELs of different kinds or inputs that cannot be sampled, VerificationError where `b` gives
    NaN or Inf.
    """
    refuse_different(a, b)
    scene = checked_scene(a, positive, negative, latent)
    recorder = Recorder()
    recorder.start("verify", 0, scene.images)
    with listening(a, recorder.wrap) as clone:
        first = sample(clone, scene, sampling, progress=Share(progress, 0, SAMPLED[0]))
    replay = _Replay(recorder.result(), Share(progress, *SAMPLED))
    with listening(b, replay.wrap) as clone:
        second = sample(clone, scene, sampling, progress=Share(progress, SAMPLED[1], PARTS))
    if not torch.isfinite(second).all():
        raise VerificationError("the second MODEL samples NaN or Inf, the first does not; plan higher precision")
    timesteps = tuple(sorted(replay.powers, reverse=True))
    return Comparison(
        latents=(first, second),
        latent_db=sqnr(first, second),
        timesteps=timesteps,
        signal=tuple(replay.powers[t].signal for t in timesteps),
        noise=tuple(replay.powers[t].noise for t in timesteps),
    )


def refuse_different(a: Any, b: Any) -> None:
    """Raise LDMQError unless both MODELs have the same kind of denoiser with the same layers."""
    kinds = [type(model.model.diffusion_model).__name__ for model in (a, b)]
    if kinds[0] != kinds[1]:
        raise LDMQError(f"the first MODEL is a {kinds[0]}, the second a {kinds[1]}; compare MODELs of one architecture")
    shapes = [{name: _shape(layer) for name, layer in source_layers(model).items()} for model in (a, b)]
    different = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
    if different:
        raise LDMQError(
            f"the two MODELs differ in {len(different)} layers ({', '.join(different[:3])}"
            f"{', ...' if len(different) > 3 else ''}); connect a MODEL and its quantized version"
        )


def _shape(layer: Any) -> tuple[int, ...]:
    return tuple(layer.weight.shape) if isinstance(layer, LDMQLayer) else float_shape(layer)


@dataclass(slots=True)
class _Replay:
    """A wrapper that, at the first call of a denoiser, gives it all the recorded ones too and keeps how far off it is.
    By then it is loaded and patched as it will sample."""

    recording: Recording
    progress: Share
    powers: dict[float, Power] = field(default_factory=dict)

    def wrap(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the denoiser."""
        if not self.powers:
            found = arguments(executor, args, kwargs)
            for done, call in enumerate(self.recording.calls):
                self._answer(executor, found, call)
                self.progress(done + 1, len(self.recording.calls))
        return executor(*args, **kwargs)

    def _answer(self, executor: Any, found: dict[str, Any], call: Any) -> None:
        batch = self.recording.batch(call)
        latent = next(iter(found.values()))
        given = {name: _moved(value, latent) for name, value in batch.kwargs.items()}
        if OPTIONS in given:
            then = given[OPTIONS]
            given[OPTIONS] = {**found.get(OPTIONS, {}), **{name: then[name] for name in CALL_OPTIONS if name in then}}
        output = executor(**given)
        if not torch.isfinite(output).all():
            raise VerificationError(
                f"the second MODEL gives NaN or Inf at timestep {call.timestep:g}, the first does not; plan higher "
                f"precision"
            )
        power = Power.between(batch.output, output.float().cpu())
        self.powers[call.timestep] = self.powers.get(call.timestep, Power()) + power


def _moved(value: Any, latent: Tensor) -> Any:
    """A recorded argument where the denoiser computes."""
    if isinstance(value, Tensor):
        return value.to(latent.device)
    if isinstance(value, dict):
        return {name: _moved(item, latent) for name, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, latent) for item in value]
    return value.fresh() if isinstance(value, InMemory) else value
