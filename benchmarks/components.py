"""Text encoders and autoencoders quantized without data: bytes, noise at their outputs, speed, and the peak of loading.

    python benchmarks/components.py bundled        the bundled model's trained CLIP text encoder and autoencoder
    python benchmarks/components.py t5             two layers and the embedding of T5-XXL's size, random weights

Rows are kept in benchmarks/results; the command goes on where it stopped.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer
from diffusers import AutoencoderKL
from measuring import Results, inputs, pipeline
from memory import resident
from torch import Tensor, nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from diffusers_ldmq import LDMQConfig
from diffusers_ldmq.demo import demo_captions, demo_model, demo_prompts
from diffusers_ldmq.metrics import sqnr_db
from diffusers_ldmq.pictures import picture_scores
from diffusers_ldmq.sampling import Sampling, sample_pictures
from diffusers_ldmq.verification import float_parameters, stored_bytes

app = typer.Typer(add_completion=False)
SCHEMES = ("w8a16", "w8a8-dyn", "w4a16", "w4a16-g64")
LARGE = ("w8a16",)
"""Schemes measured at full size."""
TOKENS, ROUNDS = 256, 3
XXL = T5Config(
    d_model=4096,
    d_ff=10240,
    d_kv=64,
    num_heads=64,
    num_layers=2,
    vocab_size=32128,
    feed_forward_proj="gated-gelu",
)


def noise(clean: Tensor, noisy: Tensor) -> float:
    """SQNR in dB of a whole tensor."""
    clean, error = clean.double(), noisy.double() - clean.double()
    return sqnr_db(float((clean**2).sum()), float((error**2).sum()))


def loaded(kind: Any, component: str, scheme: str | None, dtype: torch.dtype = torch.float32) -> Any:
    """A component of the bundled model, quantized while it is loaded."""
    config: dict[str, Any] = {"quantization_config": LDMQConfig(scheme)} if scheme else {}
    name = "dtype" if kind is CLIPTextModel else "torch_dtype"
    return kind.from_pretrained(demo_model(), subfolder=component, **{name: dtype}, **config).eval()


def bytes_of(model: nn.Module) -> dict[str, float]:
    """Stored bytes of a quantized model, and their ratio to its fp32 weights."""
    stored = stored_bytes(model)
    return {"bytes": stored, "of_fp32": stored / (4 * float_parameters(model))}


@torch.no_grad()
def text(scheme: str | None, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Embeddings of 64 captions; only the tokens of the prompt and its end count."""
    pipe = pipeline("bundled")
    tokens = pipe.tokenizer(demo_captions()[:64], padding="max_length", truncation=True, return_tensors="pt")
    model = loaded(CLIPTextModel, "text_encoder", scheme, dtype)
    clean, noisy = (m(tokens.input_ids).last_hidden_state.float() for m in (pipe.text_encoder, model))
    kept = tokens.attention_mask.bool()
    return {"sqnr_db": noise(clean[kept], noisy[kept]), "all_tokens_db": noise(clean, noisy), **bytes_of(model)}


