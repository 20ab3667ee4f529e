"""Trains a class-conditional latent diffusion model on CIFAR-10: a small autoencoder, then a DiT on its latents.

    python benchmarks/train/cifar_latent.py all cifar10_train.zip --state state/
    python benchmarks/train/cifar_latent.py denoiser cifar10_train.zip --state state/ --steps 60000

Pictures come in one folder per class, from a folder or a zip file. `--state` keeps what an interrupted run goes on
from; the model folder receives a float16 DiTPipeline with every checkpoint, as soon as both parts exist. Without a
state, training starts from the model in that folder if there is one. The denoiser's rate stays constant, so a
finished run goes on with a larger `--steps`.
"""

from enum import StrEnum
from functools import partial
from typing import Annotated

import torch
import typer
from captioned_images import CaptionedImages
from cifar_latent_parts import AutoencoderOfClasses, DenoiserOfClasses, WorkspaceOfClasses, weights_digest
from cifar_training import MODELS, PIXELS, Changes, Data, Model, State, Steps, train_to_model
from class_images import class_names, load_class_images
from training_command import errors_in_one_line, parse_settings
from training_loop import Settings, log

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Stage(StrEnum):
    """What to train; `all` is the two others in this order."""

    VAE = "vae"
    DENOISER = "denoiser"
    ALL = "all"


# Steps, batch and peak rate where the command line names none; settings whose defaults differ from other scripts'.
DEFAULTS = {Stage.VAE: (4000, 32, 1e-3), Stage.DENOISER: (40_000, 64, 1e-3)}
RECIPES = {Stage.VAE: ["ema=0.995"], Stage.DENOISER: ["schedule=constant", "ema=0.999"]}


def run_stage(stage: Stage, data: CaptionedImages, workspace: WorkspaceOfClasses, settings: Settings) -> None:
    """Trains one stage and renews the parts and the pipeline with every checkpoint."""
    torch.manual_seed(settings.seed)
    checkpoint = workspace.out / f"{stage.value}.safetensors"
    if stage is Stage.VAE:
        task, part, seen = AutoencoderOfClasses(workspace, data, settings), "vae", data.fingerprint()
    else:
        task, part = DenoiserOfClasses(workspace, data, settings), "transformer"
        seen = f"{data.fingerprint()}, autoencoder {weights_digest(workspace.load('vae'))}"
    keep = partial(workspace.keep, part, task.parts)
    train_to_model(task, settings, seen, checkpoint, keep)
    if workspace.export():
        log.info("pipeline saved in %s", workspace.model)


@app.command(help=__doc__)
def main(
    stage: Annotated[Stage, typer.Argument(help="What to train.")],
    data: Data,
    state: State,
    model: Model = MODELS / "cifar-classes",
    steps: Steps = 0,
    settings: Changes = None,
) -> None:
    with errors_in_one_line():
        stages = (Stage.VAE, Stage.DENOISER) if stage is Stage.ALL else (stage,)
        chosen = {each: parse_settings([*RECIPES[each], *(settings or [])], steps, 0) for each in stages}
        pictures = load_class_images(data, PIXELS)
        workspace = WorkspaceOfClasses(state, model, class_names(pictures))
        for each in stages:
            run_stage(each, pictures, workspace, chosen[each].with_defaults(*DEFAULTS[each]))


if __name__ == "__main__":
    app()
