"""Write a small random SD 1.5 checkpoint and a LoRA for it, such as stock loaders take, into a ComfyUI models folder.

    COMFYUI_PYTHON stock_files.py COMFYUI_PATH MODELS_FOLDER

What a checkpoint is detected by (320 channels, a text width of 768) is SD 1.5's; it has a single short level.
"""

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [sys.argv[1], str(Path(__file__).resolve().parents[2])]

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True

import comfy.model_patcher  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.taesd.taesd  # noqa: E402
import torch  # noqa: E402
from comfyui.frontend.specs import CHECKPOINT, LORA  # noqa: E402
from comfyui.tiny_models import SD15, fill, lora  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

UNET = SD15 | {
    "model_channels": 320, "channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [1],
    "transformer_depth_output": [1, 1], "context_dim": 768, "num_heads": 8,
}  # fmt: skip
LORA_STRENGTH = 0.3


def denoiser() -> Any:
    """A MODEL with random weights."""
    config = comfy.supported_models.SD15(dict(UNET))
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device=torch.device("cpu"))
    fill(model.diffusion_model, 0)
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def autoencoder() -> torch.nn.Module:
    """TAESD with random weights whose pictures are neither black nor white."""
    vae = comfy.taesd.taesd.TAESD()
    fill(vae, 2)
    last: Any = [part for part in vae.taesd_decoder.modules() if isinstance(part, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        vae.vae_scale.fill_(1.0)
        vae.vae_shift.fill_(0.0)
        drawn = vae.taesd_decoder(torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)))
        assert last.bias is not None
        last.weight.div_(4 * drawn.std())
        last.bias.div_(4 * drawn.std()).add_(0.5 - drawn.mean() / (4 * drawn.std()))
    return vae


def write(folder: Path) -> None:
    """Both files. The autoencoder is TAESD's, so that decoding costs nothing."""
    model, clip = denoiser(), comfy.sd1_clip.SD1ClipModel(device="cpu", dtype=torch.float32)
    fill(clip, 1)
    vae = autoencoder()
    tensors = {f"model.diffusion_model.{key}": value for key, value in model.model.diffusion_model.state_dict().items()}
    texts = {key.replace("clip_l.", "cond_stage_model.", 1): value for key, value in clip.state_dict().items()}
    unsaved = ("cond_stage_model.logit_scale", "cond_stage_model.transformer.text_projection.weight")
    tensors |= {key: value for key, value in texts.items() if key not in unsaved}
    tensors |= {f"first_stage_model.{key}": value for key, value in vae.state_dict().items()}
    for name in ("checkpoints", "loras"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in tensors.items()}, folder / "checkpoints" / CHECKPOINT)
    layers = [key.removesuffix(".weight") for key, value in model.model.diffusion_model.state_dict().items()
              if key.endswith(".weight") and value.dim() > 1 and "blocks" in key]  # fmt: skip
    save_file(lora(model, layers, LORA_STRENGTH), folder / "loras" / LORA)


if __name__ == "__main__":
    with torch.inference_mode(False):
        write(Path(sys.argv[2]))
