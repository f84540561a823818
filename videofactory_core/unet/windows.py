"""3D windows over a clip: cut into windows, put back, and the mask that keeps strangers apart.

Tokens are `[B, F, H, W, C]`; a window is (frames, height, width) and windows do not overlap. Sizes that the window does
not divide are padded at the end. A shift moves the windows along F alone, cyclically.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Size = tuple[int, int, int]


def fit(window: Size | None, size: Size) -> Size:
    """The window no larger than the clip; None is one window over everything."""
    if window is None:
        return size
    return (min(window[0], size[0]), min(window[1], size[1]), min(window[2], size[2]))


def shift_for(window: Size, frames: int) -> int:
    """How far shifted windows move along F: half a window, or not at all when one window holds every frame."""
    return -(-window[0] // 2) if frames > window[0] else 0


def _padding(size: Size, window: Size) -> Size:
    return (-size[0] % window[0], -size[1] % window[1], -size[2] % window[2])


def partition(x: Tensor, window: Size, shift: int = 0) -> Tensor:
    """Cut `[B, F, H, W, C]` into `[B * windows, tokens, C]`."""
    pad_f, pad_h, pad_w = _padding((x.shape[1], x.shape[2], x.shape[3]), window)
    if pad_f or pad_h or pad_w:
        x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h, 0, pad_f))
    if shift:
        x = torch.roll(x, -shift, dims=1)
    f, h, w = window
    return rearrange(x, "B (nf f) (nh h) (nw w) C -> (B nf nh nw) (f h w) C", f=f, h=h, w=w)


def merge(x: Tensor, window: Size, size: Size, shift: int = 0) -> Tensor:
    """Undo `partition`: `[B * windows, tokens, C]` back to `[B, F, H, W, C]` of the given size, padding dropped."""
    f, h, w = window
    pad = _padding(size, window)
    nf, nh, nw = ((size[i] + pad[i]) // window[i] for i in range(3))
    x = rearrange(x, "(B nf nh nw) (f h w) C -> B (nf f) (nh h) (nw w) C", nf=nf, nh=nh, nw=nw, f=f, h=h, w=w)
    if shift:
        x = torch.roll(x, shift, dims=1)
    return x[:, : size[0], : size[1], : size[2]]


def mask(size: Size, window: Size, shift: int, device: torch.device) -> Tensor | None:
    """Which tokens of a window may see each other: `[windows, tokens, tokens]`, True where they may.

    Padding is never seen by a real token, and frames that the cyclic shift brought together from the two ends of the
    clip do not see each other. None when everything in a window may see everything.
    """
    pad_f, pad_h, pad_w = _padding(size, window)
    if not (pad_f or pad_h or pad_w or shift):
        return None
    total_f, total_h, total_w = size[0] + pad_f, size[1] + pad_h, size[2] + pad_w
    f = torch.arange(total_f, device=device)
    h = torch.arange(total_h, device=device) < size[1]
    w = torch.arange(total_w, device=device) < size[2]
    real = (f < size[0])[:, None, None] & h[:, None] & w
    # 0 is padding, 1 the frames that the shift carries round, 2 the others.
    group = torch.where(real, torch.where(f < shift, 1, 2)[:, None, None], 0)
    labels = partition(group[None, ..., None], window, shift).squeeze(-1)
    return labels.unsqueeze(2) == labels.unsqueeze(1)
