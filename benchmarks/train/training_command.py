"""What the training scripts' command lines share: settings, one stage from checkpoint to parts, errors, log."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import diffusers
import torch
import transformers
import typer
from captioned_images import CaptionedImages, TrainingError
from pipeline_parts import Workspace
from rich.logging import RichHandler
from training_loop import LIMITS, Run, Settings, Task, console, identity_of, log, train

# The limits are options of their own.
CHANGEABLE = {field.name: field.default for field in fields(Settings) if field.name not in LIMITS}
SETTINGS_HELP = f"Repeatable; names and defaults: {', '.join(f'{k}={v}' for k, v in CHANGEABLE.items())}"


def train_stage(
    name: str,
    new_task: Callable[[Workspace, CaptionedImages, Settings], Task],
    data: CaptionedImages,
    workspace: Workspace,
    settings: Settings,
) -> None:
    """Trains one stage from its checkpoint, the starting weights or scratch, and saves its parts."""
    torch.manual_seed(settings.seed)
    task = new_task(workspace, data, settings)
    checkpoint = workspace.out / "checkpoints" / f"{name}.safetensors"
    run = Run(task, settings, identity_of(settings, data.fingerprint()))
    run.restore(checkpoint)
    if run.progress() >= 1:
        log.info("%s is already finished: %d steps", name, run.step)
        return
    log.info("%s: %d pictures on %s", name, task.count, task.device)
    train(run, checkpoint)
    for part_name, part in task.parts(run.average).items():
        workspace.save(part_name, part)
    run.save(checkpoint)
    log.info("%s: %d steps in %.1f minutes", name, run.step, run.seconds / 60)


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
    settings = Settings(**values, steps=steps, minutes=minutes)
    _check_settings(settings)
    return settings


def _check_settings(settings: Settings) -> None:
    """Refuses values that no stage can train with."""
    rules = {
        "steps and minutes must not be negative": settings.steps >= 0 and settings.minutes >= 0,
        "batch and rate must not be negative": settings.batch >= 0 and settings.rate >= 0,
        "dropout must be between 0 and 1": 0 <= settings.dropout <= 1,
        "ema must be at least 0 and below 1": 0 <= settings.ema < 1,
        "subset must be all or familiar": settings.subset in ("all", "familiar"),
        "width must be a positive multiple of 16": settings.width > 0 and settings.width % 16 == 0,
        "schedule must be cosine or constant": settings.schedule in ("cosine", "constant"),
        "weight_decay must not be negative": settings.weight_decay >= 0,
        "checkpoint_every must be positive": settings.checkpoint_every > 0,
    }
    for rule, kept in rules.items():
        if not kept:
            raise TrainingError(rule)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the script with one line and exit code 2 where the user can put things right."""
    _show_only_our_messages()
    try:
        yield
    except (TrainingError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _show_only_our_messages() -> None:
    """One log on standard error; the libraries' progress bars and notices stay out of it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    log.setLevel(logging.INFO)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
