"""What pictures are measured with: one file, one network. folder -> FeatureExtractor."""

import os
from collections.abc import Callable

from ..errors import EvaluationError
from ..registry import Registry
from .classifier import ClassifierExtractor
from .clip import Clip, ClipExtractor
from .contract import FeatureExtractor, Features, read_config
from .inception import InceptionExtractor

EXTRACTORS: Registry[Callable[[str | os.PathLike[str]], FeatureExtractor]] = Registry("extractor")
EXTRACTORS.add("classifier", ClassifierExtractor)
EXTRACTORS.add("clip", ClipExtractor)
EXTRACTORS.add("inception", InceptionExtractor)


def load_extractor(folder: str | os.PathLike[str]) -> FeatureExtractor:
    """The extractor in a folder; its config.json says by 'architecture' (or, for transformers' models, 'model_type')
    which kind it is. Raises EvaluationError for a folder that holds none."""
    config = read_config(folder)
    kind = str(config.get("architecture") or config.get("model_type"))
    if kind not in EXTRACTORS:
        raise EvaluationError(
            f"{folder}: config.json names the architecture {kind[:40]!r}; known: {', '.join(EXTRACTORS)}"
        )
    return EXTRACTORS[kind](folder)


__all__ = ["EXTRACTORS", "Clip", "FeatureExtractor", "Features", "load_extractor"]
