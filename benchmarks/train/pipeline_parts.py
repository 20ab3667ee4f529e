"""The pipeline's parts: how a fresh one is built, and where parts are kept between the stages."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from captioned_images import TrainingError
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tokenizers import Regex, pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PIXELS = 64  # side of a picture
LATENTS = 16  # side of its latents
TOKENS = 24  # length of a caption
VOCABULARY = 2772  # tokens
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
WORD_END = "</w>"
SPACE = "\u0120"  # how a blank looks as a byte-level letter
NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}  # Stable Diffusion's
TIMES = 1000  # diffusion times

PARTS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "unet": UNet2DConditionModel,
}


class Workspace:
    """The parts that a run has trained so far, with those of the pipeline it starts from behind them."""

    kinds: ClassVar[dict[str, Any]] = PARTS  # the classes of the parts, by name

    def __init__(self, out: Path, init: str) -> None:
        if init and not (Path(init) / "vae").is_dir():
            raise TrainingError(f"init {init} is not a pipeline folder: expected subfolders such as vae and unet")
        if out.exists() and not out.is_dir():
            raise TrainingError(f"output {out} is a file: give a folder")
        self.out = out
        self.folders = [out / "parts"] + ([Path(init)] if init else [])

    def find(self, part: str) -> Path | None:
        """The folder of a part: this run's own once trained, else the starting pipeline's, else None."""
        return next((folder / part for folder in self.folders if (folder / part).is_dir()), None)

    def load(self, part: str) -> Any:
        """A part in float32."""
        folder = self.find(part)
        if folder is None:
            raise TrainingError(f"no {part} in {self.out} yet: run its stage first or start from a pipeline (init)")
        loaded = self.kinds[part].from_pretrained(str(folder))
        return without_path(loaded.float(), part) if isinstance(loaded, nn.Module) else loaded

    def save(self, part: str, model: Any) -> None:
        """Keeps a part for the next stage."""
        _replace_folder(self.out / "parts" / part, model.save_pretrained)

    def export(self) -> Path | None:
        """Writes the float16 pipeline if all its parts exist by now, and returns its folder."""
        if any(self.find(part) is None for part in self.kinds):
            return None
        components: dict[str, Any] = {part: self.load(part) for part in self.kinds}
        components["scheduler"] = DDIMScheduler(
            **NOISE, num_train_timesteps=TIMES, clip_sample=False, set_alpha_to_one=False, steps_offset=1
        )
        _replace_folder(self.out / "pipeline", partial(self.save_pipeline, components))
        return self.out / "pipeline"

    def save_pipeline(self, components: dict[str, Any], folder: Path) -> None:
        """Writes `components`, the parts and the scheduler, as a float16 pipeline."""
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**components, **absent).to(torch.float16).save_pretrained(folder)
        _make_readable_by_transformers_4(folder, components["tokenizer"])


def _replace_folder(folder: Path, save: Callable[[Path], None]) -> None:
    """Saves beside `folder`, then renames: an interruption never leaves half a model under the final name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    save(unfinished)
    unfinished.chmod(0o755)  # mkdtemp's folders are private to the user
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def _make_readable_by_transformers_4(pipeline: Path, tokenizer: Any) -> None:
    """Adds what version 5 leaves out and version 4 needs; both read the result."""
    if not (pipeline / "tokenizer" / "vocab.json").exists():
        tokenizer.backend_tokenizer.model.save(str(pipeline / "tokenizer"))  # vocab.json and merges.txt
    weights_file = pipeline / "text_encoder" / "model.safetensors"
    prefix = "text_model."  # without it version 4 would start from random weights, with no more than a warning
    weights = {prefix + name.removeprefix(prefix): value for name, value in load_file(weights_file).items()}
    save_file(weights, weights_file, metadata={"format": "pt"})


def without_path(model: Any, part: str) -> Any:
    """Forgets the path a model was loaded from, which would otherwise be written into its config."""
    if isinstance(model, CLIPTextModel):
        model.config._name_or_path = ""
    else:
        model.register_to_config(_name_or_path=part)
    return model


def new_autoencoder(width: int, pixels: int = PIXELS) -> Any:
    """Pixels to 4 channels of a quarter of the side, without attention: 1.6 M parameters at width 64."""
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (width // 2, width, width * 3 // 2),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": pixels,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**config)


def new_unet(width: int) -> Any:
    """Cross-attention at 16x16 and 8x8, none at 4x4 but in the middle: 12.6 M parameters at width 64."""
    return UNet2DConditionModel(
        sample_size=LATENTS,
        layers_per_block=1,
        block_out_channels=(width, 2 * width, 4 * width),
        cross_attention_dim=2 * width,
        attention_head_dim=4,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def new_text_encoder(width: int, tokenizer: Any) -> CLIPTextModel:
    """Three CLIP layers as wide as the UNet's cross-attention: 1 M parameters at width 64."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=2 * width,
        intermediate_size=8 * width,
        projection_dim=2 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_tokenizer(captions: list[str]) -> Any:
    """A CLIP tokenizer whose byte pairs are learned from the captions; the same captions give the same tokens."""
    # CLIP's own way to cut a caption: runs of letters, single digits, runs of other signs; then bytes as letters.
    cut = pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splitter: Any = pre_tokenizers.Sequence([cut, as_bytes])
    pieces = (piece for caption in captions for piece, _ in splitter.pre_tokenize_str(caption.lower()))
    words = Counter(piece for piece in pieces if piece != SPACE)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Every byte, inside a word and at its end, so that no caption has an unknown token.
    single = [*letters, *(letter + WORD_END for letter in letters)]
    merges = learn_merges(words, VOCABULARY - len(single) - len(SPECIAL_TOKENS))
    tokens = dict.fromkeys([*single, *(left + right for left, right in merges), *SPECIAL_TOKENS])
    with tempfile.TemporaryDirectory() as folder:
        vocabulary_file, merges_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        numbered = {token: index for index, token in enumerate(tokens)}
        vocabulary_file.write_text(json.dumps(numbered, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
        merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer(str(vocabulary_file), str(merges_file), model_max_length=TOKENS)


def learn_merges(words: Counter[str], limit: int) -> list[tuple[str, str]]:
    """The most frequent neighbours, joined one pair at a time; equal counts are decided by the alphabet.

    The tokenizers library's own trainer decides them by hash order, so that no two runs would agree.
    """
    spelled = {word: [*word[:-1], word[-1] + WORD_END] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        counts: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in pairwise(symbols):
                counts[pair] += words[word]
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        spelled = {word: _joined(symbols, best) for word, symbols in spelled.items()}
    return merges


def _joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined
