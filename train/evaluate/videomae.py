"""The encoder of VideoMAE V2 (Wang et al., arXiv 2303.16727): a plain vision transformer on tubes of two frames."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-6
# Frames in a tube.
TUBE = 2


@dataclass(frozen=True)
class ViTConfig:
    """How large the transformer is."""

    width: int
    depth: int
    heads: int
    # Channels between the two layers of a block's MLP.
    hidden: int
    # Pixels across a patch, and across and down the picture.
    patch: int = 14
    side: int = 224
    # Frames that it was trained on.
    frames: int = 16


GIANT = ViTConfig(width=1408, depth=40, heads=16, hidden=6144)


class VideoViT(nn.Module):
    """Features `[B, width]`, the normalised mean over all tubes, of clips `[B, 3, F, side, side]` in 0..1, F even."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        tube = (TUBE, config.patch, config.patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, config.width, tube, tube)})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.fc_norm = nn.LayerNorm(config.width, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        tubes = x.shape[2] // TUBE
        x = self.patch_embed["proj"](x).flatten(2).mT
        x = x + self._positions(tubes).to(x)
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.fc_norm(x.mean(1))
        return features

    def _positions(self, tubes: int) -> Tensor:
        """`[N, width]` for `tubes` in time; other numbers than it was trained on are interpolated."""
        config = self.config
        trained, across = config.frames // TUBE, config.side // config.patch
        table = sinusoids(trained * across**2, config.width)
        if tubes == trained:
            return table
        # By the factor that content-debiased FVD takes, a tenth of a tube too long.
        factor = ((tubes + 0.1) / trained, 1.0, 1.0)
        table = table.T.reshape(1, config.width, trained, across, across)
        return F.interpolate(table, scale_factor=factor, mode="trilinear").flatten(2)[0].T


class Block(nn.Module):
    """Attention and an MLP, each on what is normalised and added to what was there."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, EPSILON)
        self.attn = Attention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, EPSILON)
        self.mlp = MLP(config.width, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    """Of every tube to every other; queries and values have a bias, keys do not."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two layers with GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


@lru_cache(maxsize=1)
def sinusoids(count: int, width: int) -> Tensor:
    """Positions `[count, width]`: sin and cos by turns of p / 10000^(2i / width) (Vaswani et al., arXiv 1706.03762)."""
    powers = torch.arange(width, dtype=torch.float64) // 2 * 2 / width
    angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000**powers
    return torch.where(torch.arange(width) % 2 == 0, angles.sin(), angles.cos()).float()
