"""The workflows of the pack as a person would describe them; write_workflows.py makes the frontend write them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINT = "v1-5-pruned-emaonly-fp16.safetensors"
LORA = "my-lora.safetensors"
SAVED = "my-model-ldmq"
BUNDLED = "emoji-sd (comes with LDM-Q)"
SAMPLER = {"seed": 1, "steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
MEASURING = {"first_seed": 0, "steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
GREEN, BLUE, PURPLE = "#3f789e", "#335577", "#533e6e"


@dataclass(frozen=True)
class Node:
    """A node. inputs: values of widgets, or ('name of a node', output); place: x, y, width, height (0: as it comes)."""

    kind: str
    inputs: dict[str, Any]
    place: tuple[int, int, int, int]
    title: str | None = None


@dataclass(frozen=True)
class Group:
    """A frame around nodes."""

    title: str
    place: tuple[int, int, int, int]
    color: str = BLUE


@dataclass(frozen=True)
class Workflow:
    """name: of the files, without their endings; nodes: by names that links use. What the user should know first is in
    notes/NAME.md."""

    name: str
    nodes: dict[str, Node]
    groups: tuple[Group, ...]

    @property
    def note(self) -> str:
        """Markdown."""
        return (Path(__file__).with_name("notes") / f"{self.name}.md").read_text(encoding="utf-8").strip()


def checkpoint(x: int, y: int, model: str = CHECKPOINT) -> Node:
    return Node("CheckpointLoaderSimple", {"ckpt_name": model}, (x, y, 380, 0))


def prompts(x: int, y: int, source: str = "checkpoint") -> dict[str, Node]:
    """Positive, negative and an empty latent, one below the other."""
    return {
        "positive": Node(
            "CLIPTextEncode",
            {"text": "photo of a red apple on a wooden table, soft light", "clip": (source, 1)},
            (x, y, 380, 150),
            "Positive prompt",
        ),
        "negative": Node(
            "CLIPTextEncode",
            {"text": "blurry, text, watermark", "clip": (source, 1)},
            (x, y + 210, 380, 120),
            "Negative prompt",
        ),
        "latent": Node("EmptyLatentImage", {"width": 512, "height": 512, "batch_size": 1}, (x, y + 390, 380, 0)),
    }


MEASURED = {"positive": ("positive", 0), "negative": ("negative", 0), "latent_image": ("latent", 0)}


def profile(x: int, y: int) -> Node:
    return Node("ldmq_profile", {"model": ("checkpoint", 0), **MEASURED, **MEASURING}, (x, y, 340, 460))


def quantize(x: int, y: int) -> Node:
    """With what reconstruction would learn from connected, so that it need only be switched on."""
    given = {"model": ("checkpoint", 0), "plan": ("plan", 0), "calibration": ("calibrate", 0)}
    return Node("ldmq_quantize", {**given, "reconstruct": "none", **MEASURED, **MEASURING}, (x, y, 340, 0))


def sampler(model: str, x: int, y: int) -> Node:
    return Node("KSampler", {"model": (model, 0), **SAMPLER, **MEASURED, "denoise": 1.0}, (x, y, 320, 0))


def text(source: str, output: int, place: tuple[int, int, int, int], title: str) -> Node:
    return Node("PreviewAny", {"source": (source, output)}, place, title)


QUICK_START = Workflow(
    "quick_start_bundled_model",
    {
        "loader": Node(
            "ldmq_pipeline_loader",
            {
                "model": BUNDLED,
                "quantize": "Balanced",
                "hub_id_or_folder": "",
                "target": "",
                "calibration": "first-step",
                "steps": 10,
                "dtype": "auto",
                "reconstruct": "none",
            },
            (40, 320, 380, 0),
        ),
        "sampler": Node(
            "ldmq_pipeline_sampler",
            {
                "pipeline": ("loader", 0),
                "prompt": "red apple",
                "negative": "",
                "steps": 10,
                "cfg": 5.0,
                "seed": 1,
                "batch_size": 4,
                "width": 0,
                "height": 0,
            },
            (480, 320, 380, 0),
        ),
        "picture": Node("SaveImage", {"images": ("sampler", 0), "filename_prefix": "ldmq/emoji"}, (920, 320, 480, 620)),
        "told": text("loader", 1, (40, 700, 380, 220), "What was loaded"),
    },
    (Group("Load and quantize", (20, 240, 420, 760)), Group("Draw", (460, 240, 960, 760), GREEN)),
)

QUANTIZE = Workflow(
    "quantize_and_save_a_checkpoint",
    {
        "checkpoint": checkpoint(40, 320),
        **prompts(40, 500),
        "profile": profile(500, 320),
        "plan": Node("ldmq_plan", {"profile": ("profile", 0), "preset": "Balanced"}, (900, 320, 380, 440)),
        "calibrate": Node(
            "ldmq_calibrate",
            {"model": ("checkpoint", 0), "plan": ("plan", 0), **MEASURED, "selection": "first-step", **MEASURING},
            (1340, 320, 340, 0),
        ),
        "quantize": quantize(1340, 650),
        "save": Node(
            "ldmq_save_model",
            {"model": ("quantize", 0), "filename_prefix": SAVED, "overwrite": False},
            (1740, 320, 340, 0),
        ),
        "saved": text("save", 0, (1740, 500, 340, 120), "Where it is"),
        "sampler": sampler("quantize", 1740, 680),
        "decode": Node("VAEDecode", {"samples": ("sampler", 0), "vae": ("checkpoint", 2)}, (2120, 320, 220, 0)),
        "picture": Node(
            "SaveImage", {"images": ("decode", 0), "filename_prefix": "ldmq/quantized"}, (2120, 420, 420, 520)
        ),
        "told": text("quantize", 1, (1340, 980, 340, 160), "What was quantized"),
    },
    (
        Group("Model and prompts", (20, 240, 420, 930)),
        Group("Measure", (480, 240, 380, 930), PURPLE),
        Group("Decide", (880, 240, 420, 930), PURPLE),
        Group("Calibrate and quantize", (1320, 240, 380, 930), PURPLE),
        Group("Save and use", (1720, 240, 840, 930), GREEN),
    ),
)

LOAD = Workflow(
    "load_quantized_with_lora",
    {
        "load": Node(
            "ldmq_load_model", {"model_file": f"{SAVED}_00001_.safetensors", "folder_or_hub_id": ""}, (40, 320, 380, 0)
        ),
        "lora": Node(
            "LoraLoaderModelOnly", {"model": ("load", 0), "lora_name": LORA, "strength_model": 0.8}, (40, 470, 380, 0)
        ),
        "checkpoint": checkpoint(40, 640),
        "told": text("load", 1, (40, 800, 380, 180), "What was loaded"),
        **prompts(480, 320),
        "sampler": sampler("lora", 920, 320),
        "decode": Node("VAEDecode", {"samples": ("sampler", 0), "vae": ("checkpoint", 2)}, (920, 660, 220, 0)),
        "picture": Node(
            "SaveImage", {"images": ("decode", 0), "filename_prefix": "ldmq/with-lora"}, (1280, 320, 460, 540)
        ),
    },
    (
        Group("Quantized model and LoRA", (20, 240, 420, 760), PURPLE),
        Group("Prompts", (460, 240, 420, 760)),
        Group("Draw", (900, 240, 860, 760), GREEN),
    ),
)

COMPARE = Workflow(
    "compare_float_and_quantized",
    {
        "checkpoint": checkpoint(40, 320),
        **prompts(40, 500),
        "profile": profile(500, 320),
        "plan": Node("ldmq_plan", {"profile": ("profile", 0), "preset": "Balanced"}, (900, 320, 380, 440)),
        "calibrate": Node(
            "ldmq_calibrate",
            {"model": ("checkpoint", 0), "plan": ("plan", 0), **MEASURED, "selection": "first-step", **MEASURING},
            (1340, 320, 340, 0),
        ),
        "quantize": quantize(1340, 650),
        "compare": Node(
            "ldmq_compare",
            {"reference": ("checkpoint", 0), "model": ("quantize", 0), "vae": ("checkpoint", 2), **MEASURED, **SAMPLER},
            (1740, 320, 620, 660),
        ),
        "picture": Node(
            "SaveImage", {"images": ("compare", 0), "filename_prefix": "ldmq/compare"}, (2400, 320, 560, 420)
        ),
        "told": text("compare", 1, (2400, 800, 560, 180), "How far apart"),
    },
    (
        Group("Model and prompts", (20, 240, 420, 760)),
        Group("Measure", (480, 240, 380, 760), PURPLE),
        Group("Decide", (880, 240, 420, 760), PURPLE),
        Group("Calibrate and quantize", (1320, 240, 380, 760), PURPLE),
        Group("Compare", (1720, 240, 1260, 760), GREEN),
    ),
)

REPORT = Workflow(
    "profile_report",
    {
        "checkpoint": checkpoint(40, 320),
        **prompts(40, 500),
        "profile": profile(500, 320),
        "chart": Node("SaveImage", {"images": ("profile", 1), "filename_prefix": "ldmq/profile"}, (880, 320, 620, 460)),
        "told": text("profile", 2, (880, 840, 620, 180), "Where noise arises"),
        **{
            f"plan {preset}": Node(
                "ldmq_plan",
                {"profile": ("profile", 0), "preset": preset},
                (1560, 320 + 390 * row, 380, 330),
                f"Plan: {preset}",
            )
            for row, preset in enumerate(("Safe", "Balanced", "Smallest"))
        },
        **{
            f"told {preset}": text(f"plan {preset}", 2, (1980, 320 + 390 * row, 420, 330), f"{preset} in words")
            for row, preset in enumerate(("Safe", "Balanced", "Smallest"))
        },
    },
    (
        Group("Model and prompts", (20, 240, 420, 760)),
        Group("Measure", (480, 240, 1040, 810), PURPLE),
        Group("Three plans", (1540, 240, 880, 1210), GREEN),
    ),
)

WORKFLOWS = (QUICK_START, QUANTIZE, LOAD, COMPARE, REPORT)
