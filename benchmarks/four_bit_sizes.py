"""Bytes of U-Nets with 4-bit weights, to fp32: the bundled model and Stable Diffusion 1.5's shape, every layer in the
scheme or all but those that stay float by default. Nothing is loaded or computed: sizes follow from shapes.

    python benchmarks/four_bit_sizes.py
"""

from typing import Any

import torch
import typer
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table

from diffusers_ldmq.demo import demo_model
from diffusers_ldmq.families import layer_table
from diffusers_ldmq.planners import fp32_bytes, plan_bytes

SCHEMES = ("w4a8", "w4a16", "w4a16-g64", "w4a16-g32")
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def unets() -> dict[str, UNet2DConditionModel]:
    """Without values."""
    bundled: Any = UNet2DConditionModel.load_config(demo_model() / "unet")
    with torch.device("meta"):
        return {"bundled": UNet2DConditionModel(**bundled), "SD 1.5": UNet2DConditionModel(**SD15)}


def main() -> None:
    """Print the table."""
    shown = Table("U-Net", "scheme", "every layer", "default layers float")
    for name, unet in unets().items():
        table = layer_table(unet)
        for scheme in SCHEMES:
            cells = []
            for keep in (False, True):
                size = plan_bytes(table, {i.name: scheme for i in table.layers if not (keep and i.keep_float)})
                cells.append(f"{size / 1e6:.2f} MB = {size / fp32_bytes(table):.4f}x")
            shown.add_row(name, scheme, *cells)
    Console(width=120).print(shown)


if __name__ == "__main__":
    typer.run(main)
