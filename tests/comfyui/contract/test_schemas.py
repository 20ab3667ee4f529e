"""What ComfyUI is told of the nodes: on the oldest and newest recorded API, which refuse what they do not know."""

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from comfyui.contract.locales import FILE, ROOT, node_definitions
from comfyui.contract.standin import StandIn

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
FIRST_WIDGETS = {
    "ldmq_quantize": [],
    "ldmq_pipeline_loader": ["model", "quantize", "hub_id_or_folder", "target", "calibration", "steps", "dtype"],
}
"""Node -> its widgets when workflows were first saved with it, of nodes that have more of them by now."""
CALIBRATING = ("ldmq_plan_advanced", "ldmq_pipeline_loader")
HELP = ROOT / "comfyui_nodes" / "web" / "docs"


def nodes() -> list[Any]:
    from comfyui_nodes.nodes import NODES

    return list(NODES)


def test_ids_and_names_are_unique_and_carry_the_prefix(stand_in: StandIn) -> None:
    schemas = [node.define_schema() for node in nodes()]
    ids, names = [s.node_id for s in schemas], [s.display_name for s in schemas]
    assert len(set(ids)) == len(set(names)) == len(ids) >= 9
    assert all(re.fullmatch(r"ldmq_[a-z_]+", node_id) for node_id in ids)
    assert all(name.startswith("LDM-Q ") for name in names)
    assert {s.category for s in schemas} == {"LDM-Q"}


def test_everything_is_explained(stand_in: StandIn) -> None:
    for node in nodes():
        schema = node.define_schema()
        assert len(schema.description) > 30, schema.node_id
        for part in (*schema.inputs, *schema.outputs):
            assert part.tooltip, f"{schema.node_id}: {part.id} has no tooltip"
            assert len(part.tooltip) > 10, f"{schema.node_id}: {part.id}"


def test_younger_keywords_reach_an_api_that_knows_them(stand_in: StandIn) -> None:
    newest = "advanced" in (stand_in.signatures["comfy_api.latest.io.Int.Input"] or [])
    schemas = [node.define_schema() for node in nodes()]
    assert all(bool(getattr(s, "search_aliases", None)) == newest for s in schemas)
    assert any(getattr(i, "advanced", None) for s in schemas for i in s.inputs) == newest


def test_a_keyword_that_no_api_knows_is_an_error(stand_in: StandIn) -> None:
    from comfyui_nodes.sockets import accepted, schema

    with pytest.raises(TypeError, match="tooltipp"):
        schema("ldmq_x", tooltipp="")
    with pytest.raises(TypeError, match="maximum"):
        accepted(stand_in.modules["comfy_api.latest"].io.Int.Input, "x", maximum=3)


def test_choices_are_what_the_library_has(stand_in: StandIn) -> None:
    """Loading the library takes seconds, so nodes list its names themselves."""
    from comfyui_nodes.payloads import RECONSTRUCTIONS, SELECTIONS
    from comfyui_nodes.sockets import LEARNED, SELECTED
    from diffusers_ldmq.reconstruction import PRESETS as RECONSTRUCTING
    from diffusers_ldmq.selections import SELECTIONS as REGISTERED

    assert tuple(REGISTERED) == SELECTIONS
    assert ("none", *RECONSTRUCTING) == RECONSTRUCTIONS
    assert all(f"{name}: " in SELECTED for name in SELECTIONS)
    assert all(f"{name}: " in LEARNED for name in RECONSTRUCTIONS)
    offered = {(s.node_id, i.id): i for s in (node.define_schema() for node in nodes()) for i in s.inputs}
    for where in (("ldmq_calibrate", "selection"), *((n, "calibration") for n in CALIBRATING)):
        assert [name for name in offered[where].options if name != "as planned"] == list(SELECTIONS), where
    for where in (("ldmq_quantize", "reconstruct"), ("ldmq_pipeline_loader", "reconstruct")):
        assert (offered[where].options, offered[where].default) == (list(RECONSTRUCTIONS), "none"), where


def test_what_workflows_were_saved_without_is_optional_and_comes_last(stand_in: StandIn) -> None:
    """Files in API format lack it; those of the browser have values by position."""
    for node in nodes():
        schema = node.define_schema()
        first = FIRST_WIDGETS.get(schema.node_id)
        if first is None:
            continue
        widgets = [one for one in schema.inputs if one.io_type in WIDGETS]
        required = [one.id for one in widgets if not one.optional]
        assert required == first, schema.node_id
        assert all(one.optional for one in widgets[len(first) :]), schema.node_id


def test_execute_takes_the_inputs_and_nothing_else(stand_in: StandIn) -> None:
    for node in nodes():
        schema, parameters = node.define_schema(), inspect.signature(node.execute).parameters
        assert {i.id for i in schema.inputs} == set(parameters), schema.node_id
        for one in schema.inputs:
            optional = parameters[one.id].default is not inspect.Parameter.empty
            assert bool(one.optional) == optional, f"{schema.node_id}: {one.id}"


def test_execute_returns_as_many_values_as_there_are_outputs(stand_in: StandIn) -> None:
    for node in nodes():
        tree = ast.parse(Path(inspect.getfile(node)).read_text(encoding="utf-8"))
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "io.NodeOutput"]
        counts = {len(call.args) for call in calls}
        assert counts == {len(node.define_schema().outputs)}, node.__name__


def test_defaults_are_valid(stand_in: StandIn) -> None:
    for node in nodes():
        for one in node.define_schema().inputs:
            where = f"{node.__name__}: {one.id}"
            if one.io_type == "COMBO":
                assert one.default in one.options, where
                assert len(set(one.options)) == len(one.options), where
            elif one.io_type in ("INT", "FLOAT"):
                assert one.min <= one.default <= one.max, where
            elif one.io_type in ("STRING", "BOOLEAN"):
                assert one.default is not None, where


def test_what_takes_long_is_not_repeated_because_a_seed_changed_by_itself(stand_in: StandIn) -> None:
    for node in nodes():
        ids = {i.id for i in node.define_schema().inputs}
        if node.define_schema().node_id in ("ldmq_profile", "ldmq_calibrate"):
            assert "first_seed" in ids
            assert not ids & {"seed", "noise_seed"}


def test_every_node_has_a_help_page_that_names_its_inputs_and_outputs(stand_in: StandIn) -> None:
    schemas = {node.define_schema().node_id: node.define_schema() for node in nodes()}
    assert {path.stem for path in HELP.glob("*.md")} == set(schemas)
    for node_id, schema in schemas.items():
        page = (HELP / f"{node_id}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {schema.display_name}\n")
        for part in (*schema.inputs, *schema.outputs):
            name = part.display_name or part.id
            assert f"`{name}`" in page, f"{node_id}.md does not explain {name}"


def test_locales_say_what_the_schemas_say(stand_in: StandIn) -> None:
    found = json.loads(FILE.read_text(encoding="utf-8"))
    assert found == node_definitions(nodes()), "run `python tests/comfyui/contract/locales.py`"


def test_inputs_and_outputs_of_one_node_do_not_share_ids(stand_in: StandIn) -> None:
    for node in nodes():
        schema = node.define_schema()
        ids = [part.id for part in (*schema.inputs, *schema.outputs)]
        assert all(ids), schema.node_id
        assert len(set(ids)) == len(ids), f"{schema.node_id}: the oldest API refuses this"
