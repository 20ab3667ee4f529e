"""The bridge to diffusers' quantizer interface, and the only file that knows it: saving and loading of quantized
denoisers through `save_pretrained` and `from_pretrained`.

diffusers offers no public way to register a quantizer; its two tables are looked up at call time, so adding our
entries when the package is imported is enough.
"""

import re
from copy import deepcopy
from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from .affine import unpack_int4
from .artifacts import FORMAT_VERSION
from .errors import CheckpointError, LDMQError
from .families import quantizable_layers
from .layers import QuantConv2d, QuantizedLayer, QuantLinear, quantized_layers
from .manifest import checked_entries, entry_of, prepare
from .quantization import STORAGE_DTYPE, fits_storage, replace_layer
from .specs import tensor_specs
from .version import __version__

NAME = "ldmq"
COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")


class LDMQMethod(StrEnum):
    """diffusers reads `quant_method.value`; its own enumeration is closed."""

    LDMQ = NAME


class LDMQConfig(QuantizationConfigMixin):
    """What config.json says of a quantized denoiser.

    layers: layer name -> {'scheme': ..., 'tensors': [...]}, exactly the tensors the file holds for it, and 'rotation'
    and 'rank' where the layer has them;
    compute_dtype: floating dtype the model was verified in; format_version: of this description.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        compute_dtype: str = "float32",
        format_version: int = FORMAT_VERSION,
        ldmq_version: str = __version__,
        **unknown: Any,
    ) -> None:
        method = unknown.pop("quant_method", NAME)
        if method not in (NAME, LDMQMethod.LDMQ):
            raise CheckpointError(f"quantization_config: quant_method is {method!r}, expected {NAME!r}")
        if not isinstance(format_version, int) or isinstance(format_version, bool) or format_version < 1:
            raise CheckpointError(
                f"quantization_config: format_version is {format_version!r}, expected {FORMAT_VERSION}"
            )
        if unknown or format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"quantization_config has format_version {format_version} and unknown keys {sorted(unknown)}; it was "
                f"written by diffusers-ldmq {ldmq_version}, this is {__version__}: pip install -U diffusers-ldmq"
            )
        if compute_dtype not in COMPUTE_DTYPES:
            raise CheckpointError(f"quantization_config: compute_dtype is {compute_dtype!r}, not in {COMPUTE_DTYPES}")
        self.quant_method = LDMQMethod.LDMQ  # pyright: ignore[reportAttributeAccessIssue]  (theirs is a closed Enum)
        self.layers = checked_entries(layers)
        self.compute_dtype = compute_dtype
        self.format_version = format_version
        self.ldmq_version = ldmq_version

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "quant_method": NAME,
            "format_version": self.format_version,
            "ldmq_version": self.ldmq_version,
            "compute_dtype": self.compute_dtype,
            "layers": deepcopy(self.layers),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What `print(config)` shows."""
        return self.to_dict()


