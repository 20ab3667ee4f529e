"""Trains an unconditional latent diffusion model on CIFAR-10: a small UNet2DModel on an existing autoencoder's latents.

    python benchmarks/train/cifar_unconditional.py cifar10_train.zip --state state/
    python benchmarks/train/cifar_unconditional.py cifar10_train.zip --state state/ --steps 60000

Pictures come in one folder per class (the classes are not learned), from a folder or a zip file. The autoencoder is
the one that `cifar_latent.py vae` left in the same state folder, else that of the pipeline named by init, which is
the class-conditional model unless `--set init=` says otherwise. `--state` keeps what an interrupted run goes on from;
the model folder receives a float16 LDMPipeline with every checkpoint. Without a state, training starts from the UNet
in that folder if there is one. The rate stays constant, so a finished run goes on with a larger `--steps`.
"""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import typer
from cifar_latent_parts import LATENTS, LatentDenoiser, LatentWorkspace, weights_digest
from cifar_training import MODELS, PIXELS, Changes, Data, Model, State, Steps, train_to_model
from class_images import load_class_images
from diffusers import AutoencoderKL, LDMPipeline, UNet2DModel
from torch import Tensor
from training_command import errors_in_one_line, parse_settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
STEPS, BATCH, RATE = 30_000, 64, 8e-4  # where the command line names none
RECIPE = ["schedule=constant", "ema=0.999"]  # settings whose defaults differ from the other scripts'
AUTOENCODER = MODELS / "cifar-classes"


class UnconditionalWorkspace(LatentWorkspace):
    """The state's parts; behind them the UNet of an earlier model and another pipeline's autoencoder."""

    kinds: ClassVar[dict[str, Any]] = {"vae": AutoencoderKL, "unet": UNet2DModel}

    def find(self, part: str) -> Path | None:
        folders = [self.folders[0], self.model] if part == "unet" else self.folders
        return next((folder / part for folder in folders if (folder / part).is_dir()), None)

    def new_pipeline(self, components: dict[str, Any]) -> Any:
        vqvae = components.pop("vae")  # LDMPipeline's name for any autoencoder
        return LDMPipeline(vqvae=vqvae, **components)


class UnconditionalTask(LatentDenoiser):
    """Predict the velocity of a picture's noisy latents."""

    part = "unet"

    def new(self, width: int) -> Any:
        return new_unet(width)

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        return self.velocity_loss(lambda noisy, times: self.trained(noisy, times).sample, rows, generator)


def new_unet(width: int) -> Any:
    """Two levels, both with attention: 4.08 M parameters and 0.19 GFLOP per picture and step at width 64."""
    return UNet2DModel(
        sample_size=LATENTS,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=(width, 2 * width),
        attention_head_dim=width // 2,
        norm_num_groups=8,
        down_block_types=("AttnDownBlock2D",) * 2,
        up_block_types=("AttnUpBlock2D",) * 2,
    )


@app.command(help=__doc__)
def main(
    data: Data,
    state: State,
    model: Model = MODELS / "cifar-unconditional",
    steps: Steps = STEPS,
    settings: Changes = None,
) -> None:
    with errors_in_one_line():
        chosen = parse_settings([*RECIPE, *(settings or [])], steps, 0).with_defaults(STEPS, BATCH, RATE)
        torch.manual_seed(chosen.seed)
        init = chosen.init or (str(AUTOENCODER) if AUTOENCODER.is_dir() else "")
        workspace = UnconditionalWorkspace(state, model, init)
        pictures = load_class_images(data, PIXELS)
        task = UnconditionalTask(workspace, pictures, chosen)
        seen = f"{pictures.fingerprint()}, autoencoder {weights_digest(workspace.load('vae'))}"
        keep = partial(workspace.keep, task.part, task.parts)
        train_to_model(task, chosen, seen, state / "unconditional.safetensors", keep)


if __name__ == "__main__":
    app()