@torch.no_grad()
def decoder(scheme: str | None, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Pictures of 8 held-out prompts: equal latents, decoded by both."""
    pipe = pipeline("bundled")
    call = {**inputs("bundled", pipe)[-1], "output_type": "latent"}
    latents = pipe(**call).images.float() / pipe.vae.config.scaling_factor
    model = loaded(AutoencoderKL, "vae", scheme, dtype)
    clean, noisy = pipe.vae.decode(latents).sample, model.decode(latents.to(dtype)).sample.float()
    pair = [pipe.image_processor.postprocess(x, output_type="pil") for x in (clean, noisy)]
    scores = picture_scores(pair[0], pair[1])
    found = {"sqnr_db": noise(clean, noisy), "psnr_db": scores.mean_psnr_db, "worst_psnr_db": scores.worst_psnr_db}
    return {**found, "ssim": scores.mean_ssim, **bytes_of(model)}


def both(text_scheme: str | None, vae_scheme: str | None) -> dict[str, float]:
    """Whole pictures, float denoiser: what quantized components change by themselves."""
    pipe, prompts = pipeline("bundled"), [*demo_prompts()]
    sampling = Sampling(20, 5.0, 1000)
    clean = sample_pictures(pipe, prompts, sampling)
    if text_scheme:
        pipe.text_encoder = loaded(CLIPTextModel, "text_encoder", text_scheme)
    if vae_scheme:
        pipe.vae = loaded(AutoencoderKL, "vae", vae_scheme)
    scores = picture_scores(clean, sample_pictures(pipe, prompts, sampling))
    return {"psnr_db": scores.mean_psnr_db, "worst_psnr_db": scores.worst_psnr_db, "ssim": scores.mean_ssim}


@app.command()
def bundled() -> None:
    """Trained components."""
    results = Results("components-bundled")
    for name, measure in (("text_encoder", text), ("vae", decoder)):
        told(name, "bfloat16", results.row(f"{name} bf16", lambda measure=measure: measure(None, torch.bfloat16)))
        for scheme in SCHEMES:
            told(name, scheme, results.row(f"{name} {scheme}", lambda m=measure, s=scheme: m(s)))
    for pair in (("w8a16", None), (None, "w8a16"), ("w8a16", "w8a16")):
        told("pictures", f"text {pair[0]}, vae {pair[1]}", results.row(f"pictures {pair}", lambda p=pair: both(*p)))


def told(name: str, scheme: str, row: dict[str, float]) -> None:
    """One row in words."""
    typer.echo(f"{name:14} {scheme:28} " + ", ".join(f"{key} {value:.4g}" for key, value in row.items()))


def float_folder(scratch: Path) -> Path:
    """The large encoder, saved in fp32."""
    folder = scratch / "float"
    if not folder.exists():
        torch.manual_seed(0)
        T5EncoderModel(XXL).save_pretrained(folder)
    return folder


def high_water() -> int:
    """Peak resident bytes of this process; what getrusage says would count the parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def load_stage(source: str, scheme: str, dtype: str, out: str) -> dict[str, float]:
    """In a fresh process: load, the growth of the peak and of what is resident; save where asked."""
    config: dict[str, Any] = {"quantization_config": LDMQConfig(scheme)} if scheme != "-" else {}
    before = resident()
    start = time.perf_counter()
    model = T5EncoderModel.from_pretrained(source, dtype=getattr(torch, dtype), **config)
    found = {"seconds": time.perf_counter() - start, "growth": resident() - before, "peak": high_water() - before}
    found |= {"file": sum(f.stat().st_size for f in Path(source).glob("*.safetensors"))}
    if out != "-":
        model.save_pretrained(out)
    return found


def fresh(*arguments: str) -> dict[str, float]:
    """`load_stage` in a process of its own."""
    command = [sys.executable, __file__, "stage", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@app.command(hidden=True)
def stage(source: str, scheme: str, dtype: str, out: str) -> None:
    """One loading, measured."""
    typer.echo(json.dumps(load_stage(source, scheme, dtype, out)))


@torch.no_grad()
def speed(folders: dict[str, tuple[Path, torch.dtype]]) -> dict[str, dict[str, float]]:
    """Median seconds of one prompt of TOKENS tokens, versions in turn, and SQNR against fp32."""
    models: dict[str, Any] = {
        name: T5EncoderModel.from_pretrained(path, dtype=dtype) for name, (path, dtype) in folders.items()
    }
    ids = torch.randint(1, XXL.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    outputs = {name: model(ids).last_hidden_state.float() for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            start = time.perf_counter()
            model(ids)
            times[name].append(time.perf_counter() - start)
    return {
        name: {
            "seconds": median(times[name]),
            "of_fp32": median(times["fp32"]) / median(times[name]),
            "of_bf16": median(times["bf16"]) / median(times[name]),
            "sqnr_db": 999.0 if name == "fp32" else noise(outputs["fp32"], outputs[name]),
        }
        for name in models
    }


@app.command()
def t5(scratch: Path = Path("components-scratch")) -> None:
    """Memory and speed at the size of T5-XXL's layers. scratch: folder for some GB, not deleted."""
    results = Results("components-t5")
    source = float_folder(scratch)
    told_load(results, "float32", str(source), "-", "-")
    versions = {"fp32": (source, torch.float32), "bf16": (source, torch.bfloat16)}
    for scheme in LARGE:
        folder = scratch / scheme
        told_load(results, f"{scheme}, while loading", str(source), scheme, "-" if folder.exists() else str(folder))
        told_load(results, f"{scheme}, saved", str(folder), "-", "-")
        versions[f"{scheme} fp32"] = (folder, torch.float32)
        versions[f"{scheme} bf16"] = (folder, torch.bfloat16)
    for name, row in results.row("speed", lambda: speed(versions)).items():
        told("speed", name, row)


def told_load(results: Results, name: str, source: str, scheme: str, out: str) -> None:
    """One way of loading in fp32: file, growth of what is resident and of the peak, the peak's limit."""
    row = results.row(f"load {name}", lambda: fresh(source, scheme, "float32", out))
    told("load", name, {**row, "limit": 1.15 * row["file"] + 300e6})


if __name__ == "__main__":
    app()
