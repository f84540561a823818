"""Video files in and out, through PyAV: .mp4 (H.264), .webm (VP9) and .gif."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Pathlike = str | os.PathLike[str]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# Players and the RGB to YUV filter below must agree on these, or colours shift.
BT709_TAGS = {
    "colorspace": "bt709",
    "color_primaries": "bt709",
    "color_trc": "bt709",
    "color_range": "tv",
    "chroma_sample_location": "left",
}
SCALER = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
# H.264 and VP9 mean chroma samples to lie in the left column of their 2x2 pixels unless told otherwise.
YUV_TO_RGB = f"in_h_chr_pos=0:{SCALER}"
RGB_TO_YUV = f"out_color_matrix=bt709:out_range=limited:out_h_chr_pos=0:out_v_chr_pos=128:{SCALER}"
# ISO 23001-8 codes of a frame's YUV matrix.
MATRIX_BT709, MATRIX_UNSPECIFIED = 1, 2
# Untagged video higher than standard definition is BT.709 by convention, else BT.601.
STANDARD_DEFINITION_HEIGHT = 576
# What an encoder writes depends on its number of threads, so that must not follow the machine's cores.
THREADS = "4"
MIN_FPS, MAX_FPS = 0.01, 240.0


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
        graph = _palette_graph(width, height, 1 / fps)
    else:
        graph = _convert_graph(width, height, "rgb24", 1 / fps, (width, height), RGB_TO_YUV, container.pixel_format)
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
            for filtered in _pull(graph):
                file.mux(stream.encode(filtered))
        graph.push(None)
        for filtered in _pull(graph):
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
        if not file.streams.video:
            raise ValueError(f"{path} holds no video: choose another file")
        stream = file.streams.video[0]
        if stream.codec_context is None:
            raise ValueError(f"{path} is in a format that this build of PyAV does not decode: convert it to H.264")
        stream.thread_type = "AUTO"
        converter = _Converter()
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
def _open(path: Pathlike) -> Iterator[Any]:
    """The file for reading; what goes wrong inside becomes ValueError with one sentence."""
    import av

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is not a file: check the name")
    try:
        # An absolute path is never taken for the address of a network protocol.
        with av.open(os.path.abspath(path), **_any_text()) as file:
            yield file
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video ({error.strerror}): choose or make another file") from error


class _Converter:
    """Decoded frames to RGB `[H, W, 3]` in one size; keeps the filter graph while the frames stay of one kind."""

    def __init__(self) -> None:
        self.kind: tuple[Any, ...] = ()
        self.size: tuple[int, int] | None = None
        self.graph: Any = None

    def __call__(self, frame: Any) -> Pixels:
        has_alpha = any(component.is_alpha for component in frame.format.components)
        if frame.colorspace == MATRIX_UNSPECIFIED and frame.height > STANDARD_DEFINITION_HEIGHT:
            frame.colorspace = MATRIX_BT709
        kind = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        self.size = self.size or (frame.width, frame.height)
        if kind != self.kind:
            self.kind = kind
            self.graph = _convert_graph(
                *kind[:3], frame.time_base, self.size, YUV_TO_RGB, "rgba" if has_alpha else "rgb24"
            )
        self.graph.push(frame)
        pixels = self.graph.pull().to_ndarray()
        if has_alpha:
            colour, alpha = pixels[..., :3].astype(np.uint16), pixels[..., 3:]
            pixels = ((colour * alpha + 127) // 255).astype(np.uint8)
        return np.ascontiguousarray(_upright(pixels, frame))


def _upright(pixels: Pixels, frame: Any) -> Pixels:
    """`pixels [H, W, 3]` turned and mirrored by the frame's display matrix: x' = a x + c y, y' = b x + d y."""
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(side_data), dtype=np.int32)[:5].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


# Filter graphs


def _convert_graph(
    width: int, height: int, pixel_format: str, time_base: Fraction, size: tuple[int, int], scaler: str, output: str
) -> Any:
    """From one pixel format to another, and to `size` (width, height)."""
    from av.filter import Graph

    graph = Graph()
    source = _source(graph, width, height, pixel_format, time_base)
    scale = graph.add("scale", f"{size[0]}:{size[1]}:{scaler}")
    convert = graph.add("format", output)
    sink = graph.add("buffersink")
    source.link_to(scale)
    scale.link_to(convert)
    convert.link_to(sink)
    graph.configure()
    return graph


def _palette_graph(width: int, height: int, time_base: Fraction) -> Any:
    """From RGB to the 256 colours that suit the whole clip; gives its frames when the last one is in."""
    from av.filter import Graph

    graph = Graph()
    source = _source(graph, width, height, "rgb24", time_base)
    split = graph.add("split")
    palette = graph.add("palettegen", "reserve_transparent=0")
    apply = graph.add("paletteuse")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(apply, 1, 0)
    palette.link_to(apply, 0, 1)
    apply.link_to(sink)
    graph.configure()
    return graph


def _source(graph: Any, width: int, height: int, pixel_format: str, time_base: Fraction) -> Any:
    import av

    return graph.add_buffer(width=width, height=height, format=av.VideoFormat(pixel_format), time_base=time_base)


def _pull(graph: Any) -> Iterator[Any]:
    """The frames that the graph has ready."""
    with contextlib.suppress(BlockingIOError, EOFError):
        while True:
            yield graph.pull()
