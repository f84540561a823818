"""`videofactory generate`: from a prompt, and frames that are given, to files."""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import device_and_dtype, load_upscaler

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from videofactory_core.config import ModelConfig

# What makes a clip out of a video, with the options that say how long it becomes; "" is without a video.
LENGTHS = {
    "": ("frames", "length"),
    "extend": ("new_frames", "length"),
    "between": ("new_frames", "length"),
    "fps_times": (),
}
PICTURES = ("first_frame", "last_frame", "frame")
# With any of these a clip is made in chunks, as many as it takes.
IN_CHUNKS = (*PICTURES, "extend", "between", "fps_times", "length", "chunk", "overlap", "anchors", "match_colours")


def run_generate(options: argparse.Namespace) -> None:
    """Prompt to file: everything that can be refused is refused before the model is loaded."""
    from videofactory_core.video import check_fps, check_writable, write_frames

    files = output_files(options)
    for file in files:
        check_writable(file)
        if options.fps is not None:
            check_fps(file, options.fps)
    if options.upscaler and not options.upscale:
        raise ValueError("--upscaler names a network that nothing uses; add --upscale, or leave it out")
    check_options(options)
    check_inputs(options, files)

    from tqdm import tqdm

    from videofactory_core import adapters, checkpoint
    from videofactory_core.long import check_chunk, chunks, generate_long
    from videofactory_core.pipeline import usual_guidance
    from videofactory_core.upscaler import BUNDLED, upscale

    from .shot import plan_shot

    path = options.checkpoint or checkpoint.DEMO
    device, dtype = device_and_dtype(options)
    config = checkpoint.check(path)[0].config
    in_chunks = any(getattr(options, name) not in (None, False, 0, []) for name in IN_CHUNKS)
    length, overlap = chunk_of(options, config)
    if in_chunks:
        at_once = length if options.frames is None else min(options.frames, length)
        check_chunk(config, at_once, options.anchors)
    else:
        at_once = config.frames if options.frames is None else options.frames
    check_sampling(options, config, at_once, device, dtype)
    shot = plan_shot(options, config, length, overlap)
    length = min(length, shot.num_frames) if in_chunks else shot.num_frames
    overlap = max(1, min(overlap, length - 1))
    for file in files:
        check_fps(file, shot.fps)
    for note in shot.notes:
        print(f"videofactory: {note}", file=sys.stderr)

    upscaler = load_upscaler(options.upscaler, device, dtype) if options.upscale else None
    loras = [(adapters.read(file), strength) for file, strength in options.lora]
    model = checkpoint.load(path, device=device, dtype=dtype)
    for change, strength in loras:
        adapters.merge(model, change, strength)

    guidance_scale, frame_guidance_scale = usual_guidance(
        config, len(shot.given), options.guidance_scale, options.frame_guidance_scale
    )
    steps = options.steps * sum(1 for _ in chunks(shot.num_frames, length, overlap, shot.given))
    # What differs from a clip that is made at once.
    chunking: dict[str, Any] = {"chunk": length, "overlap": overlap} if in_chunks else {}
    defaults = {"anchors": 0, "match_colours": False, "stagger": 0.0}
    chunking |= {name: getattr(options, name) for name, usual in defaults.items() if getattr(options, name) != usual}
    for i, file in enumerate(files):
        request: dict[str, Any] = {
            "prompt": options.prompt,
            "negative_prompt": options.negative_prompt,
            "num_frames": shot.num_frames,
            "width": shot.width,
            "height": shot.height,
            "steps": options.steps,
            "guidance_scale": guidance_scale,
            "frame_guidance_scale": frame_guidance_scale,
            "sampler": options.sampler,
            "seed": options.seed + i,
        }
        settings = {
            **request,
            "fps": shot.fps,
            "checkpoint": Path(path).name,
            "title": model.metadata.title,
            "loras": [f"{change.path.name}:{strength:g}" for change, strength in loras],
            **({"upscaler": (options.upscaler or BUNDLED).name} if options.upscale else {}),
            **shot.settings,
            **chunking,
        }
        with tqdm(total=steps, desc=file.name, unit="step") as bar:
            pieces = generate_long(
                model,
                **request,
                given=shot.given,
                **{"chunk": length, **chunking},
                on_step=lambda *_, bar=bar: bar.update(),  # type: ignore[misc]
            )
            made = (frame for piece in pieces for frame in piece)
            frames: Iterable[Tensor] = (frame for number, frame in enumerate(made) if number in shot.new)
            if upscaler is not None:
                large = upscale(upscaler, (frame.clamp(0, 1) for frame in frames), upscaler.config.scale, device=device)
                frames = tqdm(large, "upscale", len(shot.new), unit="frame")
            metadata = {"videofactory": json.dumps(settings, ensure_ascii=False)}
            write_frames(file, shot.show(frames), shot.fps, metadata, times=shot.times, audio=shot.audio)
        print(file)


