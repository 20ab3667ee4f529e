"""The table for people and the JSON for machines."""

import json
import math
from typing import Any

import pytest
from rich.console import Console

from diffusers_ldmq import Plan, Report
from diffusers_ldmq.pictures import PictureScores
from diffusers_ldmq.serialization import to_json
from diffusers_ldmq.summary import (
    FLOAT,
    FLOAT_BEST,
    QUANTIZED,
    QUANTIZED_BEST,
    Summary,
    scores_table,
    summary_data,
    summary_table,
)
from diffusers_ldmq.timing import StepTime, StepTimes


def report(noise: float = 1.0) -> Report:
    facts: dict[str, Any] = {
        "selection": "first-step",
        "observer": "minmax",
        "samples": 16,
        "forward_calls": 2,
        "sampler_calls": 2,
    }
    schemes, backends = {"float": 3, "w8a8": 10}, {"w8a8 on cpu_onednn": 10}
    return Report(
        (900.0, 1.0), (1000.0, 1000.0), (noise, 10 * noise), "float32", schemes, backends, 0.8, 30, 100, facts
    )


def times(quantized: float) -> StepTimes:
    versions = {
        FLOAT: StepTime(0.4, "float32", "contiguous"),
        FLOAT_BEST: StepTime(0.2, "bfloat16", "channels_last"),
        QUANTIZED: StepTime(quantized, "float32", "contiguous"),
        QUANTIZED_BEST: StepTime(2 * quantized, "bfloat16", "contiguous"),
    }
    return StepTimes(versions, rows=16, rounds=7, device="cpu", threads=2)


def plan() -> Plan:
    return Plan("Net", "0", "hybrid", {})


def shown(renderable: Any) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_summary_says_the_same_in_both_forms() -> None:
    scores = PictureScores((30.0, 20.0), (0.9, 0.8))
    summary = Summary("m", "Net", plan(), report(), report(100.0), times(0.05), scores, file_bytes=31, cpu="AMX")
    data = json.loads(json.dumps(to_json(summary_data(summary))))
    assert data["size"]["ratio_fp32"] == 0.3
    assert data["size"]["ratio_fp16"] == 0.6
    assert data["output_sqnr_db"] == {
        "all": pytest.approx(10 * math.log10(2000 / 11)),
        "worst": pytest.approx(20),
        "worst_timestep": 1,
    }
    assert data["seconds_per_step"]["speedup_same_dtype"] == pytest.approx(8)
    assert data["seconds_per_step"]["speedup_fastest"] == pytest.approx(4)
    text = shown(summary_table(summary))
    told = (
        "0.300x of fp32",
        "0.600x of fp16",
        "22.6 dB",
        "(t = 1)",
        "8.00x",
        "4.00x",
        "worst 20.0 dB",
        "80.0 %",
        "AMX",
    )
    for part in (*told, "10 w8a8 on cpu_onednn", "3 float", "16 rows", "bfloat16, channels_last", "2 denoiser calls"):
        assert part in text
    assert "why not faster" not in text


def test_summary_says_why_where_it_is_slower() -> None:
    text = shown(summary_table(Summary("m", "Net", plan(), report(), times=times(0.3))))
    assert "0.67x as fast" in text
    assert "why not faster" in text


def test_scores_table_lists_every_prompt_and_the_worst() -> None:
    text = shown(scores_table(PictureScores((30.0, 20.0), (0.9, 0.8)), ["red apple", "rocket"]))
    assert "red apple" in text
    assert "25.0" in text
    assert "0.850" in text
