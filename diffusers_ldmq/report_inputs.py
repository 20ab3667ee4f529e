"""What a report can show of a quantized pipeline that was loaded: what is stored beside it, and pictures and times
where the float pipeline is at hand, too."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .calls import Batch
from .errors import LDMQError
from .families import find_denoiser, fingerprint, layer_table, quantizable_layers
from .planners import candidates
from .report import ReportInputs
from .sampling import Sampling, sample_pictures
from .specs import parse_scheme
from .timing import layer_times
from .verification import floating_dtype


def stored_inputs(model: str, pipe: Any) -> ReportInputs:
    """What was stored when the pipeline was quantized. model: as the user wrote it.

    Raises LDMQError for a float pipeline, and for a quantized one whose plan.json or report.json is missing.
    """
    plan, report, profile = (getattr(pipe, name, None) for name in ("plan", "report", "profile"))
    if plan is None or report is None:
        raise LDMQError(
            f"{model}: has no stored plan and report to show; give a folder that `ldmq quantize` or "
            f"QuantizedLDMPipeline.save_pretrained wrote"
        )
    table = profile.table if profile is not None else layer_table(find_denoiser(pipe)[1])
    return ReportInputs(model=model, table=table, plan=plan, report=report, profile=profile)


def refuse_other_model(inputs: ReportInputs, name: str, denoiser: nn.Module) -> None:
    """Raise LDMQError unless the float denoiser, of the pipeline called `name`, has the layers of the quantized one."""
    if fingerprint(quantizable_layers(denoiser)) != inputs.plan.fingerprint:
        raise LDMQError(
            f"{name}: its {type(denoiser).__name__} has other layers than {inputs.model}, which was made from another "
            f"model; give that one"
        )


def with_pictures(
    inputs: ReportInputs,
    pipes: dict[str, Any],
    prompts: Sequence[str | None],
    sampling: Sampling,
    progress: Callable[[str, int, int], None],
) -> ReportInputs:
    """The inputs with pictures of both pipelines at equal seeds. pipes: 'float' and 'quantized'."""
    pictures = {
        role: sample_pictures(pipe, prompts, sampling, progress=_stage(progress, f"sample {role}"))
        for role, pipe in pipes.items()
    }
    captions = tuple(prompt or f"picture {number + 1}" for number, prompt in enumerate(prompts))
    return replace(inputs, pictures=pictures, captions=captions)


def with_times(inputs: ReportInputs, load: Callable[[], nn.Module], batch: Batch, quantized: nn.Module) -> ReportInputs:
    """The inputs with the milliseconds of every layer, measured now on this device. load: gives the float denoiser;
    quantized: whose schemes and floating dtype are timed."""
    used = {choice.scheme for choice in inputs.plan.layers.values()}
    schemes = dict.fromkeys((*sorted(used), *candidates("w8a8")))
    timed = tuple(scheme for scheme in schemes if not parse_scheme(scheme).is_float)
    return replace(inputs, times=layer_times(load, batch, timed, floating_dtype(quantized)))


def _stage(progress: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    return lambda done, whole: progress(name, done, whole)
