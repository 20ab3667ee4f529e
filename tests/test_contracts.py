"""Every member of every registry keeps its room's contract, and the package keeps its own rules."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diffusers_ldmq
from diffusers_ldmq import Profile, Recording
from diffusers_ldmq.affine import QParams, qdq
from diffusers_ldmq.artifacts import LayerChoice, Plan
from diffusers_ldmq.backends import BACKENDS, Backend
from diffusers_ldmq.calibration import calibrate
from diffusers_ldmq.calls import SampleId
from diffusers_ldmq.corrections import CORRECTIONS
from diffusers_ldmq.errors import CalibrationError
from diffusers_ldmq.extractors import EXTRACTORS
from diffusers_ldmq.families import FAMILIES, fingerprint, quantizable_layers
from diffusers_ldmq.metrics import sqnr
from diffusers_ldmq.observers import OBSERVERS, Observer
from diffusers_ldmq.planners import PLANNERS, Request
from diffusers_ldmq.registry import Registry
from diffusers_ldmq.selections import SELECTIONS
from diffusers_ldmq.specs import SCHEMES, LayerState, QuantSpec, geometry_of, parse_scheme

PACKAGE = Path(diffusers_ldmq.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
REGISTRIES: dict[str, Registry[Any]] = {
    "families": FAMILIES,
    "selections": SELECTIONS,
    "observers": OBSERVERS,
    "planners": PLANNERS,
    "backends": BACKENDS,
    "corrections": CORRECTIONS,
    "extractors": EXTRACTORS,
}


@pytest.mark.parametrize("room", list(REGISTRIES))
def test_members_are_listed_in_order_and_explain_themselves(room: str) -> None:
    names = list(REGISTRIES[room])
    assert names == sorted(names)
    assert names
    for name, member in REGISTRIES[room].items():
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", name)
        described = member if inspect.isfunction(member) or inspect.isclass(member) else type(member)
        assert inspect.getdoc(described), f"{room}: {name} has no docstring"


@pytest.mark.parametrize("room", list(REGISTRIES))
def test_every_file_of_a_room_is_used_by_it(room: str) -> None:
    files = {path.stem for path in (PACKAGE / room).glob("*.py")} - {"__init__", "contract"}
    imported = {name.split(".")[1] for path in (PACKAGE / room).glob("*.py") for name in imports(path) if "." in name}
    assert files <= imported


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_family_places_any_layer_and_keeps_a_readable_pattern(name: str) -> None:
    family = FAMILIES[name]
    assert family.name == name
    assert family.classes
    re.compile(family.keep_float)
    key, block, part = family.place("no.such.layer", nn.Module())
    assert part in ("encoder", "middle", "decoder")
    assert all(isinstance(number, int) for number in key)
    assert block
    assert family.skip_split("no.such.layer", nn.Module()) is None


@pytest.mark.parametrize("n", [None, 1, 2, 10**6])
@pytest.mark.parametrize("name", list(SELECTIONS))
def test_a_selection_gives_that_many_different_samples_of_the_recording(
    name: str, n: int | None, kind: str, recordings: Callable[[str], Recording]
) -> None:
    recording = recordings(kind).only("calibrate")
    chosen = SELECTIONS[name](recording, n)
    assert isinstance(chosen, tuple)
    assert all(isinstance(sample, SampleId) for sample in chosen)
    assert set(chosen) <= set(recording.samples())
    assert 0 < len(chosen) == len(set(chosen)) <= (n or len(recording.samples()))
    assert chosen == SELECTIONS[name](recording, n)


@pytest.mark.parametrize("name", list(OBSERVERS))
def test_an_observer_gives_usable_parameters_or_refuses(name: str) -> None:
    observer = OBSERVERS[name]()
    assert isinstance(observer, Observer)
    spec = QuantSpec(8, "tensor")
    with pytest.raises(CalibrationError):
        observer.qparams(spec)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    observer.update(x)
    scale, zero_point = observer.qparams(spec)
    assert (scale.shape, scale.dtype, zero_point.shape, zero_point.dtype) == ((), torch.float32, (), torch.int32)
    assert sqnr(x, qdq(x, QParams(scale, zero_point), spec)) > 30


@pytest.mark.parametrize("name", list(PLANNERS))
def test_a_planner_decides_every_layer_of_its_model_with_a_reason(
    name: str, kind: str, profiles: Callable[[str], Profile]
) -> None:
    profile = profiles(kind)
    plan = PLANNERS[name](profile.table, profile, Request(profile.curve.scheme))
    assert plan.planner == name
    assert (plan.denoiser, plan.fingerprint) == (profile.table.denoiser, profile.table.fingerprint)
    assert list(plan.layers) == [info.name for info in profile.table.layers]
    assert all(choice.reason for choice in plan.layers.values())
    assert plan.quantized()
    kept = frozenset(info.name for info in profile.table.layers if info.keep_float) | set(list(plan.layers)[:9])
    assert not kept & PLANNERS[name](profile.table, profile, Request(profile.curve.scheme, kept)).quantized().keys()


def made_layers() -> dict[str, nn.Linear | nn.Conv2d]:
    torch.manual_seed(0)
    return {
        "linear": nn.Linear(48, 32),
        "conv 3x3": nn.Conv2d(16, 32, 3, padding=1),
        "conv 1x1 without bias": nn.Conv2d(16, 32, 1, bias=False),
        "strided": nn.Conv2d(16, 32, 3, stride=2, padding=1),
    }


def state_of(layer: nn.Module, scheme: str, x: torch.Tensor) -> LayerState:
    from diffusers_ldmq.calibration import layer_state

    observer = OBSERVERS["minmax-affine"]()
    observer.update(x)
    return layer_state("layer", layer, parse_scheme(scheme), observer)


@pytest.mark.parametrize("scheme", SCHEMES[1:])
@pytest.mark.parametrize("shape", list(made_layers()))
@pytest.mark.parametrize("name", list(BACKENDS))
def test_a_backend_refuses_in_words_or_runs_like_the_reference_and_gives_the_codes_back(
    name: str, shape: str, scheme: str
) -> None:
    backend, layer = BACKENDS[name], made_layers()[shape]
    assert isinstance(backend, Backend)
    assert backend.name == name
    x = torch.randn(4, 48) if shape == "linear" else torch.randn(2, 16, 8, 8)
    x = nn.functional.silu(x)
    state, geometry = state_of(layer, scheme, x), geometry_of(layer)
    reason = backend.refusal(state, geometry, torch.device("cpu"))
    if reason is not None:
        assert len(reason.split()) > 2
        return
    packed = backend.pack(state, geometry)
    output = backend.run(x, packed)
    assert output.dtype == x.dtype
    oracle = BACKENDS["reference"]
    assert sqnr(oracle.run(x, oracle.pack(state, geometry)), output) > 45
    assert torch.equal(backend.unpack(packed), state.weight)


def test_the_reference_backend_runs_every_scheme_on_every_shape() -> None:
    for layer in made_layers().values():
        x = torch.randn(4, 48) if isinstance(layer, nn.Linear) else torch.randn(2, 16, 8, 8)
        for scheme in SCHEMES[1:]:
            state = state_of(layer, scheme, x)
            assert BACKENDS["reference"].refusal(state, geometry_of(layer), torch.device("cpu")) is None


@pytest.mark.parametrize("scheme", SCHEMES[1:])
@pytest.mark.parametrize("kind", ["pixel", "dit"], indirect=True)
def test_every_scheme_can_be_calibrated_in_every_kind_of_layer(
    scheme: str, kind: str, denoiser_of: Callable[[str], Any], recordings: Callable[[str], Recording]
) -> None:
    denoiser = denoiser_of(kind)
    layers = quantizable_layers(denoiser)
    plan = Plan("", fingerprint(layers), "test", {name: LayerChoice(scheme, "") for name in layers})
    assert calibrate(denoiser, plan, recordings(kind)).states.keys() == layers.keys()


ORDER = (
    ("errors", "version", "allocator", "progress", "bound"),
    ("specs", "registry", "serialization", "demo/__init__"),
    ("affine", "metrics", "extractors", "picture_sets"),
    ("scores",),
    ("tables",),
    ("artifacts", "calls", "output"),
    ("families", "selections", "observers", "planners", "backends"),
    ("packing", "gradient", "compiled", "demands", "offloading", "integer_attention"),
    ("attention",),
    ("quantized_layer",),
    ("layers", "manifest", "loading"),
    ("recording", "inputs", "headers"),
    ("calibration",),
    ("fusing",),
    ("lora",),
    ("guards",),
    ("quantization", "corrections"),
    ("noise", "curves", "units", "stacking", "rounding"),
    ("activations", "sensitivity"),
    ("reconstruction_memory",),
    ("learning",),
    ("finishing",),
    ("profiling", "planning", "verification", "reconstruction"),
    ("correction",),
    ("timing", "data_free"),
    ("config",),
    ("text_layers",),
    ("plugin",),
    ("twin",),
    ("companions",),
    ("settings",),
    ("improving",),
    ("closed_loop",),
    ("job",),
    ("hub_errors",),
    ("checkpoints", "components", "request"),
    ("folders",),
    ("cache",),
    ("pictures", "drawing", "sampling"),
    ("plots", "network_plots", "selection_plots"),
    ("generation", "features"),
    ("evaluation",),
    ("summary",),
    ("card",),
    ("card_inputs",),
    ("hub",),
    ("pipeline",),
    ("report_tables",),
    ("report",),
    ("report_inputs",),
    ("inspection",),
    ("demo",),
    ("arguments", "terminal"),
    ("cli_use", "cli_evaluate"),
    ("cli",),
    ("__main__",),
)
"""A module imports only what stands in a line above its own; members of a room may import each other."""

LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def modules_of(path: Path) -> str:
    """The name under which a file stands in ORDER: its room, or itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    if parts == ("demo", "__init__"):
        return "demo/__init__"
    return parts[0]


