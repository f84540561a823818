"""Clips of any length, and what lies between or around given frames: chunk after chunk, each knowing the one before.

A chunk is as long as the model knows clips. The last frames of the one before are clean conditions in it, and so are
the frames that are given inside it, so that memory does not grow with the length.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Model
from .config import ModelConfig
from .pipeline import (
    check_given,
    check_memory,
    check_request,
    context_of,
    decode_latents,
    denoise,
    encode_frames,
    encode_prompts,
    know,
    latent_shape,
    usual_guidance,
    warn_of_given,
)
from .prompts import PromptSchedule


@dataclass(frozen=True)
class Chunk:
    """Frames `start` to `end` are in it, and those from `first` to `last` are kept of it."""

    start: int
    end: int
    first: int
    last: int


def chunks(num_frames: int, length: int, overlap: int, given: Collection[int] = ()) -> Iterator[Chunk]:
    """Chunks of `length` frames that make what is not given of `num_frames`, in the order of their making.

    A clip that is no longer is one chunk. Otherwise each takes `overlap` frames that are done from the one before, the
    last one as many as fit. What lies behind the last frame given in a chunk is made by the next chunk, which knows how
    it goes on. With frames given at the end and none at the start they go backward. Raises ValueError where nothing
    would be left of a chunk.
    """
    if num_frames <= length:
        if len(given) < num_frames:
            yield Chunk(0, num_frames, 0, num_frames)
        return
    if length < 2:
        raise ValueError(f"a chunk of {length} frames knows none of the one before; use 2 or more")
    if not 1 <= overlap < length:
        raise ValueError(f"chunks of {length} frames cannot overlap by {overlap}; use 1 to {length - 1}")
    if num_frames - 1 in given and 0 not in given:
        for chunk in chunks(num_frames, length, overlap, {num_frames - 1 - index for index in given}):
            ends = (num_frames - end for end in (chunk.end, chunk.start, chunk.last, chunk.first))
            yield Chunk(*ends)
        return
    done = 0
    while True:
        while done in given:
            done += 1
        if done >= num_frames:
            return
        end = min(num_frames, max(0, done - overlap) + length)
        start = max(0, end - length)
        last = max((index + 1 for index in given if done < index < end), default=end)
        # Nothing is given further on, so that the next chunk would know no more.
        if not any(index >= end for index in given):
            last = end
        yield Chunk(start, end, done, last)
        done = last


def usual_chunk(config: ModelConfig, anchors: int = 0) -> int:
    """Frames of a chunk, where nothing else is asked for: as many as the model learned, with room for anchors."""
    positions = config.unet.temporal_positions
    return max(config.frames, min(config.chunk, positions - anchors)) if positions else config.chunk


def usual_overlap(length: int) -> int:
    """Frames that a chunk of `length` knows of the one before, where nothing else is asked for: a quarter, at least 4.

    A chunk of fewer knows all but one.
    """
    return min(max(4, length // 4), length - 1)


def check_chunk(config: ModelConfig, length: int, anchors: int) -> None:
    """Refuse with a ValueError chunks of `length` frames that, with their anchors, the model has no positions for."""
    if anchors < 0:
        raise ValueError(f"{anchors} anchors cannot be shown; use 0 or more")
    longest = config.unet.temporal_positions
    if longest and length + anchors > longest:
        raise ValueError(
            f"this model knows {longest} frame positions, and a chunk with its anchors has {length + anchors};"
            " make chunks shorter, or show fewer anchors"
        )


def match(latents: Tensor, like: Tensor) -> Tensor:
    """Latents `[1, C, F, h, w]` with the mean and deviation of each channel of `like`, against colours that drift."""
    dims = (2, 3, 4)
    mean, deviation = latents.mean(dims, keepdim=True), latents.std(dims, keepdim=True)
    return (latents - mean) / deviation.clamp(min=1e-6) * like.std(dims, keepdim=True) + like.mean(dims, keepdim=True)


@torch.no_grad()
def generate_long(
    model: Model,
    prompt: str,
    *,
    num_frames: int,
    given: Mapping[int, Tensor] | None = None,
    chunk: int | None = None,
    overlap: int | None = None,
    anchors: int = 0,
    match_colours: bool = False,
    negative_prompt: str = "",
    width: int | None = None,
    height: int | None = None,
    steps: int = 25,
    guidance_scale: float | None = None,
    sampler: str = "ddim",
    seed: int = 0,
    frame_guidance_scale: float | None = None,
    stagger: float = 0.0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Iterator[Tensor]:
    """A clip of any length, in pieces `[f, H, W, 3]` in 0..1 on the CPU, in the order of time.

    given: frames by their number, as in `pipeline.generate`, which does the same where one chunk is enough. chunk:
    frames of one, by default as many as the model learned and has positions for beside the anchors. overlap: see
    `chunks`, by default `usual_overlap`. anchors: so many frames of the start are shown to every later chunk too.
    match_colours: each chunk gets the mean and the spread of the first. Backward, when only the end is given, the
    pieces come when the latents of all are made. Raises ValueError as `generate` does, before the first piece.
    """
    config = model.config
    length = usual_chunk(config, anchors) if chunk is None else chunk
    overlap = usual_overlap(length) if overlap is None else overlap
    most = min(num_frames, length)
    width, height = width or config.width, height or config.height
    given = given or {}
    guidance_scale, frame_guidance_scale = usual_guidance(config, len(given), guidance_scale, frame_guidance_scale)
    check_chunk(config, most, anchors)
    at_once = most + anchors if most > 0 else most
    check_request(config, at_once, width, height, guidance_scale, sampler, steps, frame_guidance_scale)
    check_given(given, num_frames, width, height)
    plan = [*chunks(num_frames, length, overlap, given)]
    if given or len(plan) > 1:
        warn_of_given(config)
    check_memory(config, at_once, width, height, next(model.unet.parameters()))
    prompts = encode_prompts(model, prompt, negative_prompt, guidance_scale)
    settings: dict[str, Any] = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "sampler": sampler,
        "frame_guidance_scale": frame_guidance_scale,
        "stagger": stagger,
        "on_step": on_step,
    }
    pieces = _latents(model, prompts, plan, given, (num_frames, width, height), anchors, match_colours, seed, settings)
    for latents in reversed([*pieces]) if _backward(plan) else pieces:
        # With many given frames that follow each other a piece may be longer than a chunk.
        for part in latents.split(length, dim=2):
            yield decode_latents(model, part)


def _latents(
    model: Model,
    prompts: Sequence[PromptSchedule],
    plan: Sequence[Chunk],
    given: Mapping[int, Tensor],
    size: tuple[int, int, int],
    anchors: int,
    match_colours: bool,
    seed: int,
    settings: Mapping[str, Any],
) -> Iterator[Tensor]:
    """Latents `[1, C, f, h, w]` that each chunk adds, with those given around them, in the order of making."""
    num_frames, width, height = size
    backward = _backward(plan)
    # Where what a chunk adds ends; the last adds all that is left.
    ends = [chunk.first if backward else chunk.last for chunk in plan[:-1]] + [0 if backward else num_frames]
    at = num_frames if backward else 0
    # Drawn on the CPU, so that a seed means the same clip on every device.
    generator = torch.Generator().manual_seed(seed)
    latents: dict[int, Tensor] = {}
    first: Tensor | None = None
    for chunk, end in zip(plan, ends, strict=True):
        inside = range(chunk.start, chunk.end)
        shown = range(0 if backward else min(anchors, chunk.start))
        latents = {index: latent for index, latent in latents.items() if index in inside or index in range(anchors)}
        places = [*shown, *inside]
        for index in places:
            if index in given and index not in latents:
                latents[index] = encode_frames(model, given[index][None])
        noise = torch.randn(1, *latent_shape(model.config, len(places), width, height), generator=generator)
        known = know(
            noise, {place: latents[index] for place, index in enumerate(places) if index in latents}, model.config
        )
        context = context_of(prompts, places)
        made = denoise(model, context, noise, known=known, generator=generator, **settings)[:, :, len(shown) :]
        new = [index for index in range(chunk.first, chunk.last) if index not in given]
        if first is None:
            first = made
        elif match_colours:
            where = [index - chunk.start for index in new]
            made[:, :, where] = match(made[:, :, where], first)
        latents |= {index: made[:, :, index - chunk.start, None] for index in new}
        piece = [
            latents[index] if index in latents else encode_frames(model, given[index][None])
            for index in range(min(at, end), max(at, end))
        ]
        at = end
        yield torch.cat([latent.to(made) for latent in piece], dim=2)


def _backward(plan: Sequence[Chunk]) -> bool:
    return len(plan) > 1 and plan[0].start > plan[1].start
