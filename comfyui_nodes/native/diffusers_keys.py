"""The names that a U-Net of diffusers and ComfyUI's module for the same model have for the same tensors, and whether
both compute the same with them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import comfy.utils
from torch import nn

from diffusers_ldmq.errors import CheckpointError, place
from diffusers_ldmq.loading import more

PIPELINE_LOADER = "use LDM-Q Pipeline loader and LDM-Q Pipeline sampler for this model"
FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
"""What ComfyUI's U-Net has no setting for: diffusers' names and the values it is written for."""
_COMPARED = ("heads", "num_groups", "eps", "stride", "padding", "dilation", "groups")


def ldm_names(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' tensor name -> ComfyUI's, of every tensor of a UNet2DConditionModel. config: the U-Net's.

    Raises CheckpointError for a U-Net that ComfyUI's module cannot be.
    """
    names = list(names)
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"the U-Net's {key} is {config[key]!r}, ComfyUI's has {value!r} built in; {PIPELINE_LOADER}"
            )
    try:
        known = comfy.utils.unet_to_diffusers(_ldm_config(names))
    except (LookupError, TypeError) as cause:
        raise CheckpointError(f"the U-Net's blocks are none that ComfyUI knows; {PIPELINE_LOADER}") from cause
    strange = sorted(name for name in names if name not in known)
    if strange:
        raise CheckpointError(
            f"{place(strange[0])}: ComfyUI's U-Net has no such tensor ({more(strange)}); {PIPELINE_LOADER}"
        )
    return {name: known[name] for name in names}


def _ldm_config(names: list[str]) -> dict[str, Any]:
    """The U-Net's shape in the words of the original latent diffusion code: blocks in each stage, and the depth of the
    transformer that follows each block. The output's depths are listed from the last block on."""
    stages = _count(names, r"down_blocks\.(\d+)\.")
    blocks = [_count(names, rf"down_blocks\.{i}\.resnets\.(\d+)\.") for i in range(stages)]
    down = [_depth(names, f"down_blocks.{i}", j) for i in range(stages) for j in range(blocks[i])]
    up = [_depth(names, f"up_blocks.{i}", j) for i in range(stages) for j in range(blocks[stages - 1 - i] + 1)]
    return {
        "num_res_blocks": blocks,
        "channel_mult": [1] * stages,
        "transformer_depth": down,
        "transformer_depth_output": up[::-1],
        "transformer_depth_middle": _depth(names, "mid_block", 0),
    }


def _count(names: list[str], pattern: str) -> int:
    """How many different numbers the pattern finds."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _depth(names: list[str], stage: str, block: int) -> int:
    return _count(names, rf"{re.escape(stage)}\.attentions\.{block}\.transformer_blocks\.(\d+)\.")


def check_same_computation(source: nn.Module, target: nn.Module, names: Mapping[str, str]) -> None:
    """Raise CheckpointError if modules that hold the same tensors differ in what no tensor shows: heads of an
    attention, groups and epsilon of a norm, how a convolution walks. names: as `ldm_names` gives them."""
    for theirs, ours in names.items():
        for levels in (1, 2):  # the module that owns the tensor, and the attention around a projection
            first, second = _above(source, theirs, levels), _above(target, ours, levels)
            for attribute in _COMPARED:
                found, expected = getattr(first, attribute, None), getattr(second, attribute, None)
                if None not in (found, expected) and found != expected:
                    raise CheckpointError(
                        f"{place(theirs)}: {attribute} is {found!r} in the U-Net's config.json, {expected!r} in the "
                        f"model that ComfyUI took it for; {PIPELINE_LOADER}"
                    )


def _above(root: nn.Module, name: str, levels: int) -> nn.Module:
    return root.get_submodule(".".join(name.split(".")[:-levels]))
