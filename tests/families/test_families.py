"""Families: which component is the denoiser, in which order its blocks run, what stays float."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from diffusers_ldmq import Recording
from diffusers_ldmq.calls import run
from diffusers_ldmq.errors import PlanError, RecordingError
from diffusers_ldmq.families import (
    FAMILIES,
    family_of,
    find_denoiser,
    fingerprint,
    layer_table,
    quantizable_layers,
)

Make = Callable[[str], Any]


@pytest.mark.parametrize(
    ("kind", "component", "family"),
    [("bundled", "unet", "unet"), ("pixel", "unet", "unet"), ("dit", "transformer", "transformer")],
    indirect=["kind"],
)
def test_the_denoiser_of_a_pipeline_is_found(kind: str, component: str, family: str, make: Make) -> None:
    pipe = make(kind)
    name, denoiser = find_denoiser(pipe)
    assert name == component
    assert denoiser is getattr(pipe, component)
    assert family_of(denoiser).name == family


def test_a_subclass_is_of_its_parents_family() -> None:
    class Mine(UNet2DModel):
        pass

    assert FAMILIES["unet"].matches(Mine.__new__(Mine))


def test_an_unknown_model_is_refused_naming_the_known_ones() -> None:
    with pytest.raises(RecordingError, match=r"Linear is not a denoiser we know; known: .*UNet2DModel"):
        family_of(nn.Linear(2, 2))


def test_every_linear_and_convolution_is_in_exactly_one_block(kind: str, denoiser_of: Make) -> None:
    denoiser = denoiser_of(kind)
    table = layer_table(denoiser)
    plain = {n for n, m in denoiser.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    inside = [name for block in table.blocks for name in block.layers]
    assert sorted(inside) == sorted(plain) == sorted(info.name for info in table.layers)
    assert len({block.name for block in table.blocks}) == len(table.blocks)


def test_blocks_stand_in_the_order_in_which_they_run(kind: str, denoiser_of: Make, recordings: Any) -> None:
    denoiser, recording = denoiser_of(kind), recordings(kind)
    order: dict[str, None] = {}
    owner = {name: block.name for block in layer_table(denoiser).blocks for name in block.layers}
    for name, layer in quantizable_layers(denoiser).items():
        layer.register_forward_hook(lambda *_, name=name: order.setdefault(owner[name]))
    run(denoiser, recording.batch(recording.calls[0]))
    named = [block.name for block in layer_table(denoiser).blocks]
    assert [name for name in order if name != "embeddings"] == [name for name in named if name != "embeddings"]


def test_parts_run_from_encoder_over_middle_to_decoder(kind: str, denoiser_of: Make) -> None:
    parts = [block.part for block in layer_table(denoiser_of(kind)).blocks]
    expected = ["encoder", "decoder"] if kind == "dit" else ["encoder", "middle", "decoder"]
    assert list(dict.fromkeys(parts)) == expected
    assert parts == sorted(parts, key=expected.index)


@pytest.mark.parametrize(
    ("kind", "kept", "quantized"),
    [
        ("bundled", ["conv_in", "conv_out", "time_embedding.linear_1"], ["mid_block.resnets.0.conv1"]),
        ("pixel", ["conv_in", "down_blocks.0.resnets.0.time_emb_proj"], ["up_blocks.0.resnets.0.conv1"]),
        ("dit", ["proj_out_1", "transformer_blocks.0.norm1.linear"], ["transformer_blocks.1.ff.net.2"]),
    ],
    indirect=["kind"],
)  # fmt: skip
def test_time_path_and_ends_stay_float_by_default_g37(
    kind: str, kept: list[str], quantized: list[str], denoiser_of: Make
) -> None:
    table = layer_table(denoiser_of(kind))
    assert all(table.layer(name).keep_float for name in kept)
    assert not any(table.layer(name).keep_float for name in quantized)
    assert re.search(family_of(denoiser_of(kind)).keep_float, kept[0])


def test_the_table_counts_every_parameter(kind: str, denoiser_of: Make) -> None:
    denoiser = denoiser_of(kind)
    table = layer_table(denoiser)
    counted = sum(info.parameters + info.bias * info.shape[0] for info in table.layers) + table.other_parameters
    assert counted == sum(p.numel() for p in denoiser.parameters())
    for info in table.layers:
        layer = denoiser.get_submodule(info.name)
        assert info.shape == tuple(layer.weight.shape)
        assert info.kind == type(layer).__name__
        assert info.bias == (layer.bias is not None)


def test_the_fingerprint_tells_shapes_apart_but_not_weights(denoiser_of: Make) -> None:
    denoiser = denoiser_of("pixel")
    before = fingerprint(quantizable_layers(denoiser))
    with torch.no_grad():
        denoiser.conv_in.weight.add_(1)
    assert fingerprint(quantizable_layers(denoiser)) == before
    denoiser.conv_in = nn.Conv2d(3, 16, 1)
    assert fingerprint(quantizable_layers(denoiser)) != before


def test_the_fingerprint_and_shapes_stay_when_the_layers_hold_integers(mixed_denoiser: Make, denoiser_of: Make) -> None:
    float_table, mixed_table = layer_table(denoiser_of("pixel")), layer_table(mixed_denoiser("pixel"))
    assert mixed_table.fingerprint == float_table.fingerprint
    assert mixed_table.layers == float_table.layers


def test_padding_other_than_zeros_is_not_quantizable() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Conv2d(2, 2, 3), nn.Linear(2, 2))
    assert list(quantizable_layers(model)) == ["1", "2"]


def test_a_layer_class_with_a_forward_of_its_own_is_left_alone() -> None:
    class Odd(nn.Linear):
        pass

    assert quantizable_layers(nn.Sequential(Odd(2, 2), nn.Linear(2, 2))).keys() == {"1"}


def test_a_layer_that_the_model_lacks_is_named(denoiser_of: Make) -> None:
    with pytest.raises(PlanError, match="UNet2DModel has no Linear or Conv2d layer 'absent'"):
        layer_table(denoiser_of("pixel")).layer("absent")


def concatenations(denoiser: nn.Module, batch: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Layer name -> channels of the first of the two tensors whose concatenation the layer's resnet was given."""
    firsts: dict[int, tuple[torch.Tensor, int]] = {}
    found: dict[str, int] = {}
    whole = torch.cat

    def cat(tensors: Any, dim: int = 0, **rest: Any) -> torch.Tensor:
        out = whole(tensors, dim=dim, **rest)
        if dim == 1 and len(tensors) == 2:
            firsts[id(out)] = (out, tensors[0].shape[1])  # holding the tensor keeps its id its own
        return out

    for name, module in denoiser.named_modules():
        if re.search(r"resnets\.\d+$", name):

            def see(resnet: nn.Module, args: Any, name: str = name) -> None:
                if id(args[0]) in firsts:
                    found.update(
                        (f"{name}.{child}", firsts[id(args[0])][1])
                        for child in ("conv1", "conv_shortcut")
                        if getattr(resnet, child, None) is not None
                    )

            module.register_forward_pre_hook(see)
    monkeypatch.setattr(torch, "cat", cat)
    run(denoiser, batch)
    return found


