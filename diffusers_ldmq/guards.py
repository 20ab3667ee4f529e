"""What a quantized model does where diffusers would break it in silence or fail obscurely. Its class stays what it is,
because pipelines look models up by it; once there is a quantized one, its methods ask which kind calls them."""

import functools
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn

from .bound import FLAG, override, usual
from .errors import LDMQError
from .layers import quantized_layers
from .lora import add_adapter, fuse_lora, load_lora_adapter, show_float_shapes, update_manifest

REFUSALS = {
    "enable_layerwise_casting": "layerwise casting would cast biases and the float rest below 16 bits and leave the "
    "integers as they are; use group offloading to save memory",
    "fuse_qkv_projections": "q, k and v hold integers with scales of their own and cannot be joined; leave them apart",
}
"""Method -> why a quantized model does not do it, and what to do instead."""

COPYING = {
    "ControlNetModel": "from_unet",
    "ControlNetUnionModel": "from_unet",
    "ControlNetXSAdapter": "from_unet",
    "FluxControlNetModel": "from_transformer",
    "HunyuanDiT2DControlNetModel": "from_transformer",
    "QwenImageControlNetModel": "from_transformer",
    "SD3ControlNetModel": "from_transformer",
    "SparseControlNetModel": "from_unet",
    "UNetControlNetXSModel": "from_unet",
    "UNetMotionModel": "from_unet2d",
    "ZImageControlNetModel": "from_transformer",
}
"""Classes of diffusers that copy a denoiser's weights into float layers of their own, and the method that does."""

CASTS = {"half": torch.float16, "float": torch.float32, "bfloat16": torch.bfloat16, "double": torch.float64}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Stands in for a method. words: what the error says."""

    words: str

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise LDMQError(self.words)


def guard(model: nn.Module) -> None:
    """Give the quantized model its own ways with what its class would do wrong. Harmless when done again."""
    _guard_class(type(model))
    vars(model)[FLAG] = True
    vars(model).pop("save_pretrained", None)
    _guard_copying()
    show_float_shapes()


def refuse_saving(model: nn.Module) -> None:
    """Let a model whose layers were just quantized not be saved before its config says so; `guard` lifts this."""
    if hasattr(type(model), "save_pretrained"):
        words = (
            f"the {type(model).__name__} was quantized, but its config does not say so, and nobody could load it: "
            f"save it with QuantizedLDMPipeline or `ldmq quantize`, or call diffusers_ldmq.companions.attach() first"
        )
        vars(model)["save_pretrained"] = Refusal(words)


def unguard(model: nn.Module) -> None:
    """The model does again what its class does."""
    vars(model).pop(FLAG, None)


@functools.cache
def _guard_class(kind: type[nn.Module]) -> None:
    for name, function in {**_refusals(), **_replacements()}.items():
        override(kind, name, function)


def _refusals() -> dict[str, Callable[..., NoReturn]]:
    return {name: functools.partial(_refuse, name, why) for name, why in REFUSALS.items()}


def _refuse(name: str, why: str, model: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    raise LDMQError(f"{name}() is not possible on a quantized {type(model).__name__}: {why}")


def to(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """As nn.Module.to for devices and memory formats. Raises LDMQError for a dtype other than the model's own."""
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
    if dtype is not None:
        cast(model, dtype)
    moved: dict[str, Any] = {} if memory_format is None else {"memory_format": memory_format}
    if device is not None:
        moved |= {"device": device, "non_blocking": non_blocking}
    return usual(model, "to")(**moved) if moved else model


