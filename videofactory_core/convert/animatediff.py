"""AnimateDiff motion modules, versions 1 to 3: temporal transformers for an image model, with frame positions."""

from __future__ import annotations

import itertools
import re
from typing import Any

import torch
from torch import Tensor

from ..config import UNetConfig
from ..unet.temporal import frame_positions
from .stable_diffusion import Shapes, places

# Heads of every version.
HEADS = 8
# Distance of stored frame positions from the sinusoids: those of half precision are off by up to 5e-4.
POSITIONS_TOLERANCE = 1e-3
ORIGINAL_INNER = {
    "transformer_blocks.0.attn1": "transformer_blocks.0.attention_blocks.0",
    "transformer_blocks.0.attn2": "transformer_blocks.0.attention_blocks.1",
    "transformer_blocks.0.norm1": "transformer_blocks.0.norms.0",
    "transformer_blocks.0.norm2": "transformer_blocks.0.norms.1",
    "transformer_blocks.0.norm3": "transformer_blocks.0.ff_norm",
}
POSITIONS = re.compile(r"\.(pos_encoder|pos_embed)\.pe$")


def has_video_parts(shapes: Shapes) -> bool:
    """Whether there are motion modules under these names."""
    return any(".motion_modules." in name for name in shapes)


def is_original(shapes: Shapes) -> bool:
    """Whether the names are AnimateDiff's own, not diffusers'."""
    return any(".temporal_transformer." in name for name in shapes)


def motion_modules(config: UNetConfig) -> dict[str, str]:
    """Our temporal transformers and diffusers' names of the motion modules that stand there."""
    return {
        f"{place.transformer or place.resnet}.temporal": f"{place.stage}.motion_modules.{place.number}"
        for place in places(config)
        # The middle has two ResBlocks and one motion module.
        if place.resnet != "middle_block.2"
    }


def table(config: UNetConfig, shapes: Shapes) -> dict[str, str]:
    """The motion modules in the authors' files or diffusers' `MotionAdapter`, whichever names `shapes` have."""
    if not is_original(shapes):
        return motion_modules(config)
    found = {}
    for ours, theirs in motion_modules(config).items():
        theirs += ".temporal_transformer"
        found[ours] = theirs
        found |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in ORIGINAL_INNER.items()}
    return found


def settings(shapes: Shapes) -> dict[str, Any]:
    """What of our network these motion modules are."""
    lengths = {shape[1] for name, shape in shapes.items() if POSITIONS.search(name)}
    if len(lengths) != 1:
        raise ValueError("its motion modules do not agree on the number of frames; get the file again")
    return {
        "temporal_conv": False,
        "temporal_attention_behind": "blocks",
        "temporal_middle": any(name.startswith("mid_block.") for name in shapes),
        "temporal_heads": HEADS,
        "temporal_positions": lengths.pop(),
        "position_place": "attention",
        # As in the authors' code; diffusers' norms run over the clip.
        "temporal_norm": "frame",
        "temporal_skips": False,
        "fusion": "add",
    }


def widths(shapes: Shapes) -> tuple[int, ...]:
    """Channels of the levels that the motion modules are made for."""
    keys = (
        next((k for k in shapes if k.startswith(f"down_blocks.{i}.") and ".norm." in k), "") for i in itertools.count()
    )
    return tuple(shapes[key][0] for key in itertools.takewhile(bool, keys))


def check_positions(name: str, stored: Tensor) -> None:
    """ValueError unless `stored [1, F, C]` are the sinusoids that our network computes."""
    computed = frame_positions(stored.shape[1], stored.shape[2], torch.zeros(()))
    if not torch.allclose(stored[0].float(), computed, rtol=0, atol=POSITIONS_TOLERANCE):
        raise ValueError(f"{name} is no sinusoid of the frame number, so this motion module cannot be converted")


def positions(shapes: Shapes) -> list[str]:
    """The names of stored frame positions."""
    return [name for name in shapes if POSITIONS.search(name)]
