"""What a MODEL predicts and on which noise schedule it is sampled, with the patch of a ModelSampling node."""

from types import SimpleNamespace
from typing import Any

import comfy.model_base

SETTINGS = ("zsnr", "beta_schedule", "linear_start", "linear_end", "timesteps", "sigma_min", "sigma_max", "sigma_data")
"""Settings of the noise schedule that weights do not tell."""
PATCHED = ("zsnr", "shift", "multiplier")
"""Those that ModelSampling nodes change and that can be read from what they make."""
LOST = "The MODEL's ModelSampling patch is not part of the file: put the ModelSampling node behind {loader} again."


def is_patched(model: Any) -> bool:
    """Whether a ModelSampling node stands before this MODEL."""
    return "model_sampling" in model.object_patches


def own_sampling(model: Any) -> tuple[str, dict[str, Any]]:
    """As `sampling_of`, of the MODEL without a patch."""
    settings = getattr(model.model.model_config, "sampling_settings", {})
    return model.model.model_type.name, {key: settings[key] for key in SETTINGS if key in settings}


def sampling_of(model: Any) -> tuple[str, dict[str, Any]] | None:
    """(ComfyUI's name of what the MODEL predicts, settings of its noise schedule); None for a patch that these do not
    describe."""
    own_kind, own = own_sampling(model)
    if not is_patched(model):
        return own_kind, own
    base = model.model
    patch = model.get_model_object("model_sampling")
    found = own | {key: value for key in PATCHED if (value := getattr(patch, key, None)) is not None}
    for kind in dict.fromkeys((own_kind, "EPS", "V_PREDICTION")):
        config = SimpleNamespace(sampling_settings={**base.model_config.sampling_settings, **found})
        made = comfy.model_base.model_sampling(config, comfy.model_base.ModelType[kind])
        if type(made).__bases__ == type(patch).__bases__ and _numbers(made) == _numbers(patch):
            return kind, found
    return None


def _numbers(sampling: Any) -> dict[str, Any]:
    plain = {key: value for key, value in vars(sampling).items() if isinstance(value, (bool, int, float, str))}
    return plain | {key: value.tolist() for key, value in sampling.named_buffers()}
