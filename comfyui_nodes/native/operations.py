"""From stored integers to ComfyUI's MODEL, without a float copy ever being made: ComfyUI builds its module with layers
that are empty, recognizes the model by tensors that hold nothing but a shape, and gets LDMQLayers in their places."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.model_base
import comfy.ops
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from diffusers_ldmq.errors import CheckpointError, LDMQError, place
from diffusers_ldmq.loading import more
from diffusers_ldmq.quantization import replace_layer
from diffusers_ldmq.quantized_layer import CAST
from diffusers_ldmq.specs import LayerState, check_state, geometry_of

from .guarding import guard
from .layer import LDMQLayer
from .model_format import Content

LEAVES = ("weight", "bias")
OTHER_LOADER = "if it came from a diffusers pipeline, run that with LDM-Q Pipeline loader"
# what ComfyUI's recognition and its modules raise at models they were not written for
_UNKNOWN = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, AssertionError)


class _Empty:
    """What Linear and Conv2d of LDMQOps share: no memory until a tensor is loaded into them. A tensor on meta is not
    loaded; the layer then waits for the LDMQLayer that takes its place."""

    home: torch.device
    given: Tensor | None = None

    def __init__(self, *args: Any, device: Any = None, **options: Any) -> None:
        super().__init__(*args, device="meta", **options)  # pyright: ignore[reportCallIssue]
        self.home = torch.device(device or "cpu")

    def _load_from_state_dict(  # noqa: PLR0913 (nn.Module's signature)
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        parameters: dict[str, nn.Parameter | None] = self._parameters  # pyright: ignore[reportAttributeAccessIssue]
        for leaf in LEAVES:
            own, given = parameters.get(leaf), state_dict.get(prefix + leaf)
            if own is None:
                continue
            if given is None:
                missing_keys.append(prefix + leaf)
            elif given.shape != own.shape:
                error_msgs.append(f"{prefix}{leaf}: shape {list(given.shape)}, expected {list(own.shape)}")
            elif given.is_meta:
                self.given = given
            else:
                filled = torch.empty_like(own, device=self.home).copy_(given)
                parameters[leaf] = nn.Parameter(filled, requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As nn.Module, but what is on meta stays there: only where it is to be is noted."""
        weight = getattr(self, "weight", None)
        if weight is None or not weight.is_meta:
            return super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        self.home = fn(torch.empty(0)).device
        return self


class LDMQOps(comfy.ops.manual_cast):
    """`custom_operations` whose Linear and Conv2d take no memory before they are loaded."""

    class Linear(_Empty, comfy.ops.manual_cast.Linear):
        """Float once it is loaded."""

    class Conv2d(_Empty, comfy.ops.manual_cast.Conv2d):
        """Float once it is loaded."""


@contextmanager
def as_module_tensors() -> Iterator[None]:
    """While open, tensors are made as modules want them. Nodes run in inference mode, whose tensors do not count how
    often they were written to, by which a packed layer notices changes."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def build_model(content: Content) -> Any:
    """A ModelPatcher whose denoiser holds the content's states. It runs in the dtype that ComfyUI chooses for a float
    model of `content.dtype` on this machine.

    Raises CheckpointError if ComfyUI does not know the model, or knows it in another shape.
    """
    stand_ins = {
        f"{name}.weight": torch.empty(content.shapes[name], dtype=content.dtype, device="meta")
        for name in content.states
    }
    biases = {f"{name}.bias": state.bias for name, state in content.states.items() if state.bias is not None}
    tensors: dict[str, Tensor] = {**stand_ins, **biases, **content.floats}
    patcher = _recognized(tensors, content.source)
    model = patcher.model
    _check_match(tensors, model, content.source)
    dtype = _float_dtype(model, content.dtype)
    for name, state in content.states.items():
        _put(model.diffusion_model, name, state, stand_ins[f"{name}.weight"], dtype)
    _check_filled(model.diffusion_model, content.source)
    set_sampling(model, content.model_type, content.sampling)
    patcher.size = _size(model, content.states)  # it counted the empty layers as if they were full
    guard(patcher)
    return patcher


def _size(model: Any, states: dict[str, LayerState]) -> int:
    """Bytes of the model, scales and corrections of quantized layers among them, which ComfyUI does not see."""
    owners = {f"diffusion_model.{name}" for name in states}
    floats = (value for key, value in model.state_dict().items() if key.rpartition(".")[0] not in owners)
    held = (
        tensor for name in states for tensor in model.diffusion_model.get_submodule(name).state().tensors().values()
    )
    return sum(tensor.nbytes for tensor in (*floats, *held))


def _recognized(tensors: dict[str, Tensor], source: str) -> Any:
    """The patcher of ComfyUI's module for tensors of these names and shapes."""
    loader = comfy.sd.load_diffusion_model_state_dict
    options: dict[str, Any] = {"model_options": {"custom_operations": LDMQOps}}
    if "disable_dynamic" in inspect.signature(loader).parameters:
        options["disable_dynamic"] = True
    try:
        patcher = loader(dict(tensors), **options)
    except torch.OutOfMemoryError:
        raise
    except _UNKNOWN as cause:
        reason = " ".join(str(cause).split())[:300]
        raise CheckpointError(f"{source}: ComfyUI cannot build this model ({reason}); {OTHER_LOADER}") from cause
    if patcher is None:
        raise CheckpointError(f"{source}: ComfyUI has no model of this shape; {OTHER_LOADER}")
    if hasattr(patcher, "is_dynamic") and patcher.is_dynamic():  # a version whose loader cannot be told
        return ModelPatcher(patcher.model, load_device=patcher.load_device, offload_device=patcher.offload_device)
    return patcher


