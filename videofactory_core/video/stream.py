"""A video frame by frame, in the memory of a few frames, with its true times, and with what is damaged told."""

from __future__ import annotations

import contextlib
import heapq
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .file import Pathlike, interval_of, is_timed, metadata_of, open_file, pixel_aspect, reading, video_stream
from .pixels import Converter, display_matrix, is_turned, square_size

B_FRAME = 3
# Frames that may depend on a later one are held back until that has come; in practice there are no more of them.
MOST_HELD = 8
# Formats, by FFmpeg's names, that are cut anywhere.
RECORDINGS = ("mpegts", "mpeg")
# Seconds by which the times of a constant rate may stray, through rounding.
JITTER = 2e-3


class DamagedVideo(ValueError):
    """Behind a good beginning a file is damaged or breaks off; `repeat_damaged` reads it all the same."""


class Frame(NamedTuple):
    """What is shown from `time`, in seconds since the first frame: `pixels [H, W, 3]`, uint8 RGB."""

    time: float
    pixels: Tensor


@dataclass
class Stream:
    """A video whose frames come one by one, in order of their times, when it is iterated over, which it can be once."""

    # Of all frames, upright and in square pixels.
    width: int
    height: int
    # As the file lists, before any is decoded.
    frames: int
    # Mean rate, and whether the times keep to it.
    fps: float
    variable: bool
    metadata: dict[str, str]
    # Seconds that the file lacks at its end because it breaks off.
    missing: float
    shown: Iterator[Frame]
    # How many damaged frames the last good one has stood for so far.
    repeated: int = 0

    def __iter__(self) -> Iterator[Frame]:
        return self.shown


@dataclass
class Rhythm:
    """When the frames of a file are shown, by its packets."""

    frames: int
    fps: float
    variable: bool
    end: float
    missing: float


@dataclass
class Decoded:
    """What came of one packet, None where the decoder refused it; `time` is in seconds on the file's clock."""

    time: float
    frame: Any
    damaged: bool


@contextlib.contextmanager
def open_frames(path: Pathlike, repeat_damaged: bool = False) -> Iterator[Stream]:
    """Frames of the first video stream, as `read_video` gives them but in square pixels, in constant memory.

    Pixels that are wider or higher than square are scaled so that no side gets fewer. Times are the file's own, moved
    so that the first frame is shown at 0. The file is read to its end once before, without decoding, for its rate.

    From a damaged frame until the next key frame everything counts as damaged. Raises DamagedVideo, with the time, at
    the first damaged frame and for a file that breaks off; with `repeat_damaged` the last good frame stands for
    damaged ones, and a file that breaks off ends there. Raises ValueError in any case when the first frame is damaged
    or there is none, FileNotFoundError when there is no such file.

    What a decoder does not notice is not found: VP9 and AV1 have no way to tell most wrong bytes.
    """
    rhythm = _rhythm(path)
    if rhythm.missing and not repeat_damaged:
        raise DamagedVideo(
            f"{path} breaks off at {rhythm.end:.2f} seconds, {rhythm.missing:.2f} before its end: copy it anew"
        )
    with contextlib.ExitStack() as stack:
        with reading(path):
            file = stack.enter_context(open_file(path))
            video = video_stream(file, path)
            # With more, FFmpeg's H.264 decoder hides damage, and errors come with other packets than their own.
            video.codec_context.thread_count = 1
            decoded = _told(_decoded(file, video))
            first = next(decoded, None)
            if first is None:
                raise ValueError(f"{path} has no frames: choose another file")
            if first[1] is not None:
                raise ValueError(f"{path} is damaged at 0.00 seconds: repair or replace it, or cut off its beginning")
            frame, aspect = first[0].frame, pixel_aspect(video)
            width, height = square_size(frame.width, frame.height, aspect, is_turned(display_matrix(frame)))
        stream = Stream(
            width=round(width),
            height=round(height),
            frames=rhythm.frames,
            fps=rhythm.fps,
            variable=rhythm.variable,
            metadata=metadata_of(file),
            missing=rhythm.missing,
            shown=iter(()),
        )
        stream.shown = _shown(stream, path, first[0], decoded, Converter(pixel_aspect=aspect), repeat_damaged)
        yield stream


def _shown(
    stream: Stream,
    path: Pathlike,
    first: Decoded,
    decoded: Iterator[tuple[Decoded, float | None]],
    converter: Converter,
    repeat_damaged: bool,
) -> Iterator[Frame]:
    """The frames to show, beginning with the good frame `first`, and what stands for damaged ones."""
    with reading(path):
        time, pixels = 0.0, torch.from_numpy(converter(first.frame))
        yield Frame(time, pixels)
        for unit, damaged_at in decoded:
            # Some files have times that step back.
            time = max(time, unit.time - first.time)
            if damaged_at is None:
                pixels = torch.from_numpy(converter(unit.frame))
            elif repeat_damaged:
                stream.repeated += 1
            else:
                raise DamagedVideo(f"{path} is damaged at {damaged_at - first.time:.2f} seconds: repair or replace it")
            yield Frame(time, pixels)


