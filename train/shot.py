"""What `videofactory generate` asks of the model, and what the file shows of the answer: a clip from a prompt, with
pictures at their places, or new frames behind, before, between and among those of videos."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from videofactory_core.config import ModelConfig
from videofactory_core.fit import fit_frames
from videofactory_core.pipeline import check_given

from .given import Screen, Source, Spread, look, read_picture

# More would be days of video, and longer than anyone waits for.
MOST_FRAMES = 1_000_000


@dataclass(frozen=True)
class Shot:
    """The clip that the model is asked for, and the file that is made of it."""

    num_frames: int
    # Pixels of the model's frames.
    width: int
    height: int
    fps: float
    # Frames `[H, W, 3]` in 0..1 by their number in the clip.
    given: Mapping[int, Tensor]
    # Numbers of those that go on to the file,
    new: Collection[int]
    # which makes its own of them.
    show: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter
    # When the file shows its frames, where they do not follow the rate.
    times: Sequence[float] | None = None
    # The video whose sound it gets.
    audio: Path | None = None
    # What was done to frames, and what may not work well.
    notes: tuple[str, ...] = ()
    # For the file's metadata.
    settings: dict[str, Any] = field(default_factory=dict)


def plan_shot(options: argparse.Namespace, config: ModelConfig, length: int, overlap: int) -> Shot:
    """The shot that the options describe, for a model that makes `length` frames at once and knows `overlap` of them.

    Reads pictures and looks through videos once. Raises ValueError for what does not fit together, and what cannot be
    read; FileNotFoundError for files that are missing.
    """
    if options.extend:
        return _extended(options, config, length, overlap)
    if options.between:
        return _connected(options, config, length, overlap)
    if options.fps_times:
        return _smoother(options, config)
    return _with_pictures(options, config)


def _with_pictures(options: argparse.Namespace, config: ModelConfig) -> Shot:
    width, height = options.size or (config.width, config.height)
    fps = config.fps if options.fps is None else options.fps
    num_frames = config.frames if options.frames is None else options.frames
    if options.length is not None:
        num_frames = _frames_in(options.length, fps)
    _check_count(num_frames)
    named = [(0, options.first_frame), (-1, options.last_frame), *options.frame]
    given: dict[int, Tensor] = {}
    paths: dict[int, Path] = {}
    notes: list[str] = []
    for index, path in named:
        if path is None:
            continue
        place = index + num_frames if index < 0 else index
        if not 0 <= place < num_frames:
            raise ValueError(
                f"{path} is given as frame {index} and the clip has {num_frames}; name one of 0 to {num_frames - 1},"
                " or from the end -1 and below"
            )
        if place in paths:
            raise ValueError(f"frame {place} is given twice, as {paths[place]} and {path}; leave one out")
        frames, said = fit_frames(read_picture(path)[None], width, height, options.fit)
        given[place], paths[place] = frames[0], path
        notes += [f"{path}: {said}"] if said else []
    check_given(given, num_frames, width, height)
    settings = {"given": {str(place): path.name for place, path in paths.items()}, "fit": options.fit} if paths else {}
    return Shot(num_frames, width, height, fps, given, range(num_frames), notes=tuple(notes), settings=settings)


def _extended(options: argparse.Namespace, config: ModelConfig, length: int, overlap: int) -> Shot:
    """The video and new frames behind its end, or before its start."""
    source = look(options.extend, overlap)
    fps = source.fps if options.fps is None else options.fps
    shown = source.head if options.backward else source.tail
    new = _new_frames(options, fps, length - len(shown))
    screen = Screen.of(source, config, options.size, options.fit)
    frames = screen.to_model(shown)
    start = new if options.backward else 0
    parts = [(source.times, source.end), _even(new, fps)]
    keeps_times = source.variable and options.fps is None
    silent = options.backward or options.fps is not None
    notes = [*_of_rate(fps, config), *_of_length(source, overlap), *(_without_sound(source) if silent else ())]

    def show(made: Iterable[Tensor]) -> Iterable[Tensor]:
        made = map(screen.to_video, made)
        return chain(made, source.frames()) if options.backward else chain(source.frames(), made)

    return Shot(
        num_frames=new + len(shown),
        width=screen.width,
        height=screen.height,
        fps=fps,
        given={start + place: frame for place, frame in enumerate(frames)},
        new=range(new) if options.backward else range(len(shown), len(shown) + new),
        show=show,
        times=_in_turn(reversed(parts) if options.backward else parts) if keeps_times else None,
        audio=None if silent else source.path,
        notes=tuple(notes),
        settings={"extend": source.path.name, "backward": options.backward, "new_frames": new},
    )


def _connected(options: argparse.Namespace, config: ModelConfig, length: int, overlap: int) -> Shot:
    """One video, new frames, and another in the size of the first."""
    # So many of each that a chunk holds some of both and something between them.
    known = max(1, min(overlap, (length - 1) // 2))
    source, other = (look(path, known) for path in options.between)
    fps = source.fps if options.fps is None else options.fps
    before, after = source.tail, other.head
    new = _new_frames(options, fps, length - len(before) - len(after))
    screen = Screen.of(source, config, options.size, options.fit)

    def as_source(frames: Tensor) -> tuple[Tensor, str]:
        if frames.shape[1:] == source.head.shape[1:]:
            return frames, ""
        fitted, said = fit_frames(frames.float() / 255, source.width, source.height, options.fit)
        sizes = f"{other.width}x{other.height} was scaled to {source.width}x{source.height}"
        return (fitted * 255).round().to(torch.uint8), said or sizes

    after, said = as_source(after)
    notes = [*_of_rate(fps, config), *_of_length(source, known), *_of_length(other, known)]
    notes += [f"{other.path}: {said}"] if said else []
    notes += [*_without_sound(other), *(() if options.fps is None else _without_sound(source))]
    known_frames = torch.cat([screen.to_model(before), screen.to_model(after)])
    places = [*range(len(before)), *range(len(before) + new, len(before) + new + len(after))]
    parts = [(source.times, source.end), _even(new, fps), (other.times, other.end)]
    even = not (source.variable or other.variable) and math.isclose(source.fps, other.fps, rel_tol=1e-3)

    def show(made: Iterable[Tensor]) -> Iterable[Tensor]:
        return chain(
            source.frames(), map(screen.to_video, made), (as_source(frame[None])[0][0] for frame in other.frames())
        )

    return Shot(
        num_frames=len(places) + new,
        width=screen.width,
        height=screen.height,
        fps=fps,
        given=dict(zip(places, known_frames, strict=True)),
        new=range(len(before), len(before) + new),
        show=show,
        times=None if even or options.fps is not None else _in_turn(parts),
        audio=source.path if options.fps is None else None,
        notes=tuple(notes),
        settings={"between": [source.path.name, other.path.name], "new_frames": new, "fit": options.fit},
    )


def _smoother(options: argparse.Namespace, config: ModelConfig) -> Shot:
    """The video with new frames between its own."""
    times, path = int(options.fps_times[0]), Path(options.fps_times[1])
    source = look(path, 1)
    if len(source.times) < 2:
        raise ValueError(f"{path} has one frame and nothing lies between; name a longer video")
    fps = times * source.fps if options.fps is None else options.fps
    screen = Screen.of(source, config, options.size, options.fit)
    given = Spread(source, times, screen)
    num_frames = given.places[-1] + 1

    def show(made: Iterable[Tensor]) -> Iterator[Tensor]:
        made = map(screen.to_video, made)
        for frame in source.frames():
            yield frame
            yield from islice(made, times - 1)

    places = np.arange(num_frames) / times
    keeps_times = source.variable and options.fps is None
    return Shot(
        num_frames=num_frames,
        width=screen.width,
        height=screen.height,
        fps=fps,
        given=given,
        new=frozenset(range(num_frames)).difference(given.places),
        show=show,
        times=np.interp(places, np.arange(len(source.times)), source.times).tolist() if keeps_times else None,
        audio=path if options.fps is None else None,
        notes=(*_of_rate(fps, config), *(() if options.fps is None else _without_sound(source))),
        settings={"fps_times": [times, path.name]},
    )


def _frames_in(seconds: float, fps: float) -> int:
    if not 0.5 <= seconds * fps < math.inf:
        raise ValueError(f"--length {seconds:g} at {fps:g} frames a second makes no clip; ask for more than a frame")
    return max(1, round(seconds * fps))


def _new_frames(options: argparse.Namespace, fps: float, room: int) -> int:
    """How many frames are added to videos: by default as many as one chunk has room for."""
    if options.length is not None:
        new = _frames_in(options.length, fps)
    else:
        new = max(1, room) if options.new_frames is None else options.new_frames
    if new < 1:
        raise ValueError(f"{new} new frames are none; ask for 1 or more")
    _check_count(new)
    return new


def _check_count(frames: int) -> None:
    if frames > MOST_FRAMES:
        raise ValueError(f"{frames:.6g} frames are too many; ask for {MOST_FRAMES} at most")


def _even(count: int, fps: float) -> tuple[Sequence[float], float]:
    return [index / fps for index in range(count)], count / fps


def _in_turn(parts: Iterable[tuple[Sequence[float], float]]) -> list[float]:
    """Times of clips one behind the other, of each its times and its end, in seconds."""
    times: list[float] = []
    start = 0.0
    for part, end in parts:
        times += [start + time for time in part]
        start += end
    return times


def _of_rate(fps: float, config: ModelConfig) -> list[str]:
    if math.isclose(fps, config.fps, rel_tol=0.01):
        return []
    return [
        f"the model was trained on {config.fps:g} frames a second and these are {fps:.4g};"
        " motion may be faster or slower than it learned"
    ]


def _of_length(source: Source, known: int) -> list[str]:
    count = len(source.times)
    return (
        [f"{source.path} has {count} frames, so the model sees {count} of it and not {known}"] if count < known else []
    )


def _without_sound(source: Source) -> list[str]:
    return [f"the sound of {source.path} is left out"] if source.has_sound else []
