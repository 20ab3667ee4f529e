"""What every backend provides, and the table of them."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..registry import Registry
from ..specs import Geometry, LayerState


class Backend(ABC):
    """Runs quantized layers on one kind of device.

    priority: among the backends that do not refuse, the highest runs the layer.
    """

    name: str
    priority: int

    @abstractmethod
    def refusal(self, state: LayerState, geometry: Geometry, device: torch.device) -> str | None:
        """None if this backend can run the layer on `device`; otherwise the reason in words."""

    @abstractmethod
    def pack(self, state: LayerState, geometry: Geometry, low_memory: bool = False) -> Any:
        """The state in the form that `run` reads. May hold the weight only in packed form.

        low_memory: hold 4-bit weights in 4 bits, however much slower that runs; the output is the same.
        """

    @abstractmethod
    def unpack(self, packed: Any) -> Tensor:
        """The weight codes of a packed layer, equal to the `LayerState.weight` it was made of."""

    @abstractmethod
    def run(self, x: Tensor, packed: Any) -> Tensor:
        """The layer's output in x.dtype. x: float [..., K] (Linear) or [B, C, h, w] (Conv2d), any strides.

        A Linear's output is contiguous, a Conv2d's channels_last: compilers plan with strides before a backend runs.
        """


BACKENDS: Registry[Backend] = Registry("backend")
