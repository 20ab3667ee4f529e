"""LDM-Q Export: a quantized MODEL as a file that ComfyUI's own Load Diffusion Model node reads (0.27 or newer), which
knows integers in Linear layers only."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffusers_ldmq.affine import dequantize_weight
from diffusers_ldmq.errors import LDMQError
from diffusers_ldmq.progress import Progress
from diffusers_ldmq.quantization import STORAGE_DTYPE
from diffusers_ldmq.specs import LayerState

from .file_writer import Entry, entry, parts, write_tensors
from .layer import LDMQLayer
from .model_files import float_tensors, load_patched, stored
from .patching import quantized_layers_of
from .sampling_patches import LOST, is_patched

STOCK = {"format": "int8_tensorwise"}
"""ComfyUI's name of int8 weights with one fp32 scale for each row; inputs get theirs while the layer runs."""
WEIGHT_ONLY = STOCK | {"full_precision_matrix_mult": True}
"""The same, with the wish that inputs stay floats. ComfyUI 0.27 to 0.30 grants it only where the weight becomes a float
one before it multiplies: for a LoRA on an offloaded layer, or where the model runs in another dtype than its own.
Otherwise comfy-kitchen's int8 kernel gets float inputs and rounds each row of them to 8 bits all the same."""


def export_model(model: Any, path: str | os.PathLike[str], progress: Progress | None = None) -> str:
    """Write the denoiser of a quantized MODEL for ComfyUI's own loader, complete or not at all; what was exported how,
    in words. LoRAs on it become part of the weights.

    Linear layers with 8-bit weights and no correction keep their integers, and ask for float inputs if they are
    weight-only; every other layer is written as the fp16 weight that its integers stand for. Raises LDMQError if the
    MODEL is not quantized, OutputError if the file cannot be written.
    """
    layers = quantized_layers_of(model)
    if not layers:
        raise LDMQError(
            "this MODEL is not quantized: put LDM-Q Quantize before LDM-Q Export, or write a float model with the "
            "stock Save Checkpoint node"
        )
    load_patched(model)
    entries = [entry(name, stored(value)) for name, value in float_tensors(model, layers).items()]
    entries.extend(entry(name, value) for name, value in _prediction(model))
    reasons: dict[str, str | None] = {}
    looking, writing = parts(progress, len(layers))
    for done, (name, layer) in enumerate(layers.items()):
        state = layer.state()
        reasons[name] = _reason_for_float(layer, state)
        if state.bias is not None:
            entries.append(entry(f"{name}.bias", stored(state.bias)))
        entries.extend(_integers(name, layer, state) if reasons[name] is None else [_float(name, layer)])
        looking(done + 1, len(layers))
    write_tensors(path, entries, {"format": "pt"}, writing)
    told = _told(layers, reasons)
    return f"{told}\n{LOST.format(loader='Load Diffusion Model')}" if is_patched(model) else told


def _reason_for_float(layer: LDMQLayer, state: LayerState) -> str | None:
    """Why the layer's integers cannot be in a stock file; None if they can."""
    spec = state.scheme.weight
    if layer.geometry.is_conv:
        return "convolutions"
    if spec is None or spec.bits != 8:
        return "Linear layers with 4-bit weights"
    if state.pre_quant_scale is not None or state.rotation or state.rank:
        return "Linear layers with a correction (smoothing, rotation or low rank)"
    return None


def _integers(name: str, layer: LDMQLayer, state: LayerState) -> Iterator[Entry]:
    yield Entry(f"{name}.weight", torch.int8, tuple(layer.geometry.shape), lambda: layer.state().weight)
    yield entry(f"{name}.weight_scale", state.weight_scale.reshape(-1, 1))
    told = json.dumps(WEIGHT_ONLY if state.scheme.activation is None else STOCK)
    yield entry(f"{name}.comfy_quant", torch.tensor(list(told.encode()), dtype=torch.uint8))


def _float(name: str, layer: LDMQLayer) -> Entry:
    def read() -> Tensor:
        weight = dequantize_weight(layer.state(), torch.Size(layer.geometry.shape)).to(STORAGE_DTYPE)
        if not torch.isfinite(weight).all():
            raise LDMQError(f"layer {name!r}: its weight is too large for fp16; keep the model with LDM-Q Save model")
        return weight

    return Entry(f"{name}.weight", STORAGE_DTYPE, tuple(layer.geometry.shape), read)


def _prediction(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors without elements by which ComfyUI's loader sees what the model predicts."""
    if model.model.model_type.name == "V_PREDICTION":
        yield "v_pred", torch.empty(0)
        if getattr(model.get_model_object("model_sampling"), "zsnr", False):
            yield "ztsnr", torch.empty(0)


def _told(layers: dict[str, LDMQLayer], reasons: dict[str, str | None]) -> str:
    kept = [name for name, reason in reasons.items() if reason is None]
    sizes = {name: torch.Size(layer.geometry.shape).numel() for name, layer in layers.items()}
    share = sum(sizes[name] for name in kept) / sum(sizes.values())
    lines = [
        f"{len(kept)} of {len(layers)} quantized layers ({share:.0%} of their weights) exported as int8 "
        f"({STOCK['format']}, one scale for each row).",
        *(
            f"{count} {reason}: as the fp16 values of their integers."
            for reason, count in Counter(r for r in reasons.values() if r).items()
        ),
    ]
    floats = sum(1 for name in kept if layers[name].scheme.activation is None)
    if floats:
        lines.append(
            f"{floats} of the int8 layers are weight-only here. The file asks the stock loader to keep their inputs in "
            "floating point, but ComfyUI up to 0.30 mostly rounds each row of them to 8 bits all the same, which is "
            "less exact. LDM-Q Save model keeps them as they are."
        )
    static = sum(1 for name in kept if layers[name].scheme.is_static)
    if static:
        lines.append(f"{static} of the int8 layers had calibrated input ranges, which the format does not have.")
    if not kept:
        lines.append("Nothing of it is smaller than fp16: keep the model with LDM-Q Save model instead.")
    return "\n".join([*lines, "Open it with the stock Load Diffusion Model node, ComfyUI 0.27 or newer."])
