"""The parts of the class-conditional latent diffusion model: what each stage learns, and where they are kept."""

import copy
import hashlib
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
from torch import Tensor, nn
from training_loop import Settings, log
from training_tasks import AutoencoderTask, chosen_device, encode_all, fast_autocast, reconstruction_psnr

LATENTS = PIXELS // 4  # side of a picture's latents
NO_CLASS = 1000  # DiTPipeline's number for "no class in particular"; those from 10 to 999 stay unused
JUDGED = 1000  # pictures on which the autoencoder is judged and its scale is measured


class LatentWorkspace(Workspace):
    """The parts trained so far, with those of the model's folder behind them."""

    kinds: ClassVar[dict[str, Any]] = {"vae": AutoencoderKL, "transformer": DiTTransformer2DModel}

    def __init__(self, state: Path, model: Path, classes: list[str]) -> None:
        super().__init__(state, str(model) if (model / "vae").is_dir() else "")
        self.model, self.classes = model, classes

    def keep(self, part: str, parts: Callable[[Any], dict[str, Any]], average: nn.Module) -> None:
        """Stores what `parts` makes of the averaged weights, and the pipeline if it is complete."""
        self.save(part, parts(average)[part])
        self.export()

    def export(self) -> Path | None:
        """Writes the float16 pipeline if all its parts exist by now, and returns its folder."""
        if any(self.find(part) is None for part in self.kinds):
            return None
        components: dict[str, Any] = {part: self.load(part).half() for part in self.kinds}
        components["scheduler"] = new_scheduler(clip_sample=False)
        pipeline: Any = DiTPipeline(**components)
        pipeline.register_to_config(id2label={str(number): name for number, name in enumerate(self.classes)})
        renew_folder(self.model, pipeline.save_pretrained)
        return self.model


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


class DenoiserOfClasses:
    """Predict the velocity of a picture's noisy latents from its class, which is sometimes withheld."""

    def __init__(self, workspace: Workspace, data: CaptionedImages, settings: Settings) -> None:
        self.count, self.dropout = len(data.captions), settings.dropout
        self.device = chosen_device(settings.device)
        self.labels = labels_of(data)
        log.info("encoding %d pictures of %d classes", self.count, len(class_names(data)))
        vae = workspace.load("vae").to(self.device)
        self.latents = encode_all(vae, data) * vae.config.scaling_factor
        found = workspace.find("transformer")
        # Not in training mode, where each block of diffusers' DiT would withhold the class by a dice of its own.
        transformer = (workspace.load("transformer") if found else new_transformer(settings.width)).eval()
        self.trained: Any = with_plain_attention(transformer).to(self.device)
        self.autocast = fast_autocast(self.device)

    def loss(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        withheld = torch.rand(len(rows), generator=generator) < self.dropout
        labels = self.labels[rows].masked_fill(withheld, NO_CLASS).to(self.device)
        with self.autocast:
            return velocity_loss(
                lambda noisy, times: self.trained(noisy, times, labels).sample,
                self.latents[rows.to(self.device)],
                generator,
            )

    def parts(self, average: nn.Module) -> dict[str, Any]:
        """The averaged transformer."""
        return {"transformer": average}


def new_transformer(width: int) -> Any:
    """A DiT of six blocks over 8x8 tokens, three times `width` wide: 5.75 M parameters at width 64."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=width // 2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=LATENTS,
        patch_size=1,
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
