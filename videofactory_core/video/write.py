"""Writing video files: .mp4 (H.264), .webm (VP9) and .gif, with the sound of another file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..atomic import replacing, temporary_name
from .file import Pathlike, any_text
from .pixels import RGB_TO_YUV, Pixels, convert_graph, palette_graph, pull
from .sound import open_sound

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
# Packets of one stream wait for those of the other for a second at most, in microseconds; sound may end long before.
INTERLEAVING = {"max_interleave_delta": "1000000"}


@dataclass(frozen=True)
class Container:
    """How one kind of file is written; options are FFmpeg's."""

    format: str
    codec: str
    pixel_format: str
    # Ticks a second of times that do not follow a rate.
    clock: int
    max_fps: float = MAX_FPS
    codec_options: dict[str, str] = field(default_factory=dict)
    muxer_options: dict[str, str] = field(default_factory=dict)


CONTAINERS: dict[str, Container] = {
    ".mp4": Container(
        format="mp4",
        codec="libx264",
        pixel_format="yuv420p",
        clock=90_000,
        # cpu-independent: with x264's fastest rate control code, equal frames give unequal files.
        codec_options={"crf": "16", "preset": "medium", "x264-params": "cpu-independent=1", **BT709_TAGS},
        # The index comes first so that browsers start at once; without use_metadata_tags only a few keys are kept.
        muxer_options={"movflags": "+faststart+use_metadata_tags"},
    ),
    ".webm": Container(
        format="webm",
        codec="libvpx-vp9",
        pixel_format="yuv420p",
        clock=1000,
        codec_options={"crf": "16", "b": "0", "deadline": "good", "cpu-used": "2", **BT709_TAGS},
    ),
    # Delays are whole hundredths of a second, and browsers slow down what is faster than two of them.
    ".gif": Container(format="gif", codec="gif", pixel_format="pal8", clock=100, max_fps=50.0),
}


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
    temporary = temporary_name(path)
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
    check_writable(path)
    if frames.numel() == 0:
        raise ValueError(f"{path} was not written: there are no frames in a video of shape {list(frames.shape)}")
    write_frames(path, frames, fps, metadata)


def write_frames(
    path: Pathlike,
    frames: Iterable[Tensor],
    fps: float,
    metadata: dict[str, str] | None = None,
    times: Iterable[float] | None = None,
    audio: Pathlike | None = None,
) -> None:
    """Write what `write_video` does of `frames [H, W, 3]` that are taken one by one, in the memory of a few of them.

    A .gif takes all of them into memory, because its palette comes first.

    `times` are the seconds, never falling, at which the frames are shown where that does not follow a rate, each taken
    after its frame; the last one stands for 1 / `fps`. They are rounded to 1/90000 s in .mp4, 1/1000 s in .webm and
    1/100 s in .gif, and kept at least so far apart.

    `audio` is a file whose first sound is kept, in step with its picture, and cut where that ends: copied where the
    new file can hold its codec, otherwise encoded as AAC in .mp4 and as Opus in .webm. What comes before the first
    frame is left out. A .gif, or a file without sound, makes a video without.

    Raises what `frames` and `times` raise too, and leaves nothing behind; ValueError for sound that cannot be decoded,
    FileNotFoundError when there is no file `audio`.
    """
    metadata = metadata or {}
    assert all(key.isidentifier() and key.islower() for key in metadata), f"not lower-case names: {list(metadata)}"
    path = Path(path)
    check_writable(path)
    check_fps(path, fps)
    if audio is not None and not os.path.isfile(audio):
        raise FileNotFoundError(f"{audio} is not a file: check the name")
    source = _Source(frames, times)
    first = next(source, None)
    if first is None:
        raise ValueError(f"{path} was not written: there are no frames")

    import av

    container = _container(path)
    height, width = first[0].shape[:2]
    try:
        rate = Fraction(fps).limit_denominator(100_000)
        with replacing(path) as temporary:
            _encode(temporary, container, chain([first], source), (width, height), rate, metadata, audio)
    except Exception as error:
        if error is source.error:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, OSError):
            raise OSError(f"{path} was not written ({reason}): check the free space and the folder") from error
        if isinstance(error, av.FFmpegError):
            raise ValueError(
                f"{path} was not written because {container.codec} refused frames of {width}x{height} ({reason}): "
                f"choose another size or suffix"
            ) from error
        raise


