"""Dataclasses to JSON and back: strict, and loud about where and what."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from diffusers_ldmq import serialization
from diffusers_ldmq.errors import PlanError
from diffusers_ldmq.serialization import from_json, read_json, to_json, write_json


@dataclass(frozen=True, slots=True)
class Inner:
    """A nested dataclass."""

    value: float


@dataclass(frozen=True, slots=True)
class Outer:
    """One field of every kind."""

    name: str
    count: int
    flag: bool
    inner: tuple[Inner, ...]
    table: dict[str, tuple[int, ...]]
    maybe: str | None = None
    anything: dict[str, Any] = field(default_factory=dict)


GOOD = Outer("x", 2, True, (Inner(0.1), Inner(-math.inf)), {"a": (1, 2), "b": ()}, None, {"deep": [1, None]})


def test_a_dataclass_survives_the_round_trip_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "outer.json"
    write_json(path, GOOD)
    assert from_json(Outer, read_json(path, PlanError), PlanError) == GOOD


def test_infinities_and_nan_are_written_as_strings_that_every_json_reader_accepts(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    write_json(path, {"numbers": (math.inf, -math.inf, math.nan)})
    assert json.loads(path.read_text()) == {"numbers": ["inf", "-inf", "nan"]}
    back = from_json(tuple[float, ...], ["inf", "-inf", "nan"], PlanError)
    assert back[:2] == (math.inf, -math.inf)
    assert math.isnan(back[2])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": 3}, r"\.name: expected str, found int 3"),
        ({"count": "2"}, r"\.count: expected int, found str \"2\""),
        ({"count": True}, r"\.count: expected int, found bool"),
        ({"count": 2.5}, r"\.count: expected int, found float"),
        ({"flag": 1}, r"\.flag: expected bool, found int"),
        ({"inner": {}}, r"\.inner: expected a list, found dict"),
        ({"inner": [{"value": "much"}]}, r"\.inner\[0\]\.value: expected float, found str"),
        ({"inner": [{"value": True}]}, r"\.inner\[0\]\.value: expected float, found bool"),
        ({"inner": [{}]}, r"\.inner\[0\]: missing keys \['value'\]"),
        ({"inner": [7]}, r"\.inner\[0\]: expected an object, found int"),
        ({"table": []}, r"\.table: expected an object, found list"),
        ({"table": {"a": [None]}}, r"\.table\.a\[0\]: expected int, found NoneType"),
        ({"maybe": 1}, r"\.maybe: expected str, found int"),
        ({"surprise": 1}, r"unknown keys \['surprise'\]; was it written by a newer version"),
    ],
)
def test_wrong_data_is_named_by_its_place(change: dict[str, Any], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        from_json(Outer, {**to_json(GOOD), **change}, PlanError)


def test_missing_keys_are_named_and_defaults_may_be_missing() -> None:
    data = to_json(GOOD)
    del data["maybe"]
    assert from_json(Outer, data, PlanError) == GOOD
    del data["name"], data["flag"]
    with pytest.raises(PlanError, match=r"top level: missing keys \['name', 'flag'\]"):
        from_json(Outer, data, PlanError)


def test_an_integer_is_a_float_too() -> None:
    value = from_json(float, 3, PlanError)
    assert value == 3.0
    assert isinstance(value, float)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"<html>", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
    ids=["duplicate", "utf8", "empty", "html", "nested"],
)
def test_files_that_are_no_json_are_refused_by_name(content: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=rf"plan.json: .*{match}"):
        read_json(path, PlanError)


def test_absent_files_and_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="absent.json: no such file"):
        read_json(tmp_path / "absent.json", PlanError)
    with pytest.raises(PlanError, match="cannot be read"):
        read_json(tmp_path, PlanError)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with path.open("wb") as file:
        file.truncate(serialization.MAX_JSON_BYTES + 1)  # sparse: takes no space
    with pytest.raises(PlanError, match="more than a JSON file of ours ever has"):
        read_json(path, PlanError)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", GOOD)
    write_json(tmp_path / "b.json", GOOD)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
