"""Which MODELs cannot be quantized as they are, and which node to use instead."""

from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import nn

from diffusers_ldmq.errors import LDMQError

from .layer import LDMQLayer

ROOT = "diffusion_model"
"""Where a MODEL's denoiser is; prefix of its object patches and weight keys."""

LOAD_FLOAT = "load the original fp16 or bf16 file with the Load Checkpoint or Load Diffusion Model node"
FOREIGN = {
    "ggml": "a GGUF file",
    "nunchaku": "a Nunchaku model",
    "svdq": "a Nunchaku model",
    "sdnq": "an SDNQ model",
    "bnb": "a bitsandbytes model",
}
"""Part of a layer's class or module name -> what the MODEL is then."""


def refuse_unfit_model(model: Any) -> None:
    """Raise LDMQError, naming the node to use instead, for a MODEL whose layers are not plain floats: quantized by us,
    by ComfyUI (int8, fp8, fp4) or by another node pack, compiled as a whole, or emptied by an offloader.

    model: a ModelPatcher.
    """
    if not hasattr(model, "get_model_object") or not hasattr(getattr(model, "model", None), ROOT):
        raise LDMQError(f"{type(model).__name__} is no MODEL of ComfyUI; connect the MODEL output of a loader")
    modules = denoiser_modules(model)
    for patched in model.object_patches:
        inside = [name for name in modules if f"{ROOT}.{name}".startswith(f"{patched}.")]
        if inside:
            raise LDMQError(
                f"another node has replaced {patched!r} of this MODEL as a whole (an old compile node?); put LDM-Q "
                "before that node"
            )
    for name, module in modules.items():
        if isinstance(module, LDMQLayer):
            raise LDMQError("this MODEL is quantized by LDM-Q already; connect the float MODEL that it was made from")
        _refuse_foreign(model, name, module)


def denoiser_modules(model: Any) -> dict[str, nn.Module]:
    """Every module of the denoiser as this clone has it, by name without 'diffusion_model.'. The tree is shared by all
    clones and holds what was sampled last, so it gives the names only."""
    names = [name for name, _ in getattr(model.model, ROOT).named_modules() if name]
    return {name: model.get_model_object(f"{ROOT}.{name}") for name in names}


def _refuse_foreign(model: Any, name: str, module: nn.Module) -> None:
    package = type(module).__module__.rpartition("custom_nodes")[2]  # ComfyUI names packages by their whole path
    kind = f"{package}.{type(module).__qualname__}".lower()
    for word, told in FOREIGN.items():
        if word in kind:
            found = f"layer {name!r} is a {type(module).__qualname__}"
            raise LDMQError(f"this MODEL is {told}, whose weights are quantized already ({found}); {LOAD_FLOAT}")
    weight = module._parameters.get("weight")
    if weight is None:
        return
    if hasattr(weight, "tensor_type"):
        found = f"layer {name!r} holds {type(weight).__name__}"
        raise LDMQError(f"this MODEL is {FOREIGN['ggml']}, whose weights are quantized already ({found}); {LOAD_FLOAT}")
    if isinstance(weight, QuantizedTensor):
        raise LDMQError(
            f"this MODEL's file is quantized already (layer {name!r} has the layout {weight._layout_cls}); {LOAD_FLOAT}"
        )
    if weight.is_floating_point() and weight.element_size() == 1:
        raise LDMQError(
            f"this MODEL's weights are {str(weight.dtype).removeprefix('torch.')} (layer {name!r}), too few bits to "
            f"quantize from; set weight_dtype to 'default' in the Load Diffusion Model node, or {LOAD_FLOAT}"
        )
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise LDMQError(f"layer {name!r} holds {weight.dtype} codes of another quantization; {LOAD_FLOAT}")
    if weight.is_meta:
        raise LDMQError(f"layer {name!r} has no weights in memory yet; sample once with this MODEL, then quantize it")
