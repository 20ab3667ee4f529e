"""What the CIFAR-10 scripts share: options, one stage from its state to its model, every picture once per epoch."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from training_command import SETTINGS_HELP
from training_loop import Run, Settings, Task, identity_of, log, train

PIXELS = 32  # side of a picture
MODELS = Path(__file__).parents[1] / "models"

Data = Annotated[Path, typer.Argument(help="Folder or zip file of pictures, a folder per class.")]
State = Annotated[Path, typer.Option(help="Folder for the state that an interrupted run goes on from.")]
Model = Annotated[Path, typer.Option(help="Folder for the finished model.")]
Steps = Annotated[int, typer.Option(help="Optimizer steps (of a stage; 0: its default).")]
Changes = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help=SETTINGS_HELP)]


class EpochRun(Run):
    """Shows every picture once before any comes again, and writes the model whenever the state is saved."""

    def __init__(self, task: Task, settings: Settings, identity: dict[str, object]) -> None:
        super().__init__(task, settings, identity)
        self.keep: Callable[[nn.Module], None] = lambda average: None
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def rows(self) -> Tensor:
        batch = self.settings.batch
        epoch, place = divmod(self.step, max(1, self.task.count // batch))
        if epoch != self._epoch:  # the order follows from seed and epoch alone: a resumed run sees the same
            shuffler = torch.Generator().manual_seed(1_000_003 * self.settings.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.task.count, generator=shuffler)
        return self._order[place * batch : (place + 1) * batch]

    def save(self, path: Path) -> None:
        super().save(path)
        self.keep(self.average)


def train_to_model(
    task: Task, settings: Settings, fingerprint: str, checkpoint: Path, keep: Callable[[nn.Module], None]
) -> Run:
    """Trains from the state at `checkpoint`, or from the task's own weights; `keep` stores the averaged weights."""
    run = EpochRun(task, settings, identity_of(settings, fingerprint))
    run.keep = keep
    run.restore(checkpoint)
    log.info("%s: %.2f M parameters, %d pictures", checkpoint.stem, parameter_count(task.trained) / 1e6, task.count)
    if run.progress() < 1:
        train(run, checkpoint)
        run.save(checkpoint)
    log.info("%s: %d steps in %.1f minutes", checkpoint.stem, run.step, run.seconds / 60)
    return run


def with_plain_attention(network: Any) -> Any:
    """The same network: on a CPU and this small, plain matrix products train faster than the fused attention."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    return network


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
