"""Pictures sorted into one folder per class (`cat/0001.jpg`), the layout of ImageNet and torchvision's ImageFolder."""

from pathlib import Path, PurePosixPath

import numpy as np
import torch
from captioned_images import PICTURE_ENDINGS, CaptionedImages, Source, TrainingError, square
from torch import Tensor


def load_class_images(path: Path, size: int) -> CaptionedImages:
    """Every picture of a folder or zip file, `size` pixels square; its caption is the name of its folder."""
    source = Source(path)
    names = [name for name in source.names if PurePosixPath(name).suffix.lower() in PICTURE_ENDINGS]
    loose = [name for name in names if "/" not in name]
    if loose or not names:
        problem = f"{loose[0]} is in no folder" if loose else "there are no pictures"
        raise TrainingError(f"data {path}: {problem}; expected a folder per class with its pictures in it")
    pixels = torch.from_numpy(np.stack([square(source, name, size) for name in names]))
    return CaptionedImages(pixels.permute(0, 3, 1, 2).contiguous(), [PurePosixPath(name).parent.name for name in names])


def class_names(data: CaptionedImages) -> list[str]:
    """The classes in alphabetical order, which is their numbering."""
    return sorted(set(data.captions))


def labels_of(data: CaptionedImages) -> Tensor:
    """The number of every picture's class, int64 [N]."""
    number = {name: index for index, name in enumerate(class_names(data))}
    return torch.tensor([number[caption] for caption in data.captions])
