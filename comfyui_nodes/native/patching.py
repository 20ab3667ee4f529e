"""Quantizing ComfyUI's own MODEL: a clone in which our layers stand where the plan asks for integers.

The clone shares the module tree with the MODEL it came from; ComfyUI puts our layers in when the clone is sampled and
takes them out when another clone is. Nothing of ComfyUI is changed.
"""

import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import comfy.utils
import torch
from torch import Tensor, nn

from diffusers_ldmq.affine import QParams
from diffusers_ldmq.artifacts import Plan
from diffusers_ldmq.backends import choose_backend
from diffusers_ldmq.calibration import layer_state
from diffusers_ldmq.errors import LDMQError, PlanError
from diffusers_ldmq.families import fingerprint
from diffusers_ldmq.observers import Observer
from diffusers_ldmq.progress import Progress
from diffusers_ldmq.specs import LayerState, QuantSpec, Scheme, geometry_of, parse_scheme

from .guarding import guard
from .layer import LDMQLayer
from .ranges import InputRanges
from .refusals import ROOT, denoiser_modules, refuse_unfit_model

__all__ = ["fingerprint_of", "quantize_model", "quantized_layers_of", "refuse_unfit_model", "source_layers"]

STOCK = ("torch.nn.", "comfy.ops")
"""Modules whose Linear and Conv2d compute what their names say; any other class has a forward of its own."""


def source_layers(model: Any) -> dict[str, nn.Module]:
    """Layer name without 'diffusion_model.' -> this clone's own layer: every plain Linear and zero-padded Conv2d that
    can be quantized, and every LDMQLayer. model: a ModelPatcher, whatever clone of it is loaded now."""
    return {name: module for name, module in denoiser_modules(model).items() if _is_quantizable(module)}


def quantized_layers_of(model: Any) -> dict[str, LDMQLayer]:
    """Layer name -> layer of integers of this clone; empty for a float MODEL."""
    return {name: module for name, module in denoiser_modules(model).items() if isinstance(module, LDMQLayer)}


def fingerprint_of(layers: dict[str, nn.Module]) -> str:
    """The fingerprint that plans carry, of `source_layers`: names and float shapes."""
    plain: dict[str, Any] = {n: m._hidden if isinstance(m, LDMQLayer) else m for n, m in layers.items()}
    return fingerprint(plain)


def quantize_model(
    model: Any,
    plan: Plan,
    ranges: InputRanges | None = None,
    progress: Progress | None = None,
    learned: Mapping[str, LayerState] | None = None,
) -> tuple[Any, str]:
    """(new clone that runs `plan`'s integers, what it does in words). `model` itself stays as it is.

    ranges: input ranges of layers with static schemes; a layer without one runs the dynamic scheme of the same widths,
    and the text says so. learned: states of layers that reconstruct_model has rounded for this plan and these ranges.
    Raises LDMQError for a MODEL that cannot be quantized, PlanError for a plan or calibration
    made for another, CalibrationError naming a layer whose weights hold NaN or Inf.
    """
    refuse_unfit_model(model)
    layers = source_layers(model)
    check_plan(plan, layers, ranges)
    schemes, dynamic = runnable(plan, ranges)
    clone = _plain_clone(model)
    size = clone.model_size()
    for done, (name, scheme) in enumerate(schemes.items()):
        with torch.inference_mode(False), torch.no_grad():
            if learned:
                layer = _from_state(clone, name, layers[name], learned[name])
            else:
                known = ranges.ranges.get(name) if ranges is not None and scheme.is_static else None
                layer = _quantized(clone, name, layers[name], scheme, known, _repeated(progress, done, len(schemes)))
        size += _bytes(layer) - _bytes(layers[name])
        clone.add_object_patch(f"{ROOT}.{name}", layer)
        if progress:
            progress(done + 1, len(schemes))
    before, clone.size = clone.model_size(), size
    # without a new one ComfyUI takes the clone's weights for loaded when it switches between the two
    clone.patches_uuid = uuid.uuid4()
    guard(clone)
    return clone, _told(clone, dynamic, before)


class KnownRange(Observer):
    """An input range that was found earlier, where an observer is asked for one: scale and zero point."""

    def __init__(self, scale: float, zero_point: int) -> None:
        self._range = QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))

    def update(self, x: Tensor) -> None:
        raise LDMQError("a range that is known sees no tensors")

    def merge(self, other: Any) -> None:
        raise LDMQError("a range that is known merges with no other")

    def qparams(self, spec: QuantSpec) -> QParams:
        return self._range


def _is_quantizable(module: nn.Module) -> bool:
    if isinstance(module, LDMQLayer):
        return True
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or not type(module).__module__.startswith(STOCK):
        return False
    return module.weight is not None and getattr(module, "padding_mode", "zeros") == "zeros"


