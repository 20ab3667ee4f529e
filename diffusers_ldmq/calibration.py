"""Stage 4: from a plan and recorded calls to the integers of every layer."""

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from .affine import QParams, quantize_weight, weight_qparams, weight_qparams_mse
from .artifacts import Calibration, Plan
from .calls import Batch, Recording, run
from .errors import CalibrationError, PlanError
from .families import fingerprint, quantizable_layers
from .observers import OBSERVERS, Observer
from .offloading import refuse_offloaded
from .progress import Progress
from .selections import Selection, find_selection, selection_name
from .specs import LayerState, QuantSpec, Scheme, parse_scheme


def calibrate(
    denoiser: nn.Module,
    plan: Plan,
    recording: Recording | None,
    *,
    selection: str | Selection = "first-step",
    observer: str = "minmax-affine",
    progress: Progress | None = None,
) -> Calibration:
    """States of all layers that `plan` quantizes: weights from the model, static input ranges from the recording's
    calibration set. `recording` may be None if no scheme of the plan has static activations.

    Raises PlanError if the plan belongs to another model, CalibrationError if a layer was never called, saw NaN,
    or its weight holds NaN, LDMQError for an offloaded denoiser.
    """
    check_plan(plan, denoiser)
    refuse_offloaded(denoiser)
    layers = quantizable_layers(denoiser)
    schemes = {name: parse_scheme(scheme) for name, scheme in plan.quantized().items()}
    static = [name for name, scheme in schemes.items() if scheme.is_static]
    samples, batches, made = 0, [], 0
    if static:
        if recording is None:
            raise CalibrationError(
                f"{len(static)} layers have static activations ({static[0]}, ...), which need recorded calls; "
                f"record some, or choose a scheme such as w8a8-dyn or w8a16"
            )
        chosen = recording.only("calibrate")
        picked = find_selection(selection)(chosen, None)
        batches = list(chosen.batches(list(picked)))
        samples, made = len(picked), recording.sampler_calls.get("calibrate", 0)
    ranges = observe_inputs(denoiser, batches, static, observer, progress) if static else {}
    states = {name: layer_state(name, layers[name], scheme, ranges.get(name)) for name, scheme in schemes.items()}
    return Calibration(plan, states, selection_name(selection), observer, samples, len(batches), made)


def check_plan(plan: Plan, denoiser: nn.Module) -> None:
    """Raise PlanError unless the plan quantizes something and was made for a model with exactly these layers."""
    layers = quantizable_layers(denoiser)
    if not plan.quantized():
        raise PlanError("the plan leaves every layer in floating point, so there is nothing to quantize; plan again")
    missing = [name for name in plan.quantized() if name not in layers]
    if missing:
        raise PlanError(
            f"the plan names {len(missing)} layers that {type(denoiser).__name__} lacks: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}; it was made for another model, make one with `ldmq plan`"
        )
    if plan.fingerprint != fingerprint(layers):
        raise PlanError(
            f"the plan was made for another {plan.denoiser} (layer fingerprint {plan.fingerprint}, this model has "
            f"{fingerprint(layers)}); profile this model and plan again"
        )


def observe_inputs(
    denoiser: nn.Module,
    batches: Iterable[Batch],
    names: list[str],
    observer: str,
    progress: Progress | None = None,
    *,
    optional: Collection[str] = (),
) -> dict[str, Observer]:
    """One observer per named layer that has seen the layer's inputs in a float run over `batches`.

    Raises CalibrationError naming a layer that was never called, unless it is among the `optional` ones.
    """
    kind, layers = OBSERVERS[observer], quantizable_layers(denoiser)
    found: dict[str, Observer] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.setdefault(name, kind()).update(args[0])

        return see

    handles = [layers[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        batches = list(batches)
        for done, batch in enumerate(batches):
            run(denoiser, batch)
            if progress:
                progress(done + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()
    unseen = [name for name in names if name not in found and name not in optional]
    if unseen:
        raise CalibrationError(
            f"layer {unseen[0]!r} was never called while calibrating ({len(unseen)} such layers); keep it float or "
            f"give it a scheme without static activations"
        )
    return found


def layer_state(
    name: str,
    layer: nn.Module,
    scheme: Scheme,
    observer: Observer | None,
    told: Callable[[], None] | None = None,
) -> LayerState:
    """The state of one float layer under `scheme`. observer: has seen its inputs; needed for static activations;
    told: see weight_scales.

    Raises CalibrationError naming the layer if its weight or its input holds NaN or Inf.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert scheme.weight is not None
    try:
        codes, scale = quantize_weight(weight, weight_scales(weight, scheme.weight, told), scheme.weight)
        inputs = input_qparams(observer, scheme)
    except CalibrationError as cause:
        raise CalibrationError(f"layer {name!r}: {cause}") from None
    bias = layer.bias
    return LayerState(
        scheme=scheme,
        weight=codes,
        weight_scale=scale,
        bias=bias.detach().clone() if isinstance(bias, Tensor) else None,
        input_scale=inputs.scale if inputs else None,
        input_zero_point=inputs.zero_point if inputs else None,
    )


def weight_scales(weight: Tensor, spec: QuantSpec, told: Callable[[], None] | None = None) -> QParams:
    """QParams [N, groups, 1] of a weight: min-max at 8 bits, least squared error at 4, where clipping pays.

    told: called again and again while a search goes on, which takes seconds for a large weight; it may raise.
    """
    return weight_qparams(weight, spec) if spec.bits == 8 else weight_qparams_mse(weight, spec, told)


def input_qparams(observer: Observer | None, scheme: Scheme) -> QParams | None:
    """scale fp32 [], zero_point int32 [] of a static activation; None for other schemes."""
    if not scheme.is_static or scheme.activation is None:
        return None
    if observer is None:
        raise CalibrationError(f"scheme {scheme.name} needs the range of the layer's input")
    scale, zero_point = observer.qparams(scheme.activation)
    return QParams(scale.to(torch.float32), zero_point.to(torch.int32))
