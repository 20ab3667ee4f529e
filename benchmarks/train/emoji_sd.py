"""Trains a tiny, complete Stable Diffusion pipeline on captioned pictures, such as this repository's emoji-sd.

    python benchmarks/train/emoji_sd.py all noto_emoji_128.zip out/
    python benchmarks/train/emoji_sd.py unet pictures/ out/ --minutes 40 --set rate=2e-4 --set init=pipeline/

The output folder receives `parts/` (float32, what the next stage starts from), `checkpoints/` (from which the
same command resumes) and `pipeline/` (float16, the result).
"""

import logging
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import transformers
import typer
from captioned_images import TrainingError, load_captioned_images
from pipeline_parts import PIXELS, Workspace
from rich.logging import RichHandler
from training_loop import Run, Settings, Task, console, identity_of, log, train
from training_tasks import AutoencoderTask, DecoderTask, DenoiserTask

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
LIMITS = ("steps", "minutes")  # options of their own
CHANGEABLE = {field.name: field.default for field in fields(Settings) if field.name not in LIMITS}
SETTINGS_HELP = f"Repeatable; names and defaults: {', '.join(f'{k}={v}' for k, v in CHANGEABLE.items())}"


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
    """Trains one stage from its checkpoint, the starting weights or scratch, and saves its parts."""
    settings = settings.with_defaults(*DEFAULTS[stage])
    # The autoencoder gains from every picture; only the UNet has to know what they show.
    subset = settings.subset if stage is Stage.UNET else "all"
    data = load_captioned_images(data_path, PIXELS, subset)
    torch.manual_seed(settings.seed)
    task: Task = TASKS[stage](workspace, data, settings)
    checkpoint = workspace.out / "checkpoints" / f"{stage.value}.safetensors"
    run = Run(task, settings, identity_of(settings, data.fingerprint()))
    run.restore(checkpoint)
    if run.progress() >= 1:
        log.info("%s is already finished: %d steps", stage.value, run.step)
        return
    log.info("%s: %d pictures on %s", stage.value, task.count, task.device)
    train(run, checkpoint)
    for name, part in task.parts(run.average).items():
        workspace.save(name, part)
    run.save(checkpoint)
    log.info("%s: %d steps in %.1f minutes", stage.value, run.step, run.seconds / 60)


def parse_settings(assignments: list[str], steps: int, minutes: float) -> Settings:
    """Settings from `name=value` texts; each value is read as the type of the setting's default."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in CHANGEABLE:
            raise TrainingError(f"--set {assignment}: expected name=value with a name of {', '.join(CHANGEABLE)}")
        kind = type(CHANGEABLE[name])
        try:
            values[name] = kind(text)
        except ValueError as error:
            expected = "a whole number" if kind is int else "a number"
            raise TrainingError(f"--set {assignment}: expected {expected}") from error
    return Settings(**values, steps=steps, minutes=minutes)


def check_settings(settings: Settings) -> None:
    """Refuses values that no stage can train with."""
    rules = {
        "steps and minutes must not be negative": settings.steps >= 0 and settings.minutes >= 0,
        "batch and rate must not be negative": settings.batch >= 0 and settings.rate >= 0,
        "dropout must be between 0 and 1": 0 <= settings.dropout <= 1,
        "ema must be at least 0 and below 1": 0 <= settings.ema < 1,
        "subset must be all or familiar": settings.subset in ("all", "familiar"),
        "width must be a positive multiple of 16": settings.width > 0 and settings.width % 16 == 0,
        "checkpoint_every must be positive": settings.checkpoint_every > 0,
    }
    for rule, kept in rules.items():
        if not kept:
            raise TrainingError(rule)


def show_only_our_messages() -> None:
    """One log on standard error; the libraries' progress bars and notices stay out of it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    log.setLevel(logging.INFO)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


@app.command(help=__doc__)
def main(
    stage: Annotated[Stage, typer.Argument(help="What to train.")],
    data: Annotated[Path, typer.Argument(help="Folder or zip file of captioned pictures.")],
    out: Annotated[Path, typer.Argument(help="Folder for parts, checkpoints and the pipeline.")],
    steps: Annotated[int, typer.Option(help="Steps per stage; 0: no limit.")] = 0,
    minutes: Annotated[float, typer.Option(help="Minutes per stage; 0: no limit.")] = 0.0,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help=SETTINGS_HELP)] = None,
) -> None:
    show_only_our_messages()
    try:
        chosen = parse_settings(settings or [], steps, minutes)
        check_settings(chosen)
        workspace = Workspace(out, chosen.init)
        for each in TASKS if stage is Stage.ALL else [stage]:
            run_stage(each, data, workspace, chosen)
        pipeline = workspace.export()
        if pipeline:
            log.info("pipeline saved in %s", pipeline)
    except (TrainingError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
