"""The models around the denoiser: text encoders and autoencoders. They are float unless asked for; then their weights
are quantized without data while they are loaded."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin, PipelineQuantizationConfig
from torch import nn
from transformers import PreTrainedModel

from .calibration import layer_state
from .config import LDMQConfig
from .data_free import PlanLike, schemes_of
from .errors import LDMQError
from .families import FAMILIES
from .layers import quantize_layer, quantized_layers
from .plugin import attach as attach_denoiser
from .quantization import cast_floats, refuse_unfit, replace_layer, round_to_storage
from .specs import SCHEMES, parse_scheme
from .text_layers import text_schemes
from .twin import attach as attach_text
from .verification import float_parameters, scheme_counts, stored_bytes


@dataclass(frozen=True, slots=True)
class Companion:
    """A quantized model beside the denoiser. schemes: scheme -> layers; bytes: as stored, fp32_bytes: of the float
    model."""

    name: str
    kind: str
    schemes: dict[str, int]
    bytes: int
    fp32_bytes: int


def companions(pipe: Any) -> tuple[Companion, ...]:
    """Every quantized model of the pipeline but its denoiser, in order of names."""
    found = {name: m for name, m in sorted(pipe.components.items()) if isinstance(m, nn.Module) and quantized_layers(m)}
    return tuple(
        Companion(name, type(m).__name__, scheme_counts(m), stored_bytes(m), 4 * float_parameters(m))
        for name, m in found.items()
        if not _is_denoiser(m)
    )


def loading_options(index: Mapping[str, Any], schemes: Mapping[str, PlanLike]) -> dict[str, Any]:
    """Options of DiffusionPipeline.from_pretrained that quantize these components while they are loaded.

    index: of model_index.json, name -> [library, class]; schemes: component -> data-free scheme or plan. Raises
    LDMQError for a component that is not there, is no model or is the denoiser, and for a scheme that needs data.
    """
    if not schemes:
        return {}
    models = {name for name, entry in index.items() if _is_model(entry)}
    known = {kind for _, family in FAMILIES.items() for kind in family.classes}
    denoisers = {name for name in models if index[name][1] in known}
    _refuse_names(schemes, models, denoisers)
    return {"quantization_config": PipelineQuantizationConfig(quant_mapping=_configs(schemes))}


def quantize_companions(pipe: Any, schemes: Mapping[str, PlanLike]) -> None:
    """Quantize, in place and layer by layer, those of these components that were not quantized while loading. Raises
    LDMQError as `loading_options`."""
    models = {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    _refuse_names(schemes, set(models), {name for name, m in models.items() if _is_denoiser(m)})
    for name, config in _configs(schemes).items():
        if not quantized_layers(models[name]):
            quantize_data_free(models[name], config)


def quantize_data_free(model: nn.Module, config: LDMQConfig) -> None:
    """Quantize a float model in place, layer by layer, into one that `save_pretrained` saves. Raises LDMQError for what
    loading would refuse."""
    refuse_unfit(model)
    if isinstance(model, PreTrainedModel):
        chosen = text_schemes(config, model)
    else:
        chosen = schemes_of(config.plan, model, config.modules_to_not_convert)
    for name, scheme in chosen.items():
        layer = model.get_submodule(name)
        replace_layer(model, name, quantize_layer(layer, layer_state(name, layer, parse_scheme(scheme), None)))
    round_to_storage(model)
    attach(model)


def attach(model: nn.Module) -> None:
    """Make a model with quantized layers one that its library saves, as what it is now."""
    if isinstance(model, PreTrainedModel):
        attach_text(model)
    else:
        attach_denoiser(model)


def recast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model in place, quantized or not; integers and scales stay what they are."""
    if quantized_layers(model):
        cast_floats(model, dtype)
        attach(model)
    elif isinstance(model, ModelMixin):
        nn.Module.to(model, dtype)  # its own method warns of modules to be kept in fp32 where there are none
    else:
        model.to(dtype)


def refuse_unsavable(pipe: Any) -> None:
    """Raise LDMQError for a model with quantized layers whose config.json would not say so: nobody could load it."""
    for name, model in pipe.components.items():
        if isinstance(model, nn.Module) and quantized_layers(model):
            config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
            if not isinstance(config, LDMQConfig):
                raise LDMQError(
                    f"{name}: the {type(model).__name__}'s layers were quantized by hand and its config does not say "
                    f"so; load it with quantization_config=LDMQConfig(...) instead, or leave it float"
                )


def refuse_upcast(pipe: Any, dtype: torch.dtype | None) -> None:
    """Raise LDMQError where sampling would cast a quantized autoencoder: SDXL's pipelines do, in float16."""
    vae = getattr(pipe, "vae", None)
    casts = dtype == torch.float16 and hasattr(type(pipe), "upcast_vae")
    forced = getattr(getattr(vae, "config", None), "force_upcast", False)
    if casts and forced and isinstance(vae, nn.Module) and quantized_layers(vae):
        raise LDMQError(
            f"{type(pipe).__name__} casts its vae from float16 to float32 to decode (force_upcast), which a quantized "
            f"one is not; choose bfloat16 or float32, or leave the vae float"
        )


def _refuse_names(schemes: Mapping[str, PlanLike], models: set[str], denoisers: set[str]) -> None:
    if not isinstance(schemes, Mapping):
        raise LDMQError(f"components is {schemes!r}, expected a scheme for each name: {{'text_encoder': 'w8a16'}}")
    for name in schemes:
        if name in denoisers:
            raise LDMQError(
                f"component {name!r} is the denoiser, which is measured and planned: say what you want by plan=, "
                f"scheme= or target="
            )
        if name not in models:
            raise LDMQError(
                f"no component {name!r} to quantize; the models beside the denoiser are "
                f"{', '.join(sorted(models - denoisers)) or 'none'}"
            )


def _configs(schemes: Mapping[str, PlanLike]) -> dict[str, Any]:
    configs: dict[str, Any] = {}
    for name, plan in schemes.items():
        if isinstance(plan, str) and plan in SCHEMES and (plan == "float" or parse_scheme(plan).is_static):
            free = [scheme for scheme in SCHEMES if scheme != "float" and not parse_scheme(scheme).is_static]
            raise LDMQError(
                f"component {name!r}: {plan} is not what it can be quantized to, because only the denoiser is "
                f"calibrated; use one of {', '.join(free)}, or leave it out to keep it float"
            )
        try:
            configs[name] = LDMQConfig(plan)
        except LDMQError as cause:
            raise LDMQError(f"component {name!r}: {cause}") from cause
    return configs


def _is_denoiser(model: nn.Module) -> bool:
    return any(family.matches(model) for _, family in FAMILIES.items())


def _is_model(entry: Any) -> bool:
    """Whether [library, class] of model_index.json is a module; what cannot be looked up may be one."""
    if not isinstance(entry, list) or len(entry) != 2 or None in entry:
        return False
    library, name = entry
    if library not in ("diffusers", "transformers"):
        return True
    found = getattr(importlib.import_module(library), name, None)
    return isinstance(found, type) and issubclass(found, nn.Module)
