"""Attention of a denoiser on integers: an option of a float or quantized model, taken back as easily as it is given.

Whatever an attention's processor does, it comes to torch's scaled_dot_product_attention, and that call is replaced
while the attention runs. Weights and projections are not touched: those are the plan's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .bound import Bound
from .errors import LDMQError
from .integer_attention import integer_attention

FLOAT_PRODUCT = nn.functional.scaled_dot_product_attention
FEWEST_KEYS = 512
"""Below so many keys integers cost about as much time as they save, or more."""


@dataclass(frozen=True, slots=True)
class IntegerProduct:
    """scaled_dot_product_attention on integers; over fewer keys than `fewest_keys` in floating point as ever."""

    fewest_keys: int = FEWEST_KEYS

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        """Attention of [..., T, d] over [..., S, d]. Raises LDMQError for dropout, causal and grouped attention, which
        no denoiser has, and where gradients are wanted."""
        if key.shape[-2] < self.fewest_keys:
            return FLOAT_PRODUCT(query, key, value, attn_mask, dropout_p, is_causal, **options)
        if dropout_p or is_causal or options.get("enable_gqa"):
            raise LDMQError(
                "integer attention has no dropout, is not causal and has a key for each query head; call "
                "restore_attention() to run this model's attention in floating point"
            )
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            raise LDMQError(
                "integer attention gives no gradients: call restore_attention() to train, or run under torch.no_grad()"
            )
        return integer_attention(query, key, value, attn_mask, options.get("scale"))


def quantize_attention(denoiser: nn.Module, *, fewest_keys: int = FEWEST_KEYS) -> nn.Module:
    """Let the denoiser's attention over at least `fewest_keys` keys run on integers (queries, keys and values int8,
    softmax weights unsigned 8 bit); return the denoiser. Layers stay what they are, float or quantized. Saved and
    loaded with a quantized model. Harmless when done again.

    Raises LDMQError if the denoiser has no attention, or another number than at least 1 is asked for. The first call
    raises it for an attention whose processor goes other ways than torch's scaled_dot_product_attention.
    """
    if not isinstance(fewest_keys, int) or isinstance(fewest_keys, bool) or fewest_keys < 1:
        raise LDMQError(f"fewest_keys is {fewest_keys!r}, expected a number of keys from 1 on")
    replace_product(denoiser, IntegerProduct(fewest_keys))
    _enter_config(denoiser, {"fewest_keys": fewest_keys})
    return denoiser


def restore_attention(denoiser: nn.Module) -> nn.Module:
    """Let the denoiser's attention run in floating point again; return the denoiser. Harmless on any model."""
    for module in attentions(denoiser).values():
        if _is_replaced(module):
            del vars(module)["forward"]
    _enter_config(denoiser, None)
    return denoiser


def fewest_keys_of(denoiser: nn.Module) -> int | None:
    """What `quantize_attention` was called with; None where attention is float."""
    for module in attentions(denoiser).values():
        if _is_replaced(module):
            product = vars(module)["forward"].function.product
            return product.fewest_keys if isinstance(product, IntegerProduct) else None
    return None


def _enter_config(denoiser: Any, attention: dict[str, int] | None) -> None:
    """Tell what config.json will say of a quantized model."""
    config: Any = getattr(getattr(denoiser, "config", None), "quantization_config", None)
    if hasattr(config, "attention"):
        config.attention = attention


def attentions(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The modules that diffusers lets have an attention processor, by name."""
    return {name: m for name, m in denoiser.named_modules() if callable(getattr(m, "set_processor", None))}


def replace_product(denoiser: nn.Module, product: Callable[..., Tensor]) -> None:
    """Let `product` stand in for scaled_dot_product_attention in every attention of the denoiser. Raises LDMQError if
    there is none, or if something else has taken the place of an attention's forward."""
    found = attentions(denoiser)
    if not found:
        raise LDMQError(
            f"this {type(denoiser).__name__} has no attention of diffusers' kind, with a processor, to quantize"
        )
    taken = [name for name, module in found.items() if "forward" in vars(module) and not _is_replaced(module)]
    if taken:
        raise LDMQError(f"module {taken[0]!r} has hooks (offloading?); quantize attention first, offload afterwards")
    for name, module in found.items():
        vars(module)["forward"] = Bound(_Replaced(name, product), module)


@dataclass(frozen=True, slots=True)
class _Replaced:
    """An attention's forward with another product inside. name: of the module, for errors."""

    name: str
    product: Callable[..., Tensor]

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(self, module, args, kwargs)


@torch.compiler.disable()  # a compiler cannot look into it; what is around it is compiled
def _run(replaced: _Replaced, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with _Replacing(replaced.product) as replacing:
        result = type(module).forward(module, *args, **kwargs)
    if not replacing.calls:
        processor = type(getattr(module, "processor", None)).__name__
        raise LDMQError(
            f"module {replaced.name!r}: its {processor} does not call torch's scaled_dot_product_attention, which is "
            f"what can be quantized; use AttnProcessor2_0, or call restore_attention()"
        )
    return result


class _Replacing(TorchFunctionMode):
    """Within it, scaled_dot_product_attention is `product`. calls: how often it was."""

    def __init__(self, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self.product, self.calls = product, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is FLOAT_PRODUCT:
            self.calls += 1
            return self.product(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_replaced(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, Bound) and isinstance(forward.function, _Replaced)