def check_cast(models: Iterable[Any], *args: Any, **kwargs: Any) -> None:
    """Raise LDMQError for a `.to(*args, **kwargs)` that one of these models would refuse, before any of them
    is cast."""
    dtype = torch._C._nn._parse_to(*args, **kwargs)[1]  # pyright: ignore[reportAttributeAccessIssue]
    for model in models:
        if dtype is not None and isinstance(model, nn.Module) and quantized_layers(model):
            cast(model, dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model, if it has this dtype already; otherwise LDMQError."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    if own != dtype:
        upcast = getattr(getattr(model, "config", None), "force_upcast", False)
        if upcast and (own, dtype) == (torch.float16, torch.float32):
            raise LDMQError(
                f"the pipeline casts its {type(model).__name__} from float16 to float32 to decode, because its config "
                f"says force_upcast, and a quantized one is not cast: load the pipeline with bfloat16 or float32, or "
                f"the autoencoder without quantization_config"
            )
        raise LDMQError(
            f"a quantized {type(model).__name__} in {own} is not cast to {dtype}: load it, and the pipeline around it, "
            f"again with dtype={dtype} (integers and scales stay what they are), or call dequantize() first; "
            f"from_pipe casts unless told torch_dtype={own}, QuantizedLDMPipeline.from_pipe does not"
        )
    return model


def type_(model: nn.Module, dst_type: Any) -> nn.Module:
    """As nn.Module.type for the dtype that the model has. Raises LDMQError for others."""
    return cast(model, torch.empty(0).type(dst_type).dtype)


def requires_grad_(model: nn.Module, requires_grad: bool = True) -> nn.Module:
    """As nn.Module.requires_grad_. Raises LDMQError for True: integers cannot be trained."""
    if requires_grad:
        raise LDMQError(
            f"the integers of a quantized {type(model).__name__} cannot be trained; add a LoRA with add_adapter() and "
            f"train that, or call dequantize() first"
        )
    return usual(model, "requires_grad_")(False)


def save_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """As the class's own, with what fused LoRAs added in the manifest. Raises LDMQError for use_flashpack."""
    if kwargs.get("use_flashpack"):
        raise LDMQError("use_flashpack=True would leave out what tells integers from weights; save as safetensors")
    update_manifest(model)
    return usual(model, "save_pretrained")(*args, **kwargs)


def enable_group_offload(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """As the class's own, of the integers themselves: it moves and saves what a layer holds, and a layer that was
    called already holds a stand-in for them."""
    for layer in quantized_layers(model).values():
        layer._restore()
    usual(model, "enable_group_offload")(*args, **kwargs)


def num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """As the class's own, with two 4-bit weights in a byte counted as two."""
    kwargs = {"only_trainable": only_trainable, "exclude_embeddings": exclude_embeddings}
    counted = usual(model, "num_parameters")(**kwargs)
    if only_trainable:
        return counted
    weights = [(layer.geometry, layer._parameters["weight"]) for layer in quantized_layers(model).values()]
    return counted + sum(g.shape[0] * g.columns - w.numel() for g, w in weights if w is not None)


def _replacements() -> dict[str, Callable[..., Any]]:
    casts = {name: functools.partial(_cast_as, dtype) for name, dtype in CASTS.items()} | {"type": type_}
    own = (to, requires_grad_, save_pretrained, enable_group_offload, num_parameters)
    lora = (fuse_lora, add_adapter, load_lora_adapter)
    return {**casts, **{function.__name__: function for function in (*own, *lora)}}


def _cast_as(dtype: torch.dtype, model: nn.Module) -> nn.Module:
    return cast(model, dtype)


@functools.cache
def _guard_copying() -> None:
    """Once there is a quantized model: let no class copy its integers as if they were weights."""
    diffusers = importlib.import_module("diffusers")
    for name, method in COPYING.items():
        kind = getattr(diffusers, name, None)
        if kind is not None and method in vars(kind):
            setattr(kind, method, classmethod(_refusing(vars(kind)[method].__func__, f"{name}.{method}")))


def _refusing(function: Callable[..., Any], called: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def copy(*args: Any, **kwargs: Any) -> Any:
        for model in (*args, *kwargs.values()):
            if isinstance(model, nn.Module) and quantized_layers(model):
                raise LDMQError(
                    f"{called}: the {type(model).__name__} is quantized, and integers are no weights to start from; "
                    f"load the float model, or call dequantize() first"
                )
        return function(*args, **kwargs)

    return copy
