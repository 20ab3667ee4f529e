"""What a denoiser is: its place in the pipeline, its blocks in execution order, what stays float."""

import hashlib
import re
from typing import Any

from torch import nn

from ..errors import RecordingError
from ..registry import Registry
from ..tables import Block, LayerInfo, LayerTable
from . import dit, ldm_unet, transformer, unet
from .contract import Family

QUANTIZABLE = (nn.Linear, nn.Conv2d)


FAMILIES: Registry[Family] = Registry("family")
for _family in (unet.FAMILY, transformer.FAMILY, ldm_unet.FAMILY, dit.FAMILY):
    FAMILIES.add(_family.name, _family)


def find_denoiser(pipe: Any) -> tuple[str, nn.Module]:
    """(component name, module) of the pipeline's denoiser, of a compiled one the module inside. Raises RecordingError
    if there is none we know."""
    components = {name: uncompiled(component) for name, component in pipe.components.items()}
    for _, family in FAMILIES.items():
        for name in family.components:
            module = components.get(name)
            if isinstance(module, nn.Module) and family.matches(module):
                return name, module
    found = {n: type(c).__name__ for n, c in components.items() if isinstance(c, nn.Module)}
    raise RecordingError(
        f"{type(pipe).__name__} has no denoiser that can be quantized; its models are {found or 'none'}, "
        f"known denoisers are {sorted({c for _, f in FAMILIES.items() if f.components for c in f.classes})}"
    )


def uncompiled(component: Any) -> Any:
    """What torch.compile wrapped, or the component itself."""
    return getattr(component, "_orig_mod", component) if isinstance(component, nn.Module) else component


def refuse_compiled(pipe: Any) -> None:
    """Raise RecordingError if the pipeline's denoiser is compiled, for what replaces its layers."""
    name, denoiser = find_denoiser(pipe)
    if pipe.components[name] is not denoiser:
        raise RecordingError(
            f"the {name} is compiled by torch.compile: quantize first and compile the quantized one afterwards (the "
            f"model inside is pipe.{name}._orig_mod)"
        )


def family_of(denoiser: nn.Module) -> Family:
    """The denoiser's family. Raises RecordingError for an unknown class."""
    for _, family in FAMILIES.items():
        if family.matches(denoiser):
            return family
    known = sorted({c for _, f in FAMILIES.items() for c in f.classes})
    raise RecordingError(f"{type(denoiser).__name__} is not a denoiser we know; known: {known}")


def quantizable_layers(denoiser: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Name -> layer of every plain Linear and zero-padded Conv2d (other classes have forwards of their own)."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, QUANTIZABLE)
        and (type(module) in QUANTIZABLE or hasattr(module, "load_state"))
        and not (isinstance(module, nn.Conv2d) and module.padding_mode != "zeros")
    }


def layer_table(denoiser: nn.Module, macs: dict[str, int] | None = None) -> LayerTable:
    """The denoiser, float or quantized, as planners see it.

    macs: layer name -> multiply-accumulates per image (0 where unknown).
    """
    family = family_of(denoiser)
    layers = quantizable_layers(denoiser)
    infos = [_info(name, layer, family, (macs or {}).get(name, 0)) for name, layer in layers.items()]
    own = {id(p) for layer in layers.values() for p in layer.parameters(recurse=False)}
    return LayerTable(
        denoiser=type(denoiser).__name__,
        fingerprint=fingerprint(layers),
        blocks=_blocks(denoiser, family, layers),
        layers=tuple(infos),
        other_parameters=sum(p.numel() for p in denoiser.parameters() if id(p) not in own),
    )


def fingerprint(layers: dict[str, nn.Linear | nn.Conv2d]) -> str:
    """Hash of all layer names and weight shapes."""
    text = "\n".join(f"{name} {float_shape(layer)}" for name, layer in sorted(layers.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def float_shape(layer: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """Shape of the layer's float weight, also where it now holds packed codes."""
    if isinstance(layer, nn.Linear):
        return (layer.out_features, layer.in_features)
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


def _info(name: str, layer: nn.Linear | nn.Conv2d, family: Family, macs: int) -> LayerInfo:
    kind = "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"
    keep = re.search(family.keep_float, name) is not None
    return LayerInfo(name, kind, float_shape(layer), layer.bias is not None, macs, keep)


def _blocks(denoiser: nn.Module, family: Family, names: dict[str, Any]) -> tuple[Block, ...]:
    groups: dict[tuple[tuple[int, ...], str, str], list[str]] = {}
    for name in names:
        groups.setdefault(family.place(name, denoiser), []).append(name)
    ordered = sorted(groups.items(), key=lambda item: item[0][0])
    return tuple(Block(name, part, tuple(layers)) for (_, name, part), layers in ordered)
