"""Stage 5: put the quantized layers in the float layers' places."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .artifacts import Calibration
from .calibration import check_plan
from .errors import LDMQError
from .guards import refuse_saving
from .layers import quantize_layer, quantized_layers
from .offloading import refuse_offloaded
from .progress import Progress


def quantize(
    denoiser: nn.Module,
    calibration: Calibration,
    *,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Replace, in place and layer by layer, every layer of the plan by its quantized one; return the denoiser.

    dtype: floating dtype of everything else and of the layers' inputs and outputs (default: as it is). The float
    rest is rounded to 16 bits, as it will be stored, so that what is verified is what is saved.

    Raises LDMQError if the denoiser is quantized already or carries a LoRA, PlanError for another model's plan.
    """
    refuse_unfit(denoiser)
    check_plan(calibration.plan, denoiser)
    for done, name in enumerate(list(calibration.states)):
        replace_layer(denoiser, name, quantize_layer(denoiser.get_submodule(name), calibration.states[name]))
        if progress:
            progress(done + 1, len(calibration.states))
    if dtype is not None:
        cast_floats(denoiser, dtype)
    round_to_storage(denoiser)
    refuse_saving(denoiser)
    return denoiser.eval()


def cast_floats(denoiser: nn.Module, dtype: torch.dtype) -> None:
    """Cast what loading would cast: parameters and saved buffers. Scales of quantized layers stay fp32, and so do
    buffers that are computed anew (diffusers' own .to(dtype) refuses quantized models)."""
    for module in denoiser.modules():
        fresh = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        module._apply(lambda t: t.to(dtype) if t.is_floating_point() else t, recurse=False)
        module._buffers.update(fresh)


def refuse_unfit(denoiser: nn.Module) -> None:
    """Raise LDMQError for a denoiser that cannot be quantized as it stands."""
    if quantized_layers(denoiser) or getattr(denoiser, "is_quantized", False):
        raise LDMQError(f"this {type(denoiser).__name__} is quantized already; load the original model instead")
    if getattr(denoiser, "peft_config", None):
        raise LDMQError(
            "the denoiser carries a LoRA; call unload_lora_weights() or fuse_lora() first, or load the LoRA afterwards"
        )
    fused = [name for name, module in denoiser.named_modules() if getattr(module, "fused_projections", False)]
    if fused:
        raise LDMQError(
            f"{fused[0]!r} and {len(fused) - 1} other attentions have joined q, k and v, of which no checkpoint "
            f"tells; call unfuse_qkv_projections() first"
        )
    refuse_offloaded(denoiser)


STORAGE_DTYPE = torch.float16
"""Floating tensors are stored in 16 bits: finer than bf16 at the sizes that weights have."""


def round_to_storage(denoiser: nn.Module) -> None:
    """Round every fp32 parameter to STORAGE_DTYPE, in place, where its values allow."""
    for parameter in denoiser.parameters():
        if parameter.dtype == torch.float32 and fits_storage(parameter):
            parameter.data = parameter.data.to(STORAGE_DTYPE).to(parameter.dtype)


def fits_storage(value: torch.Tensor) -> bool:
    """True if the tensor's largest magnitude is within STORAGE_DTYPE's range."""
    limit = torch.finfo(STORAGE_DTYPE).max
    return value.numel() == 0 or bool(value.detach().abs().amax() <= limit)


def stored(name: str, value: torch.Tensor) -> torch.Tensor:
    """A tensor as the file holds it: fp32 values that 16 bits represent exactly are written in 16 bits."""
    if value.dtype != torch.float32 or name.endswith("_scale") or not fits_storage(value):
        return value
    small = value.to(STORAGE_DTYPE)
    return small if torch.equal(small.to(value.dtype), value) else value


def replace_layer(denoiser: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(denoiser.get_submodule(parent), child, layer)


@contextmanager
def quantized_for_now(denoiser: nn.Module, calibration: Calibration) -> Iterator[nn.Module]:
    """The denoiser with the calibration's layers in place; the float ones come back when the context ends."""
    originals = {name: denoiser.get_submodule(name) for name in calibration.states}
    try:
        for name, state in calibration.states.items():
            replace_layer(denoiser, name, quantize_layer(originals[name], state))
        yield denoiser
    finally:
        for name, layer in originals.items():
            replace_layer(denoiser, name, layer)
