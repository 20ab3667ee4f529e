"""U-Nets of diffusers: down blocks, middle, up blocks with skip connections."""

import re

from torch import nn

from .contract import Family

_PLACE = re.compile(r"(?P<stage>down_blocks|up_blocks|mid_block)(?:\.(?P<i>\d+))?\.(?P<kind>\w+)\.(?P<j>\d+)")
_STAGES = {"down_blocks": (2, "encoder"), "mid_block": (3, "middle"), "up_blocks": (4, "decoder")}
_WITHIN = {"resnets": 0, "attentions": 1, "motion_modules": 2}
_AFTER_CONCATENATION = re.compile(r"up_blocks\.(?P<i>\d+)\.resnets\.(?P<j>\d+)\.(conv1|conv_shortcut)")
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


def skip_split(name: str, denoiser: nn.Module) -> int | None:
    """Channels of the hidden state in the input of a decoder resnet's first convolution or shortcut, which sees
    cat(hidden state, skip connection). The hidden state comes from the resnet before, in this block or the last one.
    """
    match = _AFTER_CONCATENATION.fullmatch(name)
    if match is None:
        return None
    before = _resnet_before(int(match["i"]), int(match["j"]), denoiser)
    channels = None if before is None else int(before.out_channels)  # pyright: ignore[reportArgumentType]
    conv = denoiser.get_submodule(name)
    return channels if channels is not None and channels < int(conv.in_channels) else None  # pyright: ignore


def middle(denoiser: nn.Module) -> str:
    """The middle block's first attention, or its first resnet where it has none; without a middle block, the first
    resnet on the way up."""
    modules = dict(denoiser.named_modules())
    choices = ("mid_block.attentions.0", "mid_block.resnets.0", "up_blocks.0.resnets.0")
    return next((name for name in choices if name in modules), "")


def _resnet_before(i: int, j: int, denoiser: nn.Module) -> nn.Module | None:
    """The resnet that ran last before up_blocks.i.resnets.j; attention and upsampling keep its number of channels."""
    if j > 0:
        return denoiser.get_submodule(f"up_blocks.{i}.resnets.{j - 1}")
    downwards = list(denoiser.get_submodule("down_blocks").children())
    earlier = [
        *downwards,
        getattr(denoiser, "mid_block", None),
        *list(denoiser.get_submodule("up_blocks").children())[:i],
    ]
    resnets = [list(block.resnets) for block in earlier if hasattr(block, "resnets")]
    return resnets[-1][-1] if resnets else None


FAMILY = Family(
    name="unet",
    components=("unet", "prior", "decoder"),
    classes=("UNet2DConditionModel", "UNet2DModel"),
    place=place,
    # time path: hardly any work, highly sensitive; conv_in/conv_out: 4 channels, see the latent itself
    keep_float=r"^(time_embedding|class_embedding|add_embedding|encoder_hid_proj|conv_in$|conv_out$)"
    r"|\.time_emb_proj$",
    skip_split=skip_split,
    units=("ResnetBlock2D", "BasicTransformerBlock", "Attention"),
    middle=middle,
)
