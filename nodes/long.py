"""Clips of any length, chunk after chunk, each knowing the one before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sampler_helpers
import latent_preview
import torch
from comfy_api.v0_0_2 import io
from einops import rearrange
from torch import Tensor

from ..videofactory_core.long import check_chunk, chunks, match, usual_chunk, usual_overlap
from ..videofactory_core.pipeline import UNTRAINED
from . import host
from .host import FRAMES, SCHEDULE
from .load import CATEGORY
from .network import check_clips
from .sample import Run, begin, control_of, sampling_inputs


class LongSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryLongSampler",
            display_name="VideoFactory Long Sampler",
            category=CATEGORY,
            description="VideoFactory Sampler for clips of any length: chunk after chunk, each beginning with the last"
            " frames of the one before it, and knowing the frames that are given inside it.",
            inputs=[
                *sampling_inputs(),
                io.Int.Input(
                    "chunk",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Frames of a chunk; 0 for as many as the model learned.",
                ),
                io.Int.Input(
                    "overlap",
                    default=0,
                    min=0,
                    max=4095,
                    tooltip="Frames that a chunk is shown of the one before it; 0 for a quarter of the chunk.",
                ),
                io.Int.Input(
                    "anchors",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="So many frames of the clip's start are shown to every later chunk too, against drift.",
                ),
                io.Boolean.Input(
                    "match_colours",
                    default=False,
                    tooltip="Every chunk gets the colours of the first, against drift in scenes that stay the same.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The clip, for VideoFactory Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        motion_scale: float,
        swap_strength: float,
        free_noise: bool,
        chunk: int,
        overlap: int,
        anchors: int,
        match_colours: bool,
    ) -> io.NodeOutput:
        model, samples, noise = begin(model, latent, seed, motion_scale, swap_strength, free_noise)
        layout = Layout.of(latent, samples, positive)
        config = host.config_of(model)
        assert config is not None
        chunk = chunk or usual_chunk(config, anchors)
        overlap = overlap or usual_overlap(chunk)
        if overlap >= chunk:
            raise ValueError(f"chunks of {chunk} frames cannot overlap by {overlap}: use fewer than {chunk}")
        check_chunk(config, min(chunk, layout.num_frames), anchors)

        latents, noise = layout.unfold(samples).clone(), layout.unfold(noise)
        masks = torch.ones_like(latents[:, :1])
        if latent.get("noise_mask") is not None:
            mask = comfy.sampler_helpers.prepare_mask(latent["noise_mask"], samples.shape, samples.device)
            masks = layout.unfold(mask)[:, :1].clone()
        given = set(host.left_alone(masks).flatten(1).all(0).nonzero().flatten().tolist())
        plan = [*chunks(layout.num_frames, chunk, overlap, given)]
        if not config.given_frames and (given or len(plan) > 1):
            logging.warning("VideoFactory: %s", UNTRAINED)

        run = Run(model, steps, cfg, sampler_name, scheduler, denoise)
        show = latent_preview.prepare_callback(model, steps * len(plan))
        done = set(given)
        first: Tensor | None = None
        for number, part in enumerate(plan):
            anchored = [place for place in range(min(anchors, part.start)) if place in done]
            places = [*anchored, *range(part.start, part.end)]
            inside = masks[:, :, places]
            made = run(
                *layout.conditions(places, positive, negative),
                layout.fold(noise[:, :, places]),
                layout.fold(latents[:, :, places]),
                layout.fold(inside) if (inside != 1).any() else None,
                (seed + number) % 2**64,
                part_of_bar(show, number, len(plan)),
            )
            made = layout.unfold(made, len(places))[:, :, len(anchored) :]
            new = [place for place in range(part.first, part.last) if place not in given]
            where = [place - part.start for place in new]
            fresh = made[:, :, where]
            if first is None:
                first = made
            elif match_colours:
                # What a mask covers inside a frame stays.
                fresh = torch.where(masks[:, :, new] == 0, fresh, match(fresh, first))
            latents[:, :, new] = fresh.to(latents)
            masks[:, :, new] = 0
            done.update(new)
        return io.NodeOutput({**latent, "samples": layout.fold(latents)})


def part_of_bar(show: Callable[..., None], number: int, count: int) -> Callable[[int, Tensor, Tensor, int], None]:
    """The host's callback for sampling number so of `count`, on one bar for all."""
    return lambda step, x0, x, steps: show(number * steps + step, x0, x, count * steps)


@dataclass(frozen=True)
class Layout:
    """How the frames of clips lie in a latent: in the batch, `[(B F), C, H, W]`, or not, `[B, C, F, H, W]`."""

    num_frames: int
    num_clips: int
    in_batch: bool

    @staticmethod
    def of(latent: dict[str, Any], samples: Tensor, conditioning: Any) -> Layout:
        if samples.ndim == 5:
            return Layout(samples.shape[2], len(samples), in_batch=False)
        # Who works with KSampler tells it with the prompt.
        told = [entry[1][FRAMES] for entry in conditioning if FRAMES in entry[1]]
        num_frames = latent.get(FRAMES) or next(iter(told), len(samples))
        check_clips(len(samples), num_frames)
        return Layout(num_frames, len(samples) // num_frames, in_batch=True)

    def unfold(self, latents: Tensor, num_frames: int | None = None) -> Tensor:
        """Clips `[B, C, F, H, W]`, by default of as many frames as all have."""
        num_frames = num_frames or self.num_frames
        return rearrange(latents, "(B F) C H W -> B C F H W", F=num_frames) if self.in_batch else latents

    def fold(self, clips: Tensor) -> Tensor:
        """Clips `[B, C, F, H, W]` as they lie in the latent."""
        latents = rearrange(clips, "B C F H W -> (B F) C H W") if self.in_batch else clips
        # Some devices round by the order in memory, and a single chunk is to be what VideoFactory Sampler makes.
        return latents.contiguous()

    def conditions(self, places: Sequence[int], *conditionings: Any) -> list[Any]:
        """What each conditioning says of a clip that consists of these frames."""
        if not self.in_batch:
            return [*conditionings]
        length = self.num_clips * self.num_frames
        rows = [clip * self.num_frames + place for clip in range(self.num_clips) for place in places]
        controls: dict[tuple[int, ...], Any] = {}

        def cut(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == length > 1 else value

        def part(features: Tensor, told: dict[str, Any]) -> Any:
            told = {key: cut(value) for key, value in told.items()} | {FRAMES: len(places)}
            if SCHEDULE in told:
                told[SCHEDULE] = told[SCHEDULE].part(places)
            if told.get("control") is not None:
                told["control"] = control_of(told["control"], rows, length, controls)
            return [cut(features), told]

        return [[part(*entry) for entry in conditioning] for conditioning in conditionings]


NODES = [LongSampler]
