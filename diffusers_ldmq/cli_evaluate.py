"""`ldmq evaluate`: draw many pictures with a model and measure them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from . import arguments as arg
from .demo import MODEL, demo_captions
from .errors import EvaluationError
from .evaluation import Against, Evaluation, Run, evaluate, evaluation_table
from .extractors import Clip, FeatureExtractor, load_extractor
from .features import Measured, measure_reference
from .generation import sample_images, steps_of, subjects_of
from .inputs import read_prompts
from .output import file_beside, refuse_file
from .picture_sets import PictureSet, picture_set
from .sampling import Sampling
from .serialization import to_json
from .terminal import Stages, stages, tell

BATCH = 50
"""Pictures per pipeline call where the user names no number."""


def evaluate_model(
    model: arg.Model,
    reference: Annotated[
        Path | None,
        typer.Option(help="folder or zip of real pictures: FID, sFID, precision, recall; statistics are kept"),
    ] = None,
    extractor: Annotated[
        Path | None, typer.Option(help="folder of a classifier, Inception or CLIP: what pictures are measured with")
    ] = None,
    clip: Annotated[str | None, typer.Option(help="folder or hub id of a CLIP model: CLIP score of --prompts")] = None,
    original: Annotated[
        str | None, typer.Option("--float", help="the float pipeline, drawn at equal seeds: PSNR, SSIM, sample SQNR")
    ] = None,
    count: Annotated[int, typer.Option(min=2, help="pictures to draw")] = 5000,
    batch: Annotated[int | None, typer.Option(min=1, help=f"pictures per call (default: {BATCH})")] = None,
    prompts: Annotated[Path | None, typer.Option(help="prompts or class labels, one per line, taken in turn")] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="cut and scale the real pictures to the model's size")
    ] = False,
    samples: Annotated[
        Path | None, typer.Option(help="folder to keep the pictures in (DIR, and DIR-float); goes on if interrupted")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="JSON file to write")] = None,
    steps: arg.Steps = None,
    guidance: arg.Guidance = None,
    seed: arg.Seed = 0,
    device: arg.Device = "cpu",
    as_json: arg.AsJson = False,
) -> None:
    """Draw many pictures and measure them: FID, sFID, Inception Score, precision, recall, CLIP score, PSNR to float."""
    if reference is not None and extractor is None:
        raise EvaluationError(
            "--reference needs --extractor: a folder with a classifier's, Inception's or CLIP's weights"
        )
    if not (extractor or clip or original):
        raise EvaluationError("nothing to measure; give --extractor (with --reference for FID), --clip or --float")
    if out is not None:
        refuse_file(out)
    for name in (model, *([original] if original else [])):
        arg.check_model(name)
    sampling = Sampling(steps, guidance, seed, min(BATCH, count) if batch is None else batch)
    if sampling.batch > count:
        raise EvaluationError(f"--batch {batch} is larger than --count {count}; give a batch of at most {count}")
    tools = _Tools(reference, resize, extractor, clip, device)
    texts = read_prompts(prompts) if prompts else demo_captions() if model == MODEL else None
    with _kept(samples) as folder, stages() as told:
        pipe = arg.load_any(model, device)
        subjects = subjects_of(pipe, texts)
        if clip is not None and None in subjects:
            raise EvaluationError(
                f"--clip: {type(pipe).__name__} takes no prompts, so there is nothing to compare with"
            )
        first = sample_images(pipe, folder, sampling.batch, sampling, subjects)
        measured = tools.measured(first, told)  # what does not fit is refused before the long work
        pictures = sample_images(pipe, folder, count, sampling, subjects, progress=told.of("sample"))
        run = Run(model, steps_of(pipe, sampling), seed, guidance)
        del pipe  # two large pipelines need not fit at once
        originals = None
        if original is not None:
            beside = folder.with_name(f"{folder.name}-float")
            source = arg.load_float(original, device)
            originals = sample_images(source, beside, count, sampling, subjects, progress=told.of("sample float"))
            del source
        shown = [str(subject) for subject in subjects if subject is not None]
        found = evaluate(pictures, Against(tools.extractor, measured, tools.clip, shown, originals), run, progress=told)
    if out is not None:
        with file_beside(out) as beside:
            found.save(beside)
    tell(evaluation_table(found), _data(found, out, samples), as_json)


class _Tools:
    """What pictures are measured with, loaded and checked at once."""

    def __init__(
        self, reference: Path | None, resize: bool, extractor: Path | None, clip: str | None, device: str
    ) -> None:
        place = arg.checked_device(device)
        self.reference = None if reference is None else picture_set(reference)
        self.resize = resize
        self.extractor: FeatureExtractor | None = None if extractor is None else load_extractor(extractor).to(place)
        self.clip = None if clip is None else Clip(clip).to(place)

    def measured(self, drawn: PictureSet, told: Stages) -> Measured | None:
        """The real pictures at the size of those that were drawn."""
        if self.extractor is not None:
            self.extractor.check_size(drawn.size[1], drawn.size[0])
        if self.reference is None or self.extractor is None:
            return None
        real = PictureSet(self.reference.path, self.reference.names, drawn.size, self.resize)
        return measure_reference(real, self.extractor, progress=told.of("reference"))


@contextmanager
def _kept(samples: Path | None) -> Iterator[Path]:
    """The folder for the pictures: the user's, which stays, or one that goes."""
    if samples is not None:
        yield samples
        return
    with TemporaryDirectory(prefix="ldmq-") as folder:
        yield Path(folder) / "samples"


def _data(found: Evaluation, out: Path | None, samples: Path | None) -> dict[str, Any]:
    places = {name: str(path) for name, path in (("out", out), ("samples", samples)) if path is not None}
    return {**to_json(found), **places}
