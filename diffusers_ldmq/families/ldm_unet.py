"""U-Nets in the layout of the original latent diffusion code, which ComfyUI runs: input blocks, middle block, output
blocks with skip connections. Stable Diffusion 1.x, 2.x and SDXL."""

import re

from torch import nn

from .contract import Family

_PLACE = re.compile(r"(?P<stage>input_blocks|middle_block|output_blocks)(?:\.(?P<i>\d+))?\.(?P<j>\d+)(?=\.|$)")
_STAGES = {"input_blocks": (1, "encoder"), "middle_block": (2, "middle"), "output_blocks": (3, "decoder")}
_AFTER_CONCATENATION = re.compile(r"output_blocks\.(?P<i>\d+)\.0\.(in_layers\.2|skip_connection)")


def place(name: str, denoiser: nn.Module) -> tuple[tuple[int, ...], str, str]:
    """Where a layer stands: the parts of a block (resnet, transformer, sampler) run in the order of their numbers."""
    match = _PLACE.match(name)
    if match is None:
        return ((4, 0, 0), "out", "decoder") if name.split(".")[0] == "out" else ((0, 0, 0), "embeddings", "encoder")
    stage, part = _STAGES[match["stage"]]
    return (stage, int(match["i"] or 0), int(match["j"])), match[0], part


def skip_split(name: str, denoiser: nn.Module) -> int | None:
    """Channels of the hidden state in the input of an output block's first convolution or shortcut, which sees
    cat(hidden state, skip connection). The hidden state comes from the resnet that ran before."""
    match = _AFTER_CONCATENATION.fullmatch(name)
    if match is None:
        return None
    before = _resnet_before(int(match["i"]), denoiser)
    return None if before is None else int(before.out_channels)  # pyright: ignore[reportArgumentType]


def middle(denoiser: nn.Module) -> str:
    """The middle block's second part, its attention; the first, a resnet, where that is all; without a middle block,
    the first block on the way up."""
    modules = dict(denoiser.named_modules())
    choices = ("middle_block.1", "middle_block.0", "output_blocks.0.0")
    return next((name for name in choices if name in modules), "")


def _resnet_before(i: int, denoiser: nn.Module) -> nn.Module | None:
    """The resnet that ran last before output_blocks.i; transformers and samplers keep its number of channels."""
    inputs = list(denoiser.get_submodule("input_blocks").children())
    middle = getattr(denoiser, "middle_block", None)
    earlier = [*inputs, *([middle] if middle is not None else [])]
    earlier += list(denoiser.get_submodule("output_blocks").children())[:i]
    resnets = [module for block in earlier for module in block.children() if hasattr(module, "emb_layers")]
    return resnets[-1] if resnets else None


FAMILY = Family(
    name="ldm_unet",
    components=(),
    classes=("UNetModel",),
    place=place,
    # time and label path, and its projection in every resnet: hardly any work, highly sensitive; the first and last
    # convolution see the latent itself
    keep_float=r"^(time_embed|label_emb|input_blocks\.0\.0$|out\.)|\.emb_layers\.",
    skip_split=skip_split,
    units=("ResBlock", "BasicTransformerBlock"),
    middle=middle,
)