class LDMQQuantizer(DiffusersQuantizer):
    """Loads our checkpoints strictly: every tensor that the manifest names, at its dtype and shape, and no other."""

    def __init__(self, quantization_config: LDMQConfig, **kwargs: Any) -> None:
        config = LDMQConfig(**quantization_config.to_dict())  # never share or change the caller's object
        super().__init__(config, **kwargs)
        self.config = config
        self.loaded_keys: list[str] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.config.layers:
            raise CheckpointError(
                "this quantization_config names no layers, so there is nothing to load; quantize a float model with "
                "`ldmq quantize` or QuantizedLDMPipeline.from_pretrained, which calibrate it"
            )

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self.loaded_keys = list(loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        layers = quantizable_layers(model)
        for name, entry in self.config.layers.items():
            if name not in layers:
                raise CheckpointError(f"quantization_config names layer {name!r}, which {type(model).__name__} lacks")
            empty = _empty_like(layers[name])
            try:
                prepare(empty, entry)
            except LDMQError as cause:
                raise CheckpointError(f"quantization_config, layer {name!r}: {cause}") from None
            replace_layer(model, name, empty)
        self._check_keys(model)
        model.register_to_config(quantization_config=self.config)

    def _check_keys(self, model: Any) -> None:
        """Every tensor of the model must be in the file and the other way round; diffusers itself only warns."""
        expected, found = set(model.state_dict()), set(self.loaded_keys)
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
        extra = sorted(key for key in found - expected if not any(re.search(p, key) for p in ignored))
        missing = sorted(expected - found)
        if missing:
            raise CheckpointError(f"{_place(missing[0])}: the file lacks this tensor ({_more(missing)}); get it again")
        if extra:
            raise CheckpointError(
                f"{_place(extra[0])}: the checkpoint holds this tensor, which its quantization_config does not name "
                f"({_more(extra)}); it is damaged or was changed by hand"
            )

    def check_if_quantized_param(self, *args: Any, **kwargs: Any) -> bool:
        return True  # every tensor goes through create_quantized_param, so that every one is checked

    def check_quantized_param_shape(self, *args: Any, **kwargs: Any) -> Any:
        name, expected, found = args  # called only where the shapes differ
        sizes = f"shape {list(found.shape)}, expected {list(expected.shape)}"
        raise CheckpointError(f"{_place(name)}: {sizes}; wrong file?")

    def create_quantized_param(self, *args: Any, **kwargs: Any) -> Any:
        """Check one tensor and put it in place. Scales come from the state dict: `value` was cast already."""
        model, value, name, device, state_dict = args[:5]
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        raw = state_dict[name]
        exact = None
        if isinstance(module, QuantizedLayer) and not module.scheme.is_float:
            exact = tensor_specs(module.scheme, module.geometry, module.rank)[leaf].dtype
        if exact is not None and raw.dtype != exact:
            raise CheckpointError(f"{_place(name)}: dtype {raw.dtype}, expected {exact}; wrong file?")
        if exact is None and not raw.is_floating_point():
            raise CheckpointError(f"{_place(name)}: dtype {raw.dtype}, expected a floating one; wrong file?")
        _check_values(name, raw, module)
        placed = (raw if exact is not None else value).to(device)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(placed, requires_grad=exact is None)
        else:
            module._buffers[leaf] = placed.clone()  # or this small tensor would hold the whole mapped file

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        empty = sorted(name for name, value in model.state_dict().items() if value.is_meta)
        if empty:
            raise CheckpointError(f"{_place(empty[0])}: no file gave this tensor ({_more(empty)}); a shard is missing")
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        adapters = [name for name in state_dict if ".base_layer." in name or ".lora_" in name]
        if adapters:
            raise CheckpointError(
                f"{_place(adapters[0])}: a LoRA is attached, and saving it with the integers gives a file that nobody "
                f"can load; call unload_lora_weights() first and share the LoRA as a file of its own"
            )
        if not safe_serialization:
            raise CheckpointError("quantized models are saved as safetensors only; leave safe_serialization=True")
        # no metadata of ours: safetensors writes several entries in random order, and config.json says it all
        return {name: stored(name, value) for name, value in state_dict.items()}, {}

    def _dequantize(self, model: Any) -> Any:
        for name, layer in quantized_layers(model).items():
            replace_layer(model, name, layer.dequantize())
        config = dict(model.config)
        config.pop("quantization_config", None)
        model._internal_dict = type(model._internal_dict)(config)
        return model

    @property
    def is_serializable(self) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return True


def stored(name: str, value: Tensor) -> Tensor:
    """A tensor as the file holds it: fp32 values that 16 bits represent exactly are written in 16 bits."""
    if value.dtype != torch.float32 or name.endswith("_scale") or not fits_storage(value):
        return value
    small = value.to(STORAGE_DTYPE)
    return small if torch.equal(small.to(value.dtype), value) else value


def attach(denoiser: Any) -> None:
    """Make a denoiser that `quantize` returned one that diffusers saves: manifest, quantizer and config item."""
    layers = {name: entry_of(layer) for name, layer in quantized_layers(denoiser).items()}
    dtype = next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), torch.float32)
    config = LDMQConfig(layers, compute_dtype=str(dtype).removeprefix("torch."))
    denoiser.hf_quantizer = LDMQQuantizer(config, pre_quantized=True)
    denoiser.is_quantized = True
    denoiser.quantization_method = LDMQMethod.LDMQ
    denoiser.register_to_config(quantization_config=config)


def register() -> None:
    """Enter our quantizer into diffusers' tables; harmless when done again, refused where the name is taken."""
    for table, member in (
        (auto.AUTO_QUANTIZER_MAPPING, LDMQQuantizer),
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, LDMQConfig),
    ):
        if table.get(NAME, member) is not member:
            raise LDMQError(f"another package has registered a quantizer {NAME!r} with diffusers; uninstall it")
        table[NAME] = member  # pyright: ignore[reportArgumentType]


def _empty_like(layer: nn.Linear | nn.Conv2d) -> QuantizedLayer:
    """The quantized class of a float layer, still float, sharing its (meta) tensors."""
    kind = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    new = kind.__new__(kind)
    vars(new).update(vars(layer), _parameters=dict(layer._parameters), _buffers=dict(layer._buffers))
    return new


def _check_values(name: str, value: Tensor, module: nn.Module) -> None:
    if value.is_floating_point():
        if not torch.isfinite(value).all():
            raise CheckpointError(f"{_place(name)}: holds NaN or Inf; the file is damaged, get it again")
        if name.endswith("_scale") and not (value > 0).all():
            raise CheckpointError(f"{_place(name)}: a scale is zero or negative; the file is damaged, get it again")
    elif name.endswith("input_zero_point") and isinstance(module, QuantizedLayer):
        spec = module.scheme.activation
        if spec is not None and not spec.qmin <= int(value) <= spec.qmax:
            raise CheckpointError(f"{_place(name)}: zero point {int(value)}, outside {spec.qmin}..{spec.qmax}; damaged")
    elif value.dtype == torch.int8 and value.numel() and int(value.min()) == -128:
        raise CheckpointError(f"{_place(name)}: holds the code -128, outside -127..127; the file is damaged")
    elif value.dtype == torch.uint8 and isinstance(module, QuantizedLayer):
        columns = module.geometry.columns
        if columns % 2 and not (unpack_int4(value[:, -1:], 2)[:, 1] == 0).all():
            raise CheckpointError(f"{_place(name)}: a padding nibble is not 8; the file is damaged")


def _place(key: str) -> str:
    module, _, tensor = key.rpartition(".")
    return f"module {module!r}, tensor {tensor!r}" if module else f"tensor {tensor!r}"


def _more(keys: list[str]) -> str:
    return f"{len(keys)} such tensor{'s' if len(keys) > 1 else ''}"
