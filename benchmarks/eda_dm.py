"""The second paper, EDA-DM, row by row: float, W8A8, W4A8 and W4A4 of one model, from min-max to ours.

    python benchmarks/eda_dm.py bundled
    python benchmarks/eda_dm.py cifar-ddim --reference cifar10_train.zip
    python benchmarks/eda_dm.py cifar-ddim --reference cifar10_train.zip --also long,later

Every finished row is written to benchmarks/results/eda_dm-MODEL.json, and the command goes on where it stopped, in a
fresh clone too; within a row it goes on from --work. FID, sFID, precision and recall are measured with the classifier
in benchmarks/models/cifar-classifier: they are NOT comparable with the papers'. Delete the file if the model changed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from eda_dm_rows import FOLDERS, GUIDANCE, LATER, LONG, ROWS, STEPS, Row, calibrated, recording_of
from measuring import HERE, Results, pipeline, timed

from diffusers_ldmq import Recording, quantize, verify
from diffusers_ldmq.demo import demo_captions
from diffusers_ldmq.evaluation import Against, Run, evaluate
from diffusers_ldmq.extractors import load_extractor
from diffusers_ldmq.families import find_denoiser
from diffusers_ldmq.features import Measured, measure_reference
from diffusers_ldmq.generation import sample_images
from diffusers_ldmq.picture_sets import PictureSet, picture_set
from diffusers_ldmq.sampling import Sampling
from diffusers_ldmq.serialization import to_json
from diffusers_ldmq.terminal import Stages, quiet_libraries, stages

EXTRACTOR = HERE / "models" / "cifar-classifier"
FLOAT_SEEDS = {"float": 0, "float, other seeds": 1_000_000, "float, third seeds": 2_000_000}
"""Runs of the float model; how far their figures lie apart says what a difference means."""
COLUMNS = ("output_sqnr_db", "sample_sqnr_db", "fid", "sfid", "inception_score", "precision", "recall")


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """One model, what it is measured with, and where its unfinished rows lie."""

    model: str
    count: int
    work: Path
    extractor: Any
    real: Measured | None
    told: Stages

    def drawn(self, name: str, pipe: Any, seed: int = 0) -> PictureSet:
        """The row's pictures, as many as are there already plus what is missing."""
        folder = self.work / self.model / name.replace(" ", "-").replace(",", "")
        folder.parent.mkdir(parents=True, exist_ok=True)
        sampling = Sampling(STEPS, GUIDANCE.get(self.model), seed, min(100, self.count))
        subjects = demo_captions() if self.model == "bundled" else None
        return sample_images(pipe, folder, self.count, sampling, subjects, progress=self.told.of(f"draw {name}"))

    def measured(self, name: str, pipe: Any, seed: int = 0) -> dict[str, Any]:
        """Figures of the row's pictures, against real ones and against the float model's at equal seeds."""
        pictures = self.drawn(name, pipe, seed)
        originals = None if name in FLOAT_SEEDS else self.drawn("float", pipeline(self.model))
        run = Run(self.model, STEPS, seed, GUIDANCE.get(self.model))
        if self.extractor is None and originals is None:
            return {}
        return to_json(evaluate(pictures, Against(self.extractor, self.real, None, (), originals), run))

    def quantized(self, row: Row, recording: Recording) -> dict[str, Any]:
        """A row of the table."""
        pipe = pipeline(self.model)
        component, denoiser = find_denoiser(pipe)
        memory = self.work / self.model / "learned" / row.name.replace(" ", "-").replace(",", "")
        learn = lambda: calibrated(row, self.model, pipe, recording, memory, self.told.of)  # noqa: E731
        (calibration, units), seconds = timed(learn)
        quantize(denoiser, calibration)
        report = verify(denoiser, recording)
        pipe.register_modules(**{component: denoiser})
        return {
            "scheme": row.scheme,
            "output_sqnr_db": report.sqnr_db,
            "curve_db": report.curve_db(),
            "bytes": report.bytes / report.fp32_bytes,
            "calibration_seconds": round(seconds, 1),
            "units_kept": f"{sum(unit.kept for unit in units)} of {len(units)}",
            "gap_db": [round(unit.soft_db - unit.after_db, 2) for unit in units],
            **self.measured(row.name, pipe),
        }


def main(
    model: Annotated[str, typer.Argument(help=" | ".join(FOLDERS))],
    reference: Annotated[Path | None, typer.Option(help="zip or folder of real pictures, for FID")] = None,
    count: Annotated[int | None, typer.Option(help="pictures of a row (5000; bundled: 64)")] = None,
    work: Annotated[Path, typer.Option(help="folder for pictures and finished blocks")] = Path("eda-dm-work"),
    also: Annotated[str, typer.Option(help="long (rows that learn for longer), later (methods after EDA-DM)")] = "",
    only: Annotated[str, typer.Option(help="rows whose name contains this")] = "",
) -> None:
    """Measure and print."""
    quiet_libraries()
    count = count or (64 if model == "bundled" else 5000)
    results = Results(f"eda_dm-{model}")
    extractor = load_extractor(EXTRACTOR) if reference is not None else None
    setting: dict[str, Any] = {
        "count": count,
        "steps": STEPS,
        "guidance": GUIDANCE.get(model),
        "extractor": extractor and extractor.name,
    }
    if results.rows.setdefault("setting", setting) != setting:
        raise typer.BadParameter(f"{results.path} was begun with {results.rows['setting']}, now {setting}: delete it")
    with stages() as told:
        real = None
        if reference is not None and extractor is not None:
            real = measure_reference(picture_set(reference), extractor, progress=told.of("reference"))
        bench = Bench(model, count, work, extractor, real, told)
        for name, seed in FLOAT_SEEDS.items():
            if only in name and reference is not None:
                results.row(name, lambda n=name, s=seed: bench.measured(n, pipeline(model), s))
        made: list[Recording] = []
        wanted = (*ROWS, *(LONG if "long" in also else ()), *(LATER if "later" in also else ()))
        for row in [r for r in wanted if only in r.name]:
            if row.name not in results.rows and not made:
                made.append(recording_of(model, pipeline(model)))
            results.row(row.name, lambda r=row: bench.quantized(r, made[0]))
    typer.echo(f"{'':24s}" + "".join(f"{column:>17s}" for column in COLUMNS))
    for name in [*FLOAT_SEEDS, *(row.name for row in (*ROWS, *LONG, *LATER))]:
        if name in results.rows:
            typer.echo(f"{name:24s}" + "".join(_told(results.rows[name].get(column)) for column in COLUMNS))
    typer.echo(f"{results.path}: torch {torch.__version__}, {results.rows['machine']['cpu']}")


def _told(value: Any) -> str:
    return f"{value:17.3f}" if isinstance(value, (int, float)) else f"{'':17s}"


if __name__ == "__main__":
    typer.run(main)
