"""How the pack is installed and loaded: by a clone in custom_nodes, by a link, and not at all elsewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from comfyui.contract.locales import ROOT
from comfyui.contract.standin import StandIn

PROGRAM = Path(__file__).with_name("as_comfyui.py")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMFYUI_BRINGS = {"torch", "numpy"}
"""Installing these again could change what ComfyUI runs on."""
UNBOUNDED = {"huggingface_hub"}
"""Requirements without a version of ours: transformers and diffusers say which one they bear."""


def loaded(folder: Path, how: str = "") -> dict[str, Any]:
    """What came of loading a folder in a fresh interpreter that ComfyUI's stand-in runs in."""
    environment = {**os.environ, "PYTHONPATH": "" if how == "hidden" else str(ROOT)}
    run = [sys.executable, str(PROGRAM), str(folder), how]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, cwd=folder.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a link in custom_nodes, under a name that is no Python identifier."""
    link = tmp_path_factory.mktemp("custom_nodes") / "diffusers-ldmq.git"
    link.symlink_to(ROOT)
    return link


def test_loading_is_quick_and_loads_nothing_heavy(linked: Path) -> None:
    found = min((loaded(linked) for _ in range(3)), key=lambda found: found["seconds"])
    assert found["heavy"] == []
    assert found["seconds"] <= 0.5
    assert {"ldmq_profile", "ldmq_quantize", "ldmq_load_model"} <= set(found["nodes"])
    assert found["web"] == str(ROOT / "comfyui_nodes" / "web")
    assert found["added"] == []


def test_a_clone_needs_no_installation_of_the_package(linked: Path) -> None:
    found = loaded(linked, "hidden")
    assert found["found"]
    assert found["added"] == [found["last"]] == [str(ROOT)], "the repository's folder goes to the end of the path"


def test_a_link_to_the_nodes_alone_works_too(tmp_path: Path) -> None:
    link = tmp_path / "ldmq-nodes"
    link.symlink_to(ROOT / "comfyui_nodes")
    found = loaded(link)
    assert found["web"] == str(ROOT / "comfyui_nodes" / "web")
    assert "ldmq_profile" in found["nodes"]
    assert found["heavy"] == []


def test_without_comfyui_the_root_does_nothing() -> None:
    program = (
        "import importlib.util, sys; sys.path_before = list(sys.path);"
        f"spec = importlib.util.spec_from_file_location('some_package', {str(ROOT / '__init__.py')!r});"
        "module = importlib.util.module_from_spec(spec); sys.modules['some_package'] = module;"
        "spec.loader.exec_module(module);"
        "assert not hasattr(module, 'comfy_entrypoint') and sys.path == sys.path_before;"
        "assert not any('comfyui_nodes' in name for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("mode", ["prepend", "importlib"])
def test_collecting_tests_does_not_mind_the_root_being_a_package(mode: str, tmp_path: Path) -> None:
    folder = tmp_path / "a-clone" / "tests"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "__init__.py", folder.parent)
    (folder / "test_it.py").write_text("def test_it() -> None:\n    assert True\n", encoding="utf-8")
    run = [sys.executable, "-m", "pytest", "-q", f"--import-mode={mode}", f"--rootdir={folder.parent}", "tests"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=folder.parent, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_requirements_are_the_package_s_without_what_comfyui_brings() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    # ComfyUI-Manager installs line by line: no options, no links, no comments
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+(>=[0-9.]+)?", line) for line in lines)
    # diffusers brings a hub library that transformers 4 does not start with, so a newer one has to be there first
    assert lines[0] == "transformers>=5"
    named = {re.split(">", line)[0]: line for line in lines}
    needed = {re.split(">", line)[0]: line for line in PROJECT["project"]["dependencies"]}
    assert set(named) == set(needed) - COMFYUI_BRINGS | {"comfy-kitchen"}
    assert all(named[name] == name for name in UNBOUNDED)
    assert all(named[name] == needed[name] for name in (set(named) & set(needed)) - UNBOUNDED)
    tested = {re.split(">", line)[0]: line for line in PROJECT["project"]["optional-dependencies"]["test"]}
    assert named["comfy-kitchen"] == tested["comfy-kitchen"]


def test_the_nodes_know_their_requirements_by_name(stand_in: StandIn) -> None:
    from comfyui_nodes.running import MODULES, TRANSFORMERS

    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    other = {"Pillow": "PIL", "PyYAML": "yaml", "comfy-kitchen": "comfy_kitchen"}
    names = {re.split(">", line)[0] for line in lines}
    assert {other.get(name, name) for name in names} | COMFYUI_BRINGS | {"diffusers_ldmq"} == MODULES
    assert f"transformers>={TRANSFORMERS}" in PROJECT["project"]["dependencies"]


def test_the_project_says_what_comfyui_s_registry_asks() -> None:
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert re.fullmatch(r"(?!\d)[A-Za-z0-9_.-]{1,99}", project["name"])
    assert "comfyui" not in project["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["urls"]["Repository"].startswith("https://")
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= set(comfy)