def output_files(options: argparse.Namespace) -> list[Path]:
    """One file a clip; several get their number before the suffix."""
    if options.batch < 1:
        raise ValueError(f"a batch of {options.batch} makes nothing; ask for 1 or more")
    name = re.sub(r"[^a-z0-9]+", "-", options.prompt.lower()).strip("-")[:60].strip("-") or "clip"
    out = options.out or Path(f"{name}-seed{options.seed}.mp4")
    if options.batch == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(options.batch)]


def check_options(options: argparse.Namespace) -> None:
    """ValueError for options that do not go together, and for prompts that are none."""
    from videofactory_core.prompts import parse

    for prompt in (options.prompt, options.negative_prompt):
        parse(prompt)
    if not -(2**63) <= options.seed <= 2**64 - options.batch:
        raise ValueError(f"seed {options.seed} is no number of 64 bits; use 0 to {2**64 - options.batch}")
    videos = [name for name in LENGTHS if name and getattr(options, name)]
    together = [*videos, *(name for name in PICTURES if videos and getattr(options, name))]
    if len(together) > 1:
        raise ValueError(f"{_flag(together[0])} and {_flag(together[1])} do not go together; use one of them")
    video = videos[0] if videos else ""
    if options.backward and video != "extend":
        raise ValueError("--backward needs a video that it goes before; add --extend VIDEO, or leave it out")
    lengths = [name for name in ("frames", "new_frames", "length") if getattr(options, name) is not None]
    for name in lengths:
        if name not in LENGTHS[video]:
            usual = " or ".join(map(_flag, LENGTHS[video]))
            where = f"with {_flag(video)}" if video else "without a video"
            raise ValueError(f"{_flag(name)} says nothing {where}; {f'use {usual}' if usual else 'leave it out'}")
    if len(lengths) > 1:
        raise ValueError(f"{_flag(lengths[0])} and {_flag(lengths[1])} both say how long; use one of them")
    if options.fps_times and not re.fullmatch(r"[2-9]|[1-9]\d{1,2}", options.fps_times[0]):
        raise ValueError(
            f"--fps-times takes how many times and a video, such as 2 clip.mp4, not {' '.join(options.fps_times)}"
        )


def check_inputs(options: argparse.Namespace, files: list[Path]) -> None:
    """FileNotFoundError for what is to be read and is missing, ValueError when a result would take its place."""
    inputs = [options.first_frame, options.last_frame, *(path for _, path in options.frame), options.extend]
    inputs += [*(options.between or ()), *map(Path, (options.fps_times or ())[1:])]
    for path in inputs:
        if path is None:
            continue
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file: check the name")
        for file in files:
            if file.exists() and file.samefile(path):
                raise ValueError(f"{file} is to be read; name another file to write with --out")


def chunk_of(options: argparse.Namespace, config: ModelConfig) -> tuple[int, int]:
    """Frames of a chunk, and how many of those before it knows; ValueError for what is none."""
    from videofactory_core.long import usual_chunk, usual_overlap

    length = usual_chunk(config, options.anchors) if options.chunk is None else options.chunk
    if options.chunk is not None and length < 2:
        raise ValueError(f"a chunk of {length} frames adds nothing to the one before; use 2 or more")
    overlap = usual_overlap(length) if options.overlap is None else options.overlap
    if options.overlap is not None and not 1 <= overlap < length:
        raise ValueError(f"chunks of {length} frames cannot overlap by {overlap}; use 1 to {length - 1}")
    return length, max(1, overlap)


def check_sampling(
    options: argparse.Namespace, config: ModelConfig, num_frames: int, device: torch.device, dtype: torch.dtype
) -> None:
    """ValueError for what the core would refuse once the model is loaded; its warnings come then.

    `num_frames` are those that are made at once, without anchors.
    """
    import torch

    from videofactory_core.diffusion import Schedule
    from videofactory_core.pipeline import check_memory, check_request, usual_guidance
    from videofactory_core.sampling import noise_levels

    if num_frames > 0:
        num_frames += options.anchors
    width, height = options.size or (config.width, config.height)
    guidance_scale, frame_guidance_scale = usual_guidance(
        config, 0, options.guidance_scale, options.frame_guidance_scale
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_request(
            config,
            num_frames,
            width,
            height,
            guidance_scale,
            options.sampler,
            options.steps,
            frame_guidance_scale,
        )
    check_memory(config, num_frames, width, height, torch.empty(0, dtype=dtype, device=device))
    noise_levels(Schedule.from_config(config.diffusion), options.steps, num_frames, stagger=options.stagger)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
