"""The command line's options, and how they become what the library takes. What can be refused is refused here, before
anything slow begins."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .backends import fast_dtype
from .checkpoints import components_of, stored_config
from .companions import loading_options
from .correction import DEFAULT
from .data_free import PlanLike
from .demo import MODEL, demo_captions, demo_model, demo_prompts
from .errors import LDMQError, OutputError, PlanError
from .inputs import default_inputs, read_inputs, read_prompts
from .observers import OBSERVERS
from .output import refuse_file, refuse_folder
from .pipeline import QuantizedLDMPipeline, load_pipeline
from .planners import PLANNERS, parse_target
from .selections import SELECTIONS
from .settings import corrections_of
from .specs import parse_scheme

PICTURED = 8
"""Pictures that a report shows at most."""
PICTURES = {"": "PNG", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""Ending of a picture's file -> the format it is written in."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"diffusers folder, hub id, or {MODEL}")]
Prompts = Annotated[Path | None, typer.Option(help="prompts to record, one per line")]
Inputs = Annotated[Path | None, typer.Option(help="JSON lines of the pipeline's arguments, instead of --prompts")]
Steps = Annotated[int | None, typer.Option(min=1, help="sampling steps (default: the pipeline's)")]
Guidance = Annotated[float | None, typer.Option(help="guidance scale (default: the pipeline's)")]
Seed = Annotated[int, typer.Option(help="seed of the first picture; the others count up")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, typer.Option(help="auto (the device's fastest), float32, bfloat16 or float16")]
Planner = Annotated[str, typer.Option(help="hybrid (blocks from a cut-off on), budget (integer programme), uniform")]
Scheme = Annotated[str, typer.Option(help="low precision: w8a8, w8a8-dyn, w8a16, w4a16, w4a16-g64, w4a8, w4a4, ...")]
Rule = Annotated[str, typer.Option("--calibration", help="steps that calibrate: first-step, uniform, normal or tdac")]
Observer = Annotated[str, typer.Option(help="how a range is chosen: minmax, minmax-affine or mse")]
KeepFloat = Annotated[str, typer.Option(help="default (the family's layers), none, or names with commas between")]
TARGET_HELP = (
    "'sqnr>=25dB', 'size<=0.3x' (of fp32), 'size<=900MB', 'speed>=1.5x' (of the fastest float), 'int8>=80%' (of the "
    "work), or several with commas between"
)
Target = Annotated[str | None, typer.Option(help=TARGET_HELP)]
Corrections = Annotated[str, typer.Option(help=f"none, auto (try all on the worst layers), or of {', '.join(DEFAULT)}")]
CorrectedLayers = Annotated[int, typer.Option(min=1, help="how many layers, noisiest first, to try corrections on")]
Reconstruct = Annotated[
    str,
    typer.Option(help="learn all rounding block by block: none, quick (minutes) or full; goes on if interrupted"),
]
Pngs = Annotated[bool, typer.Option("--pngs", help="also write every figure as a PNG beside it")]
Full = Annotated[
    bool,
    typer.Option("--full", help="every step, block, direction, kind of noise; long, goes on if interrupted"),
]
Components = Annotated[
    list[str] | None,
    typer.Option(
        "--component",
        metavar="NAME=SCHEME",
        help="also quantize this model, without data: text_encoder=w8a16, vae=w8a16, ...; repeatable",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


def model_path(model: str) -> str | Path:
    """MODEL as the library takes it: the bundled model's folder for its word."""
    return demo_model() if model == MODEL else model


def components(given: list[str] | None) -> dict[str, PlanLike]:
    """Component -> scheme of --component options. Raises LDMQError for what is none."""
    found: dict[str, PlanLike] = {}
    for text in given or ():
        name, _, scheme = text.partition("=")
        if not name or not scheme or name in found:
            raise LDMQError(f"--component {text!r}: expected NAME=SCHEME such as vae=w8a16, each name once")
        found[name] = scheme
    return found


def load_float(
    model: str, device: str, schemes: Mapping[str, PlanLike] | None = None, *, local_files_only: bool = False
) -> Any:
    """The float pipeline, in float32. schemes: components that are quantized while they are loaded. Raises LDMQError
    for a quantized one."""
    path, place, hub = model_path(model), checked_device(device), {"local_files_only": local_files_only}
    if stored_config(path, **hub) is not None:
        raise LDMQError(f"{model}: is quantized already; give the original float model, a second rounding only loses")
    options = loading_options(components_of(path, **hub), schemes) if schemes else {}
    return _quiet(load_pipeline(path, dtype=torch.float32, device=place, **hub, **options))


def load_any(model: str, device: str) -> Any:
    """A float pipeline in float32, or a quantized one in the dtype that it was verified in."""
    path, place = model_path(model), checked_device(device)
    if stored_config(path) is not None:
        return _quiet(QuantizedLDMPipeline.from_pretrained(path, device=place))
    return _quiet(load_pipeline(path, dtype=torch.float32, device=place))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def checked_device(name: str) -> str:
    """The device's name. Raises LDMQError if it is none, or not in this machine."""
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        reason = str(cause).splitlines()[0]
        raise LDMQError(f"--device {name}: cannot be used ({reason}); use cpu, or cuda where there is one") from None
    return name


