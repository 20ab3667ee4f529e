"""What several benchmarks share: the trained models that they measure, sampling with the final latents, and results
that are kept row by row, so that an interrupted command goes on where it stopped."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from diffusers_ldmq import Recording, record_calls
from diffusers_ldmq.backends import cpu_kind
from diffusers_ldmq.calls import Batch, run
from diffusers_ldmq.demo import demo_model, demo_prompts
from diffusers_ldmq.demo.job import GUIDANCE, PICTURE_SEED, STEPS, recorded_inputs
from diffusers_ldmq.pipeline import load_pipeline
from diffusers_ldmq.sampling import Sampling, sample_pictures
from diffusers_ldmq.serialization import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results"
FOLDERS = {"bundled": demo_model(), "unconditional": HERE / "models" / "emoji-unconditional"}
PICTURES, CALLS = 8, 4
"""Pictures of one pipeline call, and recorded pipeline calls: two calibrate, one selects, one verifies."""
CALIBRATING_CALLS = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """A recording and the seconds that sampling its calibrating part took."""

    recording: Recording
    calibrating_seconds: float


def pipeline(model: str) -> Any:
    """A trained model's pipeline in fp32, quiet."""
    pipe = load_pipeline(FOLDERS[model], dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(model: str, pipe: Any) -> list[dict[str, Any]]:
    """Arguments of the recorded pipeline calls."""
    if model == "bundled":
        return recorded_inputs(pipe)
    return [{"batch_size": PICTURES, "num_inference_steps": STEPS} for _ in range(CALLS)]


def recorded(model: str, pipe: Any, selection: str = "uniform") -> Recorded:
    """The recording of a model."""
    start, ends = time.perf_counter(), []
    found = record_calls(
        pipe, inputs(model, pipe), selection=selection, progress=lambda done, whole: ends.append(time.perf_counter())
    )
    return Recorded(found, ends[CALIBRATING_CALLS - 1] - start)


def drawn(model: str, pipe: Any) -> tuple[list[Image.Image], Tensor]:
    """Pictures of seeds and prompts that nothing else uses, and their final latents (as the decoder gets them)."""
    text = model == "bundled"
    prompts: list[str | None] = [*demo_prompts()] if text else [None] * PICTURES
    with _decoded(getattr(pipe, "vae" if text else "vqvae")) as latents:
        pictures = sample_pictures(pipe, prompts, Sampling(STEPS, GUIDANCE if text else None, PICTURE_SEED))
    return pictures, torch.cat(latents)


@contextmanager
def _decoded(decoder: Any) -> Iterator[list[Tensor]]:
    """What the decoder is given while the context is open."""
    seen: list[Tensor] = []
    decode = decoder.decode

    def see(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(latents.detach().float().clone())
        return decode(latents, *args, **kwargs)

    decoder.decode = see
    try:
        yield seen
    finally:
        del decoder.decode


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """What a call returns, and its seconds."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def call_costs(denoiser: nn.Module, batch: Batch, calls: int = 5) -> tuple[float, float]:
    """Median (processor seconds, seconds by the clock) of one denoiser call, after one that is not counted."""
    run(denoiser, batch)
    found = []
    for _ in range(calls):
        cpu, wall = time.process_time(), time.perf_counter()
        run(denoiser, batch)
        found.append((time.process_time() - cpu, time.perf_counter() - wall))
    return median(cpu for cpu, _ in found), median(wall for _, wall in found)


class Results:
    """Rows under names, in a JSON file under benchmarks/results unless told otherwise; written as they come."""

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.path = folder / f"{name}.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.rows.setdefault("machine", {"cpu": cpu_kind(), "torch": torch.__version__})

    def row(self, name: str, measure: Callable[[], Any]) -> Any:
        """The row of that name, measured and written unless an earlier command did."""
        if name not in self.rows:
            value, seconds = timed(measure)
            self.rows[name] = value
            self.rows.setdefault("seconds", {})[name] = round(seconds, 2)
            write_json(self.path, self.rows)
        return self.rows[name]
