"""Trains a small unconditional latent diffusion model on the latents of an existing autoencoder.

    python benchmarks/train/unconditional.py noto_emoji_128.zip out/ --set subset=familiar
    python benchmarks/train/unconditional.py pictures/ out/ --minutes 20 --set init=pipeline/

The autoencoder is that of the bundled emoji model, or of the Stable Diffusion pipeline named by init, unchanged;
only a UNet2DModel is trained. The output folder receives `parts/` (float32), `checkpoints/` (from which the same
command resumes) and `pipeline/` (a float16 LDMPipeline, the result).
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from captioned_images import CaptionedImages, load_captioned_images
from diffusers import AutoencoderKL, LDMPipeline, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from pipeline_parts import LATENTS, PIXELS, Workspace
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from training_command import SETTINGS_HELP, errors_in_one_line, parse_settings, train_stage
from training_loop import Settings, log
from training_tasks import chosen_device, encode_all, fast_autocast, noised

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
BUNDLED = Path(__file__).parents[2] / "diffusers_ldmq" / "demo" / "emoji-sd"
DEFAULTS = (5000, 64, 1e-3)  # steps, batch and peak rate where the command line names none


class UnconditionalWorkspace(Workspace):
    """The trained UNet; the starting pipeline gives its autoencoder and nothing else."""

    kinds: ClassVar[dict[str, Any]] = {"vae": AutoencoderKL, "unet": UNet2DModel}

    def find(self, part: str) -> Path | None:
        folder = self.folders[0 if part == "unet" else -1] / part
        return folder if folder.is_dir() else None

    def save_pipeline(self, components: dict[str, Any], folder: Path) -> None:
        """Writes `components`, the parts and the scheduler, as a float16 pipeline."""
        vqvae = components.pop("vae")  # LDMPipeline's name for any autoencoder
        LDMPipeline(vqvae=vqvae, **components).to(torch.float16).save_pretrained(folder)


class UnconditionalTask:
    """The UNet alone: predict the noise in a picture's latents."""

    def __init__(self, workspace: Workspace, data: CaptionedImages, settings: Settings) -> None:
        self.count, self.device = len(data.captions), chosen_device(settings.device)
        vae = workspace.load("vae").to(self.device)
        self.latents = encode_all(vae, data) * vae.config.scaling_factor
        self.trained: Any = new_unet(settings.width).to(self.device)
        log.info("unet: %.2f M parameters", sum(p.numel() for p in self.trained.parameters()) / 1e6)
        self.autocast = fast_autocast(self.device)

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        noisy, noise, times = noised(self.latents[rows.to(self.device)], generator)
        with self.autocast:
            predicted = self.trained(noisy, times).sample
        return mse_loss(predicted.float(), noise)

    def parts(self, average: nn.Module) -> dict[str, Any]:
        """The averaged UNet."""
        return {"unet": average}


def new_unet(width: int) -> Any:
    """Attention at 8x8 and 4x4: 2.8 M parameters at width 64, half as wide as the text-to-image UNet."""
    unet = UNet2DModel(
        sample_size=LATENTS,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(width // 2, width, 2 * width),
        attention_head_dim=width // 2,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    # On a CPU and this small, plain matrix products train a quarter faster than the fused attention.
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    return unet


@app.command(help=__doc__)
def main(
    data: Annotated[Path, typer.Argument(help="Folder or zip file of captioned pictures; captions are not learned.")],
    out: Annotated[Path, typer.Argument(help="Folder for parts, checkpoints and the pipeline.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps; 0: no limit.")] = 0,
    minutes: Annotated[float, typer.Option(help="Training minutes; 0: no limit.")] = 0.0,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help=SETTINGS_HELP)] = None,
) -> None:
    with errors_in_one_line():
        chosen = parse_settings(settings or [], steps, minutes)
        workspace = UnconditionalWorkspace(out, chosen.init or str(BUNDLED))
        pictures = load_captioned_images(data, PIXELS, chosen.subset)
        train_stage("unet", UnconditionalTask, pictures, workspace, chosen.with_defaults(*DEFAULTS))
        log.info("pipeline saved in %s", workspace.export())


if __name__ == "__main__":
    app()
