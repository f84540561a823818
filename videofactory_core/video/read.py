"""Whole clips and single frames from video files, and what is in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from .file import (
    Pathlike,
    interval_of,
    is_timed,
    metadata_of,
    name_of,
    open_file,
    pixel_aspect,
    reading,
    timed_frames,
    video_stream,
)
from .pixels import Converter, display_matrix, is_turned, square_size

# Seconds before the wanted frame at which a file is entered, one after the other until that succeeds; None is its
# beginning. What lies closer to the beginning than SEEK_FROM is read from there.
SEEK_LEADS = (0.0, 5.0, None)
SEEK_FROM = 1.0


@dataclass(frozen=True)
class Video:
    """A clip in memory: `frames [F, H, W, 3]` float32 RGB in 0..1, shown at `fps` frames a second."""

    frames: Tensor
    fps: float
    metadata: dict[str, str]


def read_video(path: Pathlike, max_frames: int | None = None, start: int = 0) -> Video:
    """Decode the frames `start` to `start + max_frames` (None: to the end) of the first video stream.

    Frames stand as they are shown: turned and mirrored as the file asks, transparent parts over black (the separate
    alpha layer of .webm is ignored), converted from the matrix and the range that the file names; a file that names no
    matrix is BT.709 above 576 rows and BT.601 otherwise. Should the size change within the clip, later frames are
    scaled to that of the first.

    Every stored frame appears once, and `fps` is the file's mean rate: a clip with a variable rate keeps its length,
    but not the timing within. Frames before `start` are decoded too, since other ways of seeking are not exact.
    Memory is 12 bytes a pixel, and 6 more while reading.

    Raises ValueError when the file cannot be decoded up to the last frame asked for, has no video, or has no frame
    `start`; FileNotFoundError when there is no such file.
    """
    assert start >= 0, start
    assert max_frames is None or max_frames > 0, max_frames
    pictures: list[Tensor] = []
    with reading(path), open_file(path) as file:
        stream = video_stream(file, path)
        stream.thread_type = "AUTO"
        converter = Converter()
        times: list[float] = []
        for frame in file.decode(stream):
            times.append(frame.time)
            if len(times) > start:
                pictures.append(torch.from_numpy(converter(frame)))
            if len(pictures) == max_frames:
                break
        # A .gif has a delay for each frame instead of a rate, and the library's guess is one over the first of them.
        if file.format.name == "gif" and len(times) > 1:
            rate = (len(times) - 1) / (times[-1] - times[0])
        else:
            rate = stream.average_rate or stream.guessed_rate
        metadata = metadata_of(file)
    if not pictures:
        raise ValueError(
            f"{path} has {len(times)} frames, none from number {start} on: choose an earlier start or another file"
        )
    if not rate:
        raise ValueError(f"{path} does not say how fast its frames follow each other: convert it to another format")
    return Video(torch.stack(pictures).float().div_(255), float(rate), metadata)


@dataclass(frozen=True)
class Probe:
    """What `read_frames` can show of a video or a picture."""

    # Of the first frame, upright and in square pixels.
    width: int
    height: int
    # As the file says or counted; a picture is one frame.
    frames: int
    # Mean rate, and seconds from the beginning of the first frame to the end of the last; a picture has 0 of both.
    fps: float
    duration: float
    # Whether the file says when each frame is shown; otherwise they follow each other evenly.
    timed: bool


def probe(source: Pathlike | bytes) -> Probe:
    """Look into a file, or its content, and decode its first frame; a file without an index is read to its end.

    Raises ValueError when there is no video in it or no frame comes out, FileNotFoundError when there is no such file.
    """
    with reading(source), open_file(source) as file:
        stream = video_stream(file, source)
        stream.codec_context.thread_count = 1
        start, first = next(timed_frames(file, stream), (0.0, None))
        if first is None:
            raise ValueError(f"{name_of(source)} has no frames: choose another file")
        width, height = square_size(first.width, first.height, pixel_aspect(stream), is_turned(display_matrix(first)))
        timed, interval = is_timed(file, first), interval_of(stream)
        count, duration = stream.frames, float((stream.duration or 0) * stream.time_base)
        if timed and stream.start_time is not None:
            # Frames without the key frame that they depend on are not shown.
            duration -= max(0.0, start - float(stream.start_time * stream.time_base))
    if count != 1 and (count == 0 or duration <= 0):
        count, duration = _measure(source, start, interval)
    elif duration / interval < 0.98 * count:
        # An edit list hides some of the frames.
        count = max(1, round(duration / interval))
    fps, duration = (count / duration, duration) if count > 1 else (0.0, 0.0)
    return Probe(round(width), round(height), count, fps, duration, timed)


def read_frames(
    source: Pathlike | bytes,
    times: Sequence[float],
    size: tuple[int, int] | None = None,
    crop: float | None = None,
) -> Tensor:
    """The frames `[F, H, W, 3]` (uint8 RGB) of a file, or of its content, that are shown at `times`.

    Times are seconds since the first frame, in ascending order. The frame shown at t is the last that begins at t or
    earlier; where the file rounds times to ticks shorter than half a frame, it may begin a tick later. Frames stand as
    in `read_video`, and pixels are square. They are cut about the middle to the shape `crop` (width / height) and then
    to that of `size` (width, height), to which they are scaled.

    Decoding, in one thread, starts at the last key frame before the first time where the file can be entered there,
    else at the beginning. Raises ValueError when it fails, a frame is damaged, or the video ends before the last time;
    FileNotFoundError when there is no such file.
    """
    assert len(times) > 0, "no times"
    assert times[0] >= 0, times
    assert all(a <= b for a, b in pairwise(times)), times
    for lead in SEEK_LEADS:
        with reading(source), open_file(source) as file:
            stream = video_stream(file, source)
            stream.codec_context.thread_count = 1
            frames = _frames_before(file, stream, times[0], lead)
            if frames is not None:
                return _shown_at(times, frames, stream, Converter(size, crop, pixel_aspect(stream)), name_of(source))
    raise AssertionError("the last way is to decode from the beginning")


def _shown_at(
    times: Sequence[float], frames: Iterator[tuple[float, Any]], stream: Any, converter: Converter, name: str
) -> Tensor:
    """The converted frames that stand at `times`, the first of them at `times[0]` or before."""
    import av

    interval, tick = interval_of(stream), float(stream.time_base)
    tolerance = tick + 1e-6 if tick <= interval / 2 else 1e-6
    pictures: list[Tensor] = []
    last: Any = None
    begins, damaged_at = 0.0, None

    def show_until(end: float) -> None:
        """Let the last frame stand at all times before `end`."""
        picture = None
        while len(pictures) < len(times) and times[len(pictures)] + tolerance < end:
            if damaged_at is not None:
                raise ValueError(f"{name} is damaged at {damaged_at:.2f} seconds: repair or replace it")
            picture = torch.from_numpy(converter(last)) if picture is None else picture
            pictures.append(picture)

    failure = None
    try:
        for time, frame in frames:
            if last is not None:
                show_until(time)
            if len(pictures) == len(times):
                return torch.stack(pictures)
            # What a damaged frame leaves behind lasts until one that depends on no other.
            if frame.is_corrupt or frame.key_frame:
                damaged_at = time if frame.is_corrupt else None
            last, begins = frame, time
    except av.FFmpegError as error:
        failure = error
    if last is None:
        raise failure or ValueError(f"{name} has no frames: choose another file")
    # Durations are as rounded as times; one frame too many does no harm.
    end = begins + max(interval, float((getattr(last, "duration", 0) or 0) * stream.time_base))
    show_until(end + interval)
    if len(pictures) < len(times):
        raise failure or ValueError(
            f"{name} ends after {end:.2f} seconds, not after {times[-1]:.2f}: ask for earlier frames"
        )
    return torch.stack(pictures)


def _frames_before(file: Any, stream: Any, target: float, lead: float | None) -> Iterator[tuple[float, Any]] | None:
    """Frames with their seconds since the first one, beginning at `target` or earlier.

    They begin at a key frame `lead` seconds before `target`, with None at the first of all. None comes back when the
    file cannot be entered there.
    """
    import av

    frames = timed_frames(file, stream)
    origin, frame = next(frames, (0.0, None))
    if frame is None:
        return iter(())
    time = origin
    if lead is not None and is_timed(file, frame) and target - lead > SEEK_FROM:
        try:
            file.seek(int((origin + target - lead) / stream.time_base), stream=stream)
            frames = timed_frames(file, stream)
            time, frame = next(frames)
        except (av.FFmpegError, StopIteration):
            return None
        if not frame.key_frame or not is_timed(file, frame) or not origin <= time <= origin + target:
            return None
    return ((time - origin, frame) for time, frame in chain([(time, frame)], frames))


def _measure(source: Pathlike | bytes, start: float, interval: float) -> tuple[int, float]:
    """How many frames there are and how many seconds they last from `start` on, without decoding them."""
    with reading(source), open_file(source) as file:
        stream = video_stream(file, source)
        packets = [(packet.pts, packet.duration or 0) for packet in file.demux(stream) if packet.size]
        tick = float(stream.time_base)
    ends = [pts * tick + (length * tick or interval) for pts, length in packets if pts is not None]
    return len(packets), max(interval, max(ends) - start) if ends else len(packets) * interval
