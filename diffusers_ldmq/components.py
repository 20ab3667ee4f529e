"""Pipelines built of other pipelines' components: what goes by which name, sharing, and copies that share weights."""

import inspect
from copy import deepcopy
from typing import Any

from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from torch import nn

from .errors import LDMQError
from .families import FAMILIES, uncompiled
from .offloading import refuse_offloaded


def assembled(base: Any, pipe: Any, given: dict[str, Any]) -> Any:
    """A pipeline of class `base` with the components and options of `pipe`, those of `given` in their places. Nothing
    is copied or cast.

    Raises LDMQError for what is no pipeline, for a name in `given` that `base` does not have, and for a component that
    it needs and nobody has.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise LDMQError(
            f"from_pipe takes a pipeline, found {type(pipe).__name__}; a model alone is quantized in its pipeline, or "
            f"while it is loaded: from_pretrained(..., quantization_config=LDMQConfig('w8a16'))"
        )
    expected, optional = (list(names) for names in base._get_signature_keys(base))
    unknown = [name for name in given if name not in expected and name not in optional]
    if unknown:
        raise LDMQError(
            f"from_pipe takes no keyword {unknown[0]!r}: it is no option of quantizing, and {base.__name__} has no "
            f"such component; it has {', '.join(sorted(expected))}"
        )
    parts = {**pipe.components, **given}
    defaults = {name for name, p in inspect.signature(base.__init__).parameters.items() if p.default is not p.empty}
    absent = sorted(
        set(expected) - {*base._optional_components, *defaults, *(n for n in parts if parts[n] is not None)}
    )
    if absent:
        raise LDMQError(
            f"{base.__name__} needs {', '.join(absent)}, which the given {type(pipe).__name__} does not have; "
            f"pass it by name: from_pipe(pipe, {absent[0]}=...)"
        )
    config = {name: value for name, value in dict(pipe.config).items() if name not in pipe.components}
    # options that a class does not know are kept as private ones, as diffusers does, for the way back
    options = {name: given.get(name, config.get(name, config.get(f"_{name}"))) for name in optional}
    made = base(
        **{name: uncompiled(parts[name]) for name in expected if name in parts},
        **{name: value for name, value in options.items() if value is not None},
    )
    rest = {
        f"_{name.removeprefix('_')}": value for name, value in config.items() if name.removeprefix("_") not in options
    }
    made.register_to_config(**rest)
    for name in expected:  # only now, because pipelines are made of what has a truth value
        if uncompiled(parts.get(name)) is not parts.get(name):
            setattr(made, name, parts[name])
    return made


def shared_copy(module: nn.Module) -> nn.Module:
    """A module of its own that holds the same weights in the same memory: replacing or casting its layers leaves the
    original as it is, and takes memory only for what is new. Raises LDMQError for an offloaded one."""
    refuse_offloaded(module)  # its hooks cannot be copied
    memo: dict[int, Any] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in module.parameters():
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad) if plain else parameter
    return deepcopy(module, memo)


def refuse_quantization_config(model: str, names: list[str], config: Any) -> None:
    """Raise LDMQError for a `quantization_config` that names a component the model lacks (diffusers would load it
    unquantized) or the denoiser, whose schemes the plan decides. names: of the model's components."""
    if config is None:
        return
    if not isinstance(config, PipelineQuantizationConfig):
        raise LDMQError(
            f"quantization_config is a {type(config).__name__}; a pipeline takes a PipelineQuantizationConfig with a "
            f"quant_mapping for its other components, and plan= and scheme= for the denoiser"
        )
    asked = list(config.quant_mapping or config.components_to_quantize or names)
    for name in asked:
        if name not in names:
            raise LDMQError(
                f"quantization_config names a component {name!r}, which {model} lacks; it has {', '.join(names)}"
            )
    denoisers = {name for _, family in FAMILIES.items() for name in family.components}
    for name in asked:
        if name in denoisers:
            raise LDMQError(
                f"quantization_config names {name!r}, the denoiser, whose layers QuantizedLDMPipeline decides itself: "
                f"say what you want by plan=, scheme= or target=, or load with DiffusionPipeline.from_pretrained"
            )
