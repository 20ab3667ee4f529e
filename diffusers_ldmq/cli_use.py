"""Commands that use a finished model: draw with it, compare it, report on it, describe it, share it."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from . import arguments as arg
from .card_inputs import IMAGES, Told, card_of, draw_samples
from .checkpoints import stored_denoiser
from .families import find_denoiser
from .hub import Push, open_repo, push_folder, write_folder
from .inputs import read_prompts
from .inspection import describe, description_data, description_table, layers_table
from .output import file_beside, refuse_file
from .pictures import comparison_sheet, picture_scores
from .pipeline import denoiser_loader
from .recording import try_one_step
from .report import write_report
from .report_inputs import refuse_other_model, stored_inputs, with_pictures, with_times
from .sampling import Sampling, sample_pictures
from .summary import scores_data, scores_table
from .terminal import console, stages, tell, tell_line

WIDEST = 400
"""Columns that a list of layers may take: names are what people copy, so lines rather wrap than break them."""


def sample(
    model: arg.Model,
    prompt: Annotated[str | None, typer.Argument(help="text, or a class label where the pipeline takes one")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="picture (.png, .jpg, .webp); more get -1, -2, ...")] = Path(
        "out.png"
    ),
    steps: arg.Steps = None,
    guidance: arg.Guidance = None,
    seed: arg.Seed = 0,
    num_images: Annotated[int, typer.Option(min=1, help="how many pictures, seeds counting up")] = 1,
    device: arg.Device = "cpu",
    as_json: arg.AsJson = False,
) -> None:
    """Draw pictures with a float or quantized pipeline."""
    files = [out] if num_images == 1 else [out.with_stem(f"{out.stem}-{i + 1}") for i in range(num_images)]
    for file in files:
        arg.check_picture(file)
    pipe = arg.load_any(model, device)
    with stages() as told:
        pictures = sample_pictures(
            pipe, [prompt] * num_images, Sampling(steps, guidance, seed), progress=told.of("sample")
        )
    for file, picture in zip(files, pictures, strict=True):
        with file_beside(file) as beside:
            picture.convert("RGB").save(beside, format=arg.PICTURES[file.suffix.lower()])
    saved = [str(file) for file in files]
    tell(f"saved {', '.join(saved)}", {"model": model, "prompt": prompt, "seed": seed, "files": saved}, as_json)


def compare(
    first: Annotated[str, typer.Argument(metavar="FLOAT", help="the reference pipeline")],
    second: Annotated[str, typer.Argument(metavar="QUANTIZED", help="the pipeline to judge")],
    prompts: Annotated[Path, typer.Option(help="one prompt (or class label) per line; one picture each")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="also write the pictures side by side")] = None,
    steps: arg.Steps = None,
    guidance: arg.Guidance = None,
    seed: arg.Seed = 0,
    device: arg.Device = "cpu",
    as_json: arg.AsJson = False,
) -> None:
    """Draw every prompt with both pipelines at equal seeds and say how far the pictures are apart."""
    texts = read_prompts(prompts)
    for name in (first, second):
        arg.check_model(name)
    if out is not None:
        refuse_file(out)
    pictures = []
    with stages() as told:
        for role, name in (("float", first), ("quantized", second)):
            pipe = arg.load_any(name, device)
            told_role = told.of(f"sample {role}")
            pictures.append(sample_pictures(pipe, texts, Sampling(steps, guidance, seed), progress=told_role))
            del pipe  # two large pipelines need not fit at once
    scores = picture_scores(pictures[0], pictures[1])
    if out is not None:
        with file_beside(out) as beside:
            comparison_sheet(beside, {"float": pictures[0], "quantized": pictures[1]}, texts)
    data = {"float": first, "quantized": second, **scores.data(), "pictures": scores_data(scores, texts)}
    tell(scores_table(scores, texts), data, as_json)


def report(
    model: arg.Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write")] = Path("report.html"),
    original: Annotated[str | None, typer.Option("--float", help="the float pipeline: adds pictures and times")] = None,
    prompts: arg.Prompts = None,
    steps: arg.Steps = None,
    guidance: arg.Guidance = None,
    seed: arg.Seed = 0,
    pngs: arg.Pngs = False,
    device: arg.Device = "cpu",
    as_json: arg.AsJson = False,
) -> None:
    """Write one HTML page about a quantized pipeline: where noise arises, what was decided, what came out."""
    refuse_file(out)
    for name in (model, *([original] if original else [])):
        arg.check_model(name)
    given = arg.Given(original or model, prompts, None, seed)
    pipe = arg.load_any(model, device)
    shown = stored_inputs(model, pipe)
    if original is not None:
        source = arg.load_float(original, device)
        refuse_other_model(shown, original, find_denoiser(source)[1])
        calls = given.calls(source, steps)
        load = denoiser_loader(arg.model_path(original), device)
        with stages() as told:
            subjects = given.subjects(source)
            both = {"float": source, "quantized": pipe}
            shown = with_pictures(shown, both, subjects, Sampling(steps, guidance, seed), told)
            first = try_one_step(source, calls[0])
            shown = with_times(shown, load, first.batch(first.calls[0]), find_denoiser(pipe)[1])
    write_report(out, shown, pngs=pngs)
    tell(f"saved {out}; open it in a browser", {"model": model, "out": str(out)}, as_json)


def info(
    model: arg.Model,
    layers: Annotated[bool, typer.Option("--layers", help="list every layer")] = False,
    as_json: arg.AsJson = False,
) -> None:
    """Show schemes, backends on this machine, sizes and the stored SQNR of a pipeline, float or quantized."""
    found = describe(arg.load_any(model, "cpu"))
    tell(description_table(found), description_data(found, layers=layers), as_json)
    if layers and not as_json:
        shown, listed = console(), layers_table(found)
        needed = shown.measure(listed, options=shown.options.update(width=WIDEST)).maximum
        shown.print(listed, width=max(shown.width, needed), crop=False, no_wrap=True)


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a quantized pipeline, as `ldmq quantize` wrote it")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="where on the hub")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="of a new repository (default: as your account has it)")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch to push to, made where it is missing")] = None,
    token: Annotated[str | None, typer.Option(help="default: HF_TOKEN, or what `hf auth login` stored")] = None,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="open a pull request instead")] = False,
    base_model: Annotated[str | None, typer.Option(help="owner/name of the float model (default: as stored)")] = None,
    license_id: Annotated[str | None, typer.Option("--license", help="default: the base model's")] = None,
    original: Annotated[str | None, typer.Option("--float", help="the float pipeline: pictures side by side")] = None,
    prompts: Annotated[Path | None, typer.Option(help="what to draw for the card, one per line")] = None,
    images: Annotated[int, typer.Option(min=0, help="how many pictures to draw without --prompts; 0 = none")] = IMAGES,
    steps: arg.Steps = None,
    guidance: arg.Guidance = None,
    seed: arg.Seed = 0,
    device: arg.Device = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="write what would be pushed to --out; no network")] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="with --dry-run (default: NAME-dry-run)")] = None,
    as_json: arg.AsJson = False,
) -> None:
    """Share a quantized pipeline on the hub, with a model card: how to load it, sizes, SQNR, pictures, the plan."""
    to = Push(repo_id, private, revision, token, message, create_pr)
    texts = read_prompts(prompts) if prompts else None
    told = Told(base_model, license_id, texts, images, sampling=Sampling(steps, guidance, seed))
    stored_denoiser(folder)
    target = arg.dry_run_folder(out, to.repo_id) if dry_run else arg.no_dry_run_folder(out)
    to = to if dry_run else open_repo(to)
    samples = None
    if images or texts:
        pipe = arg.load_any(str(folder), device)
        source = arg.load_float(original, device, local_files_only=dry_run) if original else None
        with stages() as progress:
            samples = draw_samples(pipe, replace(told, original=source), pipe.plan, progress=progress)
    card = card_of(folder, to.repo_id, told, token=token, online=not dry_run)
    data = {"repo_id": card.repo_id, "base_model": card.base_model, "license": card.license and card.license.id}
    if target is not None:
        write_folder(folder, target, replace(card, samples=samples))
        line = f"wrote what would be pushed to {target}; its README.md is the card"
        tell_line(line, {**data, "out": str(target)}, as_json)
    else:
        url = push_folder(folder, to, replace(card, samples=samples))
        tell_line(f"pushed: {url}", {**data, "revision": revision, "url": url}, as_json)
