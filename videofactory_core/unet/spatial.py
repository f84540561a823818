"""The spatial stream, latent diffusion's layers under latent diffusion's key names, each with its temporal part inside.

Features are `[(B F), C, H, W]`. A ResBlock or SpatialTransformer with a temporal part computes s = Spatial(x) and
t = Temporal(s), merges them, and returns the result together with t, which the next block's temporal skip reads.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import UNetConfig
from ..ops import Attention, Operations, zeroed
from .attention import CrossAttention, FeedForward
from .conditioning import Conditioning
from .swap_attention import build_merge
from .temporal import TemporalConv, TemporalTransformer, temporal_transformer


class TemporalSkip(nn.Module):
    """Carries the last temporal feature of a block across the spatial resampling into the next one; starts at zero."""

    def __init__(self, channels_in: int, channels: int, ops: Operations) -> None:
        super().__init__()
        self.conv = zeroed(ops.Conv2d(channels_in, channels, 1))

    def forward(self, t: Tensor, like: Tensor) -> Tensor:
        return self.conv(F.adaptive_avg_pool2d(t, (like.shape[2], like.shape[3])))


class ResBlock(nn.Module):
    """Two convolutions with the time step in between, then a temporal convolution stack, or attention over time.

    `alone` is a ResBlock without a transformer behind it. `skip_from` is the width of the temporal feature that comes
    across a resampling, 0 for none; `end` counts block ends (see `build_merge`).
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        config: UNetConfig,
        ops: Operations,
        attention: Attention,
        alone: bool = False,
        skip_from: int = 0,
        end: int | None = None,
    ) -> None:
        super().__init__()
        groups, emb_dim = config.norm_groups, config.model_channels * 4
        self.in_layers = nn.Sequential(
            ops.GroupNorm(groups, channels_in), nn.SiLU(), ops.Conv2d(channels_in, channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), ops.Linear(emb_dim, channels))
        # The identity stands where image checkpoints count a dropout.
        self.out_layers = nn.Sequential(
            ops.GroupNorm(groups, channels), nn.SiLU(), nn.Identity(), ops.Conv2d(channels, channels, 3, padding=1)
        )
        self.skip_connection = ops.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        self.temporal: TemporalConv | TemporalTransformer | None = None
        if config.temporal_conv:
            self.temporal = TemporalConv(channels, groups, ops)
        elif alone and config.temporal_attention and config.temporal_attention_behind == "blocks":
            self.temporal = temporal_transformer(channels, config, ops, attention)
        carries = skip_from > 0 and config.temporal_conv and config.temporal_skips
        self.temporal_skip = TemporalSkip(skip_from, channels, ops) if carries else None
        self.merge = build_merge(config, channels, end, ops, attention) if self.temporal is not None else None

    def forward(self, x: Tensor, t: Tensor | None, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        h = self.in_layers(x) + self.emb_layers(cond.emb)[:, :, None, None]
        s = self.skip_connection(x) + self.out_layers(h)
        if self.temporal is None or self.merge is None:
            return s, t
        if self.temporal_skip is not None:
            assert t is not None, "a temporal skip needs the temporal feature of the block before"
            t = self.temporal(s + self.temporal_skip(t, s), cond.num_frames)
        else:
            t = self.temporal(s, cond.num_frames)
        return self.merge(s, cond.motion(t), cond.num_frames, cond.swap_strength), t


class BasicTransformerBlock(nn.Module):
    """Self-attention inside a frame, cross-attention on the text, feed-forward; `x [(B F), (H W), C]`."""

    def __init__(self, channels: int, config: UNetConfig, ops: Operations, attention: Attention) -> None:
        super().__init__()
        heads = config.heads(channels)
        self.norm1 = ops.LayerNorm(channels)
        self.attn1 = CrossAttention(channels, channels, heads, ops, attention)
        self.norm2 = ops.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, config.context_dim, heads, ops, attention)
        self.norm3 = ops.LayerNorm(channels)
        self.ff = FeedForward(channels, ops)

    def forward(self, x: Tensor, depth: int, cond: Conditioning) -> Tensor:
        x = x + cond.hooks.attend("attn1", depth, self.attn1, self.norm1(x), None)
        x = cond.hooks.between(x)
        # Frames that share a prompt ask it together, so its keys and values are computed once a clip, not once a frame.
        asking = rearrange(self.norm2(x), "(B F) N C -> B (F N) C", B=cond.context.shape[0])
        x = x + cond.hooks.attend("attn2", depth, self.attn2, asking, cond.context).reshape(x.shape)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of each frame, then a temporal transformer over F."""

    def __init__(
        self,
        channels: int,
        depth: int,
        config: UNetConfig,
        ops: Operations,
        attention: Attention,
        end: int | None = None,
    ) -> None:
        super().__init__()
        groups = config.norm_groups
        self.linear = config.use_linear_in_transformer
        self.norm = ops.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = ops.Linear(channels, channels) if self.linear else ops.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(channels, config, ops, attention) for _ in range(depth)]
        )
        self.proj_out = ops.Linear(channels, channels) if self.linear else ops.Conv2d(channels, channels, 1)
        self.temporal: TemporalTransformer | None = None
        self.merge: nn.Module | None = None
        if config.temporal_attention:
            self.temporal = temporal_transformer(channels, config, ops, attention)
            self.merge = build_merge(config, channels, end, ops, attention)

    def spatial(self, x: Tensor, cond: Conditioning) -> Tensor:
        height = x.shape[2]
        h = self.norm(x)
        if not self.linear:
            h = self.proj_in(h)
        h = rearrange(h, "B C H W -> B (H W) C")
        if self.linear:
            h = self.proj_in(h)
        for depth, block in enumerate(self.transformer_blocks):
            h = block(h, depth, cond)
        if self.linear:
            h = self.proj_out(h)
        h = rearrange(h, "B (H W) C -> B C H W", H=height)
        if not self.linear:
            h = self.proj_out(h)
        return x + h

    def forward(self, x: Tensor, t: Tensor | None, cond: Conditioning) -> tuple[Tensor, Tensor | None]:
        s = self.spatial(x, cond)
        if self.temporal is None or self.merge is None:
            return s, t
        t = self.temporal(s, cond.num_frames)
        return self.merge(s, cond.motion(t), cond.num_frames, cond.swap_strength), t


class Downsample(nn.Module):
    """Halves H and W, rounding up."""

    def __init__(self, channels: int, ops: Operations) -> None:
        super().__init__()
        self.op = ops.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Brings x to the size of the skip feature that it will meet: 43 columns became 22 and must become 43 again."""

    def __init__(self, channels: int, ops: Operations) -> None:
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
