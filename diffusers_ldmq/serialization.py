"""Frozen dataclasses to JSON and back, strictly: a wrong type, a missing or an unknown key is an error naming it."""

import dataclasses
import json
import math
import os
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from .errors import LDMQError

T = TypeVar("T")

MAX_JSON_BYTES = 64 * 2**20
"""Larger JSON files are refused before they are parsed."""


def to_json(value: Any) -> Any:
    """Dataclasses, dicts, tuples and plain values as plain JSON data (infinities become the strings 'inf', '-inf')."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_json(kind: type[T], data: Any, error: type[LDMQError], where: str = "") -> T:
    """`data` as a `kind` (dataclass, dict, tuple, scalar or a union with None).

    Raises `error`, naming the place in the data, what was found and what was expected.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    place = where or "top level"
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_json(kind, data, error, where)
    if origin in (typing.Union, types.UnionType):
        inner = [arg for arg in args if arg is not type(None)]
        return typing.cast(T, None if data is None else from_json(inner[0], data, error, where))
    if origin is dict:
        if not isinstance(data, dict):
            raise error(f"{place}: expected an object, found {_found(data)}")
        return typing.cast(T, {k: from_json(args[1], v, error, f"{where}.{k}") for k, v in data.items()})
    if origin is tuple:
        if not isinstance(data, list):
            raise error(f"{place}: expected a list, found {_found(data)}")
        return typing.cast(T, tuple(from_json(args[0], v, error, f"{where}[{i}]") for i, v in enumerate(data)))
    if kind is float and not isinstance(data, bool) and (isinstance(data, int) or data in ("inf", "-inf", "nan")):
        return typing.cast(T, float(data))
    if kind is not Any and (not isinstance(data, kind) or (kind is int and isinstance(data, bool))):
        raise error(f"{place}: expected {kind.__name__}, found {_found(data)}")
    return typing.cast(T, data)


def _dataclass_from_json(kind: Any, data: Any, error: type[LDMQError], where: str) -> Any:
    if not isinstance(data, dict):
        raise error(f"{where or 'top level'}: expected an object, found {_found(data)}")
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise error(f"{where or 'top level'}: unknown keys {unknown}; was it written by a newer version?")
    absent = dataclasses.MISSING
    missing = [n for n, f in known.items() if n not in data and f.default is absent and f.default_factory is absent]
    if missing:
        raise error(f"{where or 'top level'}: missing keys {missing}")
    return kind(**{name: from_json(hints[name], data[name], error, f"{where}.{name}") for name in data})


def _found(data: Any) -> str:
    text = json.dumps(data, default=str)
    return f"{type(data).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def read_json(path: str | os.PathLike[str], error: type[LDMQError]) -> Any:
    """The content of a JSON file. Raises `error` naming the file if it is absent, too large, or no JSON."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise error(f"{path}: {size} bytes is more than a JSON file of ours ever has ({MAX_JSON_BYTES})")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror})") from None
    except (UnicodeDecodeError, RecursionError, ValueError) as cause:
        if isinstance(cause, LDMQError):
            raise
        raise error(f"{path}: not valid JSON ({cause})") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(n for n in names if names.count(n) > 1)!r}")
    return found


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write dataclasses or plain data as indented JSON: to a file beside it first, then renamed into place."""
    path = Path(path)
    beside = path.with_name(path.name + ".partial")
    try:
        beside.write_text(json.dumps(to_json(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
