"""From a real profile of the bundled model to plans, charts and words: nodes run on the stand-in."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui.contract.standin import StandIn

from diffusers_ldmq import Profile
from diffusers_ldmq.errors import OutputError, PlanError
from diffusers_ldmq.planners import fp32_bytes, integer_share, plan_bytes


@pytest.fixture
def profile(profiles: Callable[[str], Profile]) -> Profile:
    return profiles("bundled")


@pytest.fixture
def payload(newest: StandIn, profile: Profile) -> dict[str, Any]:
    """What comes out of LDM-Q Profile."""
    from comfyui_nodes.payloads import from_profile

    return from_profile(profile)


def is_picture(image: Any) -> bool:
    """A chart: not blank, values of an IMAGE."""
    shaped = image.dtype == torch.float32 and image.dim() == 4 and image.shape[-1] == 3
    return shaped and float(image.min()) < 0.2 and float(image.max()) == 1.0 and float(image.std()) > 0.05


def advanced(payload: dict[str, Any] | None = None, **given: Any) -> Any:
    """Run LDM-Q Plan (Advanced), its defaults where nothing else is given."""
    from comfyui_nodes.nodes.plan_advanced import LDMQPlanAdvanced

    inputs = {i.id: i.default for i in LDMQPlanAdvanced.define_schema().inputs if i.id != "profile"}
    return LDMQPlanAdvanced.execute(**inputs | given, profile=payload)


def test_payloads_are_json_and_come_back_as_they_went(newest: StandIn, profile: Profile) -> None:
    from comfyui_nodes.native.ranges import InputRanges
    from comfyui_nodes.payloads import from_plan, from_profile, from_ranges, to_plan, to_profile, to_ranges
    from comfyui_nodes.presets import preset_plan

    plan, _ = preset_plan(profile, "Balanced")
    ranges = InputRanges("abc", {"a.b": (0.25, -3)}, "first-step", "minmax-affine", 4)
    through = lambda value: json.loads(json.dumps(value))  # noqa: E731
    assert to_profile(through(from_profile(profile))) == profile
    assert to_plan(through(from_plan(plan))) == plan
    assert to_ranges(through(from_ranges(ranges))) == ranges


def test_what_another_socket_carries_is_refused_naming_the_node_to_connect(newest: StandIn) -> None:
    from comfyui_nodes.payloads import CALIBRATION, PLAN, to_plan, to_profile, to_ranges

    for read, node in ((to_plan, "LDM-Q Plan"), (to_profile, "LDM-Q Profile"), (to_ranges, "LDM-Q Calibrate")):
        for wrong in ({"format": "ldmq_other_1"}, {}, None, torch.zeros(1), {"format": 3}):
            with pytest.raises(PlanError, match=node):
                read(wrong)
    with pytest.raises(PlanError):
        to_plan({"format": PLAN, "plan": {"planner": "x"}})
    with pytest.raises(PlanError):
        to_plan({"format": PLAN})
    good = {"fingerprint": "a", "selection": "s", "observer": "o", "samples": 1}
    for ranges in ({"l": [0.0, 0]}, {"l": [float("nan"), 0]}, {"l": [1.0, 300]}, {"l": 1.0}, [], None, {"l": [1.0]}):
        with pytest.raises(PlanError, match="LDM-Q Calibrate"):
            to_ranges({"format": CALIBRATION, "ranges": ranges, **good})


@pytest.mark.parametrize("preset", ["Safe", "Balanced", "Smallest"])
def test_a_preset_keeps_what_it_promises(newest: StandIn, profile: Profile, payload: Any, preset: str) -> None:
    from comfyui_nodes.nodes.plan import LDMQPlan
    from comfyui_nodes.payloads import to_plan

    told, chart, text = LDMQPlan.execute(payload, preset).args
    plan = to_plan(told)
    size = plan_bytes(profile.table, plan.quantized()) / fp32_bytes(profile.table)
    share = integer_share(profile.table, plan.quantized())
    assert is_picture(chart)
    assert f"{preset}:" in text
    if preset == "Safe":
        assert size <= 0.3
        assert set(plan.counts()) <= {"float", "w8a16"}
        assert "needs no LDM-Q Calibrate" in text
    if preset == "Balanced":
        assert size <= 0.28
        assert share >= 0.75
        assert "Next: LDM-Q Calibrate" in text
    if preset == "Smallest":
        assert size <= 0.2
        assert any(scheme.startswith("w4") for scheme in plan.counts())


def test_presets_go_from_the_most_exact_to_the_smallest(newest: StandIn, profile: Profile) -> None:
    from comfyui_nodes.presets import DEFAULT, PRESETS, preset_plan

    plans = [preset_plan(profile, name)[0] for name in PRESETS]
    quality = [plan.predicted_sqnr_db or 0.0 for plan in plans]
    sizes = [plan_bytes(profile.table, plan.quantized()) for plan in plans]
    assert quality == sorted(quality, reverse=True)
    assert sizes == sorted(sizes, reverse=True)
    assert DEFAULT in PRESETS


def test_a_preset_that_a_model_cannot_meet_says_so_and_what_was_planned(
    newest: StandIn, profile: Profile, payload: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfyui_nodes.nodes.plan import LDMQPlan
    from comfyui_nodes.payloads import to_plan
    from comfyui_nodes.presets import PRESETS, Preset

    monkeypatch.setitem(PRESETS, "Smallest", Preset("w4a8", "size<=0.01x", "Smallest: 0.02x of an fp16 model."))
    told, _, text = LDMQPlan.execute(payload, "Smallest").args
    plan = to_plan(told)
    size = plan_bytes(profile.table, plan.quantized()) / fp32_bytes(profile.table)
    assert "Smallest: this model cannot be brought to the preset's size<=0.01x" in text
    assert f"= {size:.2f}x of fp32" in text
    assert "0.02x" not in text


def test_other_errors_of_a_preset_are_not_taken_for_a_target_out_of_reach(
    newest: StandIn, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfyui_nodes.presets import PRESETS, Preset, preset_plan

    monkeypatch.setitem(PRESETS, "Broken", Preset("w8a8", "small please", ""))
    with pytest.raises(PlanError, match="cannot read the target"):
        preset_plan(profile, "Broken")


def test_the_profile_s_chart_and_text_tell_where_noise_arises(newest: StandIn, profile: Profile) -> None:
    from comfyui_nodes.charts import profile_chart
    from comfyui_nodes.texts import profile_text, worst_layers

    assert is_picture(profile_chart(profile))
    text, worst = profile_text(profile), worst_layers(profile, 3)
    assert [db for _, db in worst] == sorted(db for _, db in worst)
    assert all(name in text for name, _ in worst)
    assert "LDM-Q Plan" in text


def test_an_advanced_plan_keeps_its_target_and_layers(newest: StandIn, profile: Profile, payload: Any) -> None:
    from comfyui_nodes.payloads import to_plan

    kept = profile.table.layers[5].name
    told, chart, text = advanced(payload, target=" size<=0.26x ", scheme="w4a8", keep_float=kept).args
    plan = to_plan(told)
    assert plan.layers[kept].scheme == "float"
    assert plan_bytes(profile.table, plan.quantized()) <= 0.26 * fp32_bytes(profile.table)
    assert is_picture(chart)
    assert "target size<=0.26x" in text


@pytest.mark.parametrize("planner", ["budget", "hybrid", "uniform"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dyn", "w8a16", "w4a8", "w4a8-dyn", "w4a16"])
def test_every_choice_plans_or_says_what_to_choose(newest: StandIn, payload: Any, planner: str, scheme: str) -> None:
    from comfyui_nodes.payloads import to_plan

    if planner == "hybrid" and scheme != "w8a8":
        with pytest.raises(PlanError, match="choose the planner budget, or the scheme w8a8"):
            advanced(payload, planner=planner, scheme=scheme)
        return
    plan = to_plan(advanced(payload, planner=planner, scheme=scheme).args[0])
    assert plan.planner == planner
    assert scheme in plan.counts()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"target": "small please"}, "cannot read the target"),
        ({"target": "size<=0.01x"}, "cannot be met"),
        ({"target": "speed>=2x"}, "LDM-Q Pipeline loader measures them"),
        ({"keep_float": "no.such.block"}, "no such layer or block"),
    ],
)
def test_bad_wishes_are_told_in_the_words_of_nodes(
    newest: StandIn, payload: Any, given: dict[str, str], expected: str
) -> None:
    with pytest.raises(PlanError, match=expected) as caught:
        advanced(payload, **given)
    assert "--" not in str(caught.value)
    assert "`ldmq" not in str(caught.value)


def test_group_wise_weights_are_planned_alike_or_the_node_says_so(newest: StandIn, payload: Any) -> None:
    from comfyui_nodes.payloads import to_plan

    plan = to_plan(advanced(payload, planner="uniform", scheme="w4a16-g64").args[0])
    assert set(plan.counts()) == {"w4a16-g64"}
    with pytest.raises(PlanError, match=r"does not measure w4a16-g64.*planner uniform"):
        advanced(payload, planner="budget", scheme="w4a16-g64")


def test_a_plan_carries_how_to_calibrate(newest: StandIn, profile: Profile, payload: Any) -> None:
    from comfyui_nodes.payloads import selection_of, to_plan, with_selection
    from comfyui_nodes.presets import preset_plan

    advanced(payload, calibration="uniform", save_as="mine")
    told = advanced(load_plan="mine_00001_.json").args[0]
    assert selection_of(to_plan(json.loads(json.dumps(told)))) == "uniform"
    plan, _ = preset_plan(profile, "Balanced")
    assert selection_of(plan) == "first-step"
    for wrong in ("last-step", "", "Uniform"):
        with pytest.raises(PlanError, match="LDM-Q Calibrate's selection"):
            selection_of(with_selection(plan, wrong))


def test_a_plan_is_saved_loaded_and_checked_against_the_profile(
    newest: StandIn, payload: Any, toy: Any, toy_profile: Callable[[Any], Profile]
) -> None:
    from comfyui_nodes.nodes.plan_advanced import LDMQPlanAdvanced
    from comfyui_nodes.payloads import from_profile, to_plan

    made, _, text = advanced(payload, save_as="mine").args
    folder = newest.base / "models" / "ldmq_plans"
    assert [path.name for path in folder.iterdir()] == ["mine_00001_.json"]
    assert "Saved as mine_00001_.json" in text
    offered = next(i for i in LDMQPlanAdvanced.define_schema().inputs if i.id == "load_plan").options
    assert offered == ["(none)", "mine_00001_.json"]
    for given in (payload, None):
        told, chart, _ = advanced(given, load_plan="mine_00001_.json").args
        assert to_plan(told) == to_plan(made)
        assert is_picture(chart)
    other = from_profile(toy_profile([toy("a", 1e-3), toy("b", 2e-3)]))
    with pytest.raises(PlanError, match=r"another model.*choose another file"):
        advanced(other, load_plan="mine_00001_.json")


def test_nothing_to_plan_from_a_damaged_file_and_a_hostile_name_are_refused(newest: StandIn, payload: Any) -> None:
    from comfyui_nodes.nodes.plan_advanced import LDMQPlanAdvanced

    with pytest.raises(PlanError, match="connect an LDM-Q Profile"):
        advanced()
    folder = newest.base / "models" / "ldmq_plans"
    folder.mkdir(parents=True)
    (folder / "broken.json").write_text('{"format_version": 1, "planner"', encoding="utf-8")
    (folder / "other.json").write_text('{"layers": {}}', encoding="utf-8")
    for name in ("broken.json", "other.json"):
        with pytest.raises(PlanError, match=name):
            advanced(load_plan=name)
    with pytest.raises(OutputError, match="leaves ComfyUI's folder"):
        advanced(payload, save_as="../../x")
    assert "leaves ComfyUI's folder" in str(LDMQPlanAdvanced.validate_inputs(save_as="../../x"))
    assert LDMQPlanAdvanced.validate_inputs(save_as="x") is True
    assert LDMQPlanAdvanced.validate_inputs(save_as="") is True
    assert not list(Path(newest.base).rglob("x*.json"))


def test_pictures_stand_side_by_side_with_their_names(newest: StandIn) -> None:
    from comfyui_nodes.charts import difference, side_by_side
    from diffusers_ldmq.errors import LDMQError

    one = torch.rand(2, 64, 48, 3)
    other = (one + 0.01).clamp(0, 1)
    image = side_by_side([("reference", one), ("a very long name that must shrink", other)])
    assert image.shape[0] == 2
    assert image.shape[2] == 96
    assert torch.equal(image[:, -64:, :48], one)
    label = image[:, :-64]
    assert float(label.min()) < 0.5
    assert float(label.max()) == 1.0
    assert torch.allclose(difference(one, one, 8.0), torch.zeros(1))
    assert float(difference(one, other, 8.0).max()) == pytest.approx(0.08, abs=1e-3)
    with pytest.raises(LDMQError, match="different sizes"):
        side_by_side([("a", one), ("b", one[:, :32])])


def test_decibels_have_words_that_follow_them(newest: StandIn) -> None:
    from comfyui_nodes.texts import closeness

    words = [closeness(db) for db in (50, 36, 28, 10)]
    assert len(set(words)) == 4
