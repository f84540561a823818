"""How the spatial feature s and the temporal feature t meet: Swap-CA (eq. 1-4) and Table 3's alternatives.

Every merge takes `s, t [(B F), C, H, W]` and returns the same shape, and every merge with weights starts as `s + t`.
`strength` multiplies what attention adds; merges without attention know none.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from ..config import UNetConfig
from ..ops import Attention, Operations, zeroed
from . import windows
from .attention import FeedForward


class Add(nn.Module):
    """s + t."""

    def forward(self, s: Tensor, t: Tensor, num_frames: int, strength: float = 1.0) -> Tensor:
        return s + t


class Fuse(nn.Module):
    """A 1x1x1 convolution of [s, t], initialised to [I, I]."""

    def __init__(self, channels: int, ops: Operations) -> None:
        super().__init__()
        self.conv = ops.Conv2d(channels * 2, channels, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(channels).repeat(1, 2)[:, :, None, None])
            self.conv.bias.zero_()  # type: ignore[union-attr]

    def forward(self, s: Tensor, t: Tensor, num_frames: int, strength: float = 1.0) -> Tensor:
        return self.conv(torch.cat([s, t], dim=1))


class Mixture(nn.Module):
    """CogVideo's dual channel: 2 (a s + (1 - a) t) with a learned share a per channel, 1/2 at the start."""

    def __init__(self, channels: int, ops: Operations) -> None:
        super().__init__()
        # A linear layer from the constant 1, because hosts move and patch layers, not bare parameters.
        self.share = zeroed(ops.Linear(1, channels, bias=False))

    def forward(self, s: Tensor, t: Tensor, num_frames: int, strength: float = 1.0) -> Tensor:
        a = torch.sigmoid(self.share(s.new_ones(1, 1)))[:, :, None, None]
        return 2 * (a * s + (1 - a) * t)


