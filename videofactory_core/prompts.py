"""Prompts that change over the frames: `"0": "a cat", "8": "a dog"`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A frame and the prompt from there on.
ENTRY = re.compile(r'"(\d+)"\s*:\s*("(?:[^"\\]|\\.)*")\s*,?\s*', re.DOTALL)
MAX_FRAME = 100_000


class PromptSchedule(NamedTuple):
    """Text features `[K, L, D]` of K key frames in rising order."""

    frames: tuple[int, ...]
    features: Tensor

    def spread(self, num_frames: int) -> Tensor:
        """Features `[F, L, D]` of a clip's frames."""
        return self.at(range(num_frames))

    def part(self, frames: Sequence[int]) -> PromptSchedule:
        """The schedule of a clip that consists of these frames."""
        return PromptSchedule(tuple(range(len(frames))), self.at(frames))

    def at(self, frames: Iterable[int]) -> Tensor:
        """Features `[N, L, D]` of N frames: straight lines between key frames, the first and last one beyond them."""
        rows = []
        for frame in frames:
            after = next((i for i, key in enumerate(self.frames) if key >= frame), len(self.frames) - 1)
            before = max(0, after - 1) if self.frames[after] > frame else after
            room = self.frames[after] - self.frames[before]
            share = (frame - self.frames[before]) / room if room else 0.0
            rows.append(torch.lerp(self.features[before], self.features[after], share))
        return torch.stack(rows)


def parse(text: str) -> dict[int, str] | None:
    """Key frames and their prompts in rising order, with or without braces around them; None for plain text.

    Raises ValueError for text that begins like a schedule and does not go on as one.
    """
    body = text.strip().removeprefix("{").removesuffix("}").strip()
    if not re.match(r'"\d+"\s*:', body):
        return None
    found: dict[int, str] = {}
    at = 0
    while at < len(body):
        entry = ENTRY.match(body, at)
        if entry is None:
            raise ValueError(f'the prompt schedule breaks off at {body[at : at + 30]!r}: write "frame": "prompt", ...')
        if len(entry[1]) > 6 or int(entry[1]) > MAX_FRAME:
            raise ValueError(f"the prompt schedule names frame {entry[1][:12]}: use frames up to {MAX_FRAME}")
        try:
            found[int(entry[1])] = json.loads(entry[2], strict=False)
        except json.JSONDecodeError as error:
            raise ValueError(f"the prompt {entry[2][:30]} has a stray backslash: write \\\\ for one") from error
        at = entry.end()
    return dict(sorted(found.items()))


def build(keys: dict[int, Tensor]) -> PromptSchedule:
    """A schedule of features `[1, L, D]`; shorter prompts are repeated to the chunks of the longest."""
    longest = max(features.shape[1] for features in keys.values())
    rows = [features.repeat(1, -(-longest // features.shape[1]), 1)[:, :longest] for features in keys.values()]
    return PromptSchedule(tuple(keys), torch.cat(rows))
