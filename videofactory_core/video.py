"""Video files in and out, through PyAV: .mp4 (H.264), .webm (VP9) and .gif."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pixels import (
    RGB_TO_YUV,
    Converter,
    Pixels,
    convert_graph,
    display_matrix,
    is_turned,
    palette_graph,
    pull,
    square_size,
)

Pathlike = str | os.PathLike[str]

# Players and the RGB to YUV filter must agree on these, or colours shift.
BT709_TAGS = {
    "colorspace": "bt709",
    "color_primaries": "bt709",
    "color_trc": "bt709",
    "color_range": "tv",
    "chroma_sample_location": "left",
}
# What an encoder writes depends on its number of threads, so that must not follow the machine's cores.
THREADS = "4"
MIN_FPS, MAX_FPS = 0.01, 240.0
# Seconds before the wanted frame at which a file is entered, one after the other until that succeeds; None is its
# beginning. What lies closer to the beginning than SEEK_FROM is read from there.
SEEK_LEADS = (0.0, 5.0, None)
SEEK_FROM = 1.0


@dataclass(frozen=True)
class Container:
    """How one kind of file is written; options are FFmpeg's."""

    format: str
    codec: str
    pixel_format: str
    max_fps: float = MAX_FPS
    codec_options: dict[str, str] = field(default_factory=dict)
    muxer_options: dict[str, str] = field(default_factory=dict)


CONTAINERS: dict[str, Container] = {
    ".mp4": Container(
        format="mp4",
        codec="libx264",
        pixel_format="yuv420p",
        # cpu-independent: with x264's fastest rate control code, equal frames give unequal files.
        codec_options={"crf": "16", "preset": "medium", "x264-params": "cpu-independent=1", **BT709_TAGS},
        # The index comes first so that browsers start at once; without use_metadata_tags only a few keys are kept.
        muxer_options={"movflags": "+faststart+use_metadata_tags"},
    ),
    ".webm": Container(
        format="webm",
        codec="libvpx-vp9",
        pixel_format="yuv420p",
        codec_options={"crf": "16", "b": "0", "deadline": "good", "cpu-used": "2", **BT709_TAGS},
    ),
    # Delays are whole hundredths of a second, and browsers slow down what is faster than two of them.
    ".gif": Container(format="gif", codec="gif", pixel_format="pal8", max_fps=50.0),
}


@dataclass(frozen=True)
class Video:
    """A clip in memory: `frames [F, H, W, 3]` float32 RGB in 0..1, shown at `fps` frames a second."""

    frames: Tensor
    fps: float
    metadata: dict[str, str]


# Writing


def check_writable(path: Pathlike) -> None:
    """Raise what would stop `write_video` from writing to `path`, before work is spent on the frames.

    Raises ValueError for a suffix other than .mp4, .webm and .gif or a folder that does not exist, OSError when the
    folder does not take files.
    """
    path = Path(path)
    _container(path)
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a folder: create it, or choose another place for {path.name}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder: choose another name for the video")
    temporary = _temporary(path)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): choose a folder that you may write to") from error


def check_fps(path: Pathlike, fps: float) -> None:
    """Raise ValueError when the kind of file that `path` names cannot hold `fps` frames a second."""
    path = Path(path)
    highest = _container(path).max_fps
    if not MIN_FPS <= fps <= highest:
        raise ValueError(
            f"{fps} frames a second do not fit a {path.suffix.lower()} file: choose {MIN_FPS} to {highest:g}"
        )


