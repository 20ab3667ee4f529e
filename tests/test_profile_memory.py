"""An interrupted profile goes on where it stopped, and refuses what it does not know."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from diffusers_ldmq import ProfileSettings, Recording, profile_sqnr
from diffusers_ldmq.curves import Memory
from diffusers_ldmq.errors import PlanError

Recordings = Callable[[str], Recording]
DenoiserOf = Callable[[str], Any]
QUICK = ProfileSettings(timesteps=2, schemes=("w8a8", "w8a8-dyn", "w8a16"), groups=8)


def counted(denoiser: nn.Module) -> list[int]:
    """A list that grows by one with every call of the denoiser."""
    calls: list[int] = []
    denoiser.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("full", [False, True])
def test_an_interrupted_profile_goes_on_and_ends_in_the_same_numbers(
    full: bool, denoiser_of: DenoiserOf, recordings: Recordings, tmp_path: Path
) -> None:
    denoiser, recording, memory = denoiser_of("pixel"), recordings("pixel"), tmp_path / "memory.json"
    settings = replace(QUICK, full=full)
    calls = counted(denoiser)
    whole = profile_sqnr(denoiser, recording, settings)
    needed = len(calls)

    def interrupt(done: int, work: int) -> None:
        if done > work * 0.7:
            raise KeyboardInterrupt

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        profile_sqnr(denoiser, recording, settings, memory=memory, progress=interrupt)
    before = len(calls)
    assert before < needed
    calls.clear()
    told: list[tuple[int, int]] = []
    resumed = profile_sqnr(denoiser, recording, settings, memory=memory, progress=lambda *pair: told.append(pair))
    assert resumed == whole
    # calibrating and the first probing passes are done again, one timestep at two probes; nothing else
    repeated = len(recording.only("calibrate").at(recording.timesteps()[:1]).calls) + 2
    assert before + len(calls) == needed + repeated
    assert told[-1][0] == told[-1][1]
    calls.clear()
    assert profile_sqnr(denoiser, recording, settings, memory=memory) == whole
    assert len(calls) == repeated


def test_memory_is_kept_after_every_part(denoiser_of: DenoiserOf, recordings: Recordings, tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    profile_sqnr(denoiser_of("pixel"), recordings("pixel"), QUICK, memory=memory)
    rows = json.loads(memory.read_text())["rows"]
    assert [name for name in rows if name.startswith("layers")] == ["layers 0", "layers 1"]
    assert sum(name.startswith("forward both") for name in rows) == 8


@pytest.mark.parametrize(
    "change",
    [
        {"timesteps": 3},
        {"images": 1},
        {"groups": 3},
        {"scheme": "w4a8"},
        {"schemes": ("w8a8", "w8a8-dyn", "w8a16", "w4a16")},
        {"observer": "minmax"},
        {"selection": "uniform"},
        {"keep_float": frozenset({"conv_in"})},
        {"full": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_memory_of_other_settings_is_refused(
    change: dict[str, Any], denoiser_of: DenoiserOf, recordings: Recordings, tmp_path: Path
) -> None:
    denoiser, recording, memory = denoiser_of("dit"), recordings("dit"), tmp_path / "memory.json"
    profile_sqnr(denoiser, recording, QUICK, memory=memory)
    with pytest.raises(PlanError, match="memory.json: holds the beginning of another profile .*delete it to start"):
        profile_sqnr(denoiser, recording, replace(QUICK, **change), memory=memory)


def test_memory_of_another_model_is_refused(denoiser_of: DenoiserOf, recordings: Recordings, tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    profile_sqnr(denoiser_of("dit"), recordings("dit"), QUICK, memory=memory)
    with pytest.raises(PlanError, match="another profile .*model"):
        profile_sqnr(denoiser_of("pixel"), recordings("pixel"), QUICK, memory=memory)


@pytest.mark.parametrize(
    "text",
    ["", '{"key": "a", "ro', "[]", "null", '{"rows": {}}', '{"key": "a", "rows": []}', "\x00\xff",
     '{"key": "a", "rows": {"layers 0": ["x"]}}', '{"key": "a", "rows": {"layers 0": 3}}',
     '{"key": "a", "rows": {"layers 0": [[1]]}}'],
)  # fmt: skip
def test_a_damaged_or_foreign_memory_is_refused_in_words(text: str, tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError, match="memory.json.*"):
        Memory.at(path, "a")


def test_a_row_of_the_wrong_length_is_refused(denoiser_of: DenoiserOf, recordings: Recordings, tmp_path: Path) -> None:
    denoiser, recording, path = denoiser_of("dit"), recordings("dit"), tmp_path / "memory.json"
    profile_sqnr(denoiser, recording, QUICK, memory=path)
    whole = json.loads(path.read_text())
    for name in ("layers 1", next(name for name in whole["rows"] if name.startswith("forward"))):
        damaged = {**whole, "rows": {**whole["rows"], name: whole["rows"][name][:-1]}}
        path.write_text(json.dumps(damaged))
        with pytest.raises(PlanError, match="does not fit"):
            profile_sqnr(denoiser, recording, QUICK, memory=path)


def test_memory_without_a_path_keeps_rows_and_writes_nothing(tmp_path: Path) -> None:
    memory = Memory()
    memory.keep("row", (1.0, 2.0))
    assert memory.rows == {"row": (1.0, 2.0)}
    kept = Memory.at(tmp_path / "memory.json", "key")
    assert kept.rows == {}
    kept.keep("row", (0.1, 1e-300))
    assert Memory.at(tmp_path / "memory.json", "key") == kept
