"""The parts of the latent diffusion models of CIFAR-10: what each stage learns, and where they are kept."""

import copy
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from captioned_images import CaptionedImages
from cifar_diffusion import new_scheduler, renew_folder, velocity_loss
from cifar_training import PIXELS, with_plain_attention
from class_images import class_names, labels_of
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from pipeline_parts import Workspace
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from training_loop import Settings, log
from training_tasks import AutoencoderTask, chosen_device, encode_all, fast_autocast, reconstruction_psnr

LATENTS = PIXELS // 4  # side of a picture's latents
NO_CLASS = 1000  # DiTPipeline's number for "no class in particular"; those from 10 to 999 stay unused
JUDGED = 1000  # pictures on which the autoencoder is judged and its scale is measured


class LatentWorkspace(Workspace):
    """The parts trained so far, with those of another pipeline behind them, and the folder of the finished model."""

    def __init__(self, state: Path, model: Path, init: str) -> None:
        super().__init__(state, init)
        self.model = model

    def keep(self, part: str, parts: Callable[[Any], dict[str, Any]], average: nn.Module) -> None:
        """Stores what `parts` makes of the averaged weights, and the pipeline if it is complete."""
        self.save(part, parts(average)[part])
        self.export()

    def export(self) -> Path | None:
        """Writes the float16 pipeline if all its parts exist by now, and returns its folder."""
        if any(self.find(part) is None for part in self.kinds):
            return None
        components: dict[str, Any] = {part: self.load(part).half() for part in self.kinds}
        pipeline = self.new_pipeline(components | {"scheduler": new_scheduler(clip_sample=False)})
        renew_folder(self.model, pipeline.save_pretrained)
        return self.model

    def new_pipeline(self, components: dict[str, Any]) -> Any:
        """The pipeline of the parts and the scheduler."""
        raise NotImplementedError


class WorkspaceOfClasses(LatentWorkspace):
    """The parts of a DiTPipeline that knows the classes by name; training starts from an earlier model."""

    kinds: ClassVar[dict[str, Any]] = {"vae": AutoencoderKL, "transformer": DiTTransformer2DModel}

    def __init__(self, state: Path, model: Path, classes: list[str]) -> None:
        super().__init__(state, model, str(model) if (model / "vae").is_dir() else "")
        self.classes = classes

    def new_pipeline(self, components: dict[str, Any]) -> Any:
        pipeline: Any = DiTPipeline(**components)
        pipeline.register_to_config(id2label={str(number): name for number, name in enumerate(self.classes)})
        return pipeline


class AutoencoderOfClasses(AutoencoderTask):
    """Encoder and decoder of 32x32 pictures."""

    pixels = PIXELS

    def parts(self, average: nn.Module) -> dict[str, Any]:
        """The averaged autoencoder, with the factor that gives its latents unit variance."""
        vae: Any = copy.deepcopy(average)
        few = slice(None, None, max(1, self.count // JUDGED))
        judged = CaptionedImages(self.data.pixels[few], self.data.captions[few])
        vae.register_to_config(scaling_factor=1 / encode_all(vae, judged).std().item())
        log.info("vae: PSNR %.2f dB on %d pictures", reconstruction_psnr(vae, judged), len(judged.captions))
        return {"vae": vae}


class LatentDenoiser:
    """A denoiser, the workspace's or a new one, and the latents of all pictures for it to learn."""

    part: ClassVar[str]  # its name in the pipeline

    def __init__(self, workspace: Workspace, data: CaptionedImages, settings: Settings) -> None:
        self.count, self.device = len(data.captions), chosen_device(settings.device)
        self.latents = scaled_latents(workspace, data, self.device)
        denoiser = workspace.load(self.part) if workspace.find(self.part) else self.new(settings.width)
        self.trained: Any = with_plain_attention(denoiser).to(self.device)
        self.autocast = fast_autocast(self.device)

    def new(self, width: int) -> Any:
        """A denoiser with random weights."""
        raise NotImplementedError

    def velocity_loss(self, predict: Callable[[Tensor, Tensor], Tensor], rows: Tensor, dice: torch.Generator) -> Tensor:
        """The loss of `predict(noisy, times)` on the latents of `rows`."""
        with self.autocast:
            return velocity_loss(predict, self.latents[rows.to(self.device)], dice)

    def parts(self, average: nn.Module) -> dict[str, Any]:
        """The averaged denoiser."""
        return {self.part: average}


def scaled_latents(workspace: Workspace, data: CaptionedImages, device: torch.device) -> Tensor:
    """Latents of unit variance of all pictures, float32 [N, 4, 8, 8]; kept beside the state, for the next start."""
    vae = workspace.load("vae").to(device)
    file, made_of = workspace.out / "latents.safetensors", f"{data.fingerprint()}, {weights_digest(vae)}"
    if file.exists():
        with safe_open(file, framework="pt") as kept:
            if (kept.metadata() or {}).get("made_of") == made_of:
                return kept.get_tensor("latents").to(device)
    log.info("encoding %d pictures of %d classes", len(data.captions), len(class_names(data)))
    latents = encode_all(vae, data) * vae.config.scaling_factor
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({"latents": latents.cpu()}, partial, metadata={"made_of": made_of})
    os.replace(partial, file)
    return latents


class DenoiserOfClasses(LatentDenoiser):
    """Predict the velocity of a picture's noisy latents from its class, which is sometimes withheld."""

    part = "transformer"

    def __init__(self, workspace: Workspace, data: CaptionedImages, settings: Settings) -> None:
        super().__init__(workspace, data, settings)
        self.dropout, self.labels = settings.dropout, labels_of(data)
        # Not in training mode, where each block of diffusers' DiT would withhold the class by a dice of its own.
        self.trained.eval()

    def new(self, width: int) -> Any:
        return new_transformer(width)

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        withheld = torch.rand(len(rows), generator=generator) < self.dropout
        labels = self.labels[rows].masked_fill(withheld, NO_CLASS).to(self.device)
        return self.velocity_loss(lambda noisy, times: self.trained(noisy, times, labels).sample, rows, generator)


def new_transformer(width: int) -> Any:
    """A DiT of six blocks, three times `width` wide: 5.75 M parameters at width 64.

    Its 4x4 tokens cost 0.3 of the time of 8x8: of a CPU's hours more steps make more than more tokens.
    """
    transformer = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=width // 2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=LATENTS,
        patch_size=2,
        num_embeds_ada_norm=NO_CLASS,
    )
    # As its authors start it: every block changes nothing, the output is zero, classes are close to each other.
    for block in transformer.transformer_blocks:
        norm: Any = block.norm1
        nn.init.zeros_(norm.linear.weight)
        nn.init.zeros_(norm.linear.bias)
        nn.init.normal_(norm.emb.class_embedder.embedding_table.weight, std=0.02)
    nn.init.zeros_(transformer.proj_out_2.weight)
    nn.init.zeros_(transformer.proj_out_2.bias)
    return transformer


def weights_digest(module: nn.Module) -> str:
    """A short digest of a module's weights, by which a resumed run recognises the autoencoder."""
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
