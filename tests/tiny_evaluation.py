"""What tests of the evaluation share: extractors with random weights, folders of pictures, a pipeline for 32x32."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from safetensors.torch import save_file
from tiny_pipelines import clip_tokenizer, drawing, finished, plain_unet
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor
from transformers.models.clip.configuration_clip import CLIPConfig

from diffusers_ldmq.extractors.classifier import Architecture, PictureClassifier, save_classifier
from diffusers_ldmq.extractors.inception import InceptionV3

FEATURES = 12
"""Pooled features of the classifier."""
CLIP_SIDE = 16


def classifier_folder(folder: Path, seed: int = 0) -> Path:
    """A classifier of three classes with random weights that answer to the picture."""
    torch.manual_seed(seed)
    network = PictureClassifier(Architecture((4, 49, FEATURES), 3))
    network.head.weight.data.mul_(20)
    save_classifier(network, folder, {"test_accuracy": 0.5})
    return folder


def inception_folder(folder: Path) -> Path:
    """Inception with random weights, in float16, and without the counters that the usual file lacks."""
    torch.manual_seed(0)
    network = InceptionV3()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    folder.mkdir(parents=True)
    weights = {name: value.half() for name, value in network.state_dict().items() if "num_batches" not in name}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "inception"}))
    return folder


def clip_folder(folder: Path) -> Path:
    """CLIP with random weights, for pictures of CLIP_SIDE pixels cut into four patches."""
    torch.manual_seed(0)
    tokenizer: Any = clip_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {
        **tower,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**tower, "image_size": CLIP_SIDE, "patch_size": CLIP_SIDE // 2}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    side = {"height": CLIP_SIDE, "width": CLIP_SIDE}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": CLIP_SIDE}, crop_size=side), tokenizer).save_pretrained(
        folder
    )
    return folder


def picture_folder(folder: Path, count: int, *, first: int = 0, size: int = 32) -> Path:
    """Pictures of noise, each another one, in subfolders of ten."""
    for number in range(first, first + count):
        place = folder / f"class{number // 10}"
        place.mkdir(parents=True, exist_ok=True)
        drawing(number, size).save(place / f"{number:03d}.png")
    return folder


def tiny_ddim32() -> Any:
    """Unconditional, in pixels, as large as the classifier's pictures."""
    torch.manual_seed(0)
    return finished(DDIMPipeline(plain_unet(32), DDIMScheduler()))
