"""Time of one step of ComfyUI's own MODEL, float and quantized as LDM-Q Quantize does it.

    COMFYUI_PATH=ComfyUI python benchmarks/comfyui.py --rounds 5 --json comfyui.json

SD 1.5's U-Net cut to two levels of one block (107 M parameters, random weights), 64 x 64 latents, batch 2. Variants run
interleaved in one process, because a machine's speed drifts by more than they differ. COMFYUI_PATH is ComfyUI's source
tree, whose requirements the environment must have.
"""

import importlib
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from diffusers_ldmq import metrics
from diffusers_ldmq.artifacts import LayerChoice, Plan
from diffusers_ldmq.backends import cpu_kind
from diffusers_ldmq.families import family_of
from diffusers_ldmq.observers import OBSERVERS, Observer
from diffusers_ldmq.serialization import write_json
from diffusers_ldmq.specs import QuantSpec

CONFIG: dict[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "context_dim": 768, "num_heads": 8, "num_head_channels": -1,
    "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None, "use_linear_in_transformer": False,
    "use_temporal_attention": False,
}  # fmt: skip
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""As ComfyUI runs the model without options on a CPU, and with --bf16-unet."""
SCHEMES = ("w8a8", "w8a8-dyn", "w8a16")


def start_comfyui() -> None:
    """Make the ComfyUI of COMFYUI_PATH importable, on the CPU."""
    path = os.environ.get("COMFYUI_PATH", "")
    if not (Path(path) / "comfy").is_dir():
        raise SystemExit(f"COMFYUI_PATH is {path!r}; set it to ComfyUI's folder")
    sys.path[:0] = [str(Path(__file__).parents[1]), path]
    importlib.import_module("comfy.cli_args").args.cpu = True


def float_model(dtype: torch.dtype) -> Any:
    """A ModelPatcher on the CPU, with the same random weights at every dtype."""
    config = importlib.import_module("comfy.supported_models").SD15(dict(CONFIG))
    config.set_inference_dtype(dtype, None)
    cpu = torch.device("cpu")
    model = config.get_model({}, "", device=cpu)
    fill(model.diffusion_model)
    patcher = importlib.import_module("comfy.model_patcher").CoreModelPatcher
    return patcher(model, load_device=cpu, offload_device=cpu)


def fill(module: nn.Module) -> None:
    """Random weights of ordinary sizes: a matrix keeps its input's power, a norm nearly is the identity."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        scaled = noise / tensor[0].numel() ** 0.5 if tensor.dim() > 1 else noise * 0.1 + float(name.endswith("weight"))
        tensor.copy_(scaled)


def step(model: Any) -> Tensor:
    """The denoised latents of one step at batch 2, 77 tokens. Loads the MODEL where it is not."""
    importlib.import_module("comfy.model_management").load_models_gpu([model])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 64, 64, generator=generator)
    text = torch.randn(2, 77, 768, generator=generator)
    with torch.inference_mode():
        return model.model.apply_model(x, torch.full((2,), 5.0), c_crossattn=text).float()


def quantized(model: Any, scheme: str) -> Any:
    """The MODEL with all layers under `scheme` but those that stay float by default."""
    from comfyui_nodes.native.patching import fingerprint_of, quantize_model, source_layers
    from comfyui_nodes.native.ranges import InputRanges

    denoiser, layers = model.model.diffusion_model, source_layers(model)
    keep = re.compile(family_of(denoiser).keep_float)
    chosen = {name: "float" if keep.search(name) else scheme for name in layers}
    mark = fingerprint_of(layers)
    plan = Plan(type(denoiser).__name__, mark, "uniform", {n: LayerChoice(s, "benchmark") for n, s in chosen.items()})
    seen = observed(model, layers)
    found = {name: observer.qparams(QuantSpec(8, "tensor")) for name, observer in seen.items()}
    ranges = {name: (float(scale), int(zero_point)) for name, (scale, zero_point) in found.items()}
    return quantize_model(model, plan, InputRanges(mark, ranges, "first-step", "minmax-affine", 2))[0]


def observed(model: Any, layers: dict[str, nn.Module]) -> dict[str, Observer]:
    """What each layer's observer saw in one float step."""
    observers = {name: OBSERVERS["minmax-affine"]() for name in layers}

    def looking(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: observers[name].update(inputs[0].float())

    hooks = [layer.register_forward_pre_hook(looking(name)) for name, layer in layers.items()]
    try:
        step(model)
    finally:
        for hook in hooks:
            hook.remove()
    return observers


def milliseconds(model: Any) -> float:
    """Of one step, after one that is not counted and that brings the MODEL into its place."""
    step(model)
    start = time.perf_counter()
    step(model)
    return 1e3 * (time.perf_counter() - start)


def main(
    rounds: Annotated[int, typer.Option(help="Timings of every variant; the median counts.")] = 5,
    schemes: Annotated[str, typer.Option(help="Of the quantized layers, with commas between.")] = ",".join(SCHEMES),
    json: Annotated[Path | None, typer.Option(help="Write the rows here, too.")] = None,
) -> None:
    """Time float and quantized MODELs against each other."""
    start_comfyui()
    with torch.inference_mode():
        floats = {name: float_model(dtype) for name, dtype in FLOATS.items()}
        models = {(name, "float"): model for name, model in floats.items()}
        models |= {
            (name, scheme): quantized(model, scheme) for name, model in floats.items() for scheme in schemes.split(",")
        }
    reference = step(floats["fp32"])
    quality = {key: float(metrics.sqnr(reference, step(model))) for key, model in models.items() if key[1] != "float"}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in models}
    for _ in range(rounds):
        for key, model in models.items():
            times[key].append(milliseconds(model))
    table = Table("MODEL", "variant", "ms a step", "of the float MODEL's", "model_size()", "output SQNR")
    rows = []
    for key, found in times.items():
        ms, base = statistics.median(found), statistics.median(times[key[0], "float"])
        size, db = models[key].model_size(), quality.get(key)
        rows.append({"model": key[0], "variant": key[1], "ms": ms, "rounds_ms": found, "bytes": size, "sqnr_db": db})
        told = "-" if db is None else f"{db:.1f} dB"
        table.add_row(*key, f"{ms:.0f}", f"{ms / base:.2f}", f"{size / 1e6:.1f} MB", told)
    Console().print(f"{cpu_kind()}, torch {torch.__version__}, {torch.get_num_threads()} threads", table)
    if json is not None:
        write_json(json, {"cpu": cpu_kind(), "threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    typer.run(main)
