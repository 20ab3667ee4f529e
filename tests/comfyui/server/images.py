"""Pictures that a server has written."""

from typing import Any

import numpy as np
from comfyui.server.comfy_server import Server
from PIL import Image


def pictures(server: Server, outputs: dict[str, Any]) -> list[np.ndarray]:
    """What Save Image wrote, all of it in the output folder: fp32 [H, W, 3] in 0..1."""
    told = [image for output in outputs.values() for image in output.get("images", []) if image["type"] == "output"]
    files = [server.base / "output" / image["subfolder"] / image["filename"] for image in told]
    assert all(file.resolve().is_relative_to(server.base / "output") for file in files)
    return [np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255 for file in files]


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """In dB; 120 for equal ones."""
    return float(-10 * np.log10(max(np.square(first - second).mean(), 1e-12)))
