"""U-Nets of diffusers: down blocks, middle, up blocks with skip connections."""

import re

from torch import nn

from .contract import Family

_PLACE = re.compile(r"(?P<stage>down_blocks|up_blocks|mid_block)(?:\.(?P<i>\d+))?\.(?P<kind>\w+)\.(?P<j>\d+)")
_STAGES = {"down_blocks": (2, "encoder"), "mid_block": (3, "middle"), "up_blocks": (4, "decoder")}
_WITHIN = {"resnets": 0, "attentions": 1, "motion_modules": 2}
_LAST = 10**6  # samplers come after all resnets and attentions of their block


def place(name: str, denoiser: nn.Module) -> tuple[tuple[int, ...], str, str]:
    """Where a layer of a U-Net stands: a resnet is followed by the attention of its index, samplers come last."""
    match = _PLACE.match(name)
    if match is None:
        head = name.split(".")[0]
        if head == "conv_out":
            return (5, 0, 0), head, "decoder"
        return ((1, 0, 0) if head == "conv_in" else (0, 0, 0)), head if head == "conv_in" else "embeddings", "encoder"
    stage, part = _STAGES[match["stage"]]
    within = 3 * int(match["j"]) + _WITHIN[match["kind"]] if match["kind"] in _WITHIN else _LAST
    return (stage, int(match["i"] or 0), within), match[0], part


FAMILY = Family(
    name="unet",
    components=("unet", "prior", "decoder"),
    classes=("UNet2DConditionModel", "UNet2DModel"),
    place=place,
    # time path: hardly any work, highly sensitive; conv_in/conv_out: 4 channels, see the latent itself
    keep_float=r"^(time_embedding|class_embedding|add_embedding|encoder_hid_proj|conv_in$|conv_out$)"
    r"|\.time_emb_proj$",
)
