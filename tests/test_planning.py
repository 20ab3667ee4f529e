"""Making a plan, raising it, and its file."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusers_ldmq import Plan, Profile, Report, make_plan
from diffusers_ldmq.artifacts import LayerChoice
from diffusers_ldmq.errors import LDMQError, PlanError
from diffusers_ldmq.planners import parse_target
from diffusers_ldmq.planning import kept_layers, meets_size, raise_plan

Profiles = Callable[[str], Profile]


def schemes(plan: Plan) -> list[str]:
    return [choice.scheme for choice in plan.layers.values()]


@pytest.fixture
def three(toy: Any, toy_profile: Callable[[Sequence[Any]], Profile]) -> Profile:
    """Three blocks; in the last one weight noise dominates."""
    return toy_profile([toy("a", 1e-4), toy("b", 2e-4), toy("c", 3e-4, weight_db=20.0)])


def test_a_plan_covers_every_layer_of_a_real_model_with_a_reason(kind: str, profiles: Profiles) -> None:
    profile = profiles(kind)
    plan = make_plan(profile)
    assert list(plan.layers) == [info.name for info in profile.table.layers]
    assert all(choice.reason for choice in plan.layers.values())
    assert plan.fingerprint == profile.table.fingerprint
    assert sum(plan.counts().values()) == len(profile.table.layers)
    assert "float" not in plan.quantized().values()


def test_a_plan_survives_its_file(kind: str, profiles: Profiles, tmp_path: Path) -> None:
    plan = make_plan(profiles(kind), "sqnr>=30dB")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


FILES = {"plan": Plan, "profile": Profile, "report": Report}


@pytest.mark.parametrize("what", list(FILES))
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{}", "not a {what} that this version reads"),
        (b"[]", "not a {what} that this version reads"),
        (b'{"format_version": 2}', "format_version 2, expected 1 to 1"),
        (b'{"format_version": true}', "not a {what}"),
        (b'{"format_version": "1"}', "not a {what}"),
        (b'{"format_version": 0}', "not a {what}"),
        (b'{"format_version": 1, "_class_name": "UNet2DModel"}', "unknown keys"),
        (b'{"format_version": 1}', "missing keys"),
        (b"\x80\x04\x95 pickle", "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_foreign_newer_and_garbage_files_are_refused(what: str, content: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / f"{what}.json"
    path.write_bytes(content)
    with pytest.raises(PlanError, match=match.format(what=what)):
        FILES[what].load(path)


@pytest.mark.parametrize("what", list(FILES))
def test_an_absent_file_is_named(what: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"{what}.json: no such file"):
        FILES[what].load(tmp_path / f"{what}.json")


@pytest.mark.parametrize("scheme", ["w3a8", "W8A8", "w8a4", "", "w4a8-g32", "w8a16-dyn", "w8a8 "])
def test_a_plan_file_with_an_unknown_scheme_names_the_layer(scheme: str, three: Profile, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    make_plan(three).save(path)
    data = json.loads(path.read_text())
    data["layers"]["b.layer"]["scheme"] = scheme
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match="plan, layer 'b.layer': unknown scheme"):
        Plan.load(path)


def test_planning_for_float_is_refused(three: Profile) -> None:
    with pytest.raises(PlanError, match="nothing would be quantized"):
        make_plan(three, scheme="float")


def test_an_unknown_scheme_is_refused_with_the_known_ones(three: Profile) -> None:
    with pytest.raises(LDMQError, match="unknown scheme 'w2a2'; use one of float, w8a16"):
        make_plan(three.table, planner="uniform", scheme="w2a2")


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ("default", None),
        ("none", set()),
        ("conv_out", {"conv_out"}),
        ("conv_out, conv_in", {"conv_in", "conv_out"}),
        (("mid_block.resnets.0",), {f"mid_block.resnets.0.{n}" for n in ("conv1", "conv2", "time_emb_proj")}),
    ],
)
def test_layers_are_kept_by_their_own_or_their_blocks_name(choice: Any, kept: Any, profiles: Profiles) -> None:
    assert kept_layers(profiles("pixel").table, choice) == kept


@pytest.mark.parametrize("choice", ["absent", "conv_o", "conv_out,absent", ("conv_out", "up")])
def test_a_name_that_keeps_nothing_is_refused(choice: Any, profiles: Profiles) -> None:
    with pytest.raises(PlanError, match=r"keep-float names '(absent|conv_o|up)', but UNet2DModel has no such layer"):
        kept_layers(profiles("pixel").table, choice)


def test_raising_restores_block_by_block_from_the_output_and_ends(three: Profile) -> None:
    plan = make_plan(three, "sqnr>=20dB")
    steps = [schemes(plan)]
    raised = raise_plan(plan, three)
    while raised is not None:
        plan = raised
        steps.append(schemes(plan))
        raised = raise_plan(plan, three)
    assert steps == [
        ["w8a8", "w8a8", "w8a8"],
        ["w8a8", "w8a8", "float"],
        ["w8a8", "w8a16", "float"],
        ["w8a16", "w8a16", "float"],
        ["w8a16", "float", "float"],
    ]  # the next one would leave nothing quantized
    assert plan.reasons["raised_after_measuring"] == ["c", "b", "a", "b"]
    assert plan.predicted_sqnr_db is None


def test_raising_ends_on_a_real_model_and_leaves_the_kept_layers_float(profiles: Profiles) -> None:
    profile = profiles("dit")
    plan, count = make_plan(profile), 0
    kept = {name for name, choice in plan.layers.items() if choice.scheme == "float"}
    while (raised := raise_plan(plan, profile)) is not None:
        assert raised.quantized()
        assert kept <= raised.layers.keys() - raised.quantized().keys()
        plan, count = raised, count + 1
    assert 0 < count <= 2 * len(profile.table.blocks)
    assert len({owner(profile, name) for name in plan.quantized()}) == 1


def owner(profile: Profile, layer: str) -> str:
    return next(block.name for block in profile.table.blocks if layer in block.layers)


def test_a_plan_that_names_only_some_layers_can_be_raised(three: Profile) -> None:
    plan = replace(make_plan(three), layers={"a.layer": LayerChoice("w8a8", "by hand")})
    raised = raise_plan(plan, three)
    assert raised is not None
    assert raised.quantized() == {"a.layer": "w8a16"}
    assert raise_plan(raised, three) is None


@pytest.mark.parametrize(
    ("target", "fits"), [("size<=0.27x", True), ("size<=0.2x", False), ("size<=1KB", False), ("sqnr>=99dB", True)]
)
def test_a_plans_size_is_held_against_a_target(target: str, fits: bool, three: Profile) -> None:
    plan = make_plan(three.table, planner="uniform")
    assert meets_size(plan, three.table, parse_target(target)) is fits
