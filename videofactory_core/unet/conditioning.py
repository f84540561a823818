"""What every block of the U-Net receives beside its feature."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .attention import CrossAttention


class Hooks:
    """Places in the forward pass where a host looks in or changes things; here nothing happens.

    Features are `[(B F), C, H, W]`, tokens `[(B F), (H W), C]`.
    """

    def embedding(self, emb: Tensor) -> Tensor:
        """The time step's embedding `[(B F), E]`."""
        return emb

    def enter(self, part: str, index: int) -> None:
        """Called before block `index` of `part`: "input", "middle" or "output"."""

    def attend(self, name: str, depth: int, layer: CrossAttention, x: Tensor, context: Tensor | None) -> Tensor:
        """Spatial attention: `name` is "attn1" (self) or "attn2" (on the text), `depth` counts blocks of a transformer.

        Where frames share a prompt, "attn2" gets their tokens as one `[B, (F H W), C]` with `context [B, L, D]`.
        """
        return layer(x, context)

    def between(self, x: Tensor) -> Tensor:
        """Tokens between self-attention and attention on the text."""
        return x

    def after_input(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """A feature of the encoder: what the decoder will see of it, and what the next block gets."""
        return h, h

    def after_middle(self, h: Tensor) -> Tensor:
        """The feature at the bottom."""
        return h

    def before_output(self, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """A feature of the decoder, and the encoder's that it is about to meet."""
        return h, skip


class Conditioning(NamedTuple):
    """Time step and text features, the number of frames of a clip, and how strongly the video parts act.

    `motion_scale` multiplies every temporal feature where it meets the spatial one, `swap_strength` what attention
    between the two streams adds; 1 is as trained.
    """

    emb: Tensor
    context: Tensor
    num_frames: int
    hooks: Hooks
    motion_scale: float = 1.0
    swap_strength: float = 1.0

    def motion(self, t: Tensor) -> Tensor:
        """A temporal feature as strong as asked for."""
        return t if self.motion_scale == 1 else t * self.motion_scale
