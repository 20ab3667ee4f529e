"""What the CIFAR-10 denoisers share: noise schedule, loss, and how a pipeline's folder is renewed.

Cosine schedule, velocity prediction (Salimans and Ho 2022) and min-SNR weights (Hang et al. 2023): all three let a
small network learn in few steps, and a pipeline needs no more than 20 steps to draw.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

TIMES = 1000  # diffusion times
NOISE: dict[str, Any] = {
    "num_train_timesteps": TIMES,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
}
NOISING: Any = DDPMScheduler(**NOISE)
LARGEST_SNR = 5.0  # min-SNR's gamma


def new_scheduler(clip_sample: bool) -> DDIMScheduler:
    """The scheduler of a finished pipeline; `clip_sample` where pixels, not latents, are drawn."""
    return DDIMScheduler(**NOISE, clip_sample=clip_sample, timestep_spacing="trailing")


def loss_weights() -> Tensor:
    """The weight of the velocity's squared error at each diffusion time, float32 [TIMES]."""
    kept = NOISING.alphas_cumprod
    # Of the picture's squared error min(SNR, 5) is wanted, and the velocity's is that of the picture times SNR + 1.
    return (kept / (1 - kept)).clamp(max=LARGEST_SNR) * (1 - kept)


WEIGHTS = loss_weights()


def velocity_loss(predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, generator: torch.Generator) -> Tensor:
    """The weighted loss of `predict(noisy, times)` on `clean` [n, c, h, w], at times spread evenly over the batch."""
    n = len(clean)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    spread = (torch.arange(n) + torch.rand(1, generator=generator)) / n
    times = (spread * TIMES).long().clamp(max=TIMES - 1).to(clean.device)
    velocity = NOISING.get_velocity(clean, noise, times)
    predicted = predict(NOISING.add_noise(clean, noise, times), times)
    error = (predicted.float() - velocity).square().mean((1, 2, 3))
    return (WEIGHTS.to(clean.device)[times] * error).mean()


def renew_folder(folder: Path, save: Callable[[Path], Any]) -> None:
    """Lets `save` write into a new folder and renames its files into `folder`; what else is there stays."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as made:
        save(Path(made))
        for file in sorted(path for path in Path(made).rglob("*") if path.is_file()):
            place = folder / file.relative_to(made)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
