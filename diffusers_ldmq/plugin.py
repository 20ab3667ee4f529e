"""The bridge to diffusers' quantizer interface, and the only file that knows it: saving and loading of quantized
denoisers through `save_pretrained` and `from_pretrained`, and quantizing while a float model is loaded.

diffusers offers no public way to register a quantizer; its two tables are looked up at call time, so adding our
entries when the package is imported is enough.
"""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from .allocator import give_back, release_file_pages
from .attention import fewest_keys_of, quantize_attention, restore_attention
from .calibration import layer_state
from .config import NAME, LDMQConfig, LDMQMethod
from .data_free import schemes_of
from .errors import CheckpointError, LDMQError, place
from .families import quantizable_layers
from .guards import guard, unguard
from .layers import QuantConv2d, QuantizedLayer, QuantLinear, quantized_layers
from .loading import check_complete, check_keys, check_shape, more, put, refuse_pickles
from .manifest import entry_of, prepare
from .quantization import replace_layer, round_to_storage, stored
from .specs import parse_scheme

ADVICE = "`ldmq quantize` or QuantizedLDMPipeline.from_pretrained, which calibrate it"
LARGE = 2**20
"""Bytes of a weight that are worth being given back to the system at once."""


class LDMQQuantizer(DiffusersQuantizer):
    """Loads our checkpoints strictly: every tensor that the manifest names, at its dtype and shape, and no other.
    Float models it quantizes layer by layer as their tensors arrive, so that both are never in memory at once."""

    use_keep_in_fp32_modules = True
    """diffusers is to honour a class's list of modules that stay fp32 whatever dtype is asked for."""

    def __init__(self, quantization_config: LDMQConfig, **kwargs: Any) -> None:
        config = LDMQConfig(**quantization_config.to_dict())  # never share or change the caller's object
        super().__init__(config, **kwargs)
        if config.plan is not None and not config.layers:
            self.pre_quantized = False  # from_single_file does not say
        self.config = config
        self.loaded_keys: list[str] = []
        self.wanted: dict[str, str] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.config.check_request(self.pre_quantized, kwargs.get("device_map"), ADVICE)
        if _caller_has("use_flashpack"):
            raise LDMQError("use_flashpack=True skips quantizing altogether; load safetensors files instead")
        if self.pre_quantized and _caller_has("quantization_config"):
            raise LDMQError(
                "this checkpoint is quantized already, as its config.json says; leave quantization_config out to load "
                "it, or give the original float model to quantize anew"
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        if self.pre_quantized:
            refuse_pickles(checkpoint_files)
        self.loaded_keys = list(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        found = self.loaded_keys or list(kwargs.get("state_dict") or ())  # a single file gives the tensors themselves
        if self.pre_quantized:
            self._prepare(model)
            check_keys(model.state_dict(), found, getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
        else:
            self.wanted = schemes_of(self.config.plan, model, self.config.modules_to_not_convert)
            kept = set(kwargs.get("keep_in_fp32_modules") or ())
            self.wanted = {name: scheme for name, scheme in self.wanted.items() if not kept & set(name.split("."))}
            missing = sorted(set(model.state_dict()) - set(found))
            if missing:
                raise CheckpointError(
                    f"{place(missing[0])}: the file lacks this tensor ({more(missing)}); quantized models start from "
                    f"complete ones"
                )
            for name in self.wanted:
                replace_layer(model, name, empty_like(model.get_submodule(name)))
        model.register_to_config(quantization_config=self.config)

    def _prepare(self, model: Any) -> None:
        layers = quantizable_layers(model)
        for name, entry in self.config.layers.items():
            if name not in layers:
                raise CheckpointError(f"quantization_config names layer {name!r}, which {type(model).__name__} lacks")
            empty = empty_like(layers[name])
            try:
                prepare(empty, entry)
            except LDMQError as cause:
                raise CheckpointError(f"quantization_config, layer {name!r}: {cause}") from None
            replace_layer(model, name, empty)

    def check_if_quantized_param(self, *args: Any, **kwargs: Any) -> bool:
        return True  # every tensor goes through create_quantized_param, so that every one is checked

    def check_quantized_param_shape(self, *args: Any, **kwargs: Any) -> Any:
        name, expected, found = args  # called only where the shapes differ
        check_shape(name, expected, found)

    def create_quantized_param(self, *args: Any, **kwargs: Any) -> Any:
        """Check one tensor and put it in place; quantize it where that is wanted. Integers, scales and weights to
        quantize come from the state dict: `value` was cast already."""
        model, value, name, device, state_dict = args[:5]
        layer, _, leaf = name.rpartition(".")
        put(model, name, state_dict[name], value, device)
        if leaf == "weight" and layer in self.wanted:
            self._quantize(layer, model.get_submodule(layer), state_dict[name].to(device))

    def _quantize(self, name: str, layer: QuantizedLayer, weight: Tensor) -> None:
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        layer.adopt(layer_state(name, layer, parse_scheme(self.wanted[name]), None))
        if weight.nbytes >= LARGE:  # or the float file and what is freed meanwhile would pile up beside the integers
            release_file_pages(weight)
            give_back()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_complete(model, quantized_layers(model))
        floats = sorted(name for name in self.wanted if model.get_submodule(name).scheme.is_float)
        if floats:
            raise LDMQError(
                f"layer {floats[0]!r} was not quantized ({len(floats)} such layers); load without offloading"
            )
        if self.config.attention is not None:
            quantize_attention(model, **self.config.attention)
        if not self.pre_quantized:
            round_to_storage(model)
            self.pre_quantized = True
            self.quantization_config = self.config = config_of(model)
            model.register_to_config(quantization_config=self.config)
        guard(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        refuse_adapters(state_dict)
        if not safe_serialization:
            raise CheckpointError("quantized models are saved as safetensors only; leave safe_serialization=True")
        # no metadata of ours: safetensors writes several entries in random order, and config.json says it all
        return {name: stored(name, value) for name, value in state_dict.items()}, {}

    def _dequantize(self, model: Any) -> Any:
        layers = quantized_layers(model)
        biases = (layer.bias for layer in layers.values())
        dtype = next((bias.dtype for bias in biases if isinstance(bias, Tensor)), model.dtype)
        for name, layer in layers.items():
            replace_layer(model, name, layer.dequantize(dtype))
        restore_attention(model)
        config = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = type(model._internal_dict)(config)
        unguard(model)
        return model

    @property
    def supports_parallel_loading(self) -> bool:
        return self.pre_quantized  # a layer that is being quantized gets more tensors, while other threads list them

    @property
    def is_serializable(self) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(denoiser: Any) -> None:
    """Make a denoiser that `quantize` returned one that diffusers saves: manifest, quantizer and config item."""
    config = config_of(denoiser)
    denoiser.hf_quantizer = LDMQQuantizer(config, pre_quantized=True)
    denoiser.is_quantized = True
    denoiser.quantization_method = LDMQMethod.LDMQ
    denoiser.register_to_config(quantization_config=config)
    guard(denoiser)


def register() -> None:
    """Enter our quantizer into diffusers' tables; harmless when done again, refused where the name is taken."""
    for table, member in (
        (auto.AUTO_QUANTIZER_MAPPING, LDMQQuantizer),
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, LDMQConfig),
    ):
        if table.get(NAME, member) is not member:
            raise LDMQError(f"another package has registered a quantizer {NAME!r} with diffusers; uninstall it")
        table[NAME] = member  # pyright: ignore[reportArgumentType]


def config_of(model: Any) -> LDMQConfig:
    """What config.json will say of a model whose layers are quantized."""
    layers = {name: entry_of(layer) for name, layer in quantized_layers(model).items()}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    keys = fewest_keys_of(model)
    attention = None if keys is None else {"fewest_keys": keys}
    return LDMQConfig(layers=layers, compute_dtype=str(dtype).removeprefix("torch."), attention=attention)


def refuse_adapters(names: Iterable[str]) -> None:
    """Raise CheckpointError if a tensor of these names is a LoRA's or an IP-Adapter's."""
    adapters = [name for name in names if ".base_layer." in name or ".lora_" in name]
    if adapters:
        raise CheckpointError(
            f"{place(adapters[0])}: a LoRA is attached, and saving it with the integers gives a file that nobody "
            f"can load; call unload_lora_weights() first (and fuse_lora() before that to keep what it does), and "
            f"share the LoRA as a file of its own"
        )
    pictures = [name for name in names if ".processor." in name and "_ip." in name]
    if pictures:
        raise CheckpointError(
            f"{place(pictures[0])}: an IP-Adapter is loaded, whose tensors belong to no checkpoint; call "
            f"unload_ip_adapter() first"
        )


def empty_like(layer: nn.Module) -> QuantizedLayer:
    """The quantized class of a float layer, still float, sharing its (meta) tensors."""
    kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    new = kind.__new__(kind)
    vars(new).update(vars(layer), _parameters=dict(layer._parameters), _buffers=dict(layer._buffers))
    return new


def _caller_has(argument: str) -> bool:
    """Whether from_pretrained was given this argument. diffusers does not tell quantizers of use_flashpack, which skips
    them, nor of a quantization_config for a quantized checkpoint, which it drops: both would go wrong in silence."""
    return bool(sys._getframe(2).f_locals.get(argument))
