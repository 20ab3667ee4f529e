"""CLIP (Radford 2021): a feature extractor, and the model behind the CLIP score.

Loaded by transformers from a folder or a hub id such as openai/clip-vit-base-patch16. Tested here with random weights
for shapes and errors; values with the published weights are untested.
"""

import hashlib
import os
from typing import Any

import torch
from torch import Tensor

from ..errors import EvaluationError
from .contract import FeatureExtractor, Features, leading_channels

NAME = "clip"


class Clip:
    """Model and processor as torchmetrics' CLIP score takes them: features come back as plain tensors."""

    def __init__(self, source: str | os.PathLike[str]) -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            self.model: Any = CLIPModel.from_pretrained(os.fspath(source)).eval()
            self.processor: Any = CLIPProcessor.from_pretrained(os.fspath(source))
        except (OSError, ValueError, LookupError, TypeError, RuntimeError) as cause:
            reason = " ".join(str(cause).split())[:200]
            raise EvaluationError(
                f"{source}: cannot be loaded as a CLIP model ({reason}); give a folder or hub id with the model and "
                f"its processor, such as openai/clip-vit-base-patch16"
            ) from None
        self.config = self.model.config

    def to(self, device: Any) -> "Clip":
        """The same model, computing on that device."""
        self.model = self.model.to(device)
        return self

    @torch.no_grad()
    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Projected embeddings of preprocessed pictures, fp32 [n, d]."""
        return _embedding(self.model.get_image_features(pixel_values))

    @torch.no_grad()
    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Projected embeddings of tokens, fp32 [n, d]."""
        return _embedding(self.model.get_text_features(input_ids, attention_mask))


def _embedding(output: Any) -> Tensor:
    """transformers 5 wraps what earlier versions gave as a tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output


class ClipExtractor(FeatureExtractor):
    """CLIP's projected picture embedding and its patch map; it names no classes, so there is no Inception Score."""

    pixels = None

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.clip = Clip(folder)
        self.name = f"clip {os.path.basename(os.path.normpath(folder))}"
        # by values, not files: a hub id has no folder
        digest = hashlib.sha256(repr(self.clip.config.to_diff_dict()).encode())
        for name, value in self.clip.model.state_dict().items():
            digest.update(name.encode() + value.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes())
        self.digest = digest.hexdigest()[:16]
        self.device = "cpu"

    def to(self, device: str) -> "ClipExtractor":
        """The same extractor, computing on that device."""
        self.clip, self.device = self.clip.to(device), device
        return self

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Features:
        """Features of pictures, uint8 [n, 3, h, w] of any size; the processor resizes and crops them."""
        pixels = self.clip.processor(images=list(pictures), return_tensors="pt")["pixel_values"].to(self.device)
        seen = self.clip.model.vision_model(pixel_values=pixels)
        pooled = self.clip.model.visual_projection(seen.pooler_output)
        patches = seen.last_hidden_state[:, 1:].transpose(1, 2)  # the first token stands for the whole picture
        side = round(patches.shape[2] ** 0.5)
        spatial = leading_channels(patches.unflatten(2, (side, side)), pooled.shape[1])
        return Features(pooled.float().cpu(), spatial.float().cpu(), None)
