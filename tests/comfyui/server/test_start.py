"""The pack in a starting server: what it registers, serves and costs, by every way to install it."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from comfyui.frontend.object_info import FILE, object_info, recorded, used_types
from comfyui.frontend.specs import WORKFLOWS
from comfyui.server.comfy_server import HERE, REPOSITORY, Server
from comfyui.server.conftest import PACK
from comfyui.server.facts import Facts
from comfyui.server.prompts import small_run

MOST_IMPORT_SECONDS = 0.5
OURS = [name for name in object_info() if name.startswith("ldmq_")]


def test_all_nodes_are_there_as_their_schemas_say(server: Server, facts: Facts) -> None:
    assert "IMPORT FAILED" not in server.log
    assert "Error while calling comfy_entrypoint" not in server.log
    told, expected = server.get("/object_info"), object_info()
    for name in OURS:
        assert told[name]["output"] == expected[name]["output"]
        assert told[name]["output_node"] == expected[name]["output_node"]
        for section, inputs in told[name]["input"].items():
            assert section in ("hidden", "required", "optional")
            assert section == "hidden" or list(inputs) == list(expected[name]["input"][section])
    facts.add("nodes registered", f"{len(OURS)}, inputs and outputs as the recorded contract says")


def test_starting_imports_neither_diffusers_nor_the_library(server: Server, facts: Facts) -> None:
    assert "torch" in server.imported_at_start
    assert server.imported_at_start.isdisjoint({"diffusers", "diffusers_ldmq"})
    found = re.search(rf"([\d.]+) seconds: \S*/{PACK}$", server.log, re.MULTILINE)
    assert found is not None
    assert float(found[1]) <= MOST_IMPORT_SECONDS
    facts.add("cost at the start", f"{found[1]} s (ComfyUI's own count); neither diffusers nor diffusers_ldmq imported")


def test_workflows_pictures_help_and_locales_are_served(server: Server, facts: Facts) -> None:
    assert sorted(server.get("/workflow_templates")[PACK]) == sorted(workflow.name for workflow in WORKFLOWS)
    for workflow in WORKFLOWS:
        address = f"/api/workflow_templates/{PACK}/{quote(workflow.name)}"
        assert json.loads(server.read(f"{address}.json"))["nodes"]
        assert server.read(f"{address}.jpg")[:3] == b"\xff\xd8\xff"
    for name in OURS:
        assert server.read(f"/extensions/{PACK}/docs/{name}.md").startswith(b"# LDM-Q ")
    words = server.get("/i18n")["en"]["nodeDefs"]
    assert all(words[name]["display_name"].startswith("LDM-Q ") for name in OURS)
    facts.add("served", f"{len(WORKFLOWS)} templates with pictures, {len(OURS)} help pages, locales")


def test_recorded_stock_nodes_are_still_these(server: Server) -> None:
    told, before = recorded(server.get("/object_info"), used_types()), json.loads(FILE.read_text(encoding="utf-8"))
    for name, node in before.items():
        assert told[name]["output"] == node["output"]
        for section, inputs in node["input"].items():
            assert set(inputs) <= set(told[name]["input"][section])


def test_a_clone_works_as_it_is(start: Callable[..., Server], tmp_path: Path, facts: Facts) -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this tree is no git checkout, so installing by git clone was not tested")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(REPOSITORY), str(clone)], check=True)
    server = start({PACK: clone, "probe": HERE / "probe"})
    assert "diffusers_ldmq" not in server.imported_at_start
    assert server.run(small_run()).error is None
    assert "diffusers_ldmq" in server.get("/probe/modules")
    assert sorted(server.get("/workflow_templates")[PACK]) == sorted(workflow.name for workflow in WORKFLOWS)
    server.stop()
    facts.add("`git clone` into custom_nodes", "works, no other installation of the package there; symlink too")


def test_installed_package_and_linked_nodes(start: Callable[..., Server], tmp_path: Path, facts: Facts) -> None:
    for name in ("diffusers_ldmq", "comfyui_nodes"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    # what pip installs is on sys.path; the startup file that hides installed copies stays away here
    server = start({"ldmq-nodes": tmp_path / "comfyui_nodes"}, environment={"PYTHONPATH": str(tmp_path)})
    assert set(OURS) <= set(server.get("/object_info"))
    assert server.read("/extensions/ldmq-nodes/docs/ldmq_quantize.md")
    assert server.run(small_run()).error is None
    assert "ldmq-nodes" not in server.get("/workflow_templates")
    server.stop()
    facts.add("installed package, `comfyui_nodes` linked", "nodes and help work; no templates, as documented")
