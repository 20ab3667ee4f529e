"""The rows of the second paper's table: how each method calibrates and learns, all on the same layers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from measuring import FOLDERS, HERE

from diffusers_ldmq import Recording, calibrate, make_plan, record_calls
from diffusers_ldmq.artifacts import Calibration, Plan, Reconstructed
from diffusers_ldmq.correction import apply_everywhere
from diffusers_ldmq.demo import demo_captions
from diffusers_ldmq.families import find_denoiser, layer_table
from diffusers_ldmq.learning import LearningSettings
from diffusers_ldmq.progress import Progress
from diffusers_ldmq.quantization import quantized_for_now
from diffusers_ldmq.reconstruction import FULL, QUICK, ReconstructionSettings, reconstruct
from diffusers_ldmq.recording import with_reference
from diffusers_ldmq.selections import TDAC, Selection

STEPS = 20
FOLDERS |= {name: HERE / "models" / name for name in ("cifar-ddim", "cifar-classes", "cifar-unconditional")}
GUIDANCE = {"bundled": 5.0, "cifar-classes": 2.0}
CALIBRATING, HELD_OUT = 128, 32
"""Trajectories of each of two calibrating calls, and of those that select and verify (bundled: a half, a quarter)."""
CAPTIONS = HERE / "emoji_captions.txt"
"""What the bundled model learns from: names of emoji that are neither its demonstration's captions nor its prompts."""

# The released code's way in the iterations that a row may take (120 to 500, there 1,000 to 5,000): its rates for
# CIFAR-10, the largest; its steps learn in their own scale, ours in that of their logarithm.
RATES = {"w8a8": 5e-2, "w4a8": 0.5, "w4a4": 0.5}
EDA_DM = LearningSettings(rounding="soft", decide=0.0, step_rate=5e-4, vector_rate=0.0, drop=0.5, mix=0.5, gamma=0.8)
TDAC_OF = {"bundled": TDAC(5.0, radius=0.3), "cifar-ddim": TDAC(1.2, radius=3.0)}
TDAC_PUBLISHED = TDAC(1.0, radius=0.3)
"""lambda and r as published for Stable Diffusion and DDIM on CIFAR-10; for the others those of latent diffusion."""
# BRECQ's blocks with AdaRound's push to a decision; steps are learned along, where the original does that afterwards.
Q_DIFFUSION = LearningSettings(
    rounding="soft", decide=30.0, weight_rate=0.1, step_rate=1e-3, vector_rate=0.0, drop=0.0, mix=0.0, gamma=0.0
)
OURS = FULL.learning
SPLIT = ("skip-split",)


@dataclass(frozen=True, slots=True)
class Row:
    """One method. observer: of static ranges; learning: None = rounding to nearest; corrections: applied to every layer
    before it learns; selection: of the samples that calibrate and that are learned from; long: with the setting for
    results, not that for minutes; own_samples: learned once more, on inputs that the quantized model makes itself
    (TCAQ-DM)."""

    name: str
    scheme: str
    selection: str | Selection = "uniform"
    observer: str = "mse"
    learning: LearningSettings | None = None
    corrections: tuple[str, ...] = ()
    long: bool = False
    own_samples: bool = False


