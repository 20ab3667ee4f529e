"""The command line's manners: progress bars per stage, other libraries quiet, every error one line."""

import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

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
    logger.propagate = False


class _Notes(logging.Handler):
    """Our own log messages as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        note = f"note: {record.getMessage()}"
        console(stderr=True).print(note, markup=False, soft_wrap=True)


class Stages:
    """Progress of a job, one bar per stage on a terminal, one line per finished stage elsewhere."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}
        self.since = time.monotonic()

    def __call__(self, stage: str, done: int, whole: int) -> None:
        """`done` of `whole` parts of a stage are complete; a stage that begins again gets its bar again."""
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=whole)
        self.bars.update(self.tasks[stage], completed=done, total=whole)
        if done >= whole and not self.bars.console.is_terminal:
            now = time.monotonic()
            self.bars.console.print(f"{stage}: {whole} of {whole}, {now - self.since:.1f} s", markup=False)
            self.since = now

    def of(self, stage: str) -> Callable[[int, int], None]:
        """The progress of one stage, as library functions take it."""
        return lambda done, whole: self(stage, done, whole)


@contextmanager
def stages() -> Iterator[Stages]:
    """Bars on stderr while the context is open."""
    where = console(stderr=True)
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=where, disable=not where.is_terminal) as bars:
        yield Stages(bars)


def print_json(text: str) -> None:
    """One JSON object on stdout, as it is."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
