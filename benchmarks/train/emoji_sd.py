"""Trains a tiny, complete Stable Diffusion pipeline on captioned pictures, such as this repository's emoji-sd.

    python benchmarks/train/emoji_sd.py all noto_emoji_128.zip out/
    python benchmarks/train/emoji_sd.py unet pictures/ out/ --minutes 40 --set rate=2e-4 --set init=pipeline/

The output folder receives `parts/` (float32, what the next stage starts from), `checkpoints/` (from which the
same command resumes) and `pipeline/` (float16, the result).
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from captioned_images import load_captioned_images
from pipeline_parts import PIXELS, Workspace
from training_command import SETTINGS_HELP, errors_in_one_line, parse_settings, train_stage
from training_loop import Settings, log
from training_tasks import AutoencoderTask, DecoderTask, DenoiserTask

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Stage(StrEnum):
    """What to train; `all` is the three others in this order."""

    VAE = "vae"
    DECODER = "decoder"
    UNET = "unet"
    ALL = "all"


# Steps, batch and peak rate where the command line names none.
DEFAULTS = {Stage.VAE: (8000, 16, 7e-4), Stage.DECODER: (8000, 16, 5e-4), Stage.UNET: (6500, 64, 1e-3)}

TASKS: dict[Stage, type[AutoencoderTask | DecoderTask | DenoiserTask]] = {
    Stage.VAE: AutoencoderTask,
    Stage.DECODER: DecoderTask,
    Stage.UNET: DenoiserTask,
}


def run_stage(stage: Stage, data_path: Path, workspace: Workspace, settings: Settings) -> None:
    """Trains one stage on the pictures that it gains from, and saves its parts."""
    # The autoencoder gains from every picture; only the UNet has to know what they show.
    subset = settings.subset if stage is Stage.UNET else "all"
    data = load_captioned_images(data_path, PIXELS, subset)
    train_stage(stage.value, TASKS[stage], data, workspace, settings.with_defaults(*DEFAULTS[stage]))


@app.command(help=__doc__)
def main(
    stage: Annotated[Stage, typer.Argument(help="What to train.")],
    data: Annotated[Path, typer.Argument(help="Folder or zip file of captioned pictures.")],
    out: Annotated[Path, typer.Argument(help="Folder for parts, checkpoints and the pipeline.")],
    steps: Annotated[int, typer.Option(help="Steps per stage; 0: no limit.")] = 0,
    minutes: Annotated[float, typer.Option(help="Minutes per stage; 0: no limit.")] = 0.0,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help=SETTINGS_HELP)] = None,
) -> None:
    with errors_in_one_line():
        chosen = parse_settings(settings or [], steps, minutes)
        workspace = Workspace(out, chosen.init)
        for each in TASKS if stage is Stage.ALL else [stage]:
            run_stage(each, data, workspace, chosen)
        pipeline = workspace.export()
        if pipeline:
            log.info("pipeline saved in %s", pipeline)


if __name__ == "__main__":
    app()