def _check_match(tensors: dict[str, Tensor], model: Any, source: str) -> None:
    """Raise CheckpointError unless file and module have the same tensors: ComfyUI would only log what differs."""
    found = set(model.model_config.process_unet_state_dict(dict(tensors)))
    expected = set(model.diffusion_model.state_dict())
    for what, keys in (("lacks", sorted(expected - found)), ("has no place for", sorted(found - expected))):
        if keys:
            model_name = type(model).__name__
            who = "the file" if what == "lacks" else f"ComfyUI's {model_name}"
            raise CheckpointError(
                f"{source}: {place(keys[0])}: {who} {what} this tensor ({more(keys)}); it was taken for a "
                f"{model_name}, which it is not quite; {OTHER_LOADER}"
            )


def _float_dtype(model: Any, logical: torch.dtype) -> torch.dtype:
    """The dtype of what is not quantized; of a model asked for in 8 bits, what it computes in."""
    dtype = model.get_dtype()
    return dtype if dtype.itemsize > 1 else model.manual_cast_dtype or logical


def _put(denoiser: nn.Module, name: str, state: LayerState, stand_in: Tensor, dtype: torch.dtype) -> None:
    """The LDMQLayer of `state` in the place of the empty layer that got its stand-in."""
    try:
        empty = denoiser.get_submodule(name)
        if not isinstance(empty, _Empty) or empty.given is not stand_in:
            raise LDMQError(f"this version of ComfyUI builds or fills it in another way; {OTHER_LOADER}")
        geometry = geometry_of(empty)  # pyright: ignore[reportArgumentType]
        held = {leaf: value.to(dtype) for leaf in CAST if (value := getattr(state, leaf)) is not None}
        state = replace(state, **held)
        check_state(state, geometry)
        layer = LDMQLayer(state, geometry, dtype)
    except (LDMQError, AttributeError) as cause:
        raise CheckpointError(f"layer {name!r}: {cause}") from cause
    replace_layer(denoiser, name, layer if empty.home.type == "cpu" else layer.to(empty.home))


def _check_filled(denoiser: nn.Module, source: str) -> None:
    empty = sorted(name for name, value in denoiser.named_parameters() if value.is_meta)
    if empty:
        raise CheckpointError(
            f"{source}: {place(empty[0])}: nothing filled this tensor ({more(empty)}); {OTHER_LOADER}"
        )


def set_sampling(model: Any, model_type: str, sampling: dict[str, Any]) -> None:
    """Make the model predict what it was trained for, where ComfyUI took it for something else: weights do not say
    whether they predict the noise or the velocity. sampling: settings that replace those of the recognized model.

    Raises CheckpointError for a kind of prediction that this ComfyUI does not know.
    """
    config = model.model_config
    settings = {**config.sampling_settings, **sampling}
    if model.model_type.name == model_type and settings == config.sampling_settings:
        return
    kind = getattr(comfy.model_base.ModelType, model_type, None)
    if kind is None:
        raise CheckpointError(f"this version of ComfyUI does not know models of type {model_type!r}; update ComfyUI")
    config.sampling_settings = settings
    model.model_type = kind
    model.model_sampling = comfy.model_base.model_sampling(config, kind)
