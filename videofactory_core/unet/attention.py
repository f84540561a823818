"""Attention and feed-forward layers with the key names of latent diffusion."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Attention, Operations


class CrossAttention(nn.Module):
    """Multi-head attention of `x [B, N, C]` on `context [B, M, D]`, or on itself."""

    def __init__(self, channels: int, context_dim: int, heads: int, ops: Operations, attention: Attention) -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.to_q = ops.Linear(channels, channels, bias=False)
        self.to_k = ops.Linear(context_dim, channels, bias=False)
        self.to_v = ops.Linear(context_dim, channels, bias=False)
        # A list because image checkpoints call this layer `to_out.0`.
        self.to_out = nn.ModuleList([ops.Linear(channels, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        out = self.attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        return self.to_out[0](out)


class GEGLU(nn.Module):
    """A linear layer gated by GELU of another one."""

    def __init__(self, channels: int, inner: int, ops: Operations) -> None:
        super().__init__()
        self.proj = ops.Linear(channels, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU feed-forward, four times as wide inside."""

    def __init__(self, channels: int, ops: Operations) -> None:
        super().__init__()
        # The identity stands where image checkpoints count a dropout.
        self.net = nn.Sequential(GEGLU(channels, channels * 4, ops), nn.Identity(), ops.Linear(channels * 4, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
