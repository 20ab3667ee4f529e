"""High-water marks of quantizing and of running the SD 1.5 UNet (full-size config, random weights), each in a fresh
process: one float fp32 step; the whole job (record, profile, plan, calibrate, quantize, verify); load and one step.

    python benchmarks/memory.py [--json OUT]
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

app = typer.Typer(add_completion=False)
GIB = 2**30


def sd15_unet() -> Any:
    """The SD 1.5 UNet with random weights, fp32."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).eval()


def call_arguments() -> dict[str, Any]:
    """Arguments of one call: 64x64 latents, batch 2, 77 tokens."""
    torch.manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 64, 64),
        "timestep": torch.tensor(981),
        "encoder_hidden_states": torch.randn(2, 77, 768),
    }


class OneCallPipeline:
    """The least that `record_calls` needs: a denoiser and a sampling loop, here of `num_inference_steps` steps."""

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.components = {"unet": unet}
        self.config: dict[str, Any] = {}

    def __call__(self, batch_size: int = 1, num_inference_steps: int = 1, generator: Any = None) -> None:
        kwargs = call_arguments()
        kwargs["sample"] = torch.randn(2 * batch_size, 4, 64, 64, generator=generator[0])
        for step in range(num_inference_steps):
            kwargs["timestep"] = torch.tensor(981 - 20 * step)
            with torch.no_grad():
                self.unet(**kwargs)

    def register_modules(self, **modules: Any) -> None:
        """As DiffusionPipeline's."""
        self.components.update(modules)


def high_water() -> int:
    """Peak resident bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """Resident bytes of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def float_step(folder: Path) -> dict[str, float]:
    """One fp32 step."""
    unet = sd15_unet()
    with torch.no_grad():
        unet(**call_arguments())
    return {"peak": high_water(), "weights": 4.0 * sum(p.numel() for p in unet.parameters())}


def job(folder: Path) -> dict[str, float]:
    """The whole hybrid job; leaves the quantized denoiser in `folder`."""
    from diffusers_ldmq.job import Settings, quantize_pipeline

    pipe: Any = OneCallPipeline(sd15_unet())
    outcome = quantize_pipeline(pipe, [{"batch_size": 1}] * 4, Settings())
    peak = high_water()
    pipe.unet.save_pretrained(folder)
    return {"peak": peak, "sqnr_db": outcome.report.sqnr_db, "ratio": outcome.report.bytes / outcome.report.fp32_bytes}


def load(folder: Path) -> dict[str, float]:
    """Load the quantized denoiser and run one step; growth since the imports."""
    from diffusers import UNet2DConditionModel

    import diffusers_ldmq  # noqa: F401  (registers the quantizer)

    before = resident()
    unet = UNet2DConditionModel.from_pretrained(folder)
    with torch.no_grad():
        unet(**call_arguments())
    return {"growth": resident() - before, "peak_growth": high_water() - before}


def told(figures: dict[str, float]) -> str:
    """Figures in words; large ones are bytes."""
    return ", ".join(f"{k} {v / GIB:.3f} GiB" if v > 1e6 else f"{k} {v:.3f}" for k, v in figures.items())


STAGES = {"float_step": float_step, "job": job, "load": load}


@app.command()
def main(
    json_out: Annotated[Path | None, typer.Option("--json", help="also write the figures there")] = None,
    stage: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print the high-water marks."""
    if stage is not None:
        assert folder is not None
        typer.echo(json.dumps(STAGES[stage](folder)))
        return
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in STAGES:
            command = [sys.executable, __file__, "--stage", name, "--folder", scratch]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
            typer.echo(f"{name}: {told(found[name])}")
    weights = found["float_step"]["weights"]
    typer.echo(f"job - float step: {(found['job']['peak'] - found['float_step']['peak']) / GIB:+.3f} GiB (limit +1)")
    typer.echo(f"growth after load and one step: {found['load']['growth'] / weights:.3f}x of the fp32 weights")
    if json_out is not None:
        json_out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    app()
