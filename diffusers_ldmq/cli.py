"""The command line `ldmq`: options in, one library call each, a table or JSON out."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from . import arguments as arg
from .artifacts import Plan, Profile
from .demo import MODEL
from .demo.job import refuse_demo_folder, run_demo
from .families import find_denoiser, layer_table
from .inputs import read_prompts
from .inspection import (
    describe,
    description_data,
    description_table,
    layers_table,
    plan_data,
    plan_table,
    profile_data,
    profile_table,
)
from .output import file_beside, refuse_file
from .pictures import comparison_sheet, picture_scores
from .pipeline import Settings, denoiser_loader, quantize_pipeline, save_pipeline
from .planning import kept_layers, make_plan
from .profiling import ProfileSettings, profile_sqnr
from .recording import record_calls, try_one_step
from .report import write_report
from .report_inputs import refuse_other_model, stored_inputs, with_pictures, with_times
from .sampling import Sampling, sample_pictures
from .summary import Summary, scores_data, scores_table, summary_data, summary_table
from .terminal import console, quiet_libraries, say, stages, tell

WIDEST = 400
"""Columns that a list of layers may take: names are what people copy, so lines rather wrap than break them."""

app = typer.Typer(
    name="ldmq",
    help="Quantize latent diffusion pipelines: measure, decide, verify. MODEL is a diffusers folder, a hub id, or "
    f"the word {MODEL} for the small model that comes with this package.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _begin() -> None:
    quiet_libraries()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder to write; an earlier demo's is replaced")] = Path("ldmq-demo"),
    as_json: arg.AsJson = False,
) -> None:
    """Do the whole job on the bundled model: measure, plan, quantize, verify, and draw 8 pictures before and after."""
    refuse_demo_folder(out)
    with stages() as progress:
        summary = run_demo(out, progress)
    tell(summary_table(summary), {**summary_data(summary), "out": str(out)}, as_json)
    say(f"\nOpen {out}/report.html in a browser; the quantized pipeline is {out}/quantized.", as_json)


@app.command()
def quantize(
    context: typer.Context,
    model: arg.Model,
    out: Annotated[Path, typer.Option(help="folder to write")],
    plan: Annotated[Path | None, typer.Option(help="a plan.json instead of planning")] = None,
    planner: arg.Planner = "hybrid",
    scheme: arg.Scheme = "w8a8",
    calibration: arg.Rule = "first-step",
    observer: arg.Observer = "minmax-affine",
    keep_float: arg.KeepFloat = "default",
    corrections: arg.Corrections = "none",
    corrected_layers: arg.CorrectedLayers = 8,
    target: arg.Target = None,
    prompts: arg.Prompts = None,
    inputs: arg.Inputs = None,
    steps: arg.Steps = None,
    seed: arg.Seed = 0,
    component: arg.Components = None,
    device: arg.Device = "cpu",
    dtype: arg.Dtype = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a pipeline folder at --out")] = False,
    as_json: arg.AsJson = False,
) -> None:
    """Quantize a pipeline and save it as an ordinary diffusers folder."""
    arg.check_names(scheme, planner=planner, calibration=calibration, observer=observer, corrections=corrections)
    arg.check_target(target)
    arg.check_out(out, model, overwrite)
    if plan:
        arg.check_alone(context, "plan", ("planner", "scheme", "keep_float"))
    settings = Settings(
        planner=planner,
        scheme=scheme,
        calibration=calibration,
        observer=observer,
        keep_float=keep_float,
        corrections=corrections,
        corrected_layers=corrected_layers,
        target=target,
        plan=Plan.load(plan) if plan else None,
        dtype=arg.checked_dtype(dtype, device),
        seed=seed,
        components=arg.components(component),
    )
    given = arg.Given(model, prompts, inputs, seed)
    pipe = arg.load_float(model, device, settings.components)
    settings = replace(settings, dtype=arg.fitting_dtype(settings.dtype, dtype, pipe))
    reload = denoiser_loader(arg.model_path(model), device)
    with stages() as progress:
        outcome = quantize_pipeline(pipe, given.calls(pipe, steps), settings, reload=reload, progress=progress)
        save_pipeline(pipe, out, outcome=outcome, overwrite=overwrite)
    summary = Summary(model, outcome.recording.denoiser, outcome.plan, outcome.report, companions=outcome.companions)
    tell(summary_table(summary), {**summary_data(summary), "out": str(out)}, as_json)
    say(f"\nSaved in {out}; `ldmq info {out}` shows it again.", as_json)


@app.command()
def profile(
    model: arg.Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="file to write")] = Path("profile.json"),
    scheme: arg.Scheme = "w8a8",
    calibration: arg.Rule = "first-step",
    observer: arg.Observer = "minmax-affine",
    keep_float: arg.KeepFloat = "default",
    prompts: arg.Prompts = None,
    inputs: arg.Inputs = None,
    steps: arg.Steps = None,
    seed: arg.Seed = 0,
    device: arg.Device = "cpu",
    full: arg.Full = False,
    as_json: arg.AsJson = False,
) -> None:
    """Measure where quantization noise arises: per layer and scheme, per block, over time."""
    arg.check_names(scheme, calibration=calibration, observer=observer)
    refuse_file(out)
    given = arg.Given(model, prompts, inputs, seed)
    pipe = arg.load_float(model, device)
    _, denoiser = find_denoiser(pipe)
    settings = ProfileSettings(
        scheme=scheme,
        selection=calibration,
        observer=observer,
        keep_float=kept_layers(layer_table(denoiser), keep_float),
        full=full,
    )
    memory = out.with_suffix(".partial.json") if full else None
    if memory is not None:
        begun = "going on with what it holds" if memory.exists() else "repeat the command to go on after an interrupt"
        console(stderr=True).print(f"note: finished parts are kept in {memory}; {begun}", markup=False, soft_wrap=True)
    with stages() as told:
        recording = record_calls(
            pipe, given.calls(pipe, steps), selection=calibration, seed=seed, progress=told.of("record")
        )
        measured = profile_sqnr(denoiser, recording, settings, memory=memory, progress=told.of("profile"))
        with file_beside(out) as beside:
            measured.save(beside)
    if memory is not None:
        memory.unlink(missing_ok=True)
    tell(profile_table(measured), {**profile_data(measured), "out": str(out)}, as_json)


@app.command()
def plan(
    profile: Annotated[Path, typer.Argument(metavar="PROFILE.json", help="what `ldmq profile` wrote")],
    out: Annotated[Path, typer.Option("-o", "--out", help="file to write")] = Path("plan.json"),
    target: arg.Target = None,
    planner: arg.Planner = "hybrid",
    scheme: arg.Scheme = "w8a8",
    keep_float: arg.KeepFloat = "default",
    as_json: arg.AsJson = False,
) -> None:
    """Decide the scheme of every layer from a profile. Edit the file if you know better; quantize takes it."""
    arg.check_names(scheme, planner=planner)
    arg.check_target(target)
    refuse_file(out)
    measured = Profile.load(profile)
    made = make_plan(measured, target, planner=planner, scheme=scheme, keep_float=keep_float)
    with file_beside(out) as beside:
        made.save(beside)
    tell(plan_table(made, measured.table), {**plan_data(made, measured.table), "out": str(out)}, as_json)


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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
