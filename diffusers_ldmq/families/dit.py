"""Diffusion transformers in the layouts of their original code, which ComfyUI runs: embedders, lists of blocks, a final
layer. Stable Diffusion 3 (MMDiT), Flux, Chroma."""

from .contract import Family
from .transformer import middle, place, skip_split

FAMILY = Family(
    name="dit",
    components=(),
    classes=("MMDiT", "Flux", "Chroma"),
    place=place,
    # embedders, the modulation (adaLN) path and both ends: hardly any work, every block depends on them
    keep_float=r"^(\w+_in|\w+_embedder|distilled_guidance_layer|final_layer|\w*modulation\w*)(\.|$)"
    r"|\.(\w+_mod|modulation|adaLN_modulation)\.",
    skip_split=skip_split,
    units=("JointBlock", "DoubleStreamBlock", "SingleStreamBlock"),
    middle=middle,
)
