"""Opening video files, and what they say about themselves and the times of their frames."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

Pathlike = str | os.PathLike[str]


def read_metadata(path: Pathlike) -> dict[str, str]:
    """The file's own tags, with keys in lower case, among them those given to `write_video`; decodes nothing.

    Raises ValueError when the file is not a video, FileNotFoundError when there is none.
    """
    with reading(path), open_file(path) as file:
        return metadata_of(file)


def metadata_of(file: Any) -> dict[str, str]:
    # Matroska spells keys in capitals.
    return {
        key.lower(): value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        for key, value in file.metadata.items()
    }


def any_text() -> dict[str, Any]:
    """Lets metadata hold any bytes: from version 19 PyAV always does, before it must be told to."""
    import av

    return {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "surrogateescape"}


def open_file(source: Pathlike | bytes) -> Any:
    """The file for reading, a context manager; FileNotFoundError when there is none."""
    import av

    if not isinstance(source, bytes) and not os.path.isfile(source):
        raise FileNotFoundError(f"{source} is not a file: check the name")
    return av.open(
        # An absolute path is never taken for the address of a network protocol.
        io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source),
        # Nor does a file make us open others elsewhere.
        container_options={"protocol_whitelist": "file"},
        **any_text(),
    )


@contextlib.contextmanager
def reading(source: Pathlike | bytes) -> Iterator[None]:
    """Makes ValueError with one sentence of what goes wrong inside."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        name, reason = name_of(source), error.strerror
        raise ValueError(f"{name} cannot be read as a video ({reason}): choose or make another file") from error


def name_of(source: Pathlike | bytes) -> str:
    return "the file in memory" if isinstance(source, bytes) else str(source)


def video_stream(file: Any, source: Pathlike | bytes) -> Any:
    if not file.streams.video:
        raise ValueError(f"{name_of(source)} holds no video: choose another file")
    stream = file.streams.video[0]
    if stream.codec_context is None:
        raise ValueError(
            f"{name_of(source)} is in a format that this build of PyAV does not decode: convert it to H.264"
        )
    return stream


def timed_frames(file: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Decoded frames and their seconds on the file's clock; those without a time follow the one before."""
    interval, time = interval_of(stream), 0.0
    for number, frame in enumerate(file.decode(stream)):
        if is_timed(file, frame):
            time = frame.time
        elif number > 0:
            time += interval
        yield time, frame


def is_timed(file: Any, unit: Any) -> bool:
    """Whether the file says when a frame, or the frame in a packet, is shown."""
    # An .avi has no times, and those that the library makes up do not suit reordered frames.
    return unit.pts is not None and file.format.name != "avi"


def interval_of(stream: Any) -> float:
    """Mean seconds from frame to frame, as the file says."""
    return float(1 / (stream.average_rate or stream.guessed_rate or 25))


def pixel_aspect(stream: Any) -> float:
    """Width of a stored pixel over its height."""
    aspect = float(stream.sample_aspect_ratio or 1)
    # No camera or disc has others; a broken file must not make us fill the memory.
    return aspect if 1 / 8 <= aspect <= 8 else 1.0
