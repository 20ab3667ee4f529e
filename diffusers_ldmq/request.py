"""What QuantizedLDMPipeline is asked for: its own keyword arguments, taken out of those that are diffusers'."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from .artifacts import Plan
from .errors import LDMQError
from .inputs import default_inputs
from .planners import PLANNERS
from .progress import StageProgress
from .settings import Settings

SETTINGS = tuple(field.name for field in fields(Settings) if field.name not in ("plan", "target", "dtype"))
"""Keywords that are fields of Settings."""


@dataclass(frozen=True, slots=True)
class Request:
    """What from_pretrained and from_pipe were asked for. names: of the keywords that only quantizing has a use for;
    dtype: as given, so a dict too; cache: False to keep nothing and look nothing up."""

    settings: Settings
    inputs: Sequence[Any] | None
    names: list[str]
    dtype: Any
    device: str | None
    steps: int | None
    progress: StageProgress | None
    cache: bool

    @classmethod
    def taken(cls, kwargs: dict[str, Any], plan: Any, target: str | None, **given: Any) -> "Request":
        """Take what is ours out of `kwargs`; what is left is diffusers'. given: settings and inputs. Raises LDMQError
        for a plan that is neither a planner nor a file."""
        asked = {name: kwargs.pop(name) for name in list(kwargs) if name in SETTINGS}
        prompts, torch_dtype = kwargs.pop("prompts", None), kwargs.pop("torch_dtype", None)
        dtype = kwargs.pop("dtype", None) or torch_dtype
        values = {"plan": plan, "target": target, **given, "prompts": prompts, **asked}
        settings = _planned(replace(given["settings"] or Settings(), **asked), plan)
        single = dtype if isinstance(dtype, torch.dtype) else None
        return cls(
            settings=replace(settings, target=target or settings.target, dtype=single or settings.dtype),
            inputs=prompts if given["inputs"] is None else given["inputs"],
            names=[name for name, value in values.items() if value is not None],
            dtype=dtype,
            device=kwargs.pop("device", None),
            steps=kwargs.pop("steps", None),
            progress=kwargs.pop("progress", None),
            cache=kwargs.pop("cache", True),
        )

    def calls(self, pipe: Any) -> list[dict[str, Any]]:
        """`__call__` arguments to record."""
        if self.inputs is not None and not all(isinstance(entry, str) for entry in self.inputs):
            return list(self.inputs)
        return default_inputs(pipe, self.inputs, steps=self.steps, seed=self.settings.seed)

    def refuse_dtype(self) -> None:
        """Raise LDMQError unless the dtype, if any, is one: a model is quantized in one."""
        if self.dtype is not None and not isinstance(self.dtype, torch.dtype):
            raise LDMQError(
                f"dtype is {self.dtype!r}; a float model is quantized in one torch.dtype such as torch.bfloat16: save "
                f"the result and load that with others"
            )


def _planned(settings: Settings, plan: str | os.PathLike[str] | Plan | None) -> Settings:
    """The settings with a plan, given as a planner's name, a file or the plan itself."""
    if plan is None:
        return settings
    if isinstance(plan, Plan):
        return replace(settings, plan=plan)
    if not Path(plan).exists() and Path(plan).name == os.fspath(plan) and not Path(plan).suffix:
        PLANNERS[os.fspath(plan)]  # refuses what is neither a planner nor looks like a file
        return replace(settings, planner=os.fspath(plan))
    return replace(settings, plan=Plan.load(plan))
