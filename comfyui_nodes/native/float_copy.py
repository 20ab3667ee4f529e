"""A private copy of a MODEL's denoiser in ordinary torch layers, on which noise can be measured with gradients.

ComfyUI's own layers cast weights as they run, its weights are inference tensors, and its blocks add in place; none of
that can be differentiated or have layers replaced.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from types import FrameType
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from diffusers_ldmq.errors import LDMQError

HEADROOM = 1.25
"""A copy must leave room for what it computes: so many times its weights must be free."""
IN_PLACE = {Tensor.add_: Tensor.add, Tensor.sub_: Tensor.sub, Tensor.mul_: Tensor.mul, Tensor.div_: Tensor.div}
BINARY_OP = dis.opmap["BINARY_OP"]
FIRST_AUGMENTED = 13
"""From this argument of BINARY_OP on it stands for +=, -=, ... (NB_INPLACE_ADD of CPython's opcode.h)."""


class OutOfPlace(TorchFunctionMode):
    """While it is open and gradients are on, `a += b` gives `a` a new tensor: what is saved for the backward pass stays
    as it was. Values and dtypes are the same. `a.add_(b)`, whose result nobody takes, still writes into `a`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = IN_PLACE.get(func)
        if plain is None or not torch.is_grad_enabled() or not _is_augmented(sys._getframe(1)):
            return func(*args, **(kwargs or {}))
        return plain(*args).to(args[0].dtype)


def _is_augmented(frame: FrameType) -> bool:
    """Whether the frame is executing an augmented assignment such as `+=`."""
    code, at = frame.f_code.co_code, frame.f_lasti
    return code[at] == BINARY_OP and code[at + 1] >= FIRST_AUGMENTED


def copy_dtype(denoiser: nn.Module, own: torch.dtype) -> torch.dtype:
    """fp32 where the system has room for such a copy, else the MODEL's own compute dtype.

    Raises LDMQError where there is room for neither.
    """
    numbers = sum(parameter.numel() for parameter in denoiser.parameters())
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    for dtype in (torch.float32, own):
        if numbers * dtype.itemsize * HEADROOM <= free:
            return dtype
    raise LDMQError(
        f"measuring needs a float copy of the {type(denoiser).__name__}: {numbers * own.itemsize / 1e9:.1f} GB in "
        f"{own}, and {free / 1e9:.1f} GB of memory are free; close other programs, or use a plan that was measured on "
        f"another machine"
    )


def float_copy(executor: Any, device: torch.device, dtype: torch.dtype, tell: Callable[[], None]) -> nn.Module:
    """The denoiser that a wrapper's `executor` runs, on the CPU, with the weights it has now (LoRA patched in).

    device: where the loaded denoiser computes; dtype: of the copy; tell: called for every layer. Linear and Conv2d
    layers of ComfyUI become torch's, under the same names; everything else keeps its class. Calling the copy runs what
    the wrappers are around.
    """
    denoiser: nn.Module = executor.class_obj
    with torch.inference_mode(False), torch.no_grad():
        memo: dict[int, Any] = {}
        for module in denoiser.modules():
            tell()
            if isinstance(module, comfy.ops.CastWeightBiasOp) and not module._modules:  # pyright: ignore
                memo[id(module)] = _plain(module, device, dtype)
            else:
                own = [*module._parameters.values(), *module._buffers.values()]
                memo.update({id(value): _converted(value, dtype) for value in own if value is not None})
        made = deepcopy(denoiser, memo)
    recast(made, dtype)
    made.__dict__.pop("forward", None)  # a capture's own, of a denoiser that calls no wrappers
    made.__class__ = _runnable(type(denoiser), executor.original.__name__)
    return made.eval()


def placed(made: nn.Module, device: torch.device, own: torch.dtype) -> nn.Module:
    """The copy where the MODEL computes, in `own` dtype where fp32 does not fit. ComfyUI's models make room for it.

    Raises LDMQError where it does not fit at all.
    """
    if device.type == "cpu":
        return made
    numbers = sum(parameter.numel() for parameter in made.parameters())
    free = 0
    for dtype in (next(made.parameters()).dtype, own):
        needed = int(numbers * dtype.itemsize * HEADROOM)
        comfy.model_management.free_memory(needed, device)
        free = comfy.model_management.get_free_memory(device)
        if needed <= free:
            return recast(made, dtype).to(device)
    raise LDMQError(
        f"measuring needs {numbers * own.itemsize * HEADROOM / 1e9:.1f} GB on {device} for a float copy of the "
        f"{type(made).__name__}, and {free / 1e9:.1f} GB are free; close other programs, start ComfyUI with --cpu, or "
        f"use a plan that was measured on another machine"
    )


def recast(made: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The copy in another dtype, in place; modules that note theirs note the new one."""
    for module in made.modules():
        given = module.__dict__.get("dtype")
        if isinstance(given, torch.dtype) and given.is_floating_point:
            module.__dict__["dtype"] = dtype
    for parameter in made.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return made


def _plain(module: Any, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """One of ComfyUI's layers with weights of its own and nothing to cast."""
    weights: list[Any] = [None, None]
    if getattr(module, "weight", None) is not None:
        cast = comfy.ops.cast_bias_weight(module, dtype=dtype, device=device, bias_dtype=dtype, offloadable=True)
        weights = [None if value is None else _own(value, dtype) for value in cast[:2]]
        comfy.ops.uncast_bias_weight(module, *cast)
    kept = _empty(module)
    kept._parameters = {name: module._parameters[name] for name in module._parameters}
    for name, value in zip(("weight", "bias"), weights, strict=True):
        if name in kept._parameters:
            kept._parameters[name] = None if value is None else nn.Parameter(value, requires_grad=False)
    kept._buffers = {n: None if b is None else _converted(b, dtype) for n, b in module._buffers.items()}
    return kept


def _empty(module: Any) -> Any:
    """A layer like one of ComfyUI's without its weights: torch's own class for Linear and Conv2d."""
    if type(module).__module__ == comfy.ops.__name__ and isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    if type(module).__module__ == comfy.ops.__name__ and isinstance(module, nn.Conv2d):
        shape = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
        more = {"dilation": module.dilation, "groups": module.groups, "padding_mode": module.padding_mode}
        return nn.Conv2d(*shape, **more, bias=module.bias is not None, device="meta")  # pyright: ignore
    kept = copy(module)
    # the shallow copy shares its hooks and weights with the MODEL until it has dictionaries of its own
    kept.__dict__ = {**module.__dict__, **nn.Module().__dict__, "training": False}
    kept.comfy_cast_weights, kept.weight_function, kept.bias_function = False, [], []
    for name in ("_v", "_v_weight", "_v_bias", "_prefetch"):
        kept.__dict__.pop(name, None)
    return kept


def _converted(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter's or buffer's own copy on the CPU. Exact buffers keep their dtype."""
    exact = not isinstance(value, nn.Parameter) and value.dtype not in (torch.float16, torch.bfloat16)
    made = _own(value, value.dtype if exact or not value.is_floating_point() else dtype)
    return nn.Parameter(made, requires_grad=False) if isinstance(value, nn.Parameter) else made


def _own(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to("cpu", dtype, copy=True)


def _runnable(kind: type[nn.Module], forward: str) -> type[nn.Module]:
    """The denoiser's class, called past all wrappers, and with gradient checkpointing as diffusers' models offer it."""

    def enable(self: Any) -> None:
        self.is_gradient_checkpointing = True
        for block in checkpointed(self):
            block.forward = _recomputing(type(block).forward.__get__(block))

    def disable(self: Any) -> None:
        self.is_gradient_checkpointing = False
        for block in checkpointed(self):
            del block.__dict__["forward"]

    members = {
        "forward": getattr(kind, forward),
        "_supports_gradient_checkpointing": True,
        "is_gradient_checkpointing": False,
        "enable_gradient_checkpointing": enable,
        "disable_gradient_checkpointing": disable,
    }
    return type(kind.__name__, (kind,), members)


def checkpointed(denoiser: nn.Module) -> Iterator[nn.Module]:
    """The blocks whose activations are worth computing twice: those in lists that hold several weights."""
    for child in denoiser.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            for block in child:
                if isinstance(block, (nn.ModuleList, nn.Sequential)):
                    yield from checkpointed(nn.ModuleList([block]))
                elif sum(isinstance(part, (nn.Linear, nn.Conv2d)) for part in block.modules()) > 1:
                    yield block


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward whose activations are computed again in the backward pass, from options as they were: models
    note in theirs where they are."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        now = [(args, kwargs)]
        then = [_noted(arg) for arg in args], {name: _noted(arg) for name, arg in kwargs.items()}

        def compute() -> Any:
            given, named = now.pop() if now else then
            with OutOfPlace():
                return forward(*given, **named)

        return checkpoint(compute, use_reentrant=False)

    return run


def _noted(arg: Any) -> Any:
    """An argument as it is now: models write into dictionaries."""
    return dict(arg) if isinstance(arg, dict) else arg


@contextmanager
def differentiable() -> Iterator[None]:
    """While open, ComfyUI's models compute with what gradients can pass, as when they are trained, and add nothing in
    place."""
    management = comfy.model_management
    before = getattr(management, "in_training", None)
    try:
        if before is not None:
            management.in_training = True
        with OutOfPlace():
            yield
    finally:
        if before is not None:
            management.in_training = before


@contextmanager
def alive(denoiser: nn.Module, tell: Callable[[], None]) -> Iterator[None]:
    """While open, `tell` is called for every module that works, forwards and backwards; it may raise to stop it.
    Nothing that is computed changes."""

    def look(*ignored: Any) -> None:
        tell()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        tell()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(look)

    handles = [module.register_forward_hook(after) for module in denoiser.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
