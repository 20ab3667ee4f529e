"""A node at work: progress, interrupts, and errors as one clear message."""

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyui.contract.standin import Interrupted, StandIn

from diffusers_ldmq.errors import LDMQError, OutputError, PlanError

NODE: Any = type("Node", (), {"hidden": SimpleNamespace(unique_id="7")})


def test_progress_shows_the_stage_on_the_node_and_does_not_flood_the_browser(stand_in: StandIn) -> None:
    from comfyui_nodes.running import running

    with running(NODE, "Profiling") as task:
        for done in range(1, 1001):
            task(done, 1000)
    assert stand_in.told[0] == ("7", "Profiling ...")
    assert stand_in.told[1][1].startswith("Profiling: ")
    assert len(stand_in.told) < 20
    assert stand_in.bars[-1] == (1000, 1000)


def test_a_new_stage_is_told_at_once(stand_in: StandIn) -> None:
    from comfyui_nodes.running import running

    with running(NODE, "Loading") as task:
        task.stage("profile", 1, 10)
        task.stage("quantize", 1, 4)
    assert [text.split(":")[0] for _, text in stand_in.told[1:]] == ["profile", "quantize"]


def test_without_a_server_or_an_id_nothing_is_told(stand_in: StandIn) -> None:
    from comfyui_nodes.running import show_text

    show_text(type("Node", (), {"hidden": None}), "x")
    stand_in.modules["server"].PromptServer = SimpleNamespace()
    show_text(NODE, "x")
    assert stand_in.told == []


def test_an_interrupt_ends_the_work_as_itself(stand_in: StandIn) -> None:
    from comfyui_nodes.running import running

    done = []

    def work() -> None:
        with running(NODE, "Calibrating") as task:
            for step in range(10):
                stand_in.interrupted = step == 3
                task(step, 10)
                done.append(step)

    with pytest.raises(Interrupted):
        work()
    assert done == [0, 1, 2]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        torch.OutOfMemoryError("no"),
    ],
    ids=["python", "torch on the CPU", "accelerator", "torch's class"],
)
def test_out_of_memory_unloads_everything_and_says_what_to_do(stand_in: StandIn, error: Any) -> None:
    from comfyui_nodes.running import running

    large, held = [], []

    def work() -> None:
        activation = torch.zeros(1)
        large.append(weakref.ref(activation))
        raise error

    def unload() -> None:
        held.append(large[0]() is not None)

    stand_in.modules["comfy.model_management"].unload_all_models = unload
    with pytest.raises(LDMQError, match=r"Profiling: out of memory.*smaller latent"), running(NODE, "Profiling"):
        work()
    assert held == [False], "what the failed computation held is let go of before models are unloaded, once"


def test_not_every_error_is_one_of_memory(stand_in: StandIn) -> None:
    from comfyui_nodes.running import running

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), running(NODE, "Profiling"):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert stand_in.unloaded == 0


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("needs a profile; run `ldmq profile` first or choose --planner uniform", "connect an LDM-Q Profile or choose"),
        ("profile.json: is a plan; `ldmq profile MODEL` makes one", "LDM-Q Profile makes one"),
        ("profile again with --scheme w4a8", "choose the planner budget"),
        (
            "choose a smaller scheme such as --scheme w4a8, --keep-float none or a larger target",
            "such as the scheme w4a8",
        ),
        (
            "needs times; `ldmq quantize` and QuantizedLDMPipeline measure them, a",
            "LDM-Q Pipeline loader measures them",
        ),
    ],
)
def test_advice_about_commands_becomes_advice_about_nodes(stand_in: StandIn, told: str, expected: str) -> None:
    from comfyui_nodes.running import running

    with pytest.raises(PlanError, match=expected) as caught, running(NODE, "Planning"):
        raise PlanError(told)
    assert "--" not in str(caught.value)
    assert "`ldmq" not in str(caught.value)


def test_other_errors_stay_what_they_are(stand_in: StandIn) -> None:
    from comfyui_nodes.running import running

    for error in (OutputError("x: a file is expected"), ValueError("v"), KeyError("k")):
        with pytest.raises(type(error)) as caught, running(NODE, "Saving"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        ("diffusers", r"pip install -r .*requirements\.txt and restart ComfyUI"),
        ("diffusers.models", r"pip install -r .*requirements\.txt and restart ComfyUI"),
        ("transformers", "pip install -U transformers and restart ComfyUI"),
    ],
)
def test_a_missing_requirement_says_how_to_install_it(stand_in: StandIn, module: str, advice: str) -> None:
    from comfyui_nodes.running import running

    with pytest.raises(ImportError, match=advice), running(NODE, "x"):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)


def test_other_imports_that_fail_stay_what_they_are(stand_in: StandIn) -> None:
    from comfyui_nodes.running import running

    for error in (
        ModuleNotFoundError("No module named 'comfy.new'", name="comfy.new"),
        ImportError("cannot import name 'x' from 'diffusers'", name="diffusers"),
    ):
        with pytest.raises(ImportError) as caught, running(NODE, "x"):
            raise error
        assert caught.value is error


def test_transformers_that_is_too_old_is_told_before_anything_runs(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfyui_nodes.running import running

    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.57.3")
    ran = []
    with pytest.raises(ImportError, match=r"4\.57\.3; run .*pip install -U transformers"), running(NODE, "x"):
        ran.append(1)
    assert ran == []


def test_what_the_system_says_about_files_becomes_one_message(stand_in: StandIn, tmp_path: Path) -> None:
    from comfyui_nodes.running import running

    (tmp_path / "file").write_text("")
    for path in (tmp_path / ("x" * 300), tmp_path / "file" / "x"):
        with pytest.raises(LDMQError, match=r"^Saving: \[Errno .*check the name"), running(NODE, "Saving"):
            path.write_text("")
