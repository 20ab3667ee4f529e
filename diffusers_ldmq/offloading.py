"""Whether a model's weights are where quantizing can read them."""

from torch import nn

from .errors import LDMQError

ELSEWHERE = {
    "group_offloading": "under group offloading (enable_group_offload), which moves or empties its weights",
    "layerwise_casting": "under layerwise casting (enable_layerwise_casting), which keeps its weights in fewer bits",
}
"""Name of a hook of diffusers -> what it means for the weights."""


def refuse_offloaded(model: nn.Module) -> None:
    """Raise LDMQError, saying what to do, for a model whose weights cannot be read as they stand. Whole-model
    offloading (enable_model_cpu_offload) is no obstacle: it leaves the weights on the CPU between calls."""
    kind = type(model).__name__
    if any(parameter.is_meta for parameter in model.parameters()):
        raise LDMQError(
            f"the {kind}'s weights are on the meta device (offloaded); load it without offloading, quantize, and "
            f"offload the quantized model"
        )
    for name, module in model.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        for hook, state in ELSEWHERE.items():
            if hook in hooks:
                where = f" (module {name!r})" if name else ""
                raise LDMQError(
                    f"the {kind} is {state}{where}; load it again, quantize, and call that on the quantized model "
                    f"where it is possible"
                )
