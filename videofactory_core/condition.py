"""Which frames of a clip are given, and how noisy each of the others is: what training draws.

A frame that is given is shown clean, at noise level 0, and the network learns nothing from it (FVDM, arXiv 2410.03160;
random masks as in VDT, arXiv 2305.13311, and SEINE, arXiv 2310.20700). So one network makes clips from text alone, from
pictures and from other clips, without any new channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class GivenFrames:
    """How often which frames are given, in any unit."""

    # Text alone.
    none: float = 0.0
    first: float = 0.0
    first_and_last: float = 0.0
    # So many from the start, or from the end, as are drawn: two to half of a clip.
    prefix: float = 0.0
    suffix: float = 0.0
    # Every second, third or fourth, from the first.
    every_nth: float = 0.0
    # Any, with a share of them that is drawn too.
    random: float = 0.0

    def __post_init__(self) -> None:
        for setting in fields(self):
            if not 0 <= getattr(self, setting.name) < float("inf"):
                raise ValueError(f"{setting.name}: {getattr(self, setting.name)} is no weight; use 0 or more")
        if not sum(astuple(self)):
            raise ValueError("all weights are 0; name one or more kinds of given frames, such as first = 1.0")


class Drawn(NamedTuple):
    """What is drawn for each clip and frame, `[B, F]`: whether it is given (bool); whether, being given, it is hidden
    behind pure noise (bool); and in 0..1 where its noise level lies, nan where that is the clip's."""

    given: Tensor
    hidden: Tensor
    level: Tensor


@dataclass(frozen=True)
class Condition:
    """Frames as conditions: what a stage shows of the clips that it trains on."""

    frames: GivenFrames
    # Share of clips whose other frames each have a noise level of their own, for sampling one ahead of the other.
    independent: float = 0.0
    # Share of clips whose given frames are pure noise, which guidance over frames asks for later.
    frame_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("independent", "frame_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a share; use a number from 0 to 1")

    @property
    def gives_frames(self) -> bool:
        """Whether it ever gives any."""
        return any(weight for name, weight in asdict(self.frames).items() if name != "none")

    def draw(self, like: Tensor, uniform: Callable[..., Tensor]) -> Drawn:
        """Draw for clips `like [B, C, F, H, W]`; `uniform(like, *shape)` gives `[B, *shape]` in 0..1.

        At least one frame of a clip is not given, and none is of a single picture.
        """
        num_frames = like.shape[2]
        frame = torch.arange(num_frames, device=like.device)
        kind, how_many, hidden, own = (uniform(like)[:, None] for _ in range(4))
        each, levels = uniform(like, num_frames), uniform(like, num_frames)

        count = 2 + (how_many * max(0, num_frames // 2 - 1)).long()
        last = frame == num_frames - 1
        masks = torch.stack(
            [
                (frame < 0).expand_as(each),
                (frame == 0).expand_as(each),
                ((frame == 0) | last).expand_as(each),
                frame < count,
                frame >= num_frames - count,
                frame % (2 + (how_many * 3).long()) == 0,
                each < how_many,
            ]
        )
        ends = torch.tensor(astuple(self.frames), device=like.device).cumsum(0)
        chosen = (kind >= ends[:-1] / ends[-1]).sum(dim=1)
        given = masks[chosen, torch.arange(len(each), device=like.device)]
        given = given & ~given.all(dim=1, keepdim=True)
        return Drawn(
            given,
            given & (hidden < self.frame_dropout),
            levels.masked_fill(own >= self.independent, torch.nan),
        )