def write_video(path: Pathlike, frames: Tensor, fps: float, metadata: dict[str, str] | None = None) -> None:
    """Write `frames [F, H, W, 3]`, RGB as float in 0..1 (clamped) or uint8, at `fps` frames a second (0.01 to 240).

    The suffix chooses H.264 in .mp4, VP9 in .webm (both 4:2:0, limited-range BT.709, tagged so) or .gif with one
    palette for the clip (at most 50 frames a second, a frame lasts whole hundredths of a second). 4:2:0 needs even
    sides: an odd one grows by a copy of its last row or column.

    `metadata` has lower-case identifiers as keys and any text without NUL as values. A .gif holds none: it is left out.

    Equal arguments give equal bytes with one version of PyAV. The file appears whole or not at all; an older one is
    replaced. Raises ValueError for frames and settings that the format cannot hold, OSError when the disk does not
    take the file, and what `check_writable` raises.
    """
    assert frames.shape[3:] == (3,), f"expected [F, H, W, 3], got {tuple(frames.shape)}"
    assert frames.dtype == torch.uint8 or frames.is_floating_point(), f"expected float or uint8, got {frames.dtype}"
    metadata = metadata or {}
    assert all(key.isidentifier() and key.islower() for key in metadata), f"not lower-case names: {list(metadata)}"
    path = Path(path)
    check_writable(path)
    container = _container(path)
    if frames.numel() == 0:
        raise ValueError(f"{path} was not written: there are no frames in a video of shape {list(frames.shape)}")
    check_fps(path, fps)

    import av

    temporary = _temporary(path)
    try:
        _encode(temporary, container, frames, Fraction(fps).limit_denominator(100_000), metadata)
        # A full disk may show only when the system flushes what it has buffered.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, OSError):
            raise OSError(f"{path} was not written ({reason}): check the free space and the folder") from error
        if isinstance(error, av.FFmpegError):
            width, height = frames.shape[2], frames.shape[1]
            raise ValueError(
                f"{path} was not written because {container.codec} refused frames of {width}x{height} ({reason}): "
                f"choose another size or suffix"
            ) from error
        raise


