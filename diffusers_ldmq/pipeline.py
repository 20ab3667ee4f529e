"""QuantizedLDMPipeline: any diffusers pipeline with a quantized denoiser, computed or loaded, from disk or from another
pipeline."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .artifacts import Plan, Profile, Report
from .cache import find_entry, is_on
from .checkpoints import (
    HUB_OPTIONS,
    SAVING_OPTIONS,
    SIDE_FILES,
    component_names,
    components_of,
    known,
    original_name,
    refuse_unknown,
    side_files,
    stored_config,
)
from .companions import loading_options
from .components import assembled, refuse_quantization_config, shared_copy
from .demo import MODEL, demo_captions
from .errors import LDMQError
from .families import find_denoiser, refuse_compiled, uncompiled
from .folders import as_saved, denoiser_loader, load_pipeline, save_pipeline, still_true, write_side_files
from .guards import check_cast
from .job import Outcome, Settings, quantize_pipeline, settle
from .layers import quantized_layers, set_low_memory
from .output import folder_into
from .quantization import refuse_unfit
from .request import Request

__all__ = [
    "Outcome",
    "QuantizedLDMPipeline",
    "Settings",
    "denoiser_loader",
    "load_pipeline",
    "quantize_pipeline",
    "save_pipeline",
]


class QuantizedLDMPipeline:
    """A mixin over the loaded pipeline's own class: `isinstance` holds for both, everything else is the pipeline's.

    Made by `from_pretrained` and `from_pipe` only.
    """

    _artifacts: Mapping[str, Any] = MappingProxyType({})
    _plain: Any = None  # the pipeline class that a built one is made over

    @property
    def plan(self) -> Plan | None:
        """What was decided; None where not stored, or where the denoiser's layers are others by now (dequantized)."""
        return still_true(self, self._artifacts).get("plan")

    @property
    def report(self) -> Report | None:
        """What was measured; None as for `plan`, and where a LoRA was fused into the layers since."""
        return still_true(self, self._artifacts).get("report")

    @property
    def profile(self) -> Profile | None:
        """The noise of every layer before it was decided; None as for `plan`."""
        return still_true(self, self._artifacts).get("profile")

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        plan: str | os.PathLike[str] | Plan | None = None,
        target: str | None = None,
        *,
        inputs: Sequence[dict[str, Any]] | Sequence[str] | None = None,
        settings: Settings | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a quantized checkpoint, or load a float model and quantize it.

        plan: a planner's name ('hybrid', 'budget', 'uniform'), a Plan or a path to one; default 'hybrid'. inputs
        (or prompts): prompts, or dicts of `__call__` arguments, to record (default: captions of ours). settings:
        everything else; fields of Settings may be given as keywords too (`calibration`, `corrections`, ...) and, as
        plan and target, go before it. Other keywords: `dtype` / `torch_dtype` (or its name), `device`, `steps`,
        `progress`, `low_memory` (as `set_low_memory`); the rest is DiffusionPipeline.from_pretrained's (`revision`,
        `variant`, `safety_checker`, ...).

        What was computed is kept under the Hugging Face cache: asked the same again, it is loaded, and a reconstruction
        that was interrupted goes on (`cache=False` or the environment's LDMQ_CACHE=0 turn that off).
        Raises LDMQError; for a quantized checkpoint given what quantizes it says what to load instead.
        """
        request = Request.taken(kwargs, plan, target, inputs=inputs, settings=settings)
        name, model = model, known(model)
        if request.inputs is None and os.fspath(name) == MODEL:
            request = replace(request, inputs=demo_captions())
        hub = {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}
        refuse_unknown(model, kwargs, **hub)
        refuse_quantization_config(model, component_names(model, **hub), kwargs.get("quantization_config"))
        config = stored_config(model, **hub)
        if config is None:
            kwargs |= loading_options(components_of(model, **hub), request.settings.components)
        if cls._plain is not None:
            kwargs["kind"] = cls._plain
        if config is None:
            return _low_memory(_computed(model, request, kwargs), request)
        original = original_name(model, **hub)
        if request.names:
            others = [name for name in request.names if name not in ("plan", "target")]
            raise LDMQError(
                f"{model}: is quantized already; leave {', '.join(['plan and target', *others])} out to load it, or "
                f"give the original float model{original and f' ({original})'} to quantize anew"
            )
        stored = getattr(torch, str(config.get("compute_dtype", "float32")), torch.float32)
        pipe = load_pipeline(model, dtype=request.dtype or stored, device=request.device, **kwargs)
        if original:
            pipe.register_to_config(_name_or_path=original)  # of what it was made, not where it lies now
        return _low_memory(_dressed(pipe, **side_files(model, **hub)), request)

    @classmethod
    def from_pipe(
        cls,
        pipe: Any,
        plan: str | os.PathLike[str] | Plan | None = None,
        target: str | None = None,
        *,
        inputs: Sequence[dict[str, Any]] | Sequence[str] | None = None,
        settings: Settings | None = None,
        **kwargs: Any,
    ) -> Any:
        """A pipeline of both classes from one in memory, with the components of `pipe`, or those given by name.

        With a quantized denoiser everything is shared and nothing cast. A float denoiser is quantized with the keywords
        of `from_pretrained` except `device`; `pipe` keeps its own, unchanged, and shares what stays float with the new
        pipeline (to free its memory, drop `pipe`). Nothing is cached. Of a class that this one built, the new pipeline
        is of that class, whatever `pipe` is.

        Raises LDMQError for a keyword that is neither, for a quantized pipeline given what quantizes it, and for a
        dtype that it does not have.
        """
        request = Request.taken(kwargs, plan, target, inputs=inputs, settings=settings)
        made = assembled(cls._plain or getattr(pipe, "_plain", type(pipe)), pipe, kwargs)
        name, denoiser = find_denoiser(made)
        if not quantized_layers(denoiser):
            return _low_memory(_quantized(made, request), request)
        if request.names:
            raise LDMQError(
                f"the given {type(pipe).__name__} is quantized already; leave {', '.join(request.names)} out to share "
                f"its components, or give a float pipeline to quantize anew"
            )
        now = next(p.dtype for p in denoiser.parameters() if p.is_floating_point())
        if request.dtype not in (None, now):
            raise LDMQError(
                f"the given {type(pipe).__name__}'s {name} is quantized at {now} and cannot be cast; load its "
                f"checkpoint with dtype={request.dtype} instead"
            )
        same = denoiser is uncompiled(pipe.components.get(name))
        dressed = _dressed(made, **{name: getattr(pipe, name, None) for name in SIDE_FILES if same})
        return _low_memory(dressed, request)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline's own. Raises LDMQError for a dtype that a quantized model does not have, and then leaves the
        other models as they are, too."""
        named = {name: value for name, value in kwargs.items() if name != "silence_dtype_warnings"}
        check_cast(self.components.values(), *args, **named)  # pyright: ignore[reportAttributeAccessIssue]
        return super().to(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def save_pretrained(self, folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As the pipeline's own, plus plan.json, report.json and profile.json where they still are of this model. Plain
        diffusers opens the folder. Raises OutputError where it cannot be written.

        push_to_hub=True: also push it, under `repo_id` or the folder's name, with the keywords of `push_to_hub`.
        """
        pushed = None
        if kwargs.pop("push_to_hub", False):
            pushed = {name: kwargs.pop(name) for name in list(kwargs) if name not in SAVING_OPTIONS}
        with folder_into(folder) as place:
            with as_saved(self):
                super().save_pretrained(place, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            write_side_files(place, self)
        if pushed is not None:
            self._push(pushed.pop("repo_id", Path(folder).resolve().name), pushed, folder)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> str:
        """Upload the pipeline with its model card, plan, measurements and pictures; the address of the commit.

        private: None = as your account has it; options: `revision` (a branch, made where it is missing), `base_model`
        and `license` where the folder does not tell them, `prompts` or `images` (how many pictures to draw, default 4,
        0 for none) with `steps`, `guidance` and `seed`, `original` (the float pipeline, to draw beside), and `variant`,
        `max_shard_size` of save_pretrained. Raises LDMQError in one line for what the hub refuses.
        """
        given = {"commit_message": commit_message, "private": private, "token": token, "create_pr": create_pr}
        return self._push(repo_id, {**given, **options})

    def _push(self, repo_id: str, options: dict[str, Any], folder: str | os.PathLike[str] | None = None) -> str:
        from .hub import push_pipeline  # its figures and tables load only where something is pushed

        return push_pipeline(self, repo_id, folder, **options)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class shares its base's name, so it is rebuilt, never looked up
        return _restored, (self._plain, dict(vars(self)))


@cache
def _quantized_class(base: type) -> type:
    """QuantizedLDMPipeline over `base`, under the base's name, by which diffusers looks pipelines up."""
    body = {"__module__": base.__module__, "__doc__": base.__doc__, "_plain": base}
    return type(base.__name__, (QuantizedLDMPipeline, base), body)


def _dressed(pipe: Any, **artifacts: Any) -> Any:
    pipe.__class__ = _quantized_class(type(pipe))
    object.__setattr__(pipe, "_artifacts", {name: value for name, value in artifacts.items() if value is not None})
    return pipe


def _low_memory(pipe: Any, request: Request) -> Any:
    if request.low_memory is not None:
        set_low_memory(pipe, request.low_memory)
    return pipe


def _restored(base: type, state: dict[str, Any]) -> Any:
    pipe: Any = object.__new__(_quantized_class(base))
    vars(pipe).update(state)
    return pipe


def _computed(model: str, request: Request, options: dict[str, Any]) -> Any:
    """The float model in a folder or repository, quantized or, where that was done before, taken from the cache.
    options: of `load_pipeline`."""
    request.refuse_dtype()
    settings = request.settings
    entry = None
    if request.cache and is_on():
        entry = find_entry(model, request, options)
    cached = entry.load() if entry else None
    if cached is not None:
        options = {**options, cached.component: cached.denoiser}
        pipe = load_pipeline(model, dtype=torch.float32, device=request.device, **options)
        settle(pipe, cached.component, settings.dtype)
        return _dressed(pipe, **cached.artifacts)
    pipe = load_pipeline(model, dtype=torch.float32, device=request.device, **options)
    reload = denoiser_loader(model, request.device, **options)
    memory = entry.reconstruction() if entry and settings.reconstruction != "none" else None
    calls = request.calls(pipe)
    outcome = quantize_pipeline(pipe, calls, settings, reload=reload, memory=memory, progress=request.progress)
    if entry is not None:
        entry.store(pipe, outcome)
    if memory is not None:
        shutil.rmtree(memory, ignore_errors=True)
    return _dressed(pipe, **{name: getattr(outcome, name) for name in SIDE_FILES})


def _quantized(pipe: Any, request: Request) -> Any:
    """`pipe`, which is ours but shares its components, with a quantized denoiser of its own."""
    request.refuse_dtype()
    refuse_compiled(pipe)
    name, denoiser = find_denoiser(pipe)
    refuse_unfit(denoiser)
    cast = pipe.components if request.settings.dtype else [name]
    models = {n: uncompiled(c) for n, c in pipe.components.items() if n in cast and isinstance(c, torch.nn.Module)}
    pipe.register_modules(**{n: shared_copy(model) for n, model in models.items()})
    outcome = quantize_pipeline(
        pipe,
        request.calls(pipe),
        request.settings,
        reload=lambda: shared_copy(denoiser),
        progress=request.progress,
    )
    return _dressed(pipe, **{name: getattr(outcome, name) for name in SIDE_FILES})
