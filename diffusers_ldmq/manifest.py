"""What a checkpoint's config.json says of each quantized layer, and how strictly it is read."""

from typing import Any

from .errors import CheckpointError, LDMQError
from .quantized_layer import QuantizedLayer
from .specs import parse_scheme

NEEDED = {"scheme", "tensors"}
OPTIONAL = ("rotation", "rank")
"""Positive integers of corrected layers; a layer without them has no such key."""


def entry_of(layer: QuantizedLayer) -> dict[str, Any]:
    """What the manifest says of this layer: plain JSON data."""
    entry: dict[str, Any] = {"scheme": layer.scheme.name, "tensors": sorted(layer.state().tensors())}
    return entry | {key: value for key in OPTIONAL if (value := getattr(layer, key))}


def checked_entries(layers: Any) -> dict[str, dict[str, Any]]:
    """The manifest's layers as read from a file, None = there are none. Raises CheckpointError naming the layer whose
    entry is malformed; whether it fits its layer shows in `prepare`."""
    if layers is None:
        return {}
    if not isinstance(layers, dict):
        raise CheckpointError(f"quantization_config: 'layers' is a {type(layers).__name__}, expected an object")
    for name, entry in layers.items():
        if not _is_entry(entry):
            raise CheckpointError(f"quantization_config, layer {name!r}: expected scheme and tensors, found {entry!r}")
        for key in OPTIONAL:
            value = entry.get(key, 1)
            if type(value) is not int or value < 1:
                raise CheckpointError(
                    f"quantization_config, layer {name!r}: {key} is {value!r}, expected a positive integer or no such "
                    f"key"
                )
        try:
            parse_scheme(entry["scheme"])
        except LDMQError as cause:
            raise CheckpointError(f"quantization_config, layer {name!r}: {cause}") from None
    return layers


def prepare(layer: QuantizedLayer, entry: dict[str, Any]) -> None:
    """Give the layer empty tensors for what the checkpoint holds. Raises LDMQError if the entry does not fit it."""
    extras = {key: entry[key] for key in OPTIONAL if key in entry}
    layer.prepare(parse_scheme(entry["scheme"]), frozenset(entry["tensors"]), **extras)


def _is_entry(entry: Any) -> bool:
    """True for {'scheme': ..., 'tensors': [names]} with or without the optional keys."""
    if not isinstance(entry, dict) or not NEEDED <= set(entry) <= NEEDED.union(OPTIONAL):
        return False
    return isinstance(entry["tensors"], list) and all(isinstance(name, str) for name in entry["tensors"])