def imports(path: Path) -> Iterator[str]:
    """Dotted names inside the package that a file imports, wherever in the file."""
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join([*base, *([node.module] if node.module else [])])
            names = [start if node.module else f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == "diffusers_ldmq" and rest:
                yield rest


def target_of(name: str) -> str:
    """Where an imported name stands in ORDER."""
    parts = name.split(".")
    if parts[0] == "demo" and not (len(parts) > 1 and (PACKAGE / "demo" / f"{parts[1]}.py").is_file()):
        return "demo/__init__"
    return parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    own = modules_of(path)
    if own == "__init__":
        return  # the front door imports what it shows
    assert own in LEVEL, f"{own} has no place in ORDER; give it one"
    for name in imports(path):
        target = target_of(name)
        assert target in LEVEL, f"{target} has no place in ORDER; give it one"
        room = (PACKAGE / own).is_dir()
        assert LEVEL[target] < LEVEL[own] or (room and target == own), f"{own} must not import {name}"


def test_every_module_in_the_order_exists() -> None:
    assert set(LEVEL) == {modules_of(path) for path in FILES} - {"__init__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_explain_themselves_and_neither_print_nor_run_foreign_code(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(tree)
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"print", "eval", "exec", "torch.load", "compile", "os.system", "__import__"}
    foreign = {name for name in every_import(tree) if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill")}
    assert not foreign


def every_import(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def test_the_public_names_exist_and_are_explained() -> None:
    assert list(diffusers_ldmq.__all__) == sorted(diffusers_ldmq.__all__)
    for name in set(diffusers_ldmq.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(diffusers_ldmq, name))


SILENT_IMPORT = """
import random, sys
import numpy, torch, diffusers
from diffusers.quantizers import auto
from diffusers.models.modeling_utils import ModelMixin

def state():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(),
            torch.get_rng_state().sum().item(), random.getstate()[1][:3], numpy.random.get_state()[1][:3].tolist(),
            sys.excepthook, torch.nn.Linear.forward, torch.nn.Conv2d.forward, ModelMixin.from_pretrained.__func__,
            ModelMixin.save_pretrained, sorted(set(auto.AUTO_QUANTIZER_MAPPING) - {"ldmq"}))

before = state()
import diffusers_ldmq
assert state() == before
assert "ldmq" in auto.AUTO_QUANTIZER_MAPPING and "ldmq" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.quantizers import auto as transformers_auto
assert "ldmq" in transformers_auto.AUTO_QUANTIZER_MAPPING
assert "ldmq" in transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING
unwanted = {"matplotlib", "torchmetrics", "typer", "rich"} & {name.split(".")[0] for name in sys.modules}
assert not unwanted, unwanted
"""


def test_importing_registers_and_does_nothing_else(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SILENT_IMPORT],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
