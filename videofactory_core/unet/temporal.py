"""The temporal stream: convolutions over time and attention over time.

Features are `[(B F), C, H, W]`. Both modules return the residual branch alone; whoever calls them decides how it meets
the spatial feature. Both start at zero, so a fresh video model is the image model, frame by frame.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import PositionPlace, UNetConfig
from ..ops import Attention, Operations, zeroed
from .attention import CrossAttention, FeedForward


class TemporalConv(nn.Module):
    """Four times GroupNorm, SiLU and a convolution over three frames."""

    def __init__(self, channels: int, norm_groups: int, ops: Operations) -> None:
        super().__init__()
        self.norms = nn.ModuleList([ops.GroupNorm(norm_groups, channels) for _ in range(4)])
        # (3, 1) over [B, C, F, HW] is a (3, 1, 1) convolution over [B, C, F, H, W] whose weight has four dimensions,
        # which is what memory formats and weight casts of image hosts expect.
        self.convs = nn.ModuleList([ops.Conv2d(channels, channels, (3, 1), padding=(1, 0)) for _ in range(4)])
        zeroed(self.convs[-1])

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        height = x.shape[2]
        x = rearrange(x, "(B F) C H W -> B C F (H W)", F=num_frames)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = conv(F.silu(norm(x)))
        return rearrange(x, "B C F (H W) -> (B F) C H W", H=height)


def frame_positions(num_frames: int, channels: int, like: Tensor) -> Tensor:
    """Sinusoids of the frame number, sine and cosine in turn: `[F, C]`."""
    rates = torch.exp(torch.arange(0, channels, 2, device=like.device) * (-math.log(10000.0) / channels))
    angles = torch.arange(num_frames, device=like.device)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :channels].to(like.dtype)


class TemporalTransformerBlock(nn.Module):
    """Two self-attentions over time and a feed-forward on `[N, F, C]`."""

    def __init__(
        self, channels: int, heads: int, positions: PositionPlace | None, ops: Operations, attention: Attention
    ) -> None:
        super().__init__()
        self.positions = positions
        self.norm1 = ops.LayerNorm(channels)
        self.attn1 = CrossAttention(channels, channels, heads, ops, attention)
        self.norm2 = ops.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, channels, heads, ops, attention)
        self.norm3 = ops.LayerNorm(channels)
        self.ff = FeedForward(channels, ops)

    def forward(self, x: Tensor) -> Tensor:
        where: Tensor | int = 0
        if self.positions is not None:
            where = frame_positions(x.shape[1], x.shape[2], x)
        if self.positions == "input":
            x, where = x + where, 0
        x = x + self.attn1(self.norm1(x) + where)
        x = x + self.attn2(self.norm2(x) + where)
        return x + self.ff(self.norm3(x))


class TemporalTransformer(nn.Module):
    """Attention over F for each (H, W), `inner` channels wide, between linear layers; the last one starts at zero."""

    def __init__(
        self, channels: int, inner: int, heads: int, config: UNetConfig, ops: Operations, attention: Attention
    ) -> None:
        super().__init__()
        self.norm_scope = config.temporal_norm
        self.norm = ops.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = ops.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            [TemporalTransformerBlock(inner, heads, config.positions, ops, attention)]
        )
        self.proj_out = zeroed(ops.Linear(inner, channels))

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        height = x.shape[2]
        if self.norm_scope == "clip":
            x = self.norm(rearrange(x, "(B F) C H W -> B C F (H W)", F=num_frames))
            x = rearrange(x, "B C F N -> B N F C")
        else:
            x = rearrange(self.norm(x), "(B F) C H W -> B (H W) F C", F=num_frames)
        batch = x.shape[0]
        x = self.proj_in(x.flatten(0, 1))
        for block in self.transformer_blocks:
            x = block(x)
        x = rearrange(self.proj_out(x), "(B N) F C -> (B F) N C", B=batch)
        return rearrange(x, "B (H W) C -> B C H W", H=height)


def temporal_transformer(
    channels: int, config: UNetConfig, ops: Operations, attention: Attention
) -> TemporalTransformer:
    """The temporal transformer that belongs to a spatial layer of `channels`."""
    return TemporalTransformer(
        channels, channels, config.temporal_heads or config.heads(channels), config, ops, attention
    )