def _decoded(file: Any, stream: Any) -> Iterator[Decoded]:
    """All frames in the order in which they are shown, the refused ones among them."""
    import av

    interval, time = interval_of(stream), 0.0
    # Ticks at which frames are due that may not come: of a refused packet, and of those after it until a key frame,
    # which a decoder may drop without a word. And of those that lack a part of their content.
    due: list[int] = []
    partial: set[int] = set()
    # A recording may begin between two key frames; what comes before the second is not shown.
    begun, refused = file.format.name not in RECORDINGS, False
    for packet in _packets(file, stream):
        begun = begun or packet.is_keyframe
        timed = is_timed(file, packet)
        if timed and packet.is_corrupt:
            partial.add(packet.pts)
        frames: list[Any] = []
        try:
            frames = packet.decode()
            refused = refused and not packet.is_keyframe
        except av.FFmpegError:
            refused = begun
        if refused and not packet.is_discard:
            if timed:
                heapq.heappush(due, packet.pts)
            elif not frames:
                yield Decoded(time, None, True)
                time += interval
        for frame in frames:
            begun = True
            if is_timed(file, frame):
                while due and due[0] < frame.pts:
                    yield Decoded(float(heapq.heappop(due) * stream.time_base), None, True)
                if due and due[0] == frame.pts:
                    heapq.heappop(due)
                time = frame.time
            yield Decoded(time, frame, frame.is_corrupt or frame.pts in partial)
            partial.discard(frame.pts)
            # For a frame without a time, which follows the one before.
            time += interval
    while due:
        yield Decoded(float(heapq.heappop(due) * stream.time_base), None, True)


def _packets(file: Any, stream: Any) -> Iterator[Any]:
    """The stream's packets as far as the file can be read, then the empty one that makes the decoder give the rest."""
    import av

    try:
        yield from file.demux(stream)
    except av.FFmpegError:
        yield av.Packet()


def _told(decoded: Iterator[Decoded]) -> Iterator[tuple[Decoded, float | None]]:
    """Each frame and, where it is damaged, the time at which that damage began.

    What a damaged frame leaves behind lasts until one that depends on no other, and B frames depend on the next other
    frame too.
    """
    held: list[Decoded] = []
    damaged_at: float | None = None

    def told() -> Iterator[tuple[Decoded, float | None]]:
        nonlocal damaged_at
        worst = next((unit.time for unit in held if unit.damaged), None)
        for unit in held:
            if damaged_at is None:
                damaged_at = worst
            if not unit.damaged and unit.frame.key_frame:
                damaged_at = None
            yield unit, damaged_at
        held.clear()

    for unit in decoded:
        held.append(unit)
        if unit.frame is None or int(unit.frame.pict_type) != B_FRAME or len(held) == MOST_HELD:
            yield from told()
    yield from told()


def _rhythm(path: Pathlike) -> Rhythm:
    """Read a file to its end, without decoding it."""
    import av

    with reading(path), open_file(path) as file:
        stream = video_stream(file, path)
        ticks, count, end = array("q"), 0, 0
        # Where the file cannot be read any more is told when its frames are.
        with contextlib.suppress(av.FFmpegError):
            for packet in file.demux(stream):
                if not packet.size or packet.is_discard:
                    continue
                count += 1
                if is_timed(file, packet):
                    ticks.append(packet.pts)
                    end = max(end, packet.pts + (packet.duration or 0))
        tick, declared = float(stream.time_base), 1 / interval_of(stream)
        fps, variable = _rate(np.sort(np.frombuffer(ticks, dtype=np.int64)) * tick, tick, declared)
        begin, missing = 0.0, 0.0
        # Only there the index lists all frames before them; elsewhere lengths are estimates.
        if "mp4" in file.format.name and stream.duration and ticks:
            begin = (stream.start_time or 0) * tick
            missing = begin + stream.duration * tick - end * tick
            missing = missing if missing > 1.5 / fps else 0.0
        return Rhythm(count, fps, variable, end * tick - begin, missing)


def _rate(times: np.ndarray[Any, Any], tick: float, declared: float) -> tuple[float, bool]:
    """Mean frames a second of `times`, in ascending order, and whether they stray from them."""
    if len(times) < 2 or times[-1] <= times[0]:
        return declared, False
    measured = (len(times) - 1) / float(times[-1] - times[0])
    # A packet for each half of a frame would make the rate another.
    rates = [declared, measured] if measured < 1.5 * declared else [declared]
    for rate in rates:
        strays = times - np.arange(len(times)) / rate
        if strays.max() - strays.min() <= max(1.01 * tick, JITTER):
            return rate, False
    return measured, True
