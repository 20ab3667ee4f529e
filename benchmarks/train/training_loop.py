"""One resumable training loop for every stage: AdamW, warm-up and cosine rate, weight average, checkpoints.

A checkpoint is a single safetensors file: the tensors of weights, their average, the optimizer and the random
generator; step, seconds, settings and data digest as JSON in its header. One file can be replaced in one rename,
so an interruption leaves either the old checkpoint or the new one, and nothing in it can execute code.
"""

import copy
import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from captioned_images import TrainingError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

log = logging.getLogger("emoji_sd")
console = Console(stderr=True)

# What may change between an interruption and the resumption without changing what is learned.
FREE_SETTINGS = {"checkpoint_every", "device"}
LIMITS = {"steps", "minutes"}  # with a constant rate these, too: training may go on for longer than planned


@dataclass(frozen=True)
class Settings:
    """How one stage trains. Zero is the stage's own default; with both limits at zero, its default steps."""

    steps: int = 0  # optimizer steps of the whole stage
    minutes: float = 0.0  # training minutes of the whole stage, summed over resumptions
    batch: int = 0  # pictures per step
    rate: float = 0.0  # peak learning rate
    warmup: int = 200  # steps over which the rate rises to its peak
    ema: float = 0.9995  # decay of the weight average, which is what is saved
    dropout: float = 0.1  # share of captions replaced by "", for classifier-free guidance
    subset: str = "all"  # which emoji UNet and text encoder learn: "all" or "familiar"
    init: str = ""  # folder of a pipeline to start from instead of random weights
    width: int = 64  # channels of the UNet's first level; every other width follows from it
    seed: int = 0
    device: str = "auto"  # "auto", "cpu", "cuda", ...
    checkpoint_every: int = 200  # steps
    weight_decay: float = 1e-3  # AdamW's
    schedule: str = "cosine"  # the rate after its warm-up: "cosine" falls towards the limit, "constant" stays

    def with_defaults(self, steps: int, batch: int, rate: float) -> "Settings":
        """These settings with a stage's defaults in place of the zeros."""
        limited = self.steps > 0 or self.minutes > 0
        changed = asdict(self)
        changed["steps"] = self.steps if limited else steps
        changed["batch"] = self.batch or batch
        changed["rate"] = self.rate or rate
        return Settings(**changed)


class Task(Protocol):
    """What a stage teaches: some modules, and the loss of some rows of its data."""

    trained: Any  # a torch module; diffusers' classes type their own `to` and `device` too narrowly
    count: int  # rows of data
    device: torch.device

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """The scalar loss of the given rows, int64 [batch]; every random number comes from `generator`."""
        ...

    def parts(self, average: nn.Module) -> dict[str, Any]:
        """The pipeline parts to keep, by name, made from the averaged weights."""
        ...


class Run:
    """The state of one stage's training: weights, their average, optimizer, generator, step and seconds."""

    def __init__(self, task: Task, settings: Settings, identity: dict[str, object]) -> None:
        self.task = task
        self.settings = settings
        self.identity = identity  # what a checkpoint must agree on to be resumed
        self.average = copy.deepcopy(task.trained).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            task.trained.parameters(), lr=settings.rate, weight_decay=settings.weight_decay
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step = 0
        self.seconds = 0.0

    def progress(self) -> float:
        """The finished share, by whichever limit is nearer; 1 and more: done."""
        by_step = self.step / self.settings.steps if self.settings.steps else 0.0
        by_time = self.seconds / (60 * self.settings.minutes) if self.settings.minutes else 0.0
        return max(by_step, by_time)

    def rate(self) -> float:
        """Linear warm-up, then half a cosine down to 2 % of the peak, or the peak for good."""
        warm = min(1.0, (self.step + 1) / max(1, self.settings.warmup))
        if self.settings.schedule == "constant":
            return self.settings.rate * warm
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress())))
        return self.settings.rate * warm * (0.98 * cosine + 0.02)

    def rows(self) -> Tensor:
        """The rows of data that this step learns from, int64 [batch]."""
        return torch.randint(self.task.count, (self.settings.batch,), generator=self.generator)

    def advance(self) -> float:
        """One optimizer step and one step of the average; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        loss = self.task.loss(self.rows(), self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.task.trained.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._average_weights()
        return loss.item()

    @torch.no_grad()
    def _average_weights(self) -> None:
        # The short memory of the first steps keeps random starting weights out of the average.
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        for averaged, current in zip(self.average.parameters(), self.task.trained.parameters(), strict=True):
            averaged.lerp_(current, 1 - decay)
        for averaged, current in zip(self.average.buffers(), self.task.trained.buffers(), strict=True):
            if averaged.is_floating_point():  # a batch norm's statistics
                averaged.lerp_(current, 1 - decay)

    def save(self, path: Path) -> None:
        """Writes the checkpoint beside `path` and renames it into place."""
        tensors = {f"weights.{name}": value for name, value in self.task.trained.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        tensors["generator"] = self.generator.get_state()
        header = {"step": self.step, "seconds": self.seconds, "identity": self.identity}
        partial = path.with_suffix(".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors stores tensors in their logical order, so channels-last weights are copied first.
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(plain, partial, metadata={"state": json.dumps(header)})
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Takes up the checkpoint at `path`, if there is one and it was made with this run's settings."""
        if not path.exists():
            return
        header, tensors = _read_checkpoint(path)
        self._refuse_other_identity(header["identity"], path)
        self.task.trained.load_state_dict(_under("weights.", tensors))
        self.average.load_state_dict(_under("average.", tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in _under("optimizer.", tensors).items():
            index, _, moment = name.partition(".")
            moments.setdefault(int(index), {})[moment] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.generator.set_state(tensors["generator"])
        self.step, self.seconds = header["step"], header["seconds"]
        log.info("resumed %s at step %d", path.stem, self.step)

    def _refuse_other_identity(self, found: dict[str, object], path: Path) -> None:
        for name, now in self.identity.items():
            if found.get(name) != now:
                raise TrainingError(
                    f"checkpoint {path} was made with {name}={found.get(name)}, not {now}: "
                    "use the same settings, another output folder, or delete it"
                )


def identity_of(settings: Settings, fingerprint: str) -> dict[str, object]:
    """The settings and data that a checkpoint must share with the run that takes it up."""
    free = FREE_SETTINGS | (LIMITS if settings.schedule == "constant" else set())
    fixed: dict[str, object] = {name: value for name, value in asdict(settings).items() if name not in free}
    return fixed | {"data": fingerprint}


def train(run: Run, checkpoint: Path) -> None:
    """Advances `run` to its limit, with a checkpoint every so many steps."""
    stage = checkpoint.stem
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task(stage, total=1.0)
        smooth = 0.0
        while run.progress() < 1:
            started = time.perf_counter()
            loss = run.advance()
            run.seconds += time.perf_counter() - started
            smooth = loss if smooth == 0 else 0.99 * smooth + 0.01 * loss
            text = f"{stage}: step {run.step}, loss {smooth:.4f}, {run.seconds / run.step:.2f} s/step"
            bar.update(shown, completed=run.progress(), description=text)
            if run.step % run.settings.checkpoint_every == 0:
                run.save(checkpoint)
                log.info(text)


def _read_checkpoint(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["state"])
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise TrainingError(f"checkpoint {path} cannot be read: delete it to start this stage again") from error


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
