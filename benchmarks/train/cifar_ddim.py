"""Trains DDIM on CIFAR-10: a small UNet2DModel that draws 32x32 pictures pixel by pixel.

    python benchmarks/train/cifar_ddim.py cifar10_train.zip --state state/ --steps 20000

Pictures come in one folder per class (the classes are not learned), from a folder or a zip file. `--state` keeps what
an interrupted run goes on from; the model folder receives a float16 DDIMPipeline with every checkpoint. Without a
state, training starts from the model in that folder if there is one. The rate stays constant, so a finished run goes
on with a larger `--steps`.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from captioned_images import CaptionedImages
from cifar_diffusion import new_scheduler, renew_folder, velocity_loss
from cifar_training import MODELS, PIXELS, Changes, Data, Model, State, Steps, train_to_model, with_plain_attention
from class_images import load_class_images
from diffusers import DDIMPipeline, UNet2DModel
from pipeline_parts import without_path
from torch import Tensor, nn
from training_command import errors_in_one_line, parse_settings
from training_loop import Settings, log
from training_tasks import chosen_device, fast_autocast

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
STEPS, BATCH, RATE = 40_000, 32, 8e-4  # where the command line names none
RECIPE = ["schedule=constant", "ema=0.999"]  # settings whose defaults differ from the other scripts'


class PixelTask:
    """Predict the velocity of a noisy picture, which may be flipped."""

    def __init__(self, model: Path, data: CaptionedImages, settings: Settings) -> None:
        self.data, self.count = data, len(data.captions)
        self.device = chosen_device(settings.device)
        self.trained: Any = start_unet(model, settings.width).train().to(self.device)
        self.autocast = fast_autocast(self.device)

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        pictures = self.data.images(rows)
        flipped = torch.rand(len(rows), 1, 1, 1, generator=generator) < 0.5
        pictures = torch.where(flipped, pictures.flip(3), pictures).to(self.device)
        with self.autocast:
            return velocity_loss(lambda noisy, times: self.trained(noisy, times).sample, pictures, generator)

    def parts(self, average: nn.Module) -> dict[str, Any]:
        """The averaged UNet."""
        return {"unet": average}


def start_unet(model: Path, width: int) -> Any:
    """The UNet of the pipeline in `model`, or a new one."""
    if (model / "unet").is_dir():
        log.info("starting from the model in %s", model)
        unet: Any = without_path(UNet2DModel.from_pretrained(str(model), subfolder="unet").float(), "unet")
    else:
        unet = new_unet(width)
    return with_plain_attention(unet)


def new_unet(width: int) -> Any:
    """Attention at 8x8: 4.35 M parameters and 0.50 GFLOP per picture and step at width 64, most of it at 32x32."""
    return UNet2DModel(
        sample_size=PIXELS,
        layers_per_block=1,
        block_out_channels=(width // 2, width // 2, 3 * width // 2, 5 * width // 2),
        attention_head_dim=width // 2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def keep_pipeline(average: Any, model: Path) -> None:
    """Stores the averaged UNet as a float16 pipeline."""
    unet = copy.deepcopy(average).half()
    renew_folder(model, DDIMPipeline(unet, new_scheduler(clip_sample=True)).save_pretrained)


@app.command(help=__doc__)
def main(
    data: Data,
    state: State,
    model: Model = MODELS / "cifar-ddim",
    steps: Steps = STEPS,
    settings: Changes = None,
) -> None:
    with errors_in_one_line():
        chosen = parse_settings([*RECIPE, *(settings or [])], steps, 0).with_defaults(STEPS, BATCH, RATE)
        torch.manual_seed(chosen.seed)
        pictures = load_class_images(data, PIXELS)
        task = PixelTask(model, pictures, chosen)
        keep = partial(keep_pipeline, model=model)
        train_to_model(task, chosen, pictures.fingerprint(), state / "ddim.safetensors", keep)


if __name__ == "__main__":
    app()