class AttentionMerge(nn.Module):
    """s + t + Proj_out(h') where h' comes from attention between two streams: the frame that all of them share.

    Eq. 1, 2 and 4: h = Attention(LN(a~), LN(b~)) + a~, h' = FFN(LN(h)) + h, with a~ and b~ the two streams behind a
    shared GroupNorm and linear layer. Subclasses say which stream asks which, and who sees whom (`attend`).
    """

    def __init__(self, channels: int, heads: int, norm_groups: int, ops: Operations, attention: Attention) -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.norm = ops.GroupNorm(norm_groups, channels, eps=1e-6)
        self.proj_in = ops.Linear(channels, channels)
        self.norm_query = ops.LayerNorm(channels)
        self.norm_context = ops.LayerNorm(channels)
        self.to_q = ops.Linear(channels, channels, bias=False)
        self.to_k = ops.Linear(channels, channels, bias=False)
        self.to_v = ops.Linear(channels, channels, bias=False)
        self.to_out = ops.Linear(channels, channels)
        self.norm_ff = ops.LayerNorm(channels)
        self.ff = FeedForward(channels, ops)
        self.proj_out = zeroed(ops.Linear(channels, channels))

    def streams(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Who asks and who answers."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over `[B, F, H, W, C]`."""
        raise NotImplementedError

    def tokens(self, x: Tensor, num_frames: int) -> Tensor:
        """Proj_in: `[(B F), C, H, W]` to `[B, F, H, W, C]`."""
        return self.proj_in(rearrange(self.norm(x), "(B F) C H W -> B F H W C", F=num_frames))

    def forward(self, s: Tensor, t: Tensor, num_frames: int, strength: float = 1.0) -> Tensor:
        asking, answering = self.streams(s, t)
        query = self.tokens(asking, num_frames)
        context = query if answering is asking else self.tokens(answering, num_frames)
        q, context = self.norm_query(query), self.norm_context(context)
        h = self.to_out(self.attend(self.to_q(q), self.to_k(context), self.to_v(context))) + query
        h = self.ff(self.norm_ff(h)) + h
        h = self.proj_out(h)
        return s + t + rearrange(h if strength == 1 else h * strength, "B F H W C -> (B F) C H W")


class WindowAttention(AttentionMerge):
    """Attention inside 3D windows; subclasses choose the streams."""

    window: windows.Size | None = None
    shifted = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = (q.shape[1], q.shape[2], q.shape[3])
        window = windows.fit(self.window, size)
        shift = windows.shift_for(window, size[0]) if self.shifted else 0
        mask = windows.mask(size, window, shift, q.device)
        if mask is not None:
            mask = repeat(mask, "n i j -> (B n) i j", B=q.shape[0])
        q, k, v = (windows.partition(x, window, shift) for x in (q, k, v))
        return windows.merge(self.attention(q, k, v, self.heads, mask), window, size, shift)


class SwapAttention(WindowAttention):
    """Swap-CA: at one block end the spatial feature asks the temporal one, at the next the roles are swapped.

    `query` is the stream that asks ("spatial": eq. 1-2, "temporal": eq. 4); `shifted` moves the windows by half a
    window along F; `window` None is the global variant of Table 2.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        norm_groups: int,
        window: windows.Size | None,
        query: str,
        shifted: bool,
        ops: Operations,
        attention: Attention,
    ) -> None:
        super().__init__(channels, heads, norm_groups, ops, attention)
        self.window = window
        self.query = query
        self.shifted = shifted

    def streams(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return (s, t) if self.query == "spatial" else (t, s)


class WindowSelfAttention(WindowAttention):
    """Table 3: the same windows over the sum s + t, asking itself."""

    def __init__(
        self,
        channels: int,
        heads: int,
        norm_groups: int,
        window: windows.Size | None,
        shifted: bool,
        ops: Operations,
        attention: Attention,
    ) -> None:
        super().__init__(channels, heads, norm_groups, ops, attention)
        self.window = window
        self.shifted = shifted

    def streams(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        both = s + t
        return both, both


class SparseCausalAttention(AttentionMerge):
    """Table 3: Tune-A-Video's attention on s + t; each frame asks the first frame and the one before it."""

    def streams(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        both = s + t
        return both, both

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_frames, height, width = q.shape[1:4]
        before = torch.arange(num_frames, device=q.device).sub(1).clamp(min=0)

        def first_and_before(x: Tensor) -> Tensor:
            pair = torch.stack([x[:, :1].expand_as(x), x.index_select(1, before)], dim=2)
            return rearrange(pair, "B F P H W C -> (B F) (P H W) C")

        out = self.attention(
            rearrange(q, "B F H W C -> (B F) (H W) C"), first_and_before(k), first_and_before(v), self.heads
        )
        return rearrange(out, "(B F) (H W) C -> B F H W C", F=num_frames, H=height, W=width)


def build_merge(config: UNetConfig, channels: int, end: int | None, ops: Operations, attention: Attention) -> nn.Module:
    """The merge that `config` asks for behind a module: inside a block (`end` None), or at its end.

    `end` counts the block ends of encoder and decoder from 0 in the order of the forward pass; roles swap and windows
    shift at every second one.
    """
    kind = config.fusion if end is None else config.merge
    heads, groups = config.heads(channels), config.norm_groups
    if kind == "add":
        return Add()
    if kind == "fuse" or end is None:
        return Fuse(channels, ops)
    if kind == "mixture":
        return Mixture(channels, ops)
    if kind == "sparse_causal":
        return SparseCausalAttention(channels, heads, groups, ops, attention)
    odd = end % 2 == 1
    if kind == "window_self":
        return WindowSelfAttention(channels, heads, groups, config.swap_window, odd, ops, attention)
    query = config.swap_query
    if query == "swapped":
        query = "temporal" if odd else "spatial"
    return SwapAttention(channels, heads, groups, config.swap_window, query, odd, ops, attention)
