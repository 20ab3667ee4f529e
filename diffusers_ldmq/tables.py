"""The denoiser as planners see it: its blocks, its Linear and Conv2d layers, and how long they take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .errors import PlanError

Part = Literal["encoder", "middle", "decoder"]


@dataclass(frozen=True, slots=True)
class Block:
    """Smallest unit in execution order that a family names. layers: names of its Linear and Conv2d layers."""

    name: str
    part: str
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One Linear or Conv2d. shape: of its weight; macs: multiply-accumulates per image (one row of the batch)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bias: bool
    macs: int
    keep_float: bool

    @property
    def parameters(self) -> int:
        """Number of weight elements, bias apart."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class LayerTable:
    """The denoiser as planners see it: its blocks in execution order and every Linear and Conv2d.

    fingerprint: of all layer names and shapes; two fine-tunes of one model share it, other models do not.
    other_parameters: elements outside those layers' weights and biases (norms, embeddings).
    """

    denoiser: str
    fingerprint: str
    blocks: tuple[Block, ...]
    layers: tuple[LayerInfo, ...]
    other_parameters: int

    def layer(self, name: str) -> LayerInfo:
        """The layer of that name. Raises PlanError if the model lacks it."""
        for info in self.layers:
            if info.name == name:
                return info
        raise PlanError(f"{self.denoiser} has no Linear or Conv2d layer {name!r}")


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Milliseconds on one device, measured in one run. layers: name -> scheme ('float' among them) -> ms of one call.

    dtype: that quantized layers and the float rest take and give; rows: batch of the call; step_ms: a whole denoiser
    call of the float model in `dtype`; fastest_ms, fastest_dtype: in the dtype that the device runs fastest.
    """

    device: str
    dtype: str
    rows: int
    step_ms: float
    layers: dict[str, dict[str, float]]
    fastest_ms: float
    fastest_dtype: str

    def predicted_ms(self, schemes: Mapping[str, str]) -> float:
        """Milliseconds of a call under a plan (layers not named are float)."""
        return self.step_ms + sum(
            self.layers[name][scheme] - self.layers[name]["float"] for name, scheme in schemes.items()
        )
