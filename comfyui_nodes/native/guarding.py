"""What a quantized MODEL does not take part in: merging, LoRA hooks, the stock nodes that save models, and sampling on
several GPUs where its layers would be shared between them.

Merging nodes read the weights of one MODEL with `get_key_patches` and add them to a clone of the other; the shared
module tree holds whichever clone was sampled last, so what they would read is a matter of chance. The stock savers
would write codes as if they were weights. Instances are guarded, not classes; a clone guards itself again.
"""

from collections.abc import Callable
from typing import Any

from comfy.patcher_extension import CallbacksMP

from diffusers_ldmq.errors import LDMQError

from .layer import LDMQLayer

KEY = "ldmq"
"""Key of our callbacks on a ModelPatcher."""

MERGING = (
    "a MODEL quantized by LDM-Q cannot be merged with another, extracted as a LoRA, or used with LoRA hooks: merge the "
    "float MODELs first and put LDM-Q Quantize behind; for a LoRA use the Load LoRA node"
)
SAVING = (
    "a MODEL quantized by LDM-Q cannot be saved as a stock checkpoint; use LDM-Q Save model, or LDM-Q Export for a "
    "file that the stock loaders open"
)
SHARING = (
    "a MODEL behind LDM-Q Quantize cannot be sampled on several GPUs, which would share its layers: save it with LDM-Q "
    "Save model, open it with LDM-Q Load model, and put the node for several GPUs behind that"
)


def guard(patcher: Any) -> None:
    """Make a quantized ModelPatcher and all its clones refuse these, in words (LDMQError)."""
    patcher.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, _guard_clone)
    patcher.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, _refuse_old_saver)
    if hasattr(CallbacksMP, "ON_DEEPCLONE_MULTIGPU"):
        patcher.add_callback_with_key(CallbacksMP.ON_DEEPCLONE_MULTIGPU, KEY, _refuse_sharing)
    _guard_instance(patcher)


def _refuse_sharing(patcher: Any, clone: Any) -> None:
    """A loaded MODEL has its layers in a module tree of its own; one behind LDM-Q Quantize has them as patches, which
    a clone for another GPU gets as they are."""
    if any(isinstance(patch, LDMQLayer) for patch in patcher.object_patches.values()):
        raise LDMQError(SHARING)


def _guard_clone(patcher: Any, clone: Any) -> None:
    _guard_instance(clone)


def _guard_instance(patcher: Any) -> None:
    patcher.get_key_patches = _refusal(MERGING)
    patcher.add_patches = _without_merging(patcher.add_patches)
    for name in ("state_dict_for_saving", "model_state_dict_for_saving"):
        if hasattr(patcher, name):
            setattr(patcher, name, _refusal(SAVING))


def _refusal(message: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise LDMQError(message)

    return refuse


def _without_merging(add_patches: Callable[..., Any]) -> Callable[..., Any]:
    """add_patches that refuses another model's weights, which come as lists; adapters do not."""

    def guarded(patches: dict[Any, Any], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(patch, list) for patch in patches.values()):
            raise LDMQError(MERGING)
        return add_patches(patches, *args, **kwargs)

    return guarded


def _refuse_old_saver(patcher: Any, device: Any, memory: Any, force_patch_weights: bool = False, *rest: Any) -> None:
    """Before `state_dict_for_saving` was the patcher's, savers loaded the model with its patches forced in, which
    nothing else asks for."""
    if force_patch_weights:
        raise LDMQError(SAVING)
