"""InceptionV3 (Szegedy 2015, arXiv 1512.00567) in the variant that FID is defined with (Heusel 2017).

The usual weights are pt_inception-2015-12-05-6726825d.pth, TensorFlow's of 2015 in PyTorch's names. As this library
never unpickles, they are converted once:

    state = torch.load("pt_inception-2015-12-05-6726825d.pth", weights_only=True)
    safetensors.torch.save_file(state, "inception/model.safetensors")

with {"architecture": "inception"} as inception/config.json. Tested here with random weights for shapes and errors;
values with the usual weights are untested.
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

from .contract import FeatureExtractor, Features, files_digest, leading_channels, load_weights, read_config

NAME = "inception"
PIXELS = 299
"""Side that every picture is resized to."""
CLASSES = 1008
"""Of TensorFlow's 2015 model."""
IGNORED = ("num_batches_tracked",)
"""Counters that older files lack; nothing is computed from them."""


class Convolution(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True
    ) -> None:
        super().__init__()
        height, width = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        padding = (height // 2, width // 2) if pad else 0
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, inputs, h, w]."""
        return relu(self.bn(self.conv(x)))


def _mean3(x: Tensor) -> Tensor:
    """Mean of 3x3 neighbours; at the border of those that exist, as TensorFlow does."""
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max3(x: Tensor) -> Tensor:
    return max_pool2d(x, 3, stride=1, padding=1)


class Mixed(nn.Module):
    """Branches of convolutions whose outputs are concatenated. Chains run one after the other; the modules' names are
    those of the usual weights."""

    def _chain(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = getattr(self, name)(x)
        return x

    def _split(self, x: Tensor, *names: str) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in names], 1)


class MixedA(Mixed):
    """35x35 maps."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Convolution(inputs, 48, 1), Convolution(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inputs, 64, 1), Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3)
        self.branch_pool = Convolution(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 224 + pooled, 35, 35]"""
        five = self._chain(x, "branch5x5_1", "branch5x5_2")
        double = self._chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_mean3(x))], 1)


class MixedB(Mixed):
    """35x35 to 17x17."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(inputs, 384, 3, stride=2, pad=False)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inputs, 64, 1), Convolution(64, 96, 3)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 480 + inputs, 17, 17]"""
        double = self._chain(x, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
        return torch.cat([self.branch3x3(x), double, max_pool2d(x, 3, 2)], 1)


class MixedC(Mixed):
    """17x17 maps, convolutions of 7 in one direction at a time."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 192, 1)
        self.branch7x7_1 = Convolution(inputs, width, 1)
        self.branch7x7_2, self.branch7x7_3 = Convolution(width, width, (1, 7)), Convolution(width, 192, (7, 1))
        self.branch7x7dbl_1 = Convolution(inputs, width, 1)
        self.branch7x7dbl_2, self.branch7x7dbl_3 = Convolution(width, width, (7, 1)), Convolution(width, width, (1, 7))
        self.branch7x7dbl_4, self.branch7x7dbl_5 = Convolution(width, width, (7, 1)), Convolution(width, 192, (1, 7))
        self.branch_pool = Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 768, 17, 17]"""
        seven = self._chain(x, *(f"branch7x7_{i}" for i in (1, 2, 3)))
        double = self._chain(x, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_mean3(x))], 1)


class MixedD(Mixed):
    """17x17 to 8x8."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(inputs, 192, 1)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2, pad=False)
        self.branch7x7x3_1, self.branch7x7x3_2 = Convolution(inputs, 192, 1), Convolution(192, 192, (1, 7))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2, pad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 512 + inputs, 8, 8]"""
        three = self._chain(x, "branch3x3_1", "branch3x3_2")
        seven = self._chain(x, *(f"branch7x7x3_{i}" for i in (1, 2, 3, 4)))
        return torch.cat([three, seven, max_pool2d(x, 3, 2)], 1)


class MixedE(Mixed):
    """8x8 maps. The last one takes a maximum where the others take a mean: an oddity of the 2015 graph."""

    def __init__(self, inputs: int, *, last: bool = False) -> None:
        super().__init__()
        self.pool = _max3 if last else _mean3
        self.branch1x1 = Convolution(inputs, 320, 1)
        self.branch3x3_1 = Convolution(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Convolution(384, 384, (1, 3)), Convolution(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Convolution(inputs, 448, 1), Convolution(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Convolution(384, 384, (1, 3)), Convolution(384, 384, (3, 1))
        self.branch_pool = Convolution(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 2048, 8, 8]"""
        three = self._split(self.branch3x3_1(x), "branch3x3_2a", "branch3x3_2b")
        double = self._chain(x, "branch3x3dbl_1", "branch3x3dbl_2")
        double = self._split(double, "branch3x3dbl_3a", "branch3x3dbl_3b")
        return torch.cat([self.branch1x1(x), three, double, self.branch_pool(self.pool(x))], 1)


class InceptionV3(nn.Module):
    """Pictures, float [n, 3, 299, 299] about -1 to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2, pad=False)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = MixedA(192, 32), MixedA(256, 64), MixedA(288, 64)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b, self.Mixed_6c = MixedC(768, 128), MixedC(768, 160)
        self.Mixed_6d, self.Mixed_6e = MixedC(768, 160), MixedC(768, 192)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b, self.Mixed_7c = MixedE(1280), MixedE(2048, last=True)
        self.fc = nn.Linear(2048, CLASSES)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features [n, 2048] and the map [n, 768, 17, 17] of Mixed_6d, whose first 192 channels are
        TensorFlow's mixed_6/conv, where sFID is taken."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, 2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(max_pool2d(x, 3, 2))))
        spatial = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(spatial)))).mean((2, 3)), spatial

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes without their bias, which is how the Inception Score is defined."""
        return self.features(x)[0] @ self.fc.weight.T


def resized(pictures: Tensor, side: int = PIXELS) -> Tensor:
    """Pictures float [n, c, h, w] resized as TensorFlow 1 did it: bilinear, no smoothing, pixel k at k * in / out."""
    for axis in (2, 3):
        size = pictures.shape[axis]
        places = torch.arange(side, device=pictures.device, dtype=torch.float32) * (size / side)
        low = places.long()
        high = (low + 1).clamp(max=size - 1)
        share = (places - low).view([side, 1] if axis == 2 else [side])
        first, second = pictures.index_select(axis, low), pictures.index_select(axis, high)
        pictures = first + (second - first) * share
    return pictures


class InceptionExtractor(FeatureExtractor):
    """The 2048 pooled features of FID, the map of sFID, the logits of the Inception Score."""

    pixels = None

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        read_config(folder)
        self.network = InceptionV3()
        load_weights(self.network, folder, IGNORED)
        self.network.eval()
        self.name = f"inception {Path(folder).resolve().name}"
        self.digest, self.device = files_digest(folder), "cpu"

    def to(self, device: str) -> "InceptionExtractor":
        """The same extractor, computing on that device."""
        self.network, self.device = self.network.to(device), device
        return self

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Features:
        """Features of pictures, uint8 [n, 3, h, w] of any size."""
        x = (resized(pictures.to(self.device).float()) - 128) / 128
        pooled, spatial = self.network.features(x)
        logits = pooled @ self.network.fc.weight.T
        return Features(pooled.cpu(), leading_channels(spatial, pooled.shape[1]).cpu(), logits.cpu())
