"""The bundled model: a tiny, trained text-to-image latent diffusion pipeline, so that everything runs offline."""

from importlib import resources
from pathlib import Path

MODEL = "emoji-sd"
"""The word that stands for the bundled model wherever a model is asked for."""


def demo_model() -> Path:
    """Folder of the bundled pipeline: 64x64 emoji from their names, an ordinary diffusers folder."""
    # a package that holds 30 MB of weights is always installed unpacked, so the resource is a real folder
    return Path(str(resources.files(__name__).joinpath(MODEL)))


def demo_captions() -> list[str]:
    """32 captions to record the bundled model with."""
    return _lines("captions.txt")


def demo_prompts() -> list[str]:
    """8 prompts that the bundled model draws well, none of them among the captions."""
    return _lines("prompts.txt")


def _lines(name: str) -> list[str]:
    return [line for line in demo_model().joinpath(name).read_text(encoding="utf-8").splitlines() if line]