def check_plan(plan: Plan, layers: dict[str, nn.Module], ranges: InputRanges | None) -> None:
    """Raise PlanError unless plan and ranges were made for a model with exactly these layers, as `source_layers` gives
    them, and the plan quantizes something."""
    if not plan.quantized():
        raise PlanError("the plan leaves every layer in floating point, so there is nothing to quantize; plan again")
    if missing := [name for name in plan.quantized() if name not in layers]:
        raise PlanError(
            f"the plan names {len(missing)} layers that this MODEL lacks: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; it was made for another model: connect this MODEL to LDM-Q "
            "Profile and plan again"
        )
    if plan.fingerprint != (found := fingerprint_of(layers)):
        raise PlanError(
            f"the plan was made for another {plan.denoiser} (layer fingerprint {plan.fingerprint}, this MODEL has "
            f"{found}): connect this MODEL to LDM-Q Profile and plan again"
        )
    if ranges is not None and ranges.fingerprint != found:
        raise PlanError(
            f"the calibration was made for another model (layer fingerprint {ranges.fingerprint}, this MODEL has "
            f"{found}): connect this MODEL to LDM-Q Calibrate"
        )


def runnable(plan: Plan, ranges: InputRanges | None) -> tuple[dict[str, Scheme], dict[str, int]]:
    """Scheme of every quantized layer, and how many layers of which static scheme run dynamic for want of a range."""
    schemes: dict[str, Scheme] = {}
    dynamic: Counter[str] = Counter()
    known = ranges.ranges if ranges is not None else {}
    for name, asked in plan.quantized().items():
        scheme = parse_scheme(asked)
        if scheme.is_static and name not in known:
            dynamic[asked] += 1
            scheme = parse_scheme(f"{asked}-dyn")
        schemes[name] = scheme
    return schemes, dict(dynamic)


def _plain_clone(model: Any) -> Any:
    """A clone whose layers are loaded as a whole. Dynamic VRAM hands weights out at run time, past what our layers do,
    and would leave a LoRA out without a word. Raises LDMQError where it cannot be turned off."""
    if not (hasattr(model, "is_dynamic") and model.is_dynamic()):
        return model.clone()
    try:
        return model.clone(disable_dynamic=True)
    except (RuntimeError, TypeError) as cause:
        raise LDMQError(
            "this MODEL uses dynamic VRAM and its loader offers no way to turn that off; load it with the Load "
            "Checkpoint or Load Diffusion Model node, or start ComfyUI with --disable-dynamic-vram"
        ) from cause


def _repeated(progress: Progress | None, done: int, total: int) -> Callable[[], None] | None:
    """Tells a progress the same again: an interrupt is heard there, and the search in one layer takes seconds."""
    return None if progress is None else lambda: progress(done, total)


def _quantized(  # noqa: PLR0913  (what one layer is made of)
    patcher: Any,
    name: str,
    source: nn.Module,
    scheme: Scheme,
    known: tuple[float, int] | None,
    told: Callable[[], None] | None,
) -> LDMQLayer:
    weight, bias = (_original(patcher, name, source, part) for part in ("weight", "bias"))
    assert weight is not None
    plain = nn.Module()
    plain.register_buffer("weight", weight.to("cpu", torch.float32))
    plain.register_buffer("bias", None)
    state = layer_state(name, plain, scheme, KnownRange(*known) if known else None, told)
    if bias is not None:
        state = replace(state, bias=bias.to("cpu", copy=True))
    return LDMQLayer(state, geometry_of(source), weight.dtype).eval()


def _from_state(patcher: Any, name: str, source: nn.Module, state: LayerState) -> LDMQLayer:
    """A layer of integers that are there already."""
    weight, bias = (_original(patcher, name, source, part) for part in ("weight", "bias"))
    assert weight is not None
    if bias is not None and state.bias is not None:
        state = replace(state, bias=state.bias.to(bias.dtype))
    return LDMQLayer(state, geometry_of(source), weight.dtype).eval()


def _original(patcher: Any, name: str, source: nn.Module, part: str) -> Tensor | None:
    """A layer's parameter as the file gave it, which lies in a backup while a clone with a LoRA is loaded. Backups are
    of the modules that are in the shared tree now, which need not be this clone's."""
    key = f"{ROOT}.{name}.{part}"
    kept: Any = getattr(source, part, None)
    if comfy.utils.get_attr(patcher.model, f"{ROOT}.{name}") is not source:
        return None if kept is None else kept.detach()
    if key in patcher.backup:
        kept = patcher.backup[key].weight
    if key in getattr(patcher, "hook_backup", {}):
        kept = patcher.hook_backup[key][0]
    return None if kept is None else kept.detach()


def _bytes(layer: nn.Module) -> int:
    if isinstance(layer, LDMQLayer):
        return sum(tensor.nbytes for tensor in layer.state().tensors().values())
    return sum(parameter.nbytes for parameter in layer.parameters(recurse=False))


def _told(patcher: Any, dynamic: dict[str, int], before: int) -> str:
    layers = quantized_layers_of(patcher)
    counts = Counter(layer.scheme.name for layer in layers.values())
    device = torch.device(patcher.load_device)
    backends = Counter(choose_backend(layer.state(), layer.geometry, device).name for layer in layers.values())
    lines = [
        f"{len(layers)} layers quantized: " + ", ".join(f"{n} x {scheme}" for scheme, n in sorted(counts.items())),
        f"weights {before / 1e6:.1f} MB -> {patcher.model_size() / 1e6:.1f} MB",
        f"runs on {device}: " + ", ".join(f"{n} layers by {name}" for name, n in sorted(backends.items())),
    ]
    for scheme, count in sorted(dynamic.items()):
        lines.append(
            f"{count} layers planned as {scheme} have no calibration and run as {scheme}-dyn, which measures each "
            "input anew; connect LDM-Q Calibrate for fixed ranges"
        )
    return "\n".join(lines)
