"""The vocabulary: what one tensor's integers mean (QuantSpec), what one layer does (Scheme), what one layer holds
(LayerState)."""

import math
import re
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .errors import BackendError, LDMQError

Granularity = Literal["tensor", "channel", "group", "token"]


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """Integer type of one tensor.

    granularity: how many scales an input of shape [N, K] gets: 'tensor' -> [], 'channel' -> [N],
    'group' -> [N, ceil(K / group_size)], 'token' -> one per row (Linear) or image (Conv2d), found at run time.
    """

    bits: int
    granularity: Granularity
    group_size: int = 0

    @property
    def qmin(self) -> int:
        """Lowest code. 8-bit weights leave out -128, so that their range is symmetric."""
        return -127 if self.bits == 8 and self.granularity != "tensor" else -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Highest code."""
        return 2 ** (self.bits - 1) - 1


@dataclass(frozen=True, slots=True)
class Scheme:
    """What one layer does with its weight and its input. None = left in floating point."""

    name: str
    weight: QuantSpec | None = None
    activation: QuantSpec | None = None

    @property
    def is_float(self) -> bool:
        return self.weight is None

    @property
    def is_static(self) -> bool:
        """True where the input's range is calibrated."""
        return self.activation is not None and self.activation.granularity == "tensor"

    @property
    def is_dynamic(self) -> bool:
        """True where the input's range is measured in every call."""
        return self.activation is not None and self.activation.granularity == "token"

    @property
    def is_integer(self) -> bool:
        """True where the multiply-accumulates are integer x integer."""
        return self.activation is not None


SCHEMES = ("float", "w8a16", "w8a8", "w8a8-dyn", "w4a16", "w4a8", "w4a4")
_NAME = re.compile(r"w(?P<w>4|8)a(?P<a>16|8|4)(?P<dyn>-dyn)?(?:-g(?P<group>[1-9]\d*))?")


def parse_scheme(name: str) -> Scheme:
    """Scheme of a name such as 'w8a8', 'w8a8-dyn' or 'w4a16-g64' (64 inputs share a weight scale).

    Raises LDMQError for anything else, naming the common schemes.
    """
    if name == "float":
        return Scheme("float")
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or not _makes_sense(match):
        raise LDMQError(
            f"unknown scheme {name!r}; use one of {', '.join(SCHEMES)} (4-bit weight-only schemes also "
            f"take a group size, as in w4a16-g64)"
        )
    group = int(match["group"] or 0)
    weight = QuantSpec(int(match["w"]), "group" if group else "channel", group)
    if match["a"] == "16":
        return Scheme(name, weight)
    return Scheme(name, weight, QuantSpec(int(match["a"]), "token" if match["dyn"] else "tensor"))


def _makes_sense(match: re.Match[str]) -> bool:
    """No dynamic 16-bit activations, no 8-bit weights against 4-bit activations, no groups inside an integer GEMM."""
    if match["a"] == "16":
        return match["dyn"] is None and (match["group"] is None or match["w"] == "4")
    return match["group"] is None and not (match["w"] == "8" and match["a"] == "4")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of a Linear (weight [N, K]) or Conv2d (weight [N, C/groups, kh, kw]) and how the kernel walks."""

    shape: tuple[int, ...]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_conv(self) -> bool:
        return len(self.shape) == 4

    @property
    def columns(self) -> int:
        """K: how many inputs one output sums over."""
        return math.prod(self.shape[1:])

    @property
    def in_channels(self) -> int:
        """C_in: length of the input's channel axis."""
        return self.shape[1] * self.groups


