"""How good a model's pictures are: against real pictures, against their prompts, against the float model's."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from PIL import Image
from rich.table import Table

from .errors import EvaluationError
from .extractors import Clip, FeatureExtractor
from .features import Measured, measure
from .metrics import Power, told_db, total
from .picture_sets import PictureSet, evenly
from .pictures import PictureScores, picture_scores
from .progress import StageProgress
from .scores import clip_score, frechet_distance, inception_score, precision_recall
from .serialization import from_json, read_json, write_json

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Run:
    """How the pictures came about. model: as it was named; steps: per picture; guidance: None = the pipeline's own;
    seed: of the first picture, the others count up."""

    model: str
    steps: int | None
    seed: int
    guidance: float | None = None


@dataclass(frozen=True, slots=True)
class Against:
    """What pictures are measured with; None leaves out what needs it. extractor: Inception Score and, with reference
    (real pictures as the same extractor sees them), FID, sFID, precision, recall. clip, prompts: CLIP score, prompts
    taken in turn. originals: the float model's pictures at the same seeds."""

    extractor: FeatureExtractor | None = None
    reference: Measured | None = None
    clip: Clip | None = None
    prompts: Sequence[str] = ()
    originals: PictureSet | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of `count` pictures; None = not measured. extractor: name of what FID, sFID, Inception Score, precision
    and recall were computed with (figures of two extractors cannot be compared); reference: digest of the real
    pictures; neighbours_among: pictures of each kind that precision and recall were computed from.

    psnr_db, ssim: mean over pairs with the float model; sample_sqnr_db: 10 log10(sum x^2 / sum (y - x)^2) of pictures
    in -1..1, powers summed over all pairs, that is of final samples decoded and rounded to 8 bits.
    """

    run: Run
    count: int
    extractor: str | None = None
    extractor_digest: str | None = None
    reference: str | None = None
    reference_count: int | None = None
    fid: float | None = None
    sfid: float | None = None
    precision: float | None = None
    recall: float | None = None
    neighbours_among: int | None = None
    inception_score: float | None = None
    inception_score_deviation: float | None = None
    clip_score: float | None = None
    psnr_db: float | None = None
    psnr_db_worst: float | None = None
    ssim: float | None = None
    ssim_worst: float | None = None
    sample_sqnr_db: float | None = None
    notes: tuple[str, ...] = ()
    format_version: int = field(default=FORMAT)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON."""
        write_json(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Evaluation":
        """Read what `save` wrote. Raises EvaluationError for anything else."""
        data = read_json(path, EvaluationError)
        if not isinstance(data, dict) or data.get("format_version") != FORMAT:
            raise EvaluationError(f"{path}: not an evaluation of format {FORMAT}, as `ldmq evaluate` writes it")
        return from_json(cls, data, EvaluationError)


def evaluate(pictures: PictureSet, against: Against, run: Run, *, progress: StageProgress | None = None) -> Evaluation:
    """Measure a model's pictures. Notes in the result, told as warnings too, say where a figure means little.

    Raises EvaluationError for fewer than 2 pictures, where nothing is to be measured, for a reference without
    extractor, and for sets that do not fit each other.
    """
    if len(pictures) < 2:
        raise EvaluationError(f"{len(pictures)} picture: at least 2 are needed for any statistics")
    if not (against.extractor or against.clip or against.originals):
        raise EvaluationError("nothing to measure; give an extractor, a CLIP model or the float model's pictures")
    if against.reference is not None and against.extractor is None:
        raise EvaluationError("a reference needs the extractor that measured it")
    result = Evaluation(run, len(pictures))
    if against.extractor is not None:
        told = _stage(progress, "features")
        measured = measure(pictures, against.extractor, progress=told)
        result = replace(result, extractor=against.extractor.name, extractor_digest=against.extractor.digest)
        result = _with_classes(_with_reference(result, measured, against.reference), measured)
    if against.clip is not None:
        texts = [against.prompts[k % len(against.prompts)] for k in range(len(pictures))] if against.prompts else []
        result = replace(result, clip_score=clip_score(against.clip, pictures.batches(), texts))
    if against.originals is not None:
        result = _with_originals(result, pictures, against.originals)
    for note in result.notes:
        logger.warning("%s", note)
    return result


def _stage(progress: StageProgress | None, name: str):  # noqa: ANN202
    return None if progress is None else lambda done, whole: progress(name, done, whole)


def _with_reference(result: Evaluation, measured: Measured, reference: Measured | None) -> Evaluation:
    """FID, sFID, precision and recall. The latter two are taken of equally many pictures of both kinds."""
    if reference is None:
        return result
    least = min(measured.count, reference.count)
    notes = tuple(
        f"{name} of {least} pictures means little: their {size} features want more than {size} pictures, better ten "
        f"times as many; compare only figures of equal counts"
        for name, size in (("FID", len(measured.pooled.total)), ("sFID", len(measured.spatial.total)))
        if least <= size
    )
    result = replace(
        result,
        reference=reference.pictures,
        reference_count=reference.count,
        fid=frechet_distance(reference.pooled, measured.pooled),
        sfid=frechet_distance(reference.spatial, measured.spatial),
        notes=(*result.notes, *notes),
    )
    among = min(len(measured.kept), len(reference.kept))
    real, drawn = (kept[evenly(len(kept), among)] for kept in (reference.kept, measured.kept))
    if among <= 3:
        note = f"precision and recall are left out: they need more than 3 pictures of each kind, there are {among}"
        return replace(result, notes=(*result.notes, note))
    precision, recall = precision_recall(real, drawn)
    return replace(result, precision=precision, recall=recall, neighbours_among=among)


def _with_classes(result: Evaluation, measured: Measured) -> Evaluation:
    if measured.logits is None:
        return result
    score, deviation = inception_score(measured.logits)
    return replace(result, inception_score=score, inception_score_deviation=deviation)


def _with_originals(result: Evaluation, pictures: PictureSet, originals: PictureSet) -> Evaluation:
    """Pair by pair against the float model's, which must be as many and as large."""
    if (len(pictures), pictures.size) != (len(originals), originals.size):
        one, other = (f"{len(s)} of {s.size[0]}x{s.size[1]}" for s in (pictures, originals))
        raise EvaluationError(f"{one} pictures cannot be compared with {other}; draw both alike")
    scores, powers = [], []
    for drawn, original in zip(pictures.batches(), originals.batches(), strict=True):
        powers.append(Power.between(original / 127.5 - 1, drawn / 127.5 - 1))
        found = [[Image.fromarray(p.permute(1, 2, 0).numpy()) for p in batch] for batch in (original, drawn)]
        scores.append(picture_scores(*found))
    pairs = PictureScores(
        tuple(db for one in scores for db in one.psnr_db), tuple(value for one in scores for value in one.ssim)
    )
    return replace(
        result,
        psnr_db=fmean(pairs.psnr_db),
        psnr_db_worst=pairs.worst_psnr_db,
        ssim=pairs.mean_ssim,
        ssim_worst=pairs.worst_ssim,
        sample_sqnr_db=total(powers).sqnr_db,
    )


def evaluation_table(found: Evaluation) -> Table:
    """The figures for people."""
    run, table = found.run, Table(show_header=False, show_edge=False)
    steps = f"{run.steps} steps, " if run.steps else ""
    table.add_column()
    table.add_column(overflow="fold")
    rows = {
        "model": run.model,
        "pictures": f"{found.count}, {steps}seeds {run.seed} to {run.seed + found.count - 1}",
        "extractor": found.extractor,
        "reference": found.reference_count and f"{found.reference_count} pictures, {found.reference}",
        "FID": _told(found.fid),
        "sFID": _told(found.sfid),
        "Inception Score": _told(found.inception_score, found.inception_score_deviation),
        "precision": _told(found.precision, digits=3),
        "recall": _told(found.recall, digits=3),
        "CLIP score": _told(found.clip_score),
        "PSNR to float": _pair(told_db(found.psnr_db), told_db(found.psnr_db_worst), found.psnr_db),
        "SSIM to float": _pair(_told(found.ssim, digits=3), _told(found.ssim_worst, digits=3), found.ssim),
        "sample SQNR": None if found.sample_sqnr_db is None else told_db(found.sample_sqnr_db),
    }
    for name, told in rows.items():
        if told is not None:
            table.add_row(name, str(told))
    return table


def _told(value: float | None, deviation: float | None = None, digits: int = 2) -> str | None:
    if value is None:
        return None
    return f"{value:.{digits}f}" + (f" +- {deviation:.{digits}f}" if deviation is not None else "")


def _pair(mean: str | None, worst: str | None, value: float | None) -> str | None:
    return None if value is None else f"mean {mean}, worst {worst}"
