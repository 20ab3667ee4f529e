"""What models, profiles and plans say, for people and as JSON: schemes, backends on this machine, sizes, SQNR."""

from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from .artifacts import Plan, Profile, Report
from .companions import Companion, companions
from .families import find_denoiser, float_shape, layer_table, quantizable_layers
from .layers import QuantizedLayer
from .metrics import sqnr_db, told_db
from .planners import fp32_bytes, integer_share, plan_bytes
from .summary import companion_lines, companions_data, mb, size_data, sqnr_data
from .tables import LayerTable
from .verification import backend_counts, floating_dtype, scheme_counts
from .verification import float_parameters as count_parameters
from .verification import stored_bytes as count_bytes


@dataclass(frozen=True, slots=True)
class LayerLine:
    """One Linear or Conv2d. backend: None where float; sqnr_db: relative, as profiled, None where not stored."""

    name: str
    kind: str
    shape: tuple[int, ...]
    scheme: str
    backend: str | None
    sqnr_db: float | None


@dataclass(frozen=True, slots=True)
class Description:
    """A pipeline's denoiser, float or quantized. backends: 'scheme on backend' -> layers, on this machine;
    report: what verification measured when it was quantized; companions: quantized models beside it."""

    pipeline: str
    denoiser: str
    dtype: str
    schemes: dict[str, int]
    backends: dict[str, int]
    bytes: int
    fp32_bytes: int
    layers: tuple[LayerLine, ...]
    report: Report | None
    companions: tuple[Companion, ...] = ()


def describe(pipe: Any) -> Description:
    """What the pipeline's denoiser is made of. Raises RecordingError if it has none."""
    _, denoiser = find_denoiser(pipe)
    profile, report = getattr(pipe, "profile", None), getattr(pipe, "report", None)
    layers = quantizable_layers(denoiser)
    in_order = [name for block in layer_table(denoiser).blocks for name in block.layers]
    return Description(
        pipeline=type(pipe).__name__,
        denoiser=type(denoiser).__name__,
        dtype=str(floating_dtype(denoiser)).removeprefix("torch."),
        schemes=scheme_counts(denoiser),
        backends=backend_counts(denoiser),
        bytes=count_bytes(denoiser),
        fp32_bytes=4 * count_parameters(denoiser),
        layers=tuple(_line(name, layers[name], profile) for name in in_order),
        report=report,
        companions=companions(pipe),
    )


def _line(name: str, layer: nn.Linear | nn.Conv2d, profile: Profile | None) -> LayerLine:
    kind = "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"
    if not isinstance(layer, QuantizedLayer) or layer.scheme.is_float:
        return LayerLine(name, kind, float_shape(layer), "float", None, None)
    scheme, db = layer.scheme.name, None
    if profile is not None and scheme in profile.noise_of(name).noise:
        db = profile.noise_of(name).power(scheme).sqnr_db
    return LayerLine(name, kind, float_shape(layer), scheme, layer.backend_name, db)


def description_data(found: Description, *, layers: bool) -> dict[str, Any]:
    """The description as plain JSON data."""
    report = found.report
    fp32, size = found.fp32_bytes, found.bytes
    data: dict[str, Any] = {
        "pipeline": found.pipeline,
        "denoiser": found.denoiser,
        "dtype": found.dtype,
        "schemes": found.schemes,
        "backends": found.backends,
        "size": {"fp32_bytes": fp32, "bytes": size, "ratio_fp32": size / fp32, "ratio_fp16": 2 * size / fp32},
        "stored": None,
    }
    if report:
        data["stored"] = {
            "output_sqnr_db": sqnr_data(report),
            "int8_macs_share": report.int8_macs,
            "dtype": report.dtype,
            "size": size_data(report),
            "backends": report.backends,
            "calibration": report.calibration,
        }
    if found.companions:
        data["components"] = companions_data(found.companions)
    if layers:
        data["layers"] = found.layers
    return data


def description_table(found: Description) -> Table:
    """The description for people, without the list of layers."""
    table = Table(title=f"{found.denoiser} of a {found.pipeline}", title_justify="left", show_header=False)
    fp32, size = found.fp32_bytes, found.bytes
    table.add_row("floating dtype", found.dtype)
    table.add_row("size as stored", f"{mb(size)} = {size / fp32:.3f}x of fp32, {2 * size / fp32:.3f}x of fp16")
    float_layers = {"float": found.schemes["float"]} if "float" in found.schemes else {}
    counts = {**found.backends, **float_layers}
    slow = {name: " (correct, not fast)" for name in counts if name.endswith("on reference")}
    told = [f"{count} {name}{slow.get(name, '')}" for name, count in counts.items()]
    table.add_row("layers, on this machine", "\n".join(told))
    if found.report:
        timestep, worst = found.report.worst()
        told = f"{found.report.sqnr_db:.1f} dB, worst step {worst:.1f} dB (t = {timestep:g}), in {found.report.dtype}"
        table.add_row("output SQNR when quantized", told)
        table.add_row("int8 x int8 multiply-accumulates", f"{100 * found.report.int8_macs:.1f} %")
    else:
        table.add_row("output SQNR", "none stored")
    for name, before, now in companion_lines(found.companions):
        table.add_row(name, f"{now}; {before}")
    return table