ROWS = (
    Row("W8A8 min-max", "w8a8", observer="minmax"),
    Row("W8A8 Q-Diffusion-type", "w8a8", learning=Q_DIFFUSION, corrections=SPLIT),
    Row("W8A8 EDA-DM", "w8a8", "tdac", learning=EDA_DM, corrections=SPLIT),
    Row("W8A8 ours", "w8a8", "normal", learning=OURS),
    Row("W4A8 round to nearest", "w4a8"),
    Row("W4A8 Q-Diffusion-type", "w4a8", learning=Q_DIFFUSION, corrections=SPLIT),
    Row("W4A8 EDA-DM", "w4a8", "tdac", learning=EDA_DM, corrections=SPLIT),
    Row("W4A8 ours", "w4a8", "normal", learning=OURS),
    Row("W4A4 EDA-DM", "w4a4", "tdac", learning=EDA_DM, corrections=SPLIT),
    Row("W4A4 ours", "w4a4", "normal", learning=OURS),
)
LONG = (
    Row("W4A8 EDA-DM, long", "w4a8", "tdac", learning=EDA_DM, corrections=SPLIT, long=True),
    Row("W4A8 ours, long", "w4a8", "normal", learning=OURS, long=True),
)
"""With the setting for results instead of that for minutes."""
LATER = (
    Row("W4A8 ours, dilated", "w4a8", "normal", learning=OURS, corrections=("dilate",)),
    Row("W4A8 ours, low rank", "w4a8", "normal", learning=OURS, corrections=("low-rank",)),
    Row("W4A8 ours, dynamic", "w4a8-dyn", "normal", learning=OURS),
    Row("W4A8 ours, own samples", "w4a8", "normal", learning=OURS, own_samples=True),
)
"""Methods after EDA-DM: DilateQuant, SVDQuant, ViDiT-Q, TCAQ-DM."""


def recording_of(model: str, pipe: Any) -> Recording:
    """Every step of two calibrating calls, one that selects (unused here) and one that verifies, features included."""
    common: dict[str, Any] = {"num_inference_steps": STEPS}
    if model in GUIDANCE:
        common["guidance_scale"] = GUIDANCE[model]
    if model == "bundled":
        texts, judged = CAPTIONS.read_text(encoding="utf-8").splitlines(), demo_captions()
        half = len(texts) // 2
        inputs = [{"prompt": part} for part in (texts[:half], texts[half:], judged[16:24], judged[24:32])]
    else:
        counts = (CALIBRATING, CALIBRATING, HELD_OUT, HELD_OUT)
        by_class = model == "cifar-classes"
        inputs = [{"class_labels": [i % 10 for i in range(n)]} if by_class else {"batch_size": n} for n in counts]
    return record_calls(pipe, [{**entry, **common} for entry in inputs], selection="tdac")


def plan_of(denoiser: Any, scheme: str) -> Plan:
    """One scheme for every layer but those that the family keeps float: the same layers in every row."""
    kept = tuple(info.name for info in layer_table(denoiser).layers if info.keep_float)
    return make_plan(layer_table(denoiser), planner="uniform", scheme=scheme, keep_float=kept)


def settings_of(row: Row, selection: str | Selection) -> ReconstructionSettings:
    """What the row's reconstruction is given."""
    assert row.learning is not None
    base = FULL if row.long else QUICK
    learning = replace(row.learning, iterations=base.learning.iterations, batch=base.learning.batch)
    if row.learning is EDA_DM:
        learning = replace(learning, weight_rate=RATES[row.scheme])
    return replace(base, learning=learning, selection=selection)


def calibrated(
    row: Row, model: str, pipe: Any, recording: Recording, memory: Path, told: Callable[[str], Progress]
) -> tuple[Calibration, tuple[Reconstructed, ...]]:
    """The row's calibration. memory: where finished units are kept."""
    _, denoiser = find_denoiser(pipe)
    plan = plan_of(denoiser, row.scheme)
    published = TDAC_OF.get(model, TDAC_PUBLISHED)
    selection = published if row.learning is EDA_DM else row.selection
    start = calibrate(denoiser, plan, recording, selection=row.selection, observer=row.observer)
    for correction in row.corrections:
        start = apply_everywhere(denoiser, start, recording, correction)
    if row.learning is None:
        return start, ()
    chosen, progress = settings_of(row, selection), told(f"learn {row.name}")
    found, units = reconstruct(denoiser, start, recording, chosen, memory=memory, progress=progress)
    if row.own_samples:
        with quantized_for_now(denoiser, found):
            own = recording_of(model, pipe)
        own = with_reference(own, denoiser)  # inputs that the quantized model makes, outputs that the float one gives
        again = memory.with_name(f"{memory.name}-own")
        found, units = reconstruct(denoiser, start, own, chosen, memory=again, progress=progress)
    return found, units