def _container(path: Path) -> Container:
    container = CONTAINERS.get(path.suffix.lower())
    if container is None:
        raise ValueError(f"{path.name!r} does not name a kind of video: end it with {', '.join(CONTAINERS)}")
    return container


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _encode(path: Path, container: Container, frames: Tensor, fps: Fraction, metadata: dict[str, str]) -> None:
    """Write the file, in place."""
    import av

    # 4:2:0 has one chroma sample for 2x2 pixels.
    pad_height, pad_width = (side % 2 if container.pixel_format == "yuv420p" else 0 for side in frames.shape[1:3])
    height, width = frames.shape[1] + pad_height, frames.shape[2] + pad_width
    if container.pixel_format == "pal8":
        graph = palette_graph(width, height, 1 / fps)
    else:
        graph = convert_graph(width, height, "rgb24", 1 / fps, (width, height), RGB_TO_YUV, container.pixel_format)
    with av.open(
        # An absolute path is never taken for the address of a network protocol.
        os.path.abspath(path),
        "w",
        format=container.format,
        # Without bitexact the file names the library's version, and .webm holds random identifiers.
        container_options={"fflags": "+bitexact", **container.muxer_options},
        **_any_text(),
    ) as file:
        # Text from a command line may hold bytes that are no text.
        file.metadata.update({key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()})
        try:
            stream = file.add_stream(
                container.codec,
                rate=fps,
                options={"threads": THREADS, "flags": "+bitexact", **container.codec_options},
            )
        except ValueError as error:
            raise ValueError(f"this build of PyAV has no {container.codec} encoder: install PyAV from PyPI") from error
        stream.width, stream.height, stream.pix_fmt = width, height, container.pixel_format
        for index, pixels in enumerate(frames):
            padded = np.pad(_to_uint8(pixels), ((0, pad_height), (0, pad_width), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(padded, format="rgb24")
            frame.pts, frame.time_base = index, 1 / fps
            graph.push(frame)
            for filtered in pull(graph):
                file.mux(stream.encode(filtered))
        graph.push(None)
        for filtered in pull(graph):
            file.mux(stream.encode(filtered))
        file.mux(stream.encode(None))


def _to_uint8(pixels: Tensor) -> Pixels:
    """One frame as the encoder's input; ValueError for NaN, which would become arbitrary colours."""
    if pixels.is_floating_point():
        if pixels.isnan().any():
            raise ValueError("the frames hold values that are not numbers: compute them in a wider type than float16")
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.cpu().numpy()


# Reading


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
    with _open(path) as file:
        stream = _video_stream(file, path)
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
        metadata = _metadata(file)
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
    with _open(source) as file:
        stream = _video_stream(file, source)
        stream.codec_context.thread_count = 1
        start, first = next(_timed_frames(file, stream), (0.0, None))
        if first is None:
            raise ValueError(f"{_name(source)} has no frames: choose another file")
        width, height = square_size(first.width, first.height, _pixel_aspect(stream), is_turned(display_matrix(first)))
        timed, interval = _is_timed(file, first), _interval(stream)
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
        with _open(source) as file:
            stream = _video_stream(file, source)
            stream.codec_context.thread_count = 1
            frames = _frames_before(file, stream, times[0], lead)
            if frames is not None:
                return _shown_at(times, frames, stream, Converter(size, crop, _pixel_aspect(stream)), _name(source))
    raise AssertionError("the last way is to decode from the beginning")


def _shown_at(
    times: Sequence[float], frames: Iterator[tuple[float, Any]], stream: Any, converter: Converter, name: str
) -> Tensor:
    """The converted frames that stand at `times`, the first of them at `times[0]` or before."""
    import av

    interval, tick = _interval(stream), float(stream.time_base)
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

    frames = _timed_frames(file, stream)
    origin, frame = next(frames, (0.0, None))
    if frame is None:
        return iter(())
    time = origin
    if lead is not None and _is_timed(file, frame) and target - lead > SEEK_FROM:
        try:
            file.seek(int((origin + target - lead) / stream.time_base), stream=stream)
            frames = _timed_frames(file, stream)
            time, frame = next(frames)
        except (av.FFmpegError, StopIteration):
            return None
        if not frame.key_frame or not _is_timed(file, frame) or not origin <= time <= origin + target:
            return None
    return ((time - origin, frame) for time, frame in chain([(time, frame)], frames))


def _timed_frames(file: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Decoded frames and their seconds on the file's clock; those without a time follow the one before."""
    interval, time = _interval(stream), 0.0
    for number, frame in enumerate(file.decode(stream)):
        if _is_timed(file, frame):
            time = frame.time
        elif number > 0:
            time += interval
        yield time, frame


def _is_timed(file: Any, frame: Any) -> bool:
    # An .avi has no times, and those that the library makes up do not suit reordered frames.
    return frame.pts is not None and file.format.name != "avi"


def _interval(stream: Any) -> float:
    """Mean seconds from frame to frame."""
    return float(1 / (stream.average_rate or stream.guessed_rate or 25))


def _pixel_aspect(stream: Any) -> float:
    """Width of a stored pixel over its height."""
    aspect = float(stream.sample_aspect_ratio or 1)
    # No camera or disc has others; a broken file must not make us fill the memory.
    return aspect if 1 / 8 <= aspect <= 8 else 1.0


def _measure(source: Pathlike | bytes, start: float, interval: float) -> tuple[int, float]:
    """How many frames there are and how many seconds they last from `start` on, without decoding them."""
    with _open(source) as file:
        stream = _video_stream(file, source)
        packets = [(packet.pts, packet.duration or 0) for packet in file.demux(stream) if packet.size]
        tick = float(stream.time_base)
    ends = [pts * tick + (length * tick or interval) for pts, length in packets if pts is not None]
    return len(packets), max(interval, max(ends) - start) if ends else len(packets) * interval


def read_metadata(path: Pathlike) -> dict[str, str]:
    """The file's own tags, with keys in lower case, among them those given to `write_video`; decodes nothing.

    Raises ValueError when the file is not a video, FileNotFoundError when there is none.
    """
    with _open(path) as file:
        return _metadata(file)


def _metadata(file: Any) -> dict[str, str]:
    # Matroska spells keys in capitals.
    return {
        key.lower(): value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        for key, value in file.metadata.items()
    }


def _any_text() -> dict[str, Any]:
    """Lets metadata hold any bytes: from version 19 PyAV always does, before it must be told to."""
    import av

    return {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "surrogateescape"}


@contextlib.contextmanager
def _open(source: Pathlike | bytes) -> Iterator[Any]:
    """The file for reading; what goes wrong inside becomes ValueError with one sentence."""
    import av

    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise FileNotFoundError(f"{source} is not a file: check the name")
    try:
        with av.open(
            # An absolute path is never taken for the address of a network protocol.
            io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source),
            # Nor does a file make us open others elsewhere.
            container_options={"protocol_whitelist": "file"},
            **_any_text(),
        ) as file:
            yield file
    except av.FFmpegError as error:
        name, reason = _name(source), error.strerror
        raise ValueError(f"{name} cannot be read as a video ({reason}): choose or make another file") from error


def _name(source: Pathlike | bytes) -> str:
    return "the file in memory" if isinstance(source, bytes) else str(source)


def _video_stream(file: Any, source: Pathlike | bytes) -> Any:
    if not file.streams.video:
        raise ValueError(f"{_name(source)} holds no video: choose another file")
    stream = file.streams.video[0]
    if stream.codec_context is None:
        raise ValueError(f"{_name(source)} is in a format that this build of PyAV does not decode: convert it to H.264")
    return stream
