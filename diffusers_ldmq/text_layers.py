"""Which layers of a text encoder can be quantized, and what transformers' models ask of some of them."""

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from .config import LDMQConfig
from .data_free import schemes_of
from .errors import CheckpointError, LDMQError
from .specs import parse_scheme


def text_schemes(config: LDMQConfig, model: Any) -> dict[str, str]:
    """Layer name -> scheme of a float text encoder's Linear layers.

    Weights that an embedding shares stay float. Layers whose weight's dtype the model reads (T5's `wo`: it casts to any
    dtype but int8) get 8 bits where 4 were asked for. Raises as `schemes_of`.
    """
    chosen = schemes_of(config.plan, model, config.modules_to_not_convert, (nn.Linear,))
    tied = getattr(model, "all_tied_weights_keys", {})
    shared = {name.removesuffix(".weight") for name in (*tied, *tied.values())}
    chosen = {name: scheme for name, scheme in chosen.items() if name not in shared}
    if not chosen:
        raise LDMQError(f"quantization_config: no layer of {type(model).__name__} is left to quantize")
    return {name: "w8a16" if is_read(model, name) and _is_packed(s) else s for name, s in chosen.items()}


def in_fp32(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What transformers keeps in fp32 in a float16 model overflows there: integers need only an fp32 input for that."""
    return tuple(x.float() if isinstance(x, Tensor) and x.dtype == torch.float16 else x for x in inputs)


def is_read(model: Any, name: str) -> bool:
    """Whether the model asks this layer for its weight's dtype, to keep its input in fp32."""
    parts = name.split(".")
    return any(fnmatchcase(part, kept) for kept in model._keep_in_fp32_modules or () for part in parts)


def _is_packed(scheme: str) -> bool:
    spec = parse_scheme(scheme).weight
    return spec is not None and spec.bits < 8


def refuse_packed(model: Any, name: str, scheme: str) -> None:
    """Raise CheckpointError for a layer of fewer than 8 bits whose input the model would turn into integers."""
    if is_read(model, name) and _is_packed(scheme):
        raise CheckpointError(
            f"layer {name!r} is {scheme}: {type(model).__name__} would cast its input to the packed weight's dtype; "
            f"use w8a16 there"
        )