class _Source:
    """Frames with their times, None where they follow a rate; remembers what taking them raised."""

    def __init__(self, frames: Iterable[Tensor], times: Iterable[float] | None) -> None:
        self.frames, self.times = iter(frames), None if times is None else iter(times)
        self.error: BaseException | None = None

    def __iter__(self) -> _Source:
        return self

    def __next__(self) -> tuple[Tensor, float | None]:
        try:
            frame = next(self.frames)
            time = None if self.times is None else next(self.times, -1.0)
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise
        assert time is None or time >= 0, f"expected a time for each frame, in seconds from 0 on, got {time}"
        assert frame.shape[2:] == (3,), f"expected [H, W, 3], got {tuple(frame.shape)}"
        assert frame.dtype == torch.uint8 or frame.is_floating_point(), f"expected float or uint8, got {frame.dtype}"
        return frame, time


def _container(path: Path) -> Container:
    container = CONTAINERS.get(path.suffix.lower())
    if container is None:
        raise ValueError(f"{path.name!r} does not name a kind of video: end it with {', '.join(CONTAINERS)}")
    return container


def _encode(
    path: Path,
    container: Container,
    frames: Iterable[tuple[Tensor, float | None]],
    size: tuple[int, int],
    fps: Fraction,
    metadata: dict[str, str],
    audio: Pathlike | None,
) -> None:
    """Write the file, in place, with frames that are `size` (width, height) and have times or not."""
    import av

    # 4:2:0 has one chroma sample for 2x2 pixels.
    pad_width, pad_height = (side % 2 if container.pixel_format == "yuv420p" else 0 for side in size)
    width, height = size[0] + pad_width, size[1] + pad_height
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(
            av.open(
                # An absolute path is never taken for the address of a network protocol.
                os.path.abspath(path),
                "w",
                format=container.format,
                # Without bitexact the file names the library's version, and .webm holds random identifiers.
                container_options={"fflags": "+bitexact", **container.muxer_options, **(INTERLEAVING if audio else {})},
                **any_text(),
            )
        )
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
        sound = stack.enter_context(open_sound(audio, file)) if audio is not None else None

        def mux(packets: Iterable[Any]) -> None:
            for packet in packets:
                if sound is not None:
                    sound.write_until(float(packet.dts * packet.time_base))
                file.mux(packet)

        graph, clock, pts = None, 1 / fps, -1
        for pixels, time in frames:
            assert pixels.shape[:2] == size[::-1], f"expected frames of {size[0]}x{size[1]}, got {tuple(pixels.shape)}"
            if graph is None:
                if time is not None:
                    clock = stream.codec_context.time_base = Fraction(1, container.clock)
                graph = _to_codec(width, height, container.pixel_format, clock)
            padded = np.pad(_to_uint8(pixels), ((0, pad_height), (0, pad_width), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(padded, format="rgb24")
            pts = pts + 1 if time is None else max(pts + 1, round(time * container.clock))
            frame.pts, frame.time_base = pts, clock
            graph.push(frame)
            for filtered in pull(graph):
                mux(stream.encode(filtered))
        assert graph is not None, "no frames"
        graph.push(None)
        for filtered in pull(graph):
            mux(stream.encode(filtered))
        mux(stream.encode(None))
        if sound is not None:
            sound.write_until(float(pts * clock + 1 / fps))


def _to_codec(width: int, height: int, pixel_format: str, clock: Fraction) -> Any:
    """The graph from RGB to what the codec stores."""
    if pixel_format == "pal8":
        return palette_graph(width, height, clock)
    return convert_graph(width, height, "rgb24", clock, (width, height), RGB_TO_YUV, pixel_format)


def _to_uint8(pixels: Tensor) -> Pixels:
    """One frame as the encoder's input; ValueError for NaN, which would become arbitrary colours."""
    if pixels.is_floating_point():
        if pixels.isnan().any():
            raise ValueError("the frames hold values that are not numbers: compute them in a wider type than float16")
        pixels = (pixels.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.cpu().numpy()
