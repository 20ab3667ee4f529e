"""Trains a small CIFAR-10 classifier, whose features then measure generated pictures (FID and its relatives).

    python benchmarks/train/cifar_classifier.py cifar10_train.zip cifar10_test.zip --state state/

Pictures come in one folder per class, from a folder or a zip file. `--state` keeps what an interrupted run goes on
from; the model folder receives `model.safetensors` (float16) and `config.json` (architecture, accuracy) with every
checkpoint. Without a state, training starts from the model in that folder if there is one.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from captioned_images import CaptionedImages, TrainingError
from cifar_training import MODELS, PIXELS, Changes, Data, Model, State, Steps, parameter_count, train_to_model
from class_images import class_names, labels_of, load_class_images
from torch import Tensor, nn
from training_command import errors_in_one_line, parse_settings
from training_loop import Settings, log
from training_tasks import chosen_device, fast_autocast

from diffusers_ldmq.extractors.classifier import Architecture, PictureClassifier, load_classifier, save_classifier
from diffusers_ldmq.extractors.contract import CONFIG

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
STEPS, BATCH, RATE = 2000, 256, 4e-3  # where the command line names none
RECIPE = ["ema=0.995", "weight_decay=0.05", "warmup=400"]  # settings whose defaults differ from the other scripts'
SHIFT = 2  # pixels by which a picture moves at most
SMOOTHING = 0.1  # of the labels
WHITENED = 5000  # pictures from which the first layer is computed
TEST_BATCH = 500


class ClassifierTask:
    """Name the class of a picture that was flipped and moved at random."""

    def __init__(self, model: Path, data: CaptionedImages, settings: Settings) -> None:
        self.data, self.labels, self.count = data, labels_of(data), len(data.captions)
        self.device = chosen_device(settings.device)
        network: Any = self._start(model, settings).train()
        self.trained: Any = network.to(self.device, memory_format=torch.channels_last)
        self.autocast = fast_autocast(self.device)

    def _start(self, model: Path, settings: Settings) -> PictureClassifier:
        if (model / CONFIG).is_file():
            log.info("starting from the model in %s", model)
            return load_classifier(model)
        width = settings.width
        network = PictureClassifier(Architecture((width, 3 * width, 4 * width), len(class_names(self.data))))
        network.set_whitening(self.data.images(slice(None, None, max(1, self.count // WHITENED))))
        return network

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        pictures = moved(self.data.images(rows), generator)
        with self.autocast:
            logits = self.trained(pictures.to(self.device, memory_format=torch.channels_last))
        labels = self.labels[rows].to(self.device)
        return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)

    def parts(self, average: nn.Module) -> dict[str, Any]:
        """The averaged classifier."""
        return {"classifier": average}


def moved(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture flipped or not and moved by up to SHIFT pixels, its border mirrored."""
    n, _, height, width = pictures.shape
    padded = nn.functional.pad(pictures, (SHIFT,) * 4, mode="reflect")
    down, right = torch.randint(2 * SHIFT + 1, (2, n, 1), generator=generator)
    ys, xs = down + torch.arange(height), right + torch.arange(width)
    flipped = torch.rand(n, 1, generator=generator) < 0.5
    xs = torch.where(flipped, xs.flip(1), xs)
    return padded[torch.arange(n)[:, None, None], :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(network: PictureClassifier, data: CaptionedImages) -> float:
    """The share of pictures whose class the network names."""
    labels, right = labels_of(data), 0
    for start in range(0, len(labels), TEST_BATCH):
        rows = slice(start, start + TEST_BATCH)
        right += (network(data.images(rows)).argmax(1) == labels[rows]).sum().item()
    return right / len(labels)


def keep_classifier(average: Any, model: Path, test: CaptionedImages) -> None:
    """Stores the averaged network in float16, with the accuracy of the stored weights."""
    facts: dict[str, Any] = {"parameters": parameter_count(average), "class_names": class_names(test)}
    save_classifier(average, model, facts)
    facts["test_accuracy"] = accuracy(load_classifier(model), test)
    save_classifier(average, model, facts)
    log.info("test accuracy %.2f %%", 100 * facts["test_accuracy"])


@app.command(help=__doc__)
def main(
    data: Data,
    test: Annotated[Path, typer.Argument(help="The same of test pictures.")],
    state: State,
    model: Model = MODELS / "cifar-classifier",
    steps: Steps = STEPS,
    settings: Changes = None,
) -> None:
    with errors_in_one_line():
        chosen = parse_settings([*RECIPE, *(settings or [])], steps, 0).with_defaults(STEPS, BATCH, RATE)
        torch.manual_seed(chosen.seed)
        pictures, unseen = load_class_images(data, PIXELS), load_class_images(test, PIXELS)
        if class_names(pictures) != class_names(unseen):
            raise TrainingError(f"the classes of {data} and {test} differ")
        task = ClassifierTask(model, pictures, chosen)
        keep = partial(keep_classifier, model=model, test=unseen)
        train_to_model(task, chosen, pictures.fingerprint(), state / "classifier.safetensors", keep)


if __name__ == "__main__":
    app()