def test_the_skip_split_is_where_the_model_concatenates(
    kind: str, denoiser_of: Make, recordings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, recording = denoiser_of(kind), recordings(kind)
    family = family_of(denoiser)
    told = {name: family.skip_split(name, denoiser) for name in quantizable_layers(denoiser)}
    real = concatenations(denoiser, recording.batch(recording.calls[0]), monkeypatch)
    assert {name: split for name, split in told.items() if split is not None} == real
    assert bool(real) == (kind != "dit")


def test_a_decoder_without_skip_connections_has_no_split() -> None:
    unet: Any = UNet2DModel(sample_size=8, block_out_channels=(16,), norm_num_groups=8, layers_per_block=1,
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    unet.up_blocks[0].resnets[0].conv1 = nn.Conv2d(16, 16, 3, padding=1)
    assert family_of(unet).skip_split("up_blocks.0.resnets.0.conv1", unet) is None
    assert family_of(unet).skip_split("up_blocks.0.resnets.1.conv1", unet) == 16


def test_stable_diffusions_own_shape_is_read_right(recordings: Callable[[str], Recording]) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    table = layer_table(unet)
    assert table.denoiser == "UNet2DConditionModel"
    # conv_in, 22 resnets, 16 transformers, 3 + 3 samplers, conv_out, embeddings
    assert len(table.blocks) == 1 + 22 + 16 + 6 + 1 + 1
    assert [block.name for block in table.blocks[:5]] == [
        "embeddings",
        "conv_in",
        "down_blocks.0.resnets.0",
        "down_blocks.0.attentions.0",
        "down_blocks.0.resnets.1",
    ]
    assert table.blocks[-1].name == "conv_out"
    middle = [block.name for block in table.blocks if block.part == "middle"]
    assert middle == ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"]


def test_only_layers_of_exactly_these_classes_are_quantizable_g36() -> None:
    """A subclass has a forward of its own; padding that is not zeros no kernel knows."""

    class Causal(nn.Conv2d):
        pass

    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "conv": nn.Conv2d(4, 4, 3, padding=1),
            "causal": Causal(4, 4, 3),
            "circular": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
            "transposed": nn.ConvTranspose2d(4, 4, 3),
            "three": nn.Conv3d(4, 4, 3),
            "embedding": nn.Embedding(4, 4),
        }
    )
    assert list(quantizable_layers(model)) == ["linear", "conv"]


