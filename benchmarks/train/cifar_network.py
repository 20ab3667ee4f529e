"""The small CIFAR-10 classifier: its layers, its features, and how it is stored.

Three groups of two 3x3 convolutions after a fixed whitening of 2x2 patches, in the manner of Keller Jordan's
"94% on CIFAR-10 in 3.29 seconds" (arXiv 2404.00498), with a mean instead of a maximum before the last layer, so that
the pooled features describe the whole picture. The features serve as a feature extractor for FID.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import gelu

PATCH = 2  # side of the whitened patches
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class Architecture:
    """What has to be known to build the network. Pictures are float [n, 3, 32, 32] between -1 and 1."""

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
        x = gelu(self.norm1(nn.functional.max_pool2d(self.conv1(x), 2)))
        return gelu(self.norm2(self.conv2(x)))


class CifarClassifier(nn.Module):
    """Logits [n, classes] of pictures; `features` gives what the last layer sees, and the map two layers earlier."""

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
        """Pooled features [n, widths[2]] and the spatial map [n, widths[1], 7, 7] of the second group."""
        spatial = self.group2(self.group1(gelu(self.whiten(pictures))))
        return self.group3(spatial).mean((2, 3)), spatial

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures)[0])

    @torch.no_grad()
    def set_whitening(self, pictures: Tensor, floor: float = 2e-3) -> None:
        """Lets the first layer decorrelate the patches of `pictures`; each direction enters with both signs."""
        patches = nn.functional.unfold(pictures, PATCH).transpose(1, 2).flatten(0, 1).double()
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + floor).sqrt()).T.reshape(-1, 3, PATCH, PATCH).float()
        self.whiten.weight.copy_(torch.cat([filters, -filters]))


def save_classifier(network: CifarClassifier, folder: Path, facts: dict[str, Any]) -> None:
    """Writes the weights in float16, and the architecture with `facts` about them as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {name: _half(value) for name, value in network.state_dict().items()}
    save_file(half, folder / WEIGHTS, metadata={"format": "pt"})
    described = asdict(network.architecture) | {"features": network.architecture.widths[2]} | facts
    (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load_classifier(folder: Path) -> CifarClassifier:
    """The stored classifier in float32, ready to use."""
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    network = CifarClassifier(Architecture(tuple(config["widths"]), config["classes"]))
    network.load_state_dict({name: _single(value) for name, value in load_file(folder / WEIGHTS).items()})
    return network.eval()


def _half(value: Tensor) -> Tensor:
    return (value.half() if value.is_floating_point() else value).cpu().contiguous()


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
