"""The command line `ldmq`: options in, one library call each, a table or JSON out. Here: the commands that make a
quantized model; those that use one are in cli_use.py."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from . import arguments as arg
from . import cli_evaluate, cli_use
from .artifacts import Plan, Profile
from .demo import MODEL
from .demo.job import refuse_demo_folder, run_demo
from .families import find_denoiser, layer_table
from .inspection import plan_data, plan_table, profile_data, profile_table
from .output import file_beside, refuse_file
from .pipeline import Settings, denoiser_loader, quantize_pipeline, save_pipeline
from .planning import kept_layers, make_plan
from .profiling import ProfileSettings, profile_sqnr
from .recording import record_calls
from .settings import reconstruction_of
from .summary import Summary, summary_data, summary_table
from .terminal import quiet_libraries, say, stages, tell, tell_memory

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
    reconstruct: arg.Reconstruct = "none",
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
    reconstruction_of(reconstruct)
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
        reconstruction=reconstruct,
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
    memory = arg.reconstruction_memory(out) if reconstruct != "none" else None
    if memory is not None:
        tell_memory(memory)
    with stages() as progress:
        calls = given.calls(pipe, steps)
        outcome = quantize_pipeline(pipe, calls, settings, reload=reload, memory=memory, progress=progress)
        save_pipeline(pipe, out, outcome=outcome, overwrite=overwrite)
    if memory is not None:
        shutil.rmtree(memory, ignore_errors=True)
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
        tell_memory(memory)
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


for command in (cli_use.sample, cli_use.compare, cli_use.report, cli_use.info, cli_use.push):
    app.command()(command)
app.command("evaluate")(cli_evaluate.evaluate_model)
