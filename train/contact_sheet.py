"""Many clips on one picture."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

EDGE, LINE = 4, 14


def contact_sheet(clips: Mapping[str, Tensor], columns: int = 3, shown: int = 4) -> Image.Image:
    """`shown` frames of every clip `[F, H, W, 3]` (float in 0..1, or uint8) under its label, which may have lines."""
    cells = [_cell(label, frames, shown) for label, frames in clips.items()]
    columns = min(columns, len(cells))
    width, height = (max(cell.size[side] for cell in cells) for side in (0, 1))
    sheet = Image.new("RGB", (width * columns, height * -(-len(cells) // columns)), "white")
    for i, cell in enumerate(cells):
        sheet.paste(cell, (i % columns * width, i // columns * height))
    return sheet


def _cell(label: str, frames: Tensor, shown: int) -> Image.Image:
    chosen = frames[torch.linspace(0, len(frames) - 1, min(shown, len(frames))).round().long()]
    if chosen.is_floating_point():
        chosen = chosen.clamp(0, 1).mul(255).round().byte()
    strip = Image.fromarray(rearrange(chosen, "F H W C -> H (F W) C").numpy())
    lines = label.splitlines() or [""]
    top = EDGE + LINE * len(lines)
    cell = Image.new("RGB", (strip.width + 2 * EDGE, strip.height + top + 6), "white")
    cell.paste(strip, (EDGE, top))
    draw = ImageDraw.Draw(cell)
    # White pictures need an edge on a white page.
    draw.rectangle((EDGE - 1, top - 1, EDGE + strip.width, top + strip.height), outline="silver")
    for i, line in enumerate(lines):
        draw.text((EDGE, 3 + LINE * i), line, fill="black", font_size=12)
    return cell
