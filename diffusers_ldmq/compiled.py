"""A quantized layer's call as an operator that torch.compile sees whole: its shapes, its strides, its gradient.

Packed tensors and raw pointers mean nothing to a compiler, so it gets the input and a handle: an integer in a tensor,
because compilers look at a tensor's shape and not at its value, and so one compiled block serves all blocks like it.
The layer behind the handle is looked up in every call; whatever was loaded, moved or cast since is what runs. The
operators are defined by schema and not by torch.library.custom_op, whose wrapper takes 12 us a call where this takes 6.
"""

import secrets
from collections.abc import Sequence
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .backends.reference import arranged, dense_gradient
from .errors import BackendError
from .specs import Geometry

OPERATORS = {
    "linear": "(Tensor x, Tensor handle, SymInt outputs) -> Tensor",
    "conv2d": "(Tensor x, Tensor handle, SymInt[] shape, SymInt[] stride, SymInt[] padding, SymInt[] dilation)"
    " -> Tensor",
    "input_gradient": "(Tensor grad, Tensor handle, SymInt[] shape, bool is_conv) -> Tensor",
}
"""Under torch.ops.diffusers_ldmq. shape: of a convolution's weight; of the input, for input_gradient."""


class RunnableLayer(Protocol):
    """What the operators ask of a layer."""

    @property
    def geometry(self) -> Geometry: ...

    def _run(self, x: Tensor) -> Tensor: ...

    def _own_weight(self) -> Tensor: ...


_layers: WeakValueDictionary[int, RunnableLayer] = WeakValueDictionary()


def new_handle(layer: RunnableLayer) -> Tensor:
    """Int64 [] on CPU that stands for the layer as long as it lives, in this process. Never given twice, so that a
    graph that was saved and loaded elsewhere finds no layer rather than another one."""
    number = secrets.randbits(63)
    _layers[number] = layer
    with torch.inference_mode(False):
        return torch.tensor(number, dtype=torch.int64, device="cpu")


def run_compiled(x: Tensor, handle: Tensor, geometry: Geometry) -> Tensor:
    """The layer's output in x.dtype, dense: a convolution's in channels_last. Gradients reach x straight through the
    rounding. x: float [..., K] or [B, C, h, w]. Raises BackendError when it runs if the layer is gone."""
    operators = torch.ops.diffusers_ldmq
    if not geometry.is_conv:
        return operators.linear(x, handle, geometry.shape[0])
    return operators.conv2d(x, handle, geometry.shape, geometry.stride, geometry.padding, geometry.dilation)


def _layer(handle: Tensor) -> RunnableLayer:
    number = int(handle)
    layer = _layers.get(number)
    if layer is None:
        raise BackendError(
            f"a compiled or exported graph asks for the quantized layer with handle {number}, which does not exist in "
            "this process (any more); compile the model again where it is loaded"
        )
    return layer


def _linear(x: Tensor, handle: Tensor, outputs: int) -> Tensor:
    return arranged(_layer(handle)._run(x), is_conv=False)


def _conv2d(x: Tensor, handle: Tensor, *geometry: Sequence[int]) -> Tensor:
    return arranged(_layer(handle)._run(x), is_conv=True)


def _input_gradient(grad: Tensor, handle: Tensor, shape: Sequence[int], is_conv: bool) -> Tensor:
    layer = _layer(handle)
    weight = layer._own_weight().to(grad.dtype)
    return dense_gradient(grad, weight, torch.Size(shape), layer.geometry)


def _linear_shape(x: Tensor, handle: Tensor, outputs: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def _conv2d_shape(x: Tensor, handle: Tensor, shape: Sequence[int], *walk: Sequence[int]) -> Tensor:
    if x.dim() not in (3, 4):
        raise RuntimeError(f"a quantized convolution expects [B, C, h, w]; found shape {list(x.shape)}")
    steps = zip(x.shape[-2:], shape[2:], *walk, strict=True)
    sizes = [(size + 2 * pad - dilate * (kernel - 1) - 1) // stride + 1 for size, kernel, stride, pad, dilate in steps]
    return _empty(x, (*x.shape[:-3], shape[0], *sizes), is_conv=True)


def _input_gradient_shape(grad: Tensor, handle: Tensor, shape: Sequence[int], is_conv: bool) -> Tensor:
    return _empty(grad, shape, is_conv)


def _empty(like: Tensor, shape: Sequence[int], is_conv: bool) -> Tensor:
    return arranged(like.new_empty(shape), is_conv)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, handle, *rest = inputs
    ctx.save_for_backward(handle)
    ctx.shape, ctx.others = x.shape, len(rest)


def _backward(is_conv: bool) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (handle,) = ctx.saved_tensors
        gradient = torch.ops.diffusers_ldmq.input_gradient(grad, handle, ctx.shape, is_conv)
        return gradient, None, *(None,) * ctx.others

    return backward


def _defined() -> torch.library.Library:
    """The operators live as long as what this returns."""
    library = torch.library.Library("diffusers_ldmq", "DEF")
    kernels = {
        "linear": (_linear, _linear_shape),
        "conv2d": (_conv2d, _conv2d_shape),
        "input_gradient": (_input_gradient, _input_gradient_shape),
    }
    for name, (kernel, fake) in kernels.items():
        library.define(name + OPERATORS[name], tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"diffusers_ldmq::{name}", fake, lib=library)
    for name in ("linear", "conv2d"):
        torch.library.register_autograd(
            f"diffusers_ldmq::{name}", _backward(name == "conv2d"), setup_context=_remember, lib=library
        )
    return library


_library = _defined()