def layers_table(found: Description) -> Table:
    """Every Linear and Conv2d with its scheme and backend."""
    table = Table(show_edge=False)
    # names are what people copy: wider than a narrow terminal rather than broken
    table.add_column("layer", no_wrap=True, min_width=max((len(line.name) for line in found.layers), default=5))
    for name in ("kind", "weight", "scheme", "backend", "relative SQNR"):
        table.add_column(name, overflow="fold")
    for line in found.layers:
        shape, db = "x".join(map(str, line.shape)), "" if line.sqnr_db is None else told_db(line.sqnr_db)
        table.add_row(line.name, line.kind, shape, line.scheme, line.backend or "-", db)
    return table


def profile_table(profile: Profile) -> Table:
    """The block curve: SQNR at the output with every block so far quantized, and each block's noisiest layer."""
    scheme = profile.curve.scheme
    table = Table(title=f"{profile.table.denoiser}: blocks quantized to {scheme} one after another")
    for name in ("blocks", "part", "output SQNR so far", "its layer that harms the output most, alone"):
        table.add_column(name, overflow="fold")
    blocks = {block.name: block for block in profile.table.blocks}
    signal = sum(profile.curve.signal)
    for group, nsr in zip(profile.curve.groups, profile.curve.nsr(), strict=True):
        noises = [profile.noise_of(layer) for name in group for layer in blocks[name].layers]
        worst = max(noises, key=lambda noise: sum(noise.own.get(scheme, ())))
        db = told_db(sqnr_db(signal, sum(worst.own.get(scheme, ()))))
        shown = worst.name.removeprefix(f"{group[0]}.") if len(group) == 1 else worst.name
        table.add_row("\n".join(group), blocks[group[0]].part, told_db(sqnr_db(1.0, nsr)), f"{db} {shown}")
    return table


def profile_data(profile: Profile) -> dict[str, Any]:
    """The block curve as plain JSON data."""
    rows = zip(profile.curve.groups, profile.curve.nsr(), strict=True)
    return {
        "denoiser": profile.table.denoiser,
        "scheme": profile.curve.scheme,
        "timesteps": profile.timesteps,
        "blocks": [{"name": " + ".join(group), "output_sqnr_db": sqnr_db(1.0, nsr)} for group, nsr in rows],
    }


def plan_data(plan: Plan, table: LayerTable) -> dict[str, Any]:
    """What a plan comes to for the model it was made for, as plain JSON data."""
    schemes, fp32 = plan.quantized(), fp32_bytes(table)
    size = plan_bytes(table, schemes)
    return {
        "denoiser": plan.denoiser,
        "planner": plan.planner,
        "target": plan.target,
        "schemes": plan.counts(),
        "size": {"fp32_bytes": fp32, "bytes": size, "ratio_fp32": size / fp32, "ratio_fp16": 2 * size / fp32},
        "int8_macs_share": integer_share(table, schemes),
        "predicted_output_sqnr_db": plan.predicted_sqnr_db,
        "cut_off": plan.reasons.get("cut_off"),
        "sensitive_blocks": plan.reasons.get("sensitive_blocks", []),
    }


def plan_table(plan: Plan, table: LayerTable) -> Table:
    """The same for people."""
    data = plan_data(plan, table)
    shown = Table(title=f"{plan.planner} plan for {plan.denoiser}", title_justify="left", show_header=False)
    size = data["size"]
    shown.add_row("layers", "\n".join(f"{count} {scheme}" for scheme, count in sorted(data["schemes"].items())))
    ratios = f"{size['ratio_fp32']:.3f}x of fp32, {size['ratio_fp16']:.3f}x of fp16"
    shown.add_row("size", f"{mb(size['bytes'])} = {ratios}")
    shown.add_row("int8 x int8 multiply-accumulates", f"{100 * data['int8_macs_share']:.1f} %")
    predicted = plan.predicted_sqnr_db
    shown.add_row("predicted output SQNR", "unknown until measured" if predicted is None else f"{predicted:.1f} dB")
    if plan.planner.startswith("hybrid"):
        shown.add_row("higher precision from block", data["cut_off"] or "none")
        shown.add_row("sensitive blocks", ", ".join(data["sensitive_blocks"]) or "none")
    return shown
