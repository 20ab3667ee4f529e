"""Device code that runs a LayerState. One file, one backend; `reference` is the oracle of all others."""

import torch

from ..errors import BackendError
from ..specs import Geometry, LayerState
from .contract import BACKENDS, Backend
from .cpu import cpu_kind, fast_dtype
from .cpu_onednn import CpuOneDNN
from .reference import Reference

__all__ = ["BACKENDS", "Backend", "choose_backend", "cpu_kind", "fast_dtype", "refusals"]

for _backend in (Reference(), CpuOneDNN()):
    BACKENDS.add(_backend.name, _backend)


def refusals(state: LayerState, geometry: Geometry, device: torch.device) -> dict[str, str | None]:
    """Why each backend will not run this layer on `device`, best backend first; None = it can."""
    ranked = sorted(BACKENDS.items(), key=lambda item: -item[1].priority)
    return {name: backend.refusal(state, geometry, device) for name, backend in ranked}


def choose_backend(state: LayerState, geometry: Geometry, device: torch.device, name: str | None = None) -> Backend:
    """The best backend that can run this layer on `device`, or the one called `name`.

    Raises BackendError with the reasons if the named one, or all, refuse; LDMQError if `name` is unknown.
    """
    reasons = (
        refusals(state, geometry, device) if name is None else {name: BACKENDS[name].refusal(state, geometry, device)}
    )
    for candidate, reason in reasons.items():
        if reason is None:
            return BACKENDS[candidate]
    told = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise BackendError(f"no backend can run a {state.scheme.name} layer of shape {geometry.shape} on {device} ({told})")
