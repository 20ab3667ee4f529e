"""Plans and input ranges for tiny models, made without the stages that profile and calibrate."""

from collections.abc import Callable
from typing import Any

import torch
from comfyui.tiny_models import sample
from torch import Tensor, nn

from diffusers_ldmq.artifacts import LayerChoice, Plan
from diffusers_ldmq.families import family_of
from diffusers_ldmq.observers import OBSERVERS
from diffusers_ldmq.specs import parse_scheme


def plan_of(model: Any, linear: str, conv: str) -> Plan:
    """One scheme for all Linear and one for all Conv2d layers; what the family keeps float stays so."""
    import re

    from comfyui_nodes.native.patching import fingerprint_of, source_layers

    layers = source_layers(model)
    denoiser = model.model.diffusion_model
    keep = family_of(denoiser).keep_float
    choices = {
        name: LayerChoice("float", "ends")
        if re.search(keep, name)
        else LayerChoice(scheme_of(layer, linear, conv), "test")
        for name, layer in layers.items()
    }
    return Plan(type(denoiser).__name__, fingerprint_of(layers), "test", choices)


def scheme_of(layer: nn.Module, linear: str, conv: str) -> str:
    return linear if isinstance(layer, nn.Linear) else conv


def ranges_of(model: Any, plan: Plan, kind: str = "sd15", steps: int = 1) -> Any:
    """Input ranges of the plan's layers over a run of the float MODEL, by default its first step."""
    from comfyui_nodes.native.patching import source_layers
    from comfyui_nodes.native.ranges import InputRanges

    seen = {name: OBSERVERS["minmax-affine"]() for name in plan.quantized()}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen[name].update(args[0].clone())

    sources = source_layers(model)
    handles = [sources[name].register_forward_pre_hook(hook(name)) for name in seen]
    sample(model, kind, steps)
    for handle in handles:
        handle.remove()
    spec = parse_scheme("w8a8").activation
    assert spec is not None
    found = {name: observer.qparams(spec) for name, observer in seen.items()}
    values = {name: (float(q.scale), int(q.zero_point)) for name, q in found.items()}
    return InputRanges(plan.fingerprint, values, "test", "minmax-affine", steps)


def quantized(model: Any, linear: str = "w8a8-dyn", conv: str = "w8a16", ranges: Any = None) -> Any:
    """The quantized clone."""
    from comfyui_nodes.native.patching import quantize_model

    with torch.inference_mode():
        return quantize_model(model, plan_of(model, linear, conv), ranges)[0]
