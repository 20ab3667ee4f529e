"""Families of the denoisers that ComfyUI runs, on its own classes."""

from types import ModuleType
from typing import Any

import pytest
import torch
from comfyui.tiny_models import MODELS, sample, tiny_model

from diffusers_ldmq.families import family_of

FAMILY = {"sd15": "ldm_unet", "sdxl": "ldm_unet", "sd3": "dit", "flux": "dit"}


def placed(denoiser: Any, names: list[str]) -> list[tuple[tuple[int, ...], str, str]]:
    family = family_of(denoiser)
    return [family.place(name, denoiser) for name in names]


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_of_comfyuis_denoisers_stand_in_the_order_in_which_they_run(kind: str, comfy: ModuleType) -> None:
    from comfyui_nodes.native.patching import source_layers

    model = tiny_model(kind)
    denoiser, order, handles = model.model.diffusion_model, {}, []
    assert family_of(denoiser).name == FAMILY[kind]
    for name, layer in source_layers(model).items():
        handles.append(layer.register_forward_hook(lambda *_, name=name: order.setdefault(name)))
    sample(model, kind, steps=1)
    for handle in handles:
        handle.remove()
    assert set(order) == set(source_layers(model))
    found = placed(denoiser, list(order))
    keys = [key for key, block, _ in found if block != "embeddings"]
    assert keys == sorted(keys)
    assert all(block.split(".")[0] in dict(denoiser.named_children()) or block == "embeddings" for _, block, _ in found)
    parts = list(dict.fromkeys(part for _, _, part in sorted(found)))
    assert parts == (["encoder", "middle", "decoder"] if FAMILY[kind] == "ldm_unet" else ["encoder", "decoder"])


@pytest.mark.parametrize("kind", MODELS)
def test_the_skip_split_is_where_comfyuis_denoisers_concatenate(
    kind: str, comfy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfyui_nodes.native.patching import source_layers

    model = tiny_model(kind)
    denoiser, whole = model.model.diffusion_model, torch.cat
    family = family_of(denoiser)
    firsts: dict[int, tuple[torch.Tensor, int]] = {}
    real: dict[str, int] = {}

    def cat(tensors: Any, dim: int = 0, **rest: Any) -> torch.Tensor:
        out = whole(tensors, dim=dim, **rest)
        if dim == 1 and len(tensors) == 2 and out.dim() == 4:
            firsts[id(out)] = (out, tensors[0].shape[1])
        return out

    def see(name: str) -> Any:
        def hook(resnet: Any, args: Any) -> None:
            if id(args[0]) in firsts:
                real[f"{name}.in_layers.2"] = firsts[id(args[0])][1]
                if hasattr(resnet.skip_connection, "weight"):
                    real[f"{name}.skip_connection"] = firsts[id(args[0])][1]

        return hook

    for name, module in denoiser.named_modules():
        if hasattr(module, "skip_connection"):
            module.register_forward_pre_hook(see(name))
    monkeypatch.setattr(torch, "cat", cat)
    sample(model, kind, steps=1)
    told = {name: family.skip_split(name, denoiser) for name in source_layers(model)}
    assert {name: split for name, split in told.items() if split is not None} == real
    assert bool(real) == (FAMILY[kind] == "ldm_unet")


MIDDLE = {"sd15": "middle_block.1", "sdxl": "middle_block.1", "sd3": "joint_blocks.2", "flux": "double_blocks.1"}


@pytest.mark.parametrize("kind", MODELS)
def test_the_middle_is_a_block_that_runs(kind: str, comfy: ModuleType) -> None:
    model, seen = tiny_model(kind), []
    denoiser = model.model.diffusion_model
    assert family_of(denoiser).middle(denoiser) == MIDDLE[kind]
    handle = denoiser.get_submodule(MIDDLE[kind]).register_forward_hook(lambda *_: seen.append(kind))
    sample(model, kind, steps=1)
    handle.remove()
    assert seen
