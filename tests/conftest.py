"""Real pipelines, made once: the bundled trained model, and tiny random ones of other kinds."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from tiny_pipelines import tiny_dit, tiny_pixel
from transformers.utils import logging as transformers_logging

from diffusers_ldmq import Plan, Profile, Recording, calibrate, profile_sqnr, quantize, record_calls
from diffusers_ldmq.artifacts import BlockCurve, LayerChoice, LayerNoise
from diffusers_ldmq.demo import demo_captions, demo_model
from diffusers_ldmq.families import find_denoiser, layer_table
from diffusers_ldmq.plugin import attach
from diffusers_ldmq.specs import SCHEMES
from diffusers_ldmq.tables import Block, LayerInfo, LayerTable

os.environ["LDMQ_CACHE"] = "0"  # what a test computes is computed
torch.set_num_threads(1)  # models this small gain nothing from more, and lose much where cores are shared
diffusers_logging.disable_progress_bar()
diffusers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


def bundled() -> Any:
    """The trained text-to-image pipeline that comes with the package, in fp32."""
    pipe = DiffusionPipeline.from_pretrained(demo_model(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def few_inputs(steps: int = 4) -> list[dict[str, Any]]:
    """Four calls of two captions each: enough for three disjoint sets."""
    names = demo_captions()
    return [{"prompt": names[i : i + 2], "num_inference_steps": steps, "guidance_scale": 5.0} for i in range(0, 8, 2)]


MAKERS: dict[str, Callable[[], Any]] = {"bundled": bundled, "pixel": tiny_pixel, "dit": tiny_dit}
INPUTS: dict[str, list[dict[str, Any]]] = {
    "bundled": few_inputs(),
    "pixel": [{"batch_size": 2, "num_inference_steps": 3}] * 4,
    "dit": [{"class_labels": [i, i + 1], "num_inference_steps": 3} for i in range(4)],
}


@pytest.fixture(params=sorted(MAKERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def make() -> Callable[[str], Any]:
    """kind -> a fresh pipeline."""
    return lambda kind: MAKERS[kind]()


@pytest.fixture
def denoiser_of() -> Callable[[str], Any]:
    """kind -> a fresh float denoiser."""
    return lambda kind: find_denoiser(MAKERS[kind]())[1]


@pytest.fixture
def inputs_of() -> Callable[[str], list[dict[str, Any]]]:
    """kind -> the `__call__` arguments that its recording was made with."""
    return lambda kind: [dict(entry) for entry in INPUTS[kind]]


@pytest.fixture(scope="session")
def recordings() -> Callable[[str], Recording]:
    """kind -> its recording with every calibrating step and its features, made once."""
    made: dict[str, Recording] = {}

    def get(kind: str) -> Recording:
        if kind not in made:
            made[kind] = record_calls(MAKERS[kind](), INPUTS[kind], selection="tdac")
        return made[kind]

    return get


@pytest.fixture(scope="session")
def profiles(recordings: Callable[[str], Recording]) -> Callable[[str], Profile]:
    """kind -> its profile, made once."""
    made: dict[str, Profile] = {}

    def get(kind: str) -> Profile:
        if kind not in made:
            made[kind] = profile_sqnr(find_denoiser(MAKERS[kind]())[1], recordings(kind))
        return made[kind]

    return get


@pytest.fixture(scope="session")
def quantized_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, quantized by the hybrid planner and saved; tests must not change it."""
    from diffusers_ldmq.pipeline import quantize_pipeline, save_pipeline

    folder = tmp_path_factory.mktemp("checkpoint") / "quantized"
    pipe = bundled()
    outcome = quantize_pipeline(pipe, few_inputs())
    save_pipeline(pipe, folder, outcome=outcome)
    return folder


def mixed(denoiser: Any) -> Plan:
    """A plan with every scheme in turn, so that each occurs."""
    table = layer_table(denoiser)
    schemes = (*SCHEMES, "w4a16-g8")
    layers = {
        info.name: LayerChoice(schemes[index % len(schemes)], "in turn") for index, info in enumerate(table.layers)
    }
    return Plan(table.denoiser, table.fingerprint, "test", layers)


@pytest.fixture
def mixed_plan() -> Callable[[Any], Plan]:
    """denoiser -> a plan with every scheme in turn."""
    return mixed


@pytest.fixture
def mixed_denoiser(recordings: Callable[[str], Recording]) -> Callable[[str], Any]:
    """kind -> a fresh denoiser quantized with every scheme in turn, ready to be saved."""

    def make(kind: str) -> Any:
        denoiser = find_denoiser(MAKERS[kind]())[1]
        quantize(denoiser, calibrate(denoiser, mixed(denoiser), recordings(kind), observer="minmax"))
        attach(denoiser)
        return denoiser

    return make


@dataclass(frozen=True)
class Toy:
    """One block of a hand-made profile: a single 100x100 Linear layer called '<name>.layer'.

    nsr: noise-to-signal power at the output with all blocks up to this one quantized; own: of its own effect (default:
    what it adds to nsr); the rest in dB at the layer.
    """

    name: str
    nsr: float
    part: str = "decoder"
    macs: int = 100
    keep_float: bool = False
    weight_db: float = 40.0
    activation_db: float = 30.0
    static_db: float = 30.0
    dynamic_db: float = 30.0
    own: float | None = None


def _toy_noise(toy: Toy, added: float) -> LayerNoise:
    """Relative noise in dB as given; at the output, what the block adds is split like the layer's own noise."""
    local = {"w8a16": toy.weight_db, "a8": toy.activation_db, "w8a8": toy.static_db, "w8a8-dyn": toy.dynamic_db}
    own = added if toy.own is None else toy.own
    effects = {scheme: own * 10 ** ((toy.static_db - db) / 10) for scheme, db in local.items()}
    return LayerNoise(
        f"{toy.name}.layer",
        (1.0,),
        {scheme: (10 ** (-db / 10),) for scheme, db in local.items()},
        {scheme: (effect,) for scheme, effect in effects.items()},
    )


def profile_of(toys: Sequence[Toy]) -> Profile:
    """The hand-made profile with those blocks."""
    layers = tuple(LayerInfo(f"{t.name}.layer", "Linear", (100, 100), False, t.macs, t.keep_float) for t in toys)
    blocks = tuple(Block(t.name, t.part, (f"{t.name}.layer",)) for t in toys)
    before = [0.0, *(t.nsr for t in toys)]
    noises = tuple(_toy_noise(t, max(t.nsr - earlier, 1e-9)) for t, earlier in zip(toys, before, strict=False))
    table = LayerTable("Toy", "0123456789abcdef", blocks, layers, 0)
    curve = BlockCurve("w8a8", (1.0,), tuple((t.nsr,) for t in toys), tuple((t.name,) for t in toys))
    return Profile(table, (999.0,), noises, curve, {}, schedule=(999.0,))


@pytest.fixture
def toy() -> type[Toy]:
    """A block of a hand-made profile."""
    return Toy


@pytest.fixture
def toy_profile() -> Callable[[Sequence[Toy]], Profile]:
    """Blocks -> the hand-made profile that has them."""
    return profile_of
