"""The seam that a host uses: which layer classes the model is built from, and how attention is computed."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Protocol, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

# Fused attention kernels count batch times heads in 16 bits on some devices; temporal attention has one row a pixel.
MAX_ATTENTION_BATCH = 1 << 15


class Attention(Protocol):
    """Multi-head attention on `q [B, N, C]`, `k, v [B, M, C]`; `mask [B or 1, N, M]` is True where a query may look.

    Returns `[B, N, C]`.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor: ...


class Operations(Protocol):
    """Layer classes with torch.nn's constructors. A host passes its own to cast or move weights as they are used."""

    Linear: type[nn.Linear]
    Conv2d: type[nn.Conv2d]
    GroupNorm: type[nn.GroupNorm]
    LayerNorm: type[nn.LayerNorm]
    Embedding: type[nn.Embedding]


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """PyTorch's fused attention, in batches that its kernels accept. Shapes as in `Attention`."""
    q, k, v = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k, v))
    if mask is not None:
        mask = mask.unsqueeze(1)
    step = max(1, MAX_ATTENTION_BATCH // heads)
    if q.shape[0] <= step:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        parts = []
        for i in range(0, q.shape[0], step):
            part = slice(i, i + step)
            part_mask = mask[part] if mask is not None and mask.shape[0] > 1 else mask
            parts.append(F.scaled_dot_product_attention(q[part], k[part], v[part], attn_mask=part_mask))
        out = torch.cat(parts)
    return rearrange(out, "B h N d -> B N (h d)")


Layer = TypeVar("Layer", bound=nn.Module)


def zeroed(layer: Layer) -> Layer:
    """The layer with all its weights at zero: a branch that ends in it starts as if it were not there."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def bind(operations: Operations, device: torch.device | str | None, dtype: torch.dtype | None) -> Operations:
    """The same layer classes with `device` and `dtype` filled in, so that modules need not hand them down."""
    names = ("Linear", "Conv2d", "GroupNorm", "LayerNorm", "Embedding")
    bound = {name: partial(getattr(operations, name), device=device, dtype=dtype) for name in names}
    return cast(Operations, SimpleNamespace(**bound))
