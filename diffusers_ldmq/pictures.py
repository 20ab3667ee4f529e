"""Pictures side by side, and how far two sets of pictures are apart."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageDraw, ImageFont

from .errors import LDMQError
from .metrics import psnr_db, ssim

CELL = 192
"""Side in pixels that a picture of a comparison sheet gets at least; larger ones are reduced to twice that."""
TEXT = 15
MARGIN = 10


@dataclass(frozen=True, slots=True)
class PictureScores:
    """How close pictures are to their references. PSNR in dB (inf = equal), SSIM up to 1; one entry per pair."""

    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]

    @property
    def mean_psnr_db(self) -> float:
        """Mean of the pairs' PSNR in dB."""
        return fmean(self.psnr_db)

    @property
    def worst_psnr_db(self) -> float:
        """PSNR of the worst pair in dB."""
        return min(self.psnr_db)

    @property
    def mean_ssim(self) -> float:
        """Mean of the pairs' SSIM."""
        return fmean(self.ssim)

    @property
    def worst_ssim(self) -> float:
        """SSIM of the worst pair."""
        return min(self.ssim)

    def data(self) -> dict[str, float]:
        """Mean and worst of both, for summary.json."""
        return {
            "psnr_db_mean": self.mean_psnr_db,
            "psnr_db_worst": self.worst_psnr_db,
            "ssim_mean": self.mean_ssim,
            "ssim_worst": self.worst_ssim,
        }


def picture_scores(reference: Sequence[Image.Image], measured: Sequence[Image.Image]) -> PictureScores:
    """PSNR and SSIM of every pair. Raises LDMQError if the two lists or two pictures differ in number or size."""
    if not reference or len(reference) != len(measured):
        raise LDMQError(f"cannot compare {len(reference)} pictures with {len(measured)}; draw one of each per prompt")
    pairs = list(zip(reference, measured, strict=True))
    for number, (one, other) in enumerate(pairs):
        if one.size != other.size:
            raise LDMQError(
                f"picture {number} is {one.width}x{one.height} in one list and {other.width}x{other.height} in the "
                f"other; compare two versions of the same model"
            )
    return PictureScores(tuple(psnr_db(a, b) for a, b in pairs), tuple(ssim(a, b) for a, b in pairs))


def comparison_sheet(path: str | os.PathLike[str], rows: dict[str, list[Image.Image]], captions: Sequence[str]) -> None:
    """Write rows of pictures below each other, one column per caption. rows: label -> pictures; the first row is the
    reference, under the others stand PSNR and SSIM against it. Raises LDMQError if a row lacks a picture."""
    for label, pictures in rows.items():
        if len(pictures) != len(captions):
            raise LDMQError(f"row {label!r} has {len(pictures)} pictures for {len(captions)} captions")
    font = picture_font(TEXT)
    first = next(iter(rows))
    cell = max(_shown(picture).width for pictures in rows.values() for picture in pictures)
    height = max(_shown(picture).height for pictures in rows.values() for picture in pictures)
    label_width = max(int(font.getlength(line)) for label in rows for line in label.splitlines()) + 2 * MARGIN
    step_x, step_y, top = cell + MARGIN, height + 2 * TEXT + MARGIN, 2 * TEXT + MARGIN
    sheet = Image.new("RGB", (label_width + step_x * len(captions), top + step_y * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        x = label_width + column * step_x + cell // 2
        draw.text((x, top // 2), _clipped(caption, font, cell), fill="black", font=font, anchor="mm")
    for row, (label, pictures) in enumerate(rows.items()):
        y = top + row * step_y
        draw.text((MARGIN, y + height // 2), label, fill="black", font=font, anchor="lm")
        scores = None if label == first else picture_scores(rows[first], pictures)
        for column, picture in enumerate(pictures):
            x = label_width + column * step_x
            sheet.paste(_shown(picture), (x, y))
            if scores:
                told = f"{scores.psnr_db[column]:.1f} dB, SSIM {scores.ssim[column]:.3f}"
                draw.text((x + cell // 2, y + height + TEXT), told, fill="#555555", font=font, anchor="mm")
    sheet.save(path, format="PNG")


def _shown(picture: Image.Image) -> Image.Image:
    """Small pictures enlarged by a whole factor, pixel by pixel, so that nothing is smoothed; large ones reduced."""
    picture = picture.convert("RGB")
    longest = max(picture.size)
    if longest < CELL:
        factor = math.ceil(CELL / longest)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if longest > 2 * CELL:
        scale = 2 * CELL / longest
        size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def picture_font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along on every system."""
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _clipped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    text = " ".join(text.split())  # a line break cannot be measured
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
