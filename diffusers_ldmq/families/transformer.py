"""Diffusion transformers of diffusers: embedders, lists of transformer blocks, an output projection."""

import re

from torch import nn

from .contract import Family

_LISTED = re.compile(r"(?P<list>\w+)\.(?P<i>\d+)\.")
_OUTPUT = re.compile(r"^(norm_out|proj_out|final_layer)")


def place(name: str, denoiser: nn.Module) -> tuple[tuple[int, ...], str, str]:
    """Where a layer stands: lists of blocks run in the order in which the model registers them.

    The first half of all listed blocks counts as encoder, the second as decoder.
    """
    lists = [child for child, module in denoiser.named_children() if isinstance(module, nn.ModuleList)]
    match = _LISTED.match(name)
    if match is None or match["list"] not in lists:
        head = name.split(".")[0]
        if _OUTPUT.match(head):
            return (2, 0, 0), head, "decoder"
        return (0, 0, 0), "embeddings", "encoder"
    sizes = [len(list(denoiser.get_submodule(child).children())) for child in lists]
    index = lists.index(match["list"])
    position = sum(sizes[:index]) + int(match["i"])
    return (1, position, 0), match[0].rstrip("."), "decoder" if 2 * position >= sum(sizes) else "encoder"


def skip_split(name: str, denoiser: nn.Module) -> int | None:
    """None: these transformers concatenate tokens, never channels."""
    return None


def middle(denoiser: nn.Module) -> str:
    """The block in the middle of the first list of blocks; where a second list follows (Flux), pictures and text still
    run apart in the first."""
    for name, blocks in denoiser.named_children():
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return f"{name}.{len(blocks) // 2}"
    return ""


FAMILY = Family(
    name="transformer",
    components=("transformer", "prior"),
    classes=(
        "Transformer2DModel",
        "DiTTransformer2DModel",
        "PixArtTransformer2DModel",
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
        "SanaTransformer2DModel",
        "HunyuanDiT2DModel",
        "AuraFlowTransformer2DModel",
    ),
    place=place,
    # embedders and the modulation (adaLN) path: hardly any work, every block depends on them
    keep_float=r"^(time|pos_embed|patch_embed|x_embedder|context_embedder|caption_projection|adaln|norm_out"
    r"|proj_out|proj_in)|\.norm\w*\.(linear|emb\.)",
    skip_split=skip_split,
    units=(
        "BasicTransformerBlock",
        "JointTransformerBlock",
        "SD3SingleTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
        "SanaTransformerBlock",
        "HunyuanDiTBlock",
        "AuraFlowJointTransformerBlock",
        "AuraFlowSingleTransformerBlock",
    ),
    middle=middle,
)
