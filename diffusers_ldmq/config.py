"""LDMQConfig: what diffusers' and transformers' `quantization_config` says, in a call and in config.json."""

from collections.abc import Sequence
from copy import deepcopy
from enum import StrEnum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from .artifacts import FORMAT_VERSION
from .data_free import PlanLike, plan_data
from .errors import CheckpointError, LDMQError
from .manifest import checked_entries
from .version import __version__

NAME = "ldmq"
COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")


class LDMQMethod(StrEnum):
    """diffusers reads `quant_method.value`; its own enumeration is closed."""

    LDMQ = NAME


class LDMQConfig(QuantizationConfigMixin, TransformersConfigMixin):  # pyright: ignore[reportIncompatibleVariableOverride]
    """How a float model is to be quantized while it is loaded, or what config.json says of a quantized one. The same
    class for diffusers' models and transformers'.

    plan: a data-free scheme such as 'w8a16' or 'w8a8-dyn' for all layers but those that are better kept in floating
    point; or a Plan, its dict or the path of its file; or {layer, block or pattern: scheme}, later entries going
    before earlier ones.
    modules_to_not_convert: layers, blocks or patterns that stay float besides.
    layers: of a checkpoint: layer name -> {'scheme': ..., 'tensors': [...]}, exactly the tensors the file holds for it,
    and 'rotation' and 'rank' where the layer has them; compute_dtype: floating dtype the model was verified in;
    attention: {'fewest_keys': ...} where attention runs on integers; format_version: of this description.

    Raises LDMQError for schemes that need calibration, CheckpointError for a malformed description.
    """

    def __init__(
        self,
        plan: PlanLike | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        *,
        layers: dict[str, dict[str, Any]] | None = None,
        compute_dtype: str = "float32",
        attention: dict[str, int] | None = None,
        format_version: int = FORMAT_VERSION,
        **more_keys: Any,
    ) -> None:
        version = more_keys.pop("ldmq_version", __version__)
        method = more_keys.pop("quant_method", NAME)
        if method not in (NAME, LDMQMethod.LDMQ):
            raise CheckpointError(f"quantization_config: quant_method is {method!r}, expected {NAME!r}")
        _check_version(format_version, more_keys, version)
        if compute_dtype not in COMPUTE_DTYPES:
            raise CheckpointError(f"quantization_config: compute_dtype is {compute_dtype!r}, not in {COMPUTE_DTYPES}")
        self.quant_method = LDMQMethod.LDMQ  # pyright: ignore[reportAttributeAccessIssue]  (theirs is a closed Enum)
        self.plan = plan_data(plan)
        self.modules_to_not_convert = _names(modules_to_not_convert)
        self.layers = checked_entries(layers)
        self.compute_dtype = compute_dtype
        self.attention = _attention(attention)
        self.format_version = format_version
        self.ldmq_version = version

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, without paths."""
        wanted = {
            "plan": self.plan,
            "modules_to_not_convert": self.modules_to_not_convert,
            "attention": self.attention,
        }
        return {
            "quant_method": NAME,
            "format_version": self.format_version,
            "ldmq_version": self.ldmq_version,
            "compute_dtype": self.compute_dtype,
            "layers": deepcopy(self.layers),
        } | {key: deepcopy(value) for key, value in wanted.items() if value}

    def to_diff_dict(self) -> dict[str, Any]:
        """What `print(config)` shows."""
        return self.to_dict()

    def check_request(self, pre_quantized: bool, device_map: Any, advice: str) -> None:
        """Refuse what no model can be loaded with. pre_quantized: config.json describes integers; advice: how else to
        get a quantized model of this kind.

        Raises CheckpointError if there is nothing to load, LDMQError if there is nothing to do, and for parts on disk.
        """
        if pre_quantized and not self.layers:
            raise CheckpointError(
                f"this quantization_config names no layers, so there is nothing to load; quantize a float one: {advice}"
            )
        if not pre_quantized and self.plan is None:
            raise LDMQError(
                f"LDMQConfig names no scheme and no plan, so the model would stay float; give a data-free one such as "
                f"LDMQConfig('w8a16'), or: {advice}"
            )
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise LDMQError(
                "device_map puts parts of the model on disk, from where integers are not read back; leave them on "
                "'cpu', or give more max_memory"
            )


def _check_version(format_version: Any, unknown: dict[str, Any], written_by: Any) -> None:
    if not isinstance(format_version, int) or isinstance(format_version, bool) or format_version < 1:
        raise CheckpointError(f"quantization_config: format_version is {format_version!r}, expected {FORMAT_VERSION}")
    if format_version > FORMAT_VERSION:
        raise CheckpointError(
            f"quantization_config has format_version {format_version} and unknown keys {sorted(unknown)}; it was "
            f"written by diffusers-ldmq {written_by}, this is {__version__}: pip install -U diffusers-ldmq"
        )
    if unknown:
        raise CheckpointError(
            f"quantization_config has unknown keys {sorted(unknown)}; mistyped, or written by another version than "
            f"{__version__} (pip install -U diffusers-ldmq)? Known: plan, modules_to_not_convert"
        )


def _attention(given: Any) -> dict[str, int] | None:
    if given is None:
        return None
    keys = given.get("fewest_keys") if isinstance(given, dict) and len(given) == 1 else None
    if not isinstance(keys, int) or isinstance(keys, bool) or keys < 1:
        raise CheckpointError(f"quantization_config: attention is {given!r}, expected {{'fewest_keys': 512}} or so")
    return {"fewest_keys": keys}


def _names(given: Sequence[str] | None) -> list[str]:
    """A list of names of the caller's own, never the caller's list."""
    listed = given is None or isinstance(given, (list, tuple, set, frozenset))
    if not listed or not all(isinstance(name, str) for name in given or ()):
        raise LDMQError(f"quantization_config: modules_to_not_convert is {given!r}, expected a list of names")
    return list(given or ())
