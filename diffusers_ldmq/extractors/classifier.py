"""A small picture classifier whose features measure generated pictures where Inception's weights are not at hand.

Three groups of two 3x3 convolutions after a fixed whitening of 2x2 patches, in the manner of Keller Jordan's
"94% on CIFAR-10 in 3.29 seconds" (arXiv 2404.00498), with a mean instead of a maximum before the last layer, so that
the pooled features describe the whole picture. Its FID is not comparable with one measured with Inception.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import gelu

from ..errors import EvaluationError
from .contract import (
    CONFIG,
    WEIGHTS,
    FeatureExtractor,
    Features,
    files_digest,
    leading_channels,
    load_weights,
    read_config,
)

NAME = "classifier"
PATCH = 2
"""Side of the whitened patches."""
PIXELS = 32
"""Side of the pictures that the network is made for."""


@dataclass(frozen=True)
class Architecture:
    """What has to be known to build the network."""

    widths: tuple[int, int, int] = (64, 192, 256)
    classes: int = 10


class Group(nn.Module):
    """Convolution, halving, convolution; each normalised over the batch and followed by GELU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Half as wide and high as x [n, inputs, h, w]."""
        x = gelu(self.norm1(nn.functional.max_pool2d(self.conv1(x), 2)))
        return gelu(self.norm2(self.conv2(x)))


class PictureClassifier(nn.Module):
    """Logits [n, classes] of pictures, float [n, 3, 32, 32] between -1 and 1."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        patch_values = 3 * PATCH * PATCH
        self.whiten = nn.Conv2d(3, 2 * patch_values, PATCH)
        self.whiten.weight.requires_grad_(False)
        first, second, third = architecture.widths
        self.group1, self.group2 = Group(2 * patch_values, first), Group(first, second)
        self.group3 = Group(second, third)
        self.head = nn.Linear(third, architecture.classes)

    def features(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [n, widths[2]], which the last layer sees, and the map [n, widths[1], 7, 7] of the second
        group."""
        spatial = self.group2(self.group1(gelu(self.whiten(pictures))))
        return self.group3(spatial).mean((2, 3)), spatial

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits of the classes."""
        return self.head(self.features(pictures)[0])

    @torch.no_grad()
    def set_whitening(self, pictures: Tensor, floor: float = 2e-3) -> None:
        """Let the first layer decorrelate the patches of `pictures`; each direction enters with both signs."""
        patches = nn.functional.unfold(pictures, PATCH).transpose(1, 2).flatten(0, 1).double()
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + floor).sqrt()).T.reshape(-1, 3, PATCH, PATCH).float()
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def save_classifier(network: PictureClassifier, folder: Path, facts: dict[str, Any]) -> None:
    """Write the weights in float16, and the architecture with `facts` about them as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: _half(value) for name, value in network.state_dict().items()}
    save_file(half, folder / WEIGHTS, metadata={"format": "pt"})
    described = {"architecture": NAME} | asdict(network.architecture) | {"features": network.architecture.widths[2]}
    (folder / CONFIG).write_text(json.dumps(described | facts, indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: str | os.PathLike[str]) -> PictureClassifier:
    """The stored classifier in float32, ready to use. Raises EvaluationError for a folder that holds none."""
    config = read_config(folder)
    widths: Any = config.get("widths")
    classes: Any = config.get("classes")
    three = isinstance(widths, list) and len(widths) == 3
    if not three or not all(isinstance(n, int) and 0 < n <= 4096 for n in (*widths, classes)):
        found = f"widths {str(widths)[:40]} and classes {str(classes)[:40]}"
        raise EvaluationError(f"{Path(folder) / CONFIG}: {found}; expected three widths and a number of classes")
    network = PictureClassifier(Architecture(tuple(widths), classes))
    load_weights(network, folder)
    return network.eval()


class ClassifierExtractor(FeatureExtractor):
    """The classifier's pooled features, its 7x7 map and its logits. The name says which classifier and how good."""

    pixels = PIXELS

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.network = load_classifier(folder)
        self.digest = files_digest(folder)
        accuracy = read_config(folder).get("test_accuracy")
        told = f", {100 * accuracy:.2f} %" if isinstance(accuracy, (int, float)) else ""
        self.name = f"{Path(folder).resolve().name}{told}"
        self.device = "cpu"

    def to(self, device: str) -> "ClassifierExtractor":
        """The same extractor, computing on that device."""
        self.network, self.device = self.network.to(device), device
        return self

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Features:
        """Features of pictures, uint8 [n, 3, 32, 32]."""
        self.check_size(*pictures.shape[2:])
        pooled, spatial = self.network.features(pictures.to(self.device).float() / 127.5 - 1)
        logits = self.network.head(pooled)
        return Features(pooled.cpu(), leading_channels(spatial, pooled.shape[1]).cpu(), logits.cpu())


def _half(value: Tensor) -> Tensor:
    return (value.half() if value.is_floating_point() else value).cpu().contiguous()
