"""What corrections cost and bring: time of a step with N layers smoothed, rotated or with a branch, against the same
model without; output SQNR of gated and ungated corrections; LoRA on corrected layers, in dB.

    python benchmarks/corrections.py cost|quality|lora [--model sd15] [--layers 10] [--json OUT]

'quality' takes minutes. Weights of 'sd15' are random: only 'cost' is measured there.
"""

import copy
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from diffusers_ldmq import calibrate, default_inputs, make_plan, profile_sqnr, quantize, record_calls, verify
from diffusers_ldmq.artifacts import Calibration
from diffusers_ldmq.backends import fast_dtype
from diffusers_ldmq.calls import Batch, Recording, run
from diffusers_ldmq.correction import apply_everywhere, correct
from diffusers_ldmq.corrections import CORRECTIONS, LayerInputs
from diffusers_ldmq.demo import demo_captions, demo_model
from diffusers_ldmq.families import find_denoiser, layer_table, quantizable_layers
from diffusers_ldmq.layers import quantize_layer, quantized_layers
from diffusers_ldmq.metrics import sqnr, sqnr_db
from diffusers_ldmq.quantization import cast_floats, quantized_for_now, replace_layer
from diffusers_ldmq.specs import LayerState, geometry_of, parse_scheme
from diffusers_ldmq.timing import seconds_per_step

app = typer.Typer(add_completion=False)
STAY_FLOAT = re.compile(r"^(time_embedding|conv_in$|conv_out$)|\.time_emb_proj$")
LORA_TARGETS = ("ff.net.2", "conv1")


def show(line: str) -> None:
    typer.echo(line)


def changed(state: LayerState, layer: nn.Module, what: str) -> LayerState:
    """The state with a correction's run-time parts, whose values do not matter for its time."""
    geometry = geometry_of(layer)
    if what == "smoothed":
        return replace(state, pre_quant_scale=torch.ones(geometry.in_channels))
    if what.startswith("rotated"):
        return replace(state, rotation=int(what.removeprefix("rotated ")))
    dtype = torch.float32 if state.bias is None else state.bias.dtype
    a = torch.zeros(16, geometry.columns, dtype=dtype)
    return replace(state, low_rank_a=a, low_rank_b=torch.zeros(geometry.shape[0], 16, dtype=dtype))


def with_parts(denoiser: nn.Module, names: Sequence[str], what: str) -> nn.Module:
    """A copy of the quantized denoiser that shares everything but the named layers."""
    keep = {id(module): module for name, module in denoiser.named_modules() if name and not list(module.children())}
    version = copy.deepcopy(denoiser, {key: module for key, module in keep.items()})
    for name in names:
        layer = quantized_layers(denoiser)[name]
        replace_layer(version, name, quantize_layer(layer, changed(layer.state(), layer, what)))
    return version


def costs(denoiser: nn.Module, batch: Batch, names: Sequence[str], rounds: int) -> dict[str, float]:
    """Step time with the named layers corrected, over that without.

    Two measurements: whole steps, interleaved in one run ('plain again' shows how far the machine's load falsifies
    them), and the layers alone on their own inputs, the fastest of many interleaved calls each, which other load on
    the machine hardly reaches: 1 + (corrected - plain) / fastest plain step.
    """
    kinds = ("smoothed", "rotated 16", "rotated 64", "low-rank")
    fits = {what: [name for name in names if fits_layer(denoiser.get_submodule(name), what)] for what in kinds}
    versions = {"plain": denoiser, "plain again": with_parts(denoiser, (), "smoothed")}
    versions |= {f"{len(fits[what])} {what}": with_parts(denoiser, fits[what], what) for what in kinds}
    times = seconds_per_step(versions, batch, rounds)
    show(f"plain step {times.versions['plain'].seconds * 1e3:.1f} ms, {times.rows} rows, {times.threads} threads")
    ratios = {f"steps, {name}": times.speedup("plain", over=name) for name in versions if name != "plain"}
    inputs = layer_inputs(denoiser, batch, names)
    fastest = min(timed(lambda: run(denoiser, batch)) for _ in range(max(rounds, 3)))
    for what in kinds:
        corrected = versions[f"{len(fits[what])} {what}"]
        extra = sum(
            added(denoiser.get_submodule(name), corrected.get_submodule(name), inputs[name]) for name in fits[what]
        )
        ratios[f"layers, {len(fits[what])} {what}"] = 1 + extra / fastest
    for name, ratio in ratios.items():
        show(f"  {name:22s} {ratio:.3f}")
    return ratios


