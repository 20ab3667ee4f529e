"""The command line's manners: progress bars per stage, other libraries quiet, every error one line."""

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .serialization import to_json

USER_ERROR, INTERRUPTED = 2, 130


def console(*, stderr: bool = False) -> Console:
    """Where to print. Made anew each time, so that it follows a redirected sys.stdout or sys.stderr."""
    return Console(stderr=stderr, highlight=False)


def complain(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    console(stderr=True).print(f"error: {' '.join(message.split())}", markup=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Keep warnings and bars of diffusers, transformers and torch off the terminal; ours and downloads' stay."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for other in (diffusers_logging, transformers_logging):
        other.set_verbosity_error()
        other.disable_progress_bar()
    warnings.simplefilter("ignore")
    logger = logging.getLogger(__package__)
    logger.handlers = [_Notes()]
    logger.setLevel(logging.INFO)
    logger.propagate = False


class _Notes(logging.Handler):
    """Our own log messages as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        note = f"note: {record.getMessage()}"
        console(stderr=True).print(note, markup=False, soft_wrap=True)


QUIET_SECONDS = 30
"""After so long a stage says how far it is where there is no terminal to draw a bar on."""


class Stages:
    """Progress of a job, one bar per stage on a terminal, one line per finished stage elsewhere."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.since = self.told = time.monotonic()

    def __call__(self, stage: str, done: int, whole: int) -> None:
        """`done` of `whole` parts of a stage are complete; a stage that begins again gets its bar again."""
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=whole)
        self.bars.update(self.tasks[stage], completed=done, total=whole)
        if self.bars.console.is_terminal:
            return
        now = time.monotonic()
        if done >= whole:
            self.bars.console.print(f"{stage}: {whole} of {whole}, {now - self.since:.1f} s", markup=False)
            self.since = self.told = now
        elif done and now - self.told > QUIET_SECONDS:
            left = (now - self.since) * (whole - done) / done
            self.bars.console.print(f"{stage}: {done} of {whole}, about {left / 60:.0f} min left", markup=False)
            self.told = now

    def of(self, stage: str) -> Callable[[int, int], None]:
        """The progress of one stage, as library functions take it."""
        return lambda done, whole: self(stage, done, whole)


@contextmanager
def stages() -> Iterator[Stages]:
    """Bars on stderr while the context is open."""
    where = console(stderr=True)
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=where, disable=not where.is_terminal) as bars:
        yield Stages(bars)


def tell_memory(memory: Path) -> None:
    """Say on stderr where a long stage keeps its finished parts, and whether it goes on with some."""
    begun = "going on with what it holds" if memory.exists() else "repeat the command to go on after an interrupt"
    console(stderr=True).print(f"note: finished parts are kept in {memory}; {begun}", markup=False, soft_wrap=True)


def print_json(text: str) -> None:
    """One JSON object on stdout, as it is."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def tell(shown: RenderableType, data: dict[str, Any], as_json: bool) -> None:
    """A table or text for people, or the data as one JSON object."""
    if as_json:
        print_json(json.dumps(to_json(data), allow_nan=False))
    else:
        console().print(shown)


def tell_line(line: str, data: dict[str, Any], as_json: bool) -> None:
    """A line for people that is never broken (paths and addresses are what people copy), or one JSON object."""
    if as_json:
        tell(line, data, as_json)
    say(line, as_json)


def say(text: str, as_json: bool) -> None:
    """A line for people; nothing where machines read."""
    if not as_json:
        console().print(text, markup=False, soft_wrap=True)