def geometry_of(layer: nn.Module) -> Geometry:
    """Geometry of an nn.Linear or nn.Conv2d.

    Raises BackendError for other classes, padding that is not zeros, and padding that differs between two sides.
    """
    if isinstance(layer, nn.Linear):
        return Geometry((layer.out_features, layer.in_features))
    if not isinstance(layer, nn.Conv2d):
        raise BackendError(f"only nn.Linear and nn.Conv2d can be quantized; found {type(layer).__name__}")
    if layer.padding_mode != "zeros":
        raise BackendError(
            f"a convolution with padding_mode {layer.padding_mode!r} cannot be quantized; leave it float"
        )
    kh, kw = _pair(layer.kernel_size)
    dilation, padding = _pair(layer.dilation), layer.padding
    if padding == "same":
        reach = (dilation[0] * (kh - 1), dilation[1] * (kw - 1))
        if reach[0] % 2 or reach[1] % 2:
            raise BackendError("a convolution whose 'same' padding differs between sides cannot be quantized")
        padding = (reach[0] // 2, reach[1] // 2)
    padding = (0, 0) if isinstance(padding, str) else _pair(padding)
    shape = (layer.out_channels, layer.in_channels // layer.groups, kh, kw)
    return Geometry(shape, _pair(layer.stride), padding, dilation, layer.groups)


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(second)


@dataclass(frozen=True, slots=True, eq=False)
class LayerState:
    """Everything a quantized layer holds, in a form that belongs to no backend. N outputs, K inputs of a row.

    weight: int8 [N, K] or [N, C/groups, kh, kw], codes -127..127; 4 bit: uint8 [N, ceil(K/2)], two codes a byte,
        K = C/groups*kh*kw flattened, low nibble first, codes -8..7 stored +8, a padding nibble holds 8.
    weight_scale: fp32 [N] or [N, ceil(K/group_size)].
    bias: compute dtype [N] or None.
    input_scale: fp32 [], input_zero_point: int32 [] in -128..127 (signed domain); None where not static.
    pre_quant_scale: fp32 [C_in] or None; multiplies the input, the weight holds W / pre_quant_scale.
    rotation: after that, blocks of so many input channels are multiplied by an orthonormal Hadamard matrix H, the
        weight holds (W / pre_quant_scale) @ H; a power of two that divides C_in / groups, 0 = none.
    low_rank_a: [r, K], low_rank_b: [N, r], compute dtype, or None both; x A^T B^T of the layer's own input (neither
        scaled nor rotated) is added to the output, so the codes hold what A and B leave of W.
    """

    scheme: Scheme
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    pre_quant_scale: Tensor | None = None
    rotation: int = 0
    low_rank_a: Tensor | None = None
    low_rank_b: Tensor | None = None

    @property
    def rank(self) -> int:
        """r of the low-rank branch; 0 = none."""
        return 0 if self.low_rank_a is None else int(self.low_rank_a.shape[0])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, under the names they have in a file."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("scheme", "rotation")}
        return {name: value for name, value in found.items() if value is not None}

    def to(self, device: torch.device | str) -> "LayerState":
        """The same state with every tensor on `device`; dtypes stay."""
        return replace(self, **{name: value.to(device) for name, value in self.tensors().items()})


class TensorSpec(NamedTuple):
    """What a LayerState tensor looks like. dtype None = any floating dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    required: bool


def tensor_specs(scheme: Scheme, geometry: Geometry, rank: int = 0) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor a layer of this scheme may hold, by its name in LayerState and in a file.

    rank: of the low-rank branch, 0 = none. Raises LDMQError for a scheme or rank that the layer cannot have.
    """
    if scheme.weight is None:
        raise LDMQError("scheme 'float' holds no integers; a float layer has no LayerState")
    check_rank(rank, geometry)
    rows, columns, size = geometry.shape[0], geometry.columns, scheme.weight.group_size
    packed = scheme.weight.bits == 4
    specs = {
        "bias": TensorSpec((rows,), None, False),
        "weight": TensorSpec((rows, -(-columns // 2)), torch.uint8, True)
        if packed
        else TensorSpec(tuple(geometry.shape), torch.int8, True),
        "weight_scale": TensorSpec((rows, -(-columns // size)) if size else (rows,), torch.float32, True),
        "pre_quant_scale": TensorSpec((geometry.in_channels,), torch.float32, False),
    }
    if scheme.is_static:
        specs["input_scale"] = TensorSpec((), torch.float32, True)
        specs["input_zero_point"] = TensorSpec((), torch.int32, True)
    if rank:
        specs["low_rank_a"] = TensorSpec((rank, columns), None, True)
        specs["low_rank_b"] = TensorSpec((rows, rank), None, True)
    return specs


def check_rank(rank: int, geometry: Geometry) -> None:
    """Raises LDMQError unless a low-rank branch of this rank (0 = none) can stand beside the layer's weight."""
    largest = min(geometry.shape[0], geometry.columns) if geometry.groups == 1 else 0
    if not 0 <= rank <= largest:
        why = "a convolution with groups has no low-rank branch" if geometry.groups > 1 else f"expected 0..{largest}"
        raise LDMQError(f"low-rank branch of rank {rank} beside a weight of shape {list(geometry.shape)}: {why}")


def check_rotation(rotation: int, geometry: Geometry) -> None:
    """Raises LDMQError unless `rotation` is 0 or a block size that Hadamard matrices have and the layer allows."""
    channels = geometry.shape[1]
    if rotation == 0 or (rotation > 1 and rotation & (rotation - 1) == 0 and channels % rotation == 0):
        return
    raise LDMQError(
        f"rotation {rotation}: expected 0 or a power of two from 2 on that divides the {channels} input channels of "
        f"{'a group of ' if geometry.groups > 1 else ''}the layer"
    )


def check_state(state: LayerState, geometry: Geometry) -> None:
    """Raises LDMQError naming the tensor if one is missing, or has a shape or dtype its scheme does not ask for; also
    if the layer cannot be rotated in blocks of that size or have a branch of that rank."""
    check_rotation(state.rotation, geometry)
    if state.low_rank_a is not None and state.low_rank_a.dim() != 2:
        raise LDMQError(f"tensor 'low_rank_a' must have two dimensions; found {list(state.low_rank_a.shape)}")
    specs, found = tensor_specs(state.scheme, geometry, state.rank), state.tensors()
    for name in sorted(specs.keys() | found.keys()):
        spec, tensor = specs.get(name), found.get(name)
        if spec is None:
            raise LDMQError(f"a {state.scheme.name} layer has no tensor {name!r}; leave it out")
        if tensor is None:
            if spec.required:
                raise LDMQError(f"a {state.scheme.name} layer needs the tensor {name!r}")
            continue
        dtype_fits = tensor.dtype == spec.dtype if spec.dtype else tensor.is_floating_point()
        if tuple(tensor.shape) != spec.shape or not dtype_fits:
            raise LDMQError(
                f"tensor {name!r} of a {state.scheme.name} layer must be {spec.dtype or 'floating'} "
                f"{list(spec.shape)}; found {tensor.dtype} {list(tensor.shape)}"
            )
