"""Pictures of a comparison, decoded and put side by side."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from .native.comparing import Comparison

GAIN = 8.0
"""So many times as bright a difference is shown: what differs by one part in eight is white."""


def picture_pairs(vae: Any, comparison: "Comparison") -> "Tensor":
    """Reference, model and their difference. [B, H, W, 3] in 0..1; videos give one picture per frame."""
    from .charts import difference, side_by_side
    from .texts import decibels

    one, other = (_decoded(vae, latent) for latent in comparison.latents)
    return side_by_side(
        [
            ("reference", one),
            (f"model: {decibels(comparison.latent_db)}", other),
            (f"difference x{GAIN:g}", difference(one, other, GAIN)),
        ]
    )


def _decoded(vae: Any, latent: "Tensor") -> "Tensor":
    pictures = vae.decode(latent)
    return pictures.reshape(-1, *pictures.shape[-3:])[..., :3]