LDM_UNET_BLOCKS = [
    ("embeddings", "encoder", ["time_embed.0", "label_emb.0.2"]),
    ("input_blocks.0.0", "encoder", ["input_blocks.0.0"]),
    ("input_blocks.1.0", "encoder", ["input_blocks.1.0.in_layers.2", "input_blocks.1.0.emb_layers.1"]),
    ("input_blocks.1.1", "encoder", ["input_blocks.1.1.proj_in", "input_blocks.1.1.transformer_blocks.0.attn1.to_q"]),
    ("input_blocks.3.0", "encoder", ["input_blocks.3.0.op"]),
    ("input_blocks.10.0", "encoder", ["input_blocks.10.0.in_layers.2"]),
    ("middle_block.0", "middle", ["middle_block.0.in_layers.2"]),
    ("middle_block.1", "middle", ["middle_block.1.proj_out"]),
    ("output_blocks.2.0", "decoder", ["output_blocks.2.0.skip_connection"]),
    ("output_blocks.2.2", "decoder", ["output_blocks.2.2.conv"]),
    ("output_blocks.11.0", "decoder", ["output_blocks.11.0.in_layers.2"]),
    ("out", "decoder", ["out.2"]),
]
"""Blocks of ComfyUI's U-Nets in execution order, their part and some of their layers."""


def test_the_blocks_of_the_original_unet_layout_stand_in_the_order_in_which_they_run() -> None:
    placed = [(FAMILIES["ldm_unet"].place(n, nn.Module()), b, p) for b, p, names in LDM_UNET_BLOCKS for n in names]
    assert [(block, part) for (_, block, part), _, _ in placed] == [(block, part) for _, block, part in placed]
    keys = list(dict.fromkeys(key for (key, _, _), _, _ in placed))
    assert keys == sorted(keys)
    assert len(keys) == len(LDM_UNET_BLOCKS)


@pytest.mark.parametrize(
    ("family", "kept", "quantized"),
    [
        (
            "ldm_unet",
            ["time_embed.0", "label_emb.0.2", "input_blocks.0.0", "out.2", "middle_block.0.emb_layers.1"],
            ["input_blocks.3.0.op", "output_blocks.0.0.in_layers.2", "input_blocks.1.1.proj_in"],
        ),
        (
            "dit",
            ["img_in", "time_in.in_layer", "vector_in.out_layer", "guidance_in.in_layer", "txt_in",
             "final_layer.linear", "double_blocks.0.img_mod.lin", "single_blocks.3.modulation.lin", "x_embedder.proj",
             "t_embedder.mlp.0", "y_embedder.mlp.2", "context_embedder", "joint_blocks.0.x_block.adaLN_modulation.1",
             "final_layer.adaLN_modulation.1", "distilled_guidance_layer.layers.0.in_layer"],
            ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "joint_blocks.0.x_block.mlp.fc1",
             "joint_blocks.0.context_block.attn.proj", "double_blocks.1.txt_mlp.2"],
        ),
    ],
)  # fmt: skip
def test_time_path_and_ends_of_comfyuis_denoisers_stay_float_by_default(
    family: str, kept: list[str], quantized: list[str]
) -> None:
    pattern = FAMILIES[family].keep_float
    assert [name for name in kept if not re.search(pattern, name)] == []
    assert [name for name in quantized if re.search(pattern, name)] == []


def test_families_of_comfyui_are_looked_for_in_no_pipeline() -> None:
    assert {name for name, family in FAMILIES.items() if not family.components} == {"dit", "ldm_unet"}


def test_the_middle_is_an_attention_else_a_resnet_else_the_way_up(denoiser_of: Make) -> None:
    names = {kind: family_of(denoiser_of(kind)).middle(denoiser_of(kind)) for kind in ("bundled", "dit")}
    assert names == {"bundled": "mid_block.attentions.0", "dit": "transformer_blocks.1"}
    shape: Any = {"sample_size": 8, "block_out_channels": (16,), "norm_num_groups": 8, "layers_per_block": 1,
                  "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}  # fmt: skip
    others: dict[str, Any] = {
        "mid_block.attentions.0": {},
        "mid_block.resnets.0": {"add_attention": False},
        "up_blocks.0.resnets.0": {"mid_block_type": None},
    }
    for expected, options in others.items():
        unet = UNet2DModel(**shape, **options)
        assert family_of(unet).middle(unet) == expected


@pytest.mark.parametrize(
    ("family", "modules", "expected"),
    [
        ("ldm_unet", {"middle_block": nn.ModuleList([nn.Identity() for _ in range(3)])}, "middle_block.1"),
        ("ldm_unet", {"middle_block": nn.ModuleList([nn.Identity()])}, "middle_block.0"),
        ("dit", {"double_blocks": nn.ModuleList([nn.Identity() for _ in range(5)])}, "double_blocks.2"),
        ("transformer", {"none": nn.ModuleList()}, ""),
        ("unet", {}, ""),
    ],
)
def test_the_middle_of_other_layouts(family: str, modules: dict[str, nn.Module], expected: str) -> None:
    denoiser = nn.Module()
    for name, module in modules.items():
        denoiser.add_module(name, module)
    assert FAMILIES[family].middle(denoiser) == expected