def checked_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of a name; 'auto' = the one that the device runs fastest. Raises LDMQError for others."""
    if name == "auto":
        return fast_dtype(checked_device(device))
    if name not in DTYPES:
        raise LDMQError(f"--dtype {name!r}: unknown; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def fitting_dtype(chosen: torch.dtype | None, name: str, pipe: Any) -> torch.dtype | None:
    """The chosen dtype; float32 where it was chosen by 'auto' for a pipeline without prompts. Those may draw their
    latents in float32 whatever the denoiser's dtype is; with prompts the latents follow the text encoder."""
    takes_text = "prompt" in inspect.signature(pipe.__call__).parameters
    return chosen if takes_text or name != "auto" else torch.float32


def check_names(
    scheme: str,
    *,
    planner: str = "hybrid",
    calibration: str = "first-step",
    observer: str = "mse",
    corrections: str = "none",
) -> None:
    """Raise LDMQError for a scheme, planner, selection, observer or correction that does not exist."""
    if parse_scheme(scheme).is_float:
        raise PlanError("--scheme float: nothing would be quantized; choose one such as w8a8")
    PLANNERS[planner]
    SELECTIONS[calibration]
    OBSERVERS[observer]
    corrections_of(corrections)


def check_target(target: str | None) -> None:
    """Raise PlanError for a target that cannot be read."""
    if target is not None:
        parse_target(target)


def check_model(model: str) -> None:
    """Raise LDMQError if there is no such model, before anything slow begins."""
    stored_config(model_path(model))


def check_picture(file: Path) -> None:
    """Raise OutputError for a name that is no picture's, or that cannot be written."""
    refuse_file(file)
    if file.suffix.lower() not in PICTURES:
        raise OutputError(f"{file}: pictures are written as {', '.join(filter(None, PICTURES))}; give such an ending")


def check_out(out: Path, model: str, overwrite: bool) -> None:
    """Raise OutputError for an output folder that may not be written or replaced."""
    refuse_folder(out, overwrite=overwrite)
    if not overwrite or not out.is_dir() or not any(out.iterdir()):
        return
    if out.resolve() == Path(model_path(model)).resolve():
        raise OutputError(f"{out}: is the model itself; quantize into another folder")
    if not (out / "model_index.json").is_file():
        raise OutputError(f"{out}: holds no pipeline (no model_index.json), so --overwrite will not delete it")


def reconstruction_memory(out: Path) -> Path:
    """Where the finished blocks of a reconstruction are kept until `out` is written."""
    return out.absolute().with_name(f".{out.absolute().name}.reconstruction")


def dry_run_folder(out: Path | None, repo_id: str) -> Path:
    """Where a dry run writes. Raises OutputError if it must not."""
    folder = out or Path(f"{repo_id.rpartition('/')[2]}-dry-run")
    refuse_folder(folder, overwrite=False)
    return folder


def no_dry_run_folder(out: Path | None) -> None:
    """Raise LDMQError if a folder was named that nothing would be written to."""
    if out is not None:
        raise LDMQError(f"--out {out}: only --dry-run writes a folder; add it, or leave --out out")


def check_alone(context: typer.Context, option: str, others: tuple[str, ...]) -> None:
    """Raise PlanError if any of `others` was given on the command line beside `option`."""
    for other in others:
        source = context.get_parameter_source(other)
        if source is not None and source.name == "COMMANDLINE":
            raise PlanError(f"--{option} decides already what --{other.replace('_', '-')} would; leave one of them out")


@dataclass(frozen=True, slots=True)
class Given:
    """What to record: read and checked at once, turned into pipeline calls when the pipeline is there."""

    model: str
    prompts: Path | None
    inputs: Path | None
    seed: int
    read: list[Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.prompts and self.inputs:
            raise LDMQError("--prompts and --inputs exclude each other; give one of them")
        found = read_prompts(self.prompts) if self.prompts else read_inputs(self.inputs) if self.inputs else None
        object.__setattr__(self, "read", found)

    def calls(self, pipe: Any, steps: int | None) -> list[dict[str, Any]]:
        """`__call__` arguments for recording."""
        if self.inputs and self.read is not None:
            common = {"num_inference_steps": steps} if steps else {}
            return [{**common, **entry} for entry in self.read]
        prompts = demo_captions() if self.read is None and self.model == MODEL else self.read
        return default_inputs(pipe, prompts, steps=steps, seed=self.seed)

    def subjects(self, pipe: Any) -> list[str | None]:
        """What to draw for people to look at: the prompts given, or those that fit the pipeline."""
        if self.read is not None:
            return list(self.read)[:PICTURED]
        if self.model == MODEL:
            return list(demo_prompts())
        first = default_inputs(pipe, None, seed=self.seed)[0]
        found = first.get("prompt") or first.get("class_labels") or [None] * 4
        return [None if subject is None else str(subject) for subject in found][:PICTURED]
