"""LoRA on models with quantized layers, as users know it from diffusers: what guards.py puts before their own methods.

Attaching works by itself, because quantized layers are Linear and Conv2d; what is here is fusing, saving what was
fused, and refusals in words. What happens in one layer is in fusing.py.
"""

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .bound import usual
from .errors import LDMQError
from .fusing import KEPT, fuse, held_by, is_fusible, is_quantized, kind_of, restore, to_fuse
from .layers import quantized_layers
from .manifest import entry_of


def fuse_lora(
    model: Any, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
) -> None:
    """Put the active adapters, or those of `adapter_names`, into the layers, scaled by lora_scale.

    Nothing is rounded twice: adapters that are fused later start from the original codes again. `lora_scale` holds for
    what is fused only; once unfused, an adapter acts as it did before. Ranges of inputs stay as they are, because
    fusing does not change what a layer reads. Integers cannot hold NaN or Inf, so quantized layers are checked for them
    whatever `safe_fusing` says. Raises LDMQError naming the layer if one cannot be fused; then every layer is as it was
    before the call.
    """
    model.lora_scale, model._safe_fusing = lora_scale, safe_fusing
    dtype, undo = _floating_dtype(model), list[functools.partial[None]]()
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in adapter_layers(model).items():
            try:
                if not is_fusible(layer):
                    model._fuse_lora_apply(layer, adapter_names)
                elif names := to_fuse(layer, adapter_names):
                    now = held_by(layer.base_layer)
                    undo.append(functools.partial(restore, layer, now, vars(layer).get(KEPT)))
                    fuse(layer, now, {n: layer.scaling[n] * lora_scale for n in names}, safe_fusing, dtype)
            except (ValueError, RuntimeError) as cause:
                for step in undo:
                    step()
                raise LDMQError(f"fuse_lora, layer {name!r}: {cause} (nothing was fused)") from cause


def add_adapter(model: Any, adapter_config: Any, adapter_name: str = "default") -> None:
    """As diffusers' own. Raises LDMQError for an adapter that reads the weight of a quantized layer."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if getattr(adapter_config, "use_dora", False):
        _refuse_dora([n for n in _quantized(model) if check_target_module_exists(adapter_config, n)])
    with _four_dimensional(model):
        usual(model, "add_adapter")(adapter_config, adapter_name)
    _refuse_unfit(model, adapter_name)


def load_lora_adapter(
    model: Any,
    pretrained_model_name_or_path_or_dict: Any,
    prefix: str | None = "transformer",
    hotswap: bool = False,
    **kwargs: Any,
) -> Any:
    """As diffusers' own. Raises LDMQError for an adapter that reads the weight of a quantized layer."""
    source = pretrained_model_name_or_path_or_dict
    before = set(getattr(model, "peft_config", ()))
    start = "" if prefix is None else f"{prefix}."
    keys = source if isinstance(source, dict) else ()
    scaled = {key.split(".lora_magnitude_vector")[0].removeprefix(start) for key in keys if "lora_magn" in key}
    _refuse_dora([name for name in _quantized(model) if name in scaled])
    with _four_dimensional(model):
        found = usual(model, "load_lora_adapter")(source, prefix, hotswap, **kwargs)
    for adapter_name in set(getattr(model, "peft_config", ())) - before:
        _refuse_unfit(model, adapter_name)
    return found


def update_manifest(model: Any) -> None:
    """Enter the branches that fusing made, or took away again, into what config.json will say."""
    # the attribute: saving makes plain data of the item of that name
    entries = getattr(getattr(model.config, "quantization_config", None), "layers", {})
    for name, layer in quantized_layers(model).items():
        if name in entries and entries[name].get("rank", 0) != layer.rank:
            entries[name] = entry_of(layer)


@functools.cache
def show_float_shapes() -> None:
    """Once there is a quantized model: let diffusers' Flux pipelines see the float shape of packed 4-bit weights. They
    compare it with the adapter's, and would replace the layers by larger ones."""
    from diffusers.loaders import FluxLoraLoaderMixin

    of_float = getattr(FluxLoraLoaderMixin, "_calculate_module_shape", None)
    if of_float is None:  # another version of diffusers, which does not ask
        return

    @functools.wraps(of_float)
    def shape(model: Any, base_module: Any = None, base_weight_param_name: str | None = None) -> torch.Size:
        layer = base_module or model.get_submodule(str(base_weight_param_name).removesuffix(".weight"))
        return torch.Size(layer.geometry.shape) if is_quantized(layer) else of_float(model, base_module=layer)

    FluxLoraLoaderMixin._calculate_module_shape = staticmethod(shape)


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """peft's adapter layers, by the name of the layer that they wrap."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _floating_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the model computes in, whatever the adapters' is."""
    names = (name for name, value in model.named_parameters() if value.is_floating_point() and ".lora_" not in name)
    return model.get_parameter(next(names)).dtype


def _quantized(model: nn.Module) -> list[str]:
    """Names of the quantized layers, also of those inside an adapter layer."""
    return [name.removesuffix(".base_layer") for name in quantized_layers(model)]


@contextmanager
def _four_dimensional(model: nn.Module) -> Iterator[None]:
    """peft asks a convolution's weight how many dimensions it has, and packed 4-bit codes have two."""
    weights = [layer._parameters["weight"] for layer in quantized_layers(model).values() if layer.geometry.is_conv]
    for weight in weights:
        vars(weight)["dim"] = functools.partial(int, 4)  # before the method of that name
    try:
        yield
    finally:
        for weight in weights:
            vars(weight).pop("dim", None)


def _refuse_dora(names: Collection[str]) -> None:
    for name in names:
        raise LDMQError(
            f"layer {name!r} is quantized, and DoRA needs its float weight in every call; load the adapter into the "
            f"float model, fuse it there with fuse_lora() and quantize that"
        )


def _refuse_unfit(model: Any, adapter_name: str) -> None:
    """Take an adapter off again and raise LDMQError if it reads the weight of a quantized layer: DoRA its values, LoHa
    and LoKr its shape, which packed 4-bit codes do not have."""
    for name, layer in adapter_layers(model).items():
        base = layer.get_base_layer()
        if not is_quantized(base) or adapter_name not in layer._all_available_adapter_names():
            continue
        if getattr(layer, "use_dora", {}).get(adapter_name, False):
            model.delete_adapters(adapter_name)
            _refuse_dora([name])
        if base.weight.shape != base.geometry.shape and not hasattr(layer, "lora_A"):
            model.delete_adapters(adapter_name)
            raise LDMQError(
                f"layer {name!r} is {base.scheme.name}, and {kind_of(layer)} adapters need 8-bit weights; load it into "
                f"the float model, fuse it there with fuse_lora() and quantize that"
            )
