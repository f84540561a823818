"""Pictures and clips of any size as frames of a clip."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[Fit, ...] = get_args(Fit)


def fit_frames(frames: Tensor, width: int, height: int, fit: Fit = "crop") -> tuple[Tensor, str]:
    """Frames `[F, H, W, 1 to 4]` in 0..1 as `[F, height, width, 3]` (float32), and in words what was done to them.

    Another shape is cut about its centre ("crop"), set between black bars ("pad") or pulled ("stretch"); grey becomes
    RGB, and what is transparent lies over black. The words are "" where nothing was done but scaling. Raises ValueError
    for a tensor that holds no pictures.
    """
    if frames.ndim != 4 or frames.numel() == 0 or not 1 <= frames.shape[3] <= 4:
        raise ValueError(f"pictures are [F, H, W, 3], not {list(frames.shape)}; name a picture or a clip")
    frames, said = frames.detach().float(), []
    if frames.shape[3] in (2, 4):
        frames = frames[..., :-1] * frames[..., -1:]
        said.append("what is transparent became black")
    if frames.shape[3] == 1:
        frames = frames.expand(-1, -1, -1, 3)
    old_height, old_width = frames.shape[1:3]
    scales = width / old_width, height / old_height
    # What it is scaled to before it is cut or set into bars.
    scale = max(scales) if fit == "crop" else min(scales)
    size = max(1, round(old_height * scale)), max(1, round(old_width * scale))
    if size != (height, width):
        done = {"crop": "cut", "pad": "set between black bars", "stretch": "pulled"}[fit]
        said.append(f"{old_width}x{old_height} was {done} to the shape of {width}x{height}")
    size = (height, width) if fit == "stretch" else size
    pictures = rearrange(frames, "F H W C -> F C H W")
    if size != (old_height, old_width):
        pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    # Negative margins cut.
    pictures = F.pad(pictures, (left, width - size[1] - left, top, height - size[0] - top))
    return rearrange(pictures, "F C H W -> F H W C").contiguous(), "; ".join(said)
