"""What QuantizedLDMPipeline is asked for: its own keyword arguments, taken out of those that are diffusers'."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from .artifacts import Plan
from .errors import LDMQError, PlanError
from .inputs import default_inputs, entries_of
from .planners import PLANNERS
from .progress import StageProgress
from .settings import Settings
from .specs import SCHEMES

SETTINGS = tuple(field.name for field in fields(Settings) if field.name not in ("plan", "target", "dtype"))
"""Keywords that are fields of Settings."""


@dataclass(frozen=True, slots=True)
class Request:
    """What from_pretrained and from_pipe were asked for. names: of the keywords that only quantizing has a use for;
    dtype: as given, so a dict too; cache: False to keep nothing and look nothing up; low_memory: as `set_low_memory`,
    None = as it is."""

    settings: Settings
    inputs: Sequence[Any] | None
    names: list[str]
    dtype: Any
    device: str | None
    steps: int | None
    progress: StageProgress | None
    cache: bool
    low_memory: bool | None = None

    @classmethod
    def taken(cls, kwargs: dict[str, Any], plan: Any, target: str | None, **given: Any) -> "Request":
        """Take what is ours out of `kwargs`; what is left is diffusers'. given: settings and inputs. Raises LDMQError
        for a plan that is neither a planner nor a file, for inputs that are no list, and for what is no dtype."""
        asked = {name: kwargs.pop(name) for name in list(kwargs) if name in SETTINGS}
        prompts, torch_dtype = kwargs.pop("prompts", None), kwargs.pop("torch_dtype", None)
        dtype, steps = _dtype(kwargs.pop("dtype", None) or torch_dtype), kwargs.pop("steps", None)
        values = {"plan": plan, "target": target, **given, "prompts": prompts, "steps": steps, **asked}
        _refuse_count("steps", steps)
        settings = _planned(replace(given["settings"] or Settings(), **asked), plan)
        single = dtype if isinstance(dtype, torch.dtype) else None
        return cls(
            settings=replace(settings, target=target or settings.target, dtype=single or settings.dtype),
            inputs=_to_record(prompts, given["inputs"]),
            names=[name for name, value in values.items() if value is not None],
            dtype=dtype,
            device=kwargs.pop("device", None),
            steps=steps,
            progress=kwargs.pop("progress", None),
            cache=kwargs.pop("cache", True),
            low_memory=kwargs.pop("low_memory", None),
        )

    def calls(self, pipe: Any) -> list[dict[str, Any]]:
        """`__call__` arguments to record."""
        if self.inputs is not None and not isinstance(self.inputs[0], str):
            return list(self.inputs)
        return default_inputs(pipe, self.inputs, steps=self.steps, seed=self.settings.seed)

    def refuse_dtype(self) -> None:
        """Raise LDMQError unless the dtype, if any, is one: a model is quantized in one."""
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise LDMQError(
                f"dtype is {self.dtype!r}; a float model is quantized in one torch.dtype such as torch.bfloat16: save "
                f"the result and load that with others"
            )


def _refuse_count(name: str, given: Any) -> None:
    if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        raise LDMQError(f"{name} is {given!r}; expected a whole number from 1 on")


def _to_record(prompts: Any, inputs: Any) -> list[Any] | None:
    """Prompts, or dicts of arguments; None where neither is given."""
    if prompts is not None and inputs is not None:
        raise LDMQError("prompts and inputs are both given, and either says what to record; leave one out")
    if inputs is not None:
        return entries_of("inputs", inputs)
    return None if prompts is None else entries_of("prompts", prompts, (str,))


def _dtype(given: Any) -> Any:
    """A dtype, or a dict of them, in which names of dtypes ('bfloat16') have become what they name."""
    if isinstance(given, dict):
        return {name: _dtype(value) for name, value in given.items()}
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if found is None and given is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise LDMQError(
            f"dtype is {given!r}; expected a floating one such as torch.bfloat16, or its name, 'bfloat16'; left out, a "
            f"checkpoint is loaded in the dtype that it was saved in, and a float model is quantized in float32"
        )
    return found


def _planned(settings: Settings, plan: Any) -> Settings:
    """The settings with a plan, given as a planner's name, a file or the plan itself."""
    if plan is None:
        return settings
    if isinstance(plan, Plan):
        return replace(settings, plan=plan)
    if not isinstance(plan, (str, os.PathLike)):
        raise PlanError(
            f"plan is of type {type(plan).__name__}; expected a planner's name ({', '.join(PLANNERS)}), a Plan or "
            f"the path of a plan.json; one scheme for all layers is plan='uniform' with scheme='w8a16', say"
        )
    text = os.fspath(plan)
    if not Path(plan).exists() and Path(plan).name == text and not Path(plan).suffix:
        if text in SCHEMES:
            raise PlanError(
                f"unknown planner {text!r}, which is a scheme: pass scheme={text!r}, with plan='uniform' for all "
                f"layers; known planners: {', '.join(PLANNERS)}"
            )
        PLANNERS[text]  # refuses what is neither a planner nor looks like a file
        return replace(settings, planner=text)
    return replace(settings, plan=Plan.load(text))
