"""Many clips on one picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# In pixels: the most that a frame takes, a line of text, and the space around a clip.
FRAME_WIDTH, FRAME_HEIGHT, LINE_HEIGHT, MARGIN = 160, 120, 16, 4


def contact_sheet(clips: Sequence[tuple[str, Tensor]], columns: int = 3, shown: int = 4) -> Image.Image:
    """`shown` frames of every clip `[F, H, W, 3]` (float in 0..1, or uint8) under its label, which may have lines."""
    font = ImageFont.load_default(size=12)
    strips = [_strip(frames, shown) for _, frames in clips]
    lines = max(len(label.splitlines()) for label, _ in clips)
    width = max(strip.width for strip in strips) + 2 * MARGIN
    height = max(strip.height for strip in strips) + lines * LINE_HEIGHT + 2 * MARGIN
    columns = min(columns, len(clips))
    sheet = Image.new("RGB", (columns * width, -(-len(clips) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, ((label, _), strip) in enumerate(zip(clips, strips, strict=True)):
        left, top = number % columns * width + MARGIN, number // columns * height + MARGIN
        for line, text in enumerate(label.splitlines()):
            draw.text(
                (left, top + line * LINE_HEIGHT), _shortened(text, font, width), "grey" if line else "black", font
            )
        top += lines * LINE_HEIGHT
        sheet.paste(strip, (left, top))
        # White pictures need an edge on a white page.
        draw.rectangle((left - 1, top - 1, left + strip.width, top + strip.height), outline="silver")
    return sheet


def _strip(frames: Tensor, shown: int) -> Image.Image:
    """Frames side by side, made smaller where they are too large."""
    chosen = frames[torch.linspace(0, len(frames) - 1, min(shown, len(frames))).round().long()]
    if chosen.is_floating_point():
        chosen = chosen.clamp(0, 1).mul(255).round().byte()
    height, width = chosen.shape[1:3]
    scale = min(1.0, FRAME_WIDTH / width, FRAME_HEIGHT / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    strip = Image.new("RGB", (size[0] * len(chosen), size[1]))
    for place, picture in enumerate(chosen):
        strip.paste(Image.fromarray(picture.numpy()).resize(size), (place * size[0], 0))
    return strip


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """One line of text that fits; names of files need not be text."""
    text = " ".join(text.split()).encode("utf-8", "replace").decode()
    while font.getlength(text) > width:
        text = text[: len(text) * 9 // 10 - 3] + "..."
    return text
