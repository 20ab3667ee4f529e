"""What FID and its relatives say of real pictures: the floor that no generated set can be expected below.

    python benchmarks/metric_floor.py cifar10_train.zip cifar10_test.zip

Rows: test pictures, all and 5,000 of them, against all training pictures; two times 5,000 different training pictures
against each other; the first 5,000 with noise added, which shows what a visible fault costs; and 5,000 training
pictures through the latent models' autoencoder, the floor of what those can draw.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import AutoencoderKL
from torch import Tensor

from diffusers_ldmq.evaluation import Against, Evaluation, Run, evaluate
from diffusers_ldmq.extractors import FeatureExtractor, load_extractor
from diffusers_ldmq.features import measure_reference
from diffusers_ldmq.picture_sets import PictureSet, picture_set

CLASSIFIER = Path(__file__).parent / "models" / "cifar-classifier"
AUTOENCODER = Path(__file__).parent / "models" / "cifar-classes"
COUNT = 5000
NOISE = 8
"""Standard deviation of the added noise, of 255."""


class Noisy(PictureSet):
    """The same pictures with the same noise every time."""

    def batches(self, batch: int = 100) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for pictures in super().batches(batch):
            noise = torch.randn(pictures.shape, generator=generator) * NOISE
            yield (pictures + noise).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class Decoded(PictureSet):
    """The same pictures, encoded and decoded."""

    def batches(self, batch: int = 100) -> Iterator[Tensor]:
        autoencoder: Any = AutoencoderKL.from_pretrained(str(AUTOENCODER), subfolder="vae").eval()
        for pictures in super().batches(batch):
            with torch.no_grad():
                latents = autoencoder.encode(pictures.float() / 127.5 - 1).latent_dist.mean
                decoded = autoencoder.decode(latents).sample
            yield ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def rows(train: PictureSet, test: PictureSet, extractor: FeatureExtractor) -> Iterator[Evaluation]:
    """One evaluation per row of the table."""
    half = train.taken(2 * COUNT)
    one, other = (replace(half, names=half.names[start::2]) for start in (0, 1))
    noisy = Noisy(test.path, test.taken(COUNT).names, test.size)
    every = {
        f"test, all {len(test)}": (test, train),
        f"test, {COUNT}": (test.taken(COUNT), train),
        f"train, {COUNT} others": (one, other),
        f"test, {COUNT}, noise of {NOISE}/255": (noisy, train),
        f"train, {COUNT}, through the autoencoder": (Decoded(train.path, one.names, train.size), train),
    }
    for name, (pictures, reference) in every.items():
        against = Against(extractor, measure_reference(reference, extractor))
        yield evaluate(pictures, against, Run(name, None, 0))


def main(
    train: Annotated[Path, typer.Argument(help="folder or zip file of pictures")],
    test: Annotated[Path, typer.Argument(help="the same of others")],
    extractor: Annotated[Path, typer.Option(help="folder of what measures them")] = CLASSIFIER,
) -> None:
    """Print the table."""
    found = load_extractor(extractor)
    typer.echo(f"extractor: {found.name}\n\n| pictures | against | FID | sFID | IS | precision | recall |")
    typer.echo("|---|---|---|---|---|---|---|")
    for row in rows(picture_set(train), picture_set(test), found):
        score = f"{row.inception_score:.3f} ± {row.inception_score_deviation or 0:.3f}"
        figures = f"{row.fid:.3f} | {row.sfid:.3f} | {score} | {row.precision:.3f} | {row.recall:.3f}"
        typer.echo(f"| {row.run.model} | {row.reference_count} | {figures} |")


if __name__ == "__main__":
    typer.run(main)
