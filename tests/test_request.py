"""Keywords of ours are taken out of diffusers', with what only quantizing has a use for named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import MAKERS

from diffusers_ldmq import make_plan
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


def test_prompts_become_calls_of_the_pipeline_and_arguments_stay() -> None:
    pipe = MAKERS["sd"]()
    calls = taken(prompts=["one", "two", "three", "four"], steps=2)[0].calls(pipe)
    assert [call["prompt"] for call in calls] == [["one"], ["two"], ["three"], ["four"]]
    assert {call["num_inference_steps"] for call in calls} == {2}
    arguments = [{"prompt": "one", "num_inference_steps": 7}]
    assert taken(inputs=arguments)[0].calls(pipe) == arguments