def fits_layer(layer: nn.Module, what: str) -> bool:
    size = int(what.split()[1]) if what.startswith("rotated") else 1
    return geometry_of(layer).shape[1] % size == 0


def layer_inputs(denoiser: nn.Module, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda _, args: found.update({name: args[0].clone()})

    handles = [denoiser.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    run(denoiser, batch)
    for handle in handles:
        handle.remove()
    return found


def added(plain: nn.Module, corrected: nn.Module, x: Tensor, rounds: int = 15) -> float:
    """Seconds that the corrected layer takes more than the plain one: fastest of each, interleaved."""
    with torch.inference_mode():
        for layer in (plain, corrected):
            layer(x)  # packs
        pairs = [(timed(lambda: plain(x)), timed(lambda: corrected(x))) for _ in range(rounds)]
    return min(pair[1] for pair in pairs) - min(pair[0] for pair in pairs)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bundled() -> tuple[nn.Module, Recording]:
    pipe: Any = DiffusionPipeline.from_pretrained(demo_model(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    inputs = [{**entry, "guidance_scale": 5.0} for entry in default_inputs(pipe, demo_captions(), steps=20)]
    return find_denoiser(pipe)[1], record_calls(pipe, inputs, selection="uniform")


def worst_layers(denoiser: nn.Module, recording: Recording, calibration: Calibration, n: int) -> list[str]:
    """The n quantized layers with the lowest relative SQNR at w8a8, worst first."""
    profile = profile_sqnr(denoiser, recording)
    quantized = [layer for layer in profile.layers if layer.name in calibration.states]
    quantized.sort(key=lambda layer: sqnr_db(sum(layer.signal), sum(layer.noise["w8a8"])))
    return [layer.name for layer in quantized[:n]]


def quality(denoiser: nn.Module, recording: Recording, n: int) -> dict[str, float]:
    """Output SQNR in dB on the verifying calls: gated, and everywhere without a gate; each for both selections."""
    found: dict[str, float] = {}
    for selection in ("first-step", "uniform"):
        calibration = calibrated(denoiser, recording, selection)
        gated, trials = correct(
            denoiser, calibration, recording, layers=worst_layers(denoiser, recording, calibration, n)
        )
        for trial in trials:
            if trial.output_db is not None:
                show(f"    {trial.layer}: {trial.correction}, {'kept' if trial.kept else 'not kept'}: {trial.reason}")
        versions = {"none": lambda c=calibration: c, f"gated, worst {n}": lambda g=gated: g}
        for name in CORRECTIONS:
            versions[f"{name} everywhere"] = lambda c=calibration, k=name: apply_everywhere(denoiser, c, recording, k)
        for name, version in versions.items():
            with quantized_for_now(denoiser, version()):
                found[f"{selection}: {name}"] = verify(denoiser, recording).sqnr_db
            show(f"  {selection:11s} {name:22s} {found[f'{selection}: {name}']:6.2f} dB")
    return found


def calibrated(denoiser: nn.Module, recording: Recording, selection: str) -> Calibration:
    """W8A8 of every layer that the family does not keep float."""
    table = layer_table(denoiser)
    kept = tuple(info.name for info in table.layers if info.keep_float)
    plan = make_plan(table, planner="uniform", keep_float=kept)
    return calibrate(denoiser, plan, recording, selection=selection)


def lora_table(denoiser: nn.Module, recording: Recording, calibration: Calibration) -> dict[str, float]:
    """What a LoRA adds to the denoiser's output with one layer corrected, as SQNR in dB against what it adds with that
    layer in floating point; 'plain' is the layer quantized but not corrected."""
    batch = recording.batch(recording.only("select").calls[len(recording.only("select").calls) // 2])
    found: dict[str, float] = {}
    for ending in LORA_TARGETS:
        name = [n for n in calibration.states if n.endswith(ending) and n.startswith("up_blocks")][-1]
        layer = denoiser.get_submodule(name)
        inputs = captured(denoiser, layer, recording)
        truth = lora_effect(denoiser, name, batch)
        for correction in ("plain", "smooth", "rotate", "low-rank"):
            state: LayerState | None = calibration.states[name]
            if correction != "plain":
                state = CORRECTIONS[correction](layer, calibration.states[name], inputs)
            if state is None:
                continue
            replace_layer(denoiser, name, quantize_layer(layer, state))
            found[f"{name}: {correction}"] = sqnr(truth, lora_effect(denoiser, name, batch))
            replace_layer(denoiser, name, layer)
            show(f"  {name} {correction:9s} {found[f'{name}: {correction}']:6.2f} dB")
    return found


def captured(denoiser: nn.Module, layer: nn.Module, recording: Recording) -> LayerInputs:
    """Inputs of one layer on the first eight calibrating calls."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for call in recording.only("calibrate").calls[:8]:
        run(denoiser, recording.batch(call))
    handle.remove()
    return LayerInputs(tuple(seen), "mse")


def lora_effect(denoiser: Any, name: str, batch: Batch) -> Tensor:
    """Change of the denoiser's output by a seeded rank-4 LoRA on that layer."""
    from peft import LoraConfig

    without = run(denoiser, batch)
    torch.manual_seed(3)
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=[name], init_lora_weights=False))
    change = run(denoiser, batch) - without
    denoiser.delete_adapters("default")
    # peft leaves its wrapper around the layer
    replace_layer(denoiser, name, getattr(denoiser.get_submodule(name), "base_layer", denoiser.get_submodule(name)))
    denoiser.__dict__.pop("peft_config", None)
    return change


def sd15() -> tuple[nn.Module, Batch, list[str]]:
    """SD 1.5's architecture in w8a8 with random weights, a call of it, and its layers, large inputs first."""
    torch.manual_seed(0)
    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()
    kwargs = {
        "sample": torch.randn(2, 4, 64, 64),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, 77, 768),
    }
    sizes: dict[str, int] = {}
    layers = {n: m for n, m in quantizable_layers(model).items() if not STAY_FLOAT.search(n)}
    limits: dict[str, Tensor] = {}

    def looking_at(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes[name], limits[name] = args[0].numel(), args[0].abs().amax()

        return see

    handles = [layer.register_forward_pre_hook(looking_at(name)) for name, layer in layers.items()]
    output = run(model, Batch(kwargs, torch.empty(0), 500.0))
    for handle in handles:
        handle.remove()
    from diffusers_ldmq.calibration import layer_state
    from diffusers_ldmq.observers import OBSERVERS

    for name, layer in layers.items():
        observer = OBSERVERS["minmax"]()
        observer.update(limits[name])
        replace_layer(model, name, quantize_layer(layer, layer_state(name, layer, parse_scheme("w8a8"), observer)))
    cast_floats(model, fast_dtype("cpu"))
    return model, Batch(kwargs, output, 500.0), sorted(sizes, key=lambda name: -sizes[name])


@app.command()
def main(
    part: Annotated[str, typer.Argument(help="cost | quality | lora")],
    model: Annotated[str, typer.Option(help="bundled | sd15")] = "bundled",
    layers: Annotated[int, typer.Option(min=1, help="how many layers are corrected")] = 10,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    json_out: Annotated[Path | None, typer.Option("--json", help="also write the figures there")] = None,
) -> None:
    """Print what corrections cost and bring."""
    found: dict[str, Any] = {}
    if model == "sd15":
        denoiser, batch, names = sd15()
        show(f"cost on the {layers} layers with the largest inputs (the worst case)")
        found["cost, largest inputs"] = costs(denoiser, batch, names[:layers], rounds)
    else:
        denoiser, recording = bundled()
        if part == "quality":
            found["quality"] = quality(denoiser, recording, layers)
        calibration = calibrated(denoiser, recording, "uniform")
        if part == "lora":
            found["lora"] = lora_table(denoiser, recording, calibration)
        if part == "cost":
            worst = worst_layers(denoiser, recording, calibration, layers)
            batch = recording.batch(recording.calls[0])
            quantize(denoiser, calibration, dtype=fast_dtype("cpu"))
            show(f"cost on the {layers} worst layers")
            found["cost, worst"] = costs(denoiser, batch, worst, rounds)
    if json_out is not None:
        json_out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    app()
