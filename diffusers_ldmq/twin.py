"""The bridge to transformers' quantizer interface, and the only file that knows it: the twin of `plugin` for text
encoders. They are quantized without data while they are loaded, saved, and loaded again by plain `from_pretrained`.

transformers reads the files, casts and places the tensors itself; a quantizer may only say which layers there are and
turn a tensor into others. What it would do in silence (fill a missing tensor with random values, drop one too many,
cast a damaged one) is refused before, by the files' headers, and after, by the values.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from .calibration import layer_state
from .config import NAME, LDMQConfig, LDMQMethod
from .errors import CheckpointError, LDMQError, place
from .families import quantizable_layers
from .guards import guard, unguard
from .headers import Header, read_headers
from .layers import QuantLinear, quantized_layers
from .loading import check_complete, check_dtype, check_keys, check_shape, check_values, exact_dtype, more
from .manifest import prepare
from .plugin import config_of, empty_like, refuse_adapters
from .quantization import replace_layer, round_to_storage, stored
from .specs import parse_scheme
from .text_layers import in_fp32, is_read, refuse_packed, text_schemes

ADVICE = "from_pretrained(..., quantization_config=LDMQConfig('w8a16'))"
SMALL = 2**16
"""Bytes up to which a tensor is copied out of its file; larger ones stay mapped."""


class LDMQTextQuantizer(HfQuantizer):
    """Loads our checkpoints of transformers' models strictly, and quantizes float ones layer by layer."""

    def __init__(self, quantization_config: LDMQConfig, **kwargs: Any) -> None:
        config = LDMQConfig(**quantization_config.to_dict())  # never share or change the caller's object
        super().__init__(config, **kwargs)
        self.config = config
        self.wanted: dict[str, str] = {}
        self.missing: set[str] = set()  # transformers' own set, as loading empties it
        self.found: dict[str, Header | None] = {}
        self.failure: LDMQError | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        self.config.check_request(self.pre_quantized, kwargs.get("device_map"), ADVICE)
        if self.config.attention is not None:
            raise LDMQError("attention on integers is for diffusers' models, not for text encoders; leave it out")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or []
        if self.pre_quantized:
            entries = self.config.layers
            _prepare(model, entries)
            self._check_headers(model, files)
        else:
            self.wanted = text_schemes(self.config, model)
            if all(file.endswith(".safetensors") for file in files):
                self.found = _renamed(model, read_headers(files), self)
                _refuse_missing(model, model.state_dict().keys() - self.found.keys())
            entries = {name: {"scheme": s, "tensors": _tensors(model, name)} for name, s in self.wanted.items()}
            _prepare(model, entries)
            # a weight is rounded once, from what the file holds, and not to the model's dtype before
            exact = {f"{name}.weight": self.found.get(f"{name}.weight") for name in self.wanted}
            plan = {re.escape(name): header.dtype if header else torch.float32 for name, header in exact.items()}
            model._get_dtype_plan = lambda dtype: {**plan, **type(model)._get_dtype_plan(model, dtype)}
        model.config.quantization_config = self.config

    def _check_headers(self, model: Any, files: list[str]) -> None:
        """Refuse files that do not hold exactly what the model, with its quantized layers in place, is made of."""
        tensors = model.state_dict()
        tied = set(getattr(model, "all_tied_weights_keys", {}))
        self.found = found = _renamed(model, read_headers(files), self)
        ignored = {*(model._keys_to_ignore_on_load_unexpected or ()), r"(^|\.)position_ids$"}
        absent = {name for name in tied if name not in found}
        check_keys(tensors.keys() - absent, found, ignored)
        for name, header in found.items():
            if header is not None and name in tensors:
                owner, _, leaf = name.rpartition(".")
                check_dtype(name, exact_dtype(model.get_submodule(owner), leaf), header.dtype)
                check_shape(name, tensors[name], header.like())

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        layer, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and layer in self.wanted

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def quantized(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """A layer's tensors in place of its float weight. name: of the weight; weight: [N, K], as the file holds it,
        which is read anew where it can be: transformers keeps the whole file mapped until it is done."""
        header = self.found.get(name)
        weight = weight if header is None else header.read()
        layer = name.removesuffix(".weight")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        state = layer_state(layer, linear, parse_scheme(self.wanted[layer]), None)
        return {f"{layer}.{tensor}": value for tensor, value in state.tensors().items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.failure is not None:
            raise self.failure
        if self.pre_quantized:
            self._leave_mapping(model)
        else:
            del model._get_dtype_plan
            _refuse_missing(model, self.missing)
        for name, value in model.state_dict().items():
            if not value.is_meta:
                check_values(name, value, model.get_submodule(name.rpartition(".")[0]))
        check_complete(model, quantized_layers(model))
        if not self.pre_quantized:
            round_to_storage(model)
            self.pre_quantized = True
            self.quantization_config = self.config = config_of(model)
        _enter(model, self)
        return model

    def _leave_mapping(self, model: Any) -> None:
        """Map anew, one by one, what was not cast: views of the whole file would hold all of it in memory, also what
        was read of it to be cast."""
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            header = self.found.get(name)
            if header is not None and value.device.type == "cpu" and value.dtype == header.dtype:
                fresh = header.read() if value.nbytes > SMALL else value.data.clone()
                owner, _, leaf = name.rpartition(".")
                buffers = model.get_submodule(owner)._buffers
                if leaf in buffers:
                    buffers[leaf] = fresh  # a view would keep its base
                else:
                    value.data = fresh

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What the file will hold. Tied weights stay one tensor, by which transformers knows them."""
        state = model.state_dict()
        refuse_adapters(state)
        done: dict[tuple[int, torch.Size], Tensor] = {}
        for name, value in state.items():
            key = (value.data_ptr(), value.shape)
            done.setdefault(key, _stored(name, value))
            state[name] = done[key]
        return state, {}

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return super().dequantize(model, dtype or model.dtype)  # the config's may be a string

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, layer in quantized_layers(model).items():
            replace_layer(model, name, layer.dequantize(dtype))
        unguard(model)
        return model.to(dtype)

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _stored(name: str, value: Tensor) -> Tensor:
    """As `stored`; values that came from bfloat16 go back to it where float16 cannot hold them."""
    small = stored(name, value)
    if small.dtype != torch.float32 or name.endswith("_scale"):
        return small
    rounded = value.to(torch.bfloat16)
    return rounded if torch.equal(rounded.to(value.dtype), value) else value


class _Quantize(ConversionOps):
    """transformers' step between reading a tensor and placing it."""

    def __init__(self, quantizer: LDMQTextQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.quantizer.missing = kwargs.get("missing_keys") or set()
        found: dict[str, Any] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if not self.quantizer.param_needs_quantization(kwargs.get("model"), name):
                found[name] = tensor
                continue
            try:
                found |= self.quantizer.quantized(name, tensor)
            except LDMQError as cause:  # transformers would log it and go on: raised when loading is done
                self.quantizer.failure = self.quantizer.failure or cause
                found |= _blank(kwargs["model"], name)
        return found


def _blank(model: Any, name: str) -> dict[str, Tensor]:
    """What a layer is made of, without values. name: of its weight."""
    layer = name.removesuffix(".weight")
    tensors = model.get_submodule(layer).state().tensors().items()
    return {f"{layer}.{leaf}": torch.zeros_like(value, device="cpu") for leaf, value in tensors if leaf != "bias"}


def attach(model: Any) -> None:
    """Make a transformers model with quantized layers one that transformers saves. Raises CheckpointError for a layer
    that it could not run after loading."""
    for name, layer in quantized_layers(model).items():
        refuse_packed(model, name, layer.scheme.name)
    quantizer = LDMQTextQuantizer(config_of(model), pre_quantized=True)
    model.hf_quantizer, model.is_quantized, model.quantization_method = quantizer, True, LDMQMethod.LDMQ
    _enter(model, quantizer)


def register() -> None:
    """Enter quantizer and configuration into transformers' tables; harmless when done again, refused where taken."""
    entries = (
        (auto.AUTO_QUANTIZER_MAPPING, auto.register_quantizer, LDMQTextQuantizer),
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.register_quantization_config, LDMQConfig),
    )
    for table, enter, member in entries:
        if table.get(NAME, member) is not member:
            raise LDMQError(f"another package has registered a quantizer {NAME!r} with transformers; uninstall it")
        if NAME not in table:
            enter(NAME)(member)  # pyright: ignore[reportArgumentType]


def _enter(model: Any, quantizer: LDMQTextQuantizer) -> None:
    model.config.quantization_config = quantizer.config
    for name, layer in quantized_layers(model).items():
        if is_read(model, name) and in_fp32 not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(in_fp32)
    guard(model)


def _tensors(model: nn.Module, name: str) -> list[str]:
    """Names of the tensors that a data-free scheme gives a layer."""
    bias = getattr(model.get_submodule(name), "bias", None)
    return ["weight", "weight_scale", *([] if bias is None else ["bias"])]


def _prepare(model: Any, entries: dict[str, dict[str, Any]]) -> None:
    """Put empty quantized layers in the float ones' places."""
    layers = {name: layer for name, layer in quantizable_layers(model).items() if isinstance(layer, nn.Linear)}
    for name, entry in entries.items():
        if name not in layers:
            raise CheckpointError(f"quantization_config names layer {name!r}, which {type(model).__name__} lacks")
        refuse_packed(model, name, entry["scheme"])
        empty = empty_like(layers[name])
        assert isinstance(empty, QuantLinear)
        try:
            prepare(empty, entry)
        except LDMQError as cause:
            raise CheckpointError(f"quantization_config, layer {name!r}: {cause}") from None
        replace_layer(model, name, empty)


def _renamed(model: Any, headers: dict[str, Header], quantizer: HfQuantizer) -> dict[str, Header | None]:
    """The headers by the names that the model will have them under; None where transformers joins or splits tensors."""
    rules = get_model_conversion_mapping(model, None, quantizer)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    tensors = model.state_dict()
    found: dict[str, Header | None] = {}
    for key, header in headers.items():
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, tensors)
        if name not in tensors and key in tensors:
            name, pattern = key, None
        found[name] = header if pattern is None else None
    return found


def _refuse_missing(model: Any, missing: Iterable[str]) -> None:
    """Raise CheckpointError for a tensor that transformers made up."""
    lacking = set(missing)
    tied = getattr(model, "all_tied_weights_keys", {})
    filled = {one for pair in tied.items() for one in pair if not set(pair) <= lacking}
    patterns = model._keys_to_ignore_on_load_missing or ()
    names = sorted(n for n in lacking - filled if not any(re.search(pattern, n) for pattern in patterns))
    if names:
        raise CheckpointError(
            f"{place(names[0])}: the file lacks this tensor ({more(names)}); quantized models start from complete ones"
        )
