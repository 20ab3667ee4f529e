"""Keywords of ours are taken out of diffusers', with what only quantizing has a use for named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import MAKERS

from diffusers_ldmq import LDMQConfig, make_plan
from diffusers_ldmq.errors import LDMQError, PlanError
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.request import Request
from diffusers_ldmq.settings import Settings


def taken(plan: Any = None, target: str | None = None, **kwargs: Any) -> tuple[Request, dict[str, Any]]:
    given = {name: kwargs.pop(name, None) for name in ("inputs", "settings")}
    return Request.taken(kwargs, plan, target, **given), kwargs


def test_what_is_ours_is_taken_and_the_rest_left() -> None:
    request, left = taken(
        "budget", "size<=0.3x", scheme="w4a8", steps=3, device="cpu", cache=False, revision="main", vae=1
    )
    assert request.settings == Settings(planner="budget", scheme="w4a8", target="size<=0.3x")
    assert (request.steps, request.device, request.cache) == (3, "cpu", False)
    assert left == {"revision": "main", "vae": 1}


def test_what_only_quantizing_has_a_use_for_is_named() -> None:
    assert taken(device="cpu", dtype=torch.float32, cache=True)[0].names == []
    request, _ = taken("hybrid", "sqnr>=30dB", prompts=["red apple"], seed=1, settings=Settings())
    assert sorted(request.names) == ["plan", "prompts", "seed", "settings", "target"]
    assert taken(inputs=["red apple"])[0].names == ["inputs"]
    assert taken(steps=4, progress=print)[0].names == ["steps"]


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_goes_by_both_of_its_names(name: str) -> None:
    asked: Any = {name: torch.bfloat16}
    request, left = taken(**asked)
    assert request.settings.dtype == request.dtype == torch.bfloat16
    assert not left
    request.refuse_dtype()


def test_several_dtypes_are_for_loading_only() -> None:
    request, _ = taken(torch_dtype={"unet": torch.bfloat16})
    assert request.settings.dtype is None
    with pytest.raises(LDMQError, match=r"a float model is quantized in one torch\.dtype .*save the result"):
        request.refuse_dtype()


def test_a_plan_is_a_planner_a_file_or_itself(tmp_path: Path) -> None:
    plan = make_plan(layer_table(MAKERS["dit"]().transformer), planner="uniform")
    plan.save(tmp_path / "plan.json")
    assert taken(plan)[0].settings.plan == taken(tmp_path / "plan.json")[0].settings.plan == plan
    assert taken("uniform")[0].settings.planner == "uniform"
    with pytest.raises(LDMQError, match="unknown planner 'best'"):
        taken("best")
    with pytest.raises(PlanError, match="no such file"):
        taken("absent.json")


def test_a_dtype_may_be_given_by_its_name() -> None:
    asked: Any = {"dtype": "bfloat16"}
    assert taken(**asked)[0].settings.dtype == torch.bfloat16
    named: Any = {"torch_dtype": {"unet": "float16", "default": torch.float32}}
    assert taken(**named)[0].dtype == {"unet": torch.float16, "default": torch.float32}


@pytest.mark.parametrize("wrong", ["bf16", "auto", "int8", "nn", torch.int8, 16])
def test_what_is_no_floating_dtype_is_refused(wrong: Any) -> None:
    with pytest.raises(LDMQError, match=r"dtype is .*expected a floating one such as torch\.bfloat16, or its name"):
        taken(**{"dtype": wrong})


@pytest.mark.parametrize("wrong", [{"mid_block": "w8a16"}, LDMQConfig("w8a16"), 5])
def test_what_is_no_plan_is_named_with_what_is_one(wrong: Any) -> None:
    message = f"plan is of type {type(wrong).__name__}; expected a planner's name .*hybrid.* a Plan or the path"
    with pytest.raises(PlanError, match=message):
        taken(wrong)


def test_a_scheme_in_a_planners_place_is_told_where_it_belongs() -> None:
    with pytest.raises(PlanError, match="unknown planner 'w8a16', which is a scheme: pass scheme='w8a16'"):
        taken("w8a16")


def test_one_prompt_or_call_stands_for_a_list_of_it() -> None:
    calls = taken(prompts="a red apple")[0].calls(MAKERS["sd"]())
    assert [call["prompt"] for call in calls] == [["a red apple"]]
    assert taken(inputs="a red apple")[0].inputs == ["a red apple"]
    assert taken(inputs={"prompt": "a red apple"})[0].inputs == [{"prompt": "a red apple"}]
    assert taken(prompts=(word for word in ("one", "two")))[0].inputs == ["one", "two"]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"prompts": [1, 2]}, r"prompts\[0\] is '1' \(int\); expected str in every place, as in \[\"a red apple"),
        ({"prompts": 5}, r"prompts is of type int, expected a list such as \[\"a red apple"),
        ({"prompts": {"prompt": "one"}}, "prompts is of type dict, expected a list"),
        ({"prompts": []}, "prompts is empty; give a list"),
        ({"inputs": []}, "inputs is empty; give a list"),
        ({"inputs": ["one", {"prompt": "two"}]}, r"inputs\[1\] is .*dict\); expected str in every place"),
        ({"inputs": [{"prompt": "two"}, "one"]}, r"inputs\[1\] is 'one' \(str\); expected dict in every place"),
        ({"inputs": b"one"}, "inputs is of type bytes, expected a list"),
        ({"inputs": ["one"], "prompts": ["two"]}, "prompts and inputs are both given"),
    ],
)
def test_what_cannot_be_recorded_is_refused_with_what_can(given: dict[str, Any], match: str) -> None:
    with pytest.raises(LDMQError, match=match):
        taken(**given)


def test_prompts_become_calls_of_the_pipeline_and_arguments_stay() -> None:
    pipe = MAKERS["sd"]()
    calls = taken(prompts=["one", "two", "three", "four"], steps=2)[0].calls(pipe)
    assert [call["prompt"] for call in calls] == [["one"], ["two"], ["three"], ["four"]]
    assert {call["num_inference_steps"] for call in calls} == {2}
    arguments = [{"prompt": "one", "num_inference_steps": 7}]
    assert taken(inputs=arguments)[0].calls(pipe) == arguments


@pytest.mark.parametrize("steps", [0, -1, "5", 2.0, True])
def test_what_is_no_number_of_steps_is_refused(steps: Any) -> None:
    with pytest.raises(LDMQError, match="steps is .*; expected a whole number from 1 on"):
        Request.taken({"steps": steps}, None, None, inputs=None, settings=None)
