"""Scenes: where a video is cut, and the clips between the cuts, which stay parts of their file and are read by time."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from videofactory_core.video import Pathlike, probe
from videofactory_core.video.file import interval_of, is_timed, name_of, open_file, reading, video_stream
from videofactory_core.video.read import SEEK_FROM, SEEK_LEADS

from .sources import content
from .stage import Row, Stage, Work

if TYPE_CHECKING:
    import pyarrow as pa

# Longer side, in pixels, of the pictures that detectors compare; PySceneDetect's own choice.
DETECTION_SIDE = 256
# Seconds by which lengths may be off through rounding.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Scenes(Stage):
    """Cut videos into scenes with PySceneDetect; its function maps a source to `{"clips": [...]}`, in order of time.

    A clip's `start` and `end` are seconds since the first frame of the file; `start_pts` and `end_pts` are the same on
    the file's own clock, in ticks of `time_base`. Stretches whose frames are damaged are in no clip. ValueError for a
    source that is no video, or none of whose frames between its `start` and `end` are sound.
    """

    name: ClassVar[str] = "scenes"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()
    rows_per_part: ClassVar[int] = 8
    splits: ClassVar[bool] = True
    weights_in: ClassVar[tuple[str, ...]] = ("model",)

    detector: Literal["adaptive", "content", "histogram", "hash", "threshold", "transnetv2"] = "adaptive"
    # From which difference on there is a cut; 0 is the library's default for the detector.
    threshold: float = 0.0
    # The ONNX file of TransNetV2.
    model: str = ""
    # Seconds that a clip lasts at least.
    min_seconds: float = 2.0
    # Seconds that it lasts at most; what is longer is cut into equal parts. 0 is as long as the scene.
    max_seconds: float = 0.0
    # Seconds that are left out at both ends of a scene, where it may be dissolving into another.
    trim_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("threshold", "min_seconds", "max_seconds", "trim_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)} is out of range; use 0 or more")
        if 0 < self.max_seconds < 2 * self.min_seconds:
            # Parts of a scene that is a little longer would be too short.
            raise ValueError(
                f"max_seconds: {self.max_seconds:g} is too near to min_seconds; "
                f"use {2 * self.min_seconds:g} or more, or 0 for no limit"
            )

    @classmethod
    def columns(cls) -> dict[str, pa.DataType]:
        import pyarrow as pa

        text, number, integer = pa.string(), pa.float64(), pa.int64()
        return {
            "path": text,
            "offset": integer,
            "length": integer,
            "name": text,
            "start": number,
            "end": number,
            "start_pts": integer,
            "end_pts": integer,
            "time_base": text,
            "width": pa.int32(),
            "height": pa.int32(),
            "fps": number,
            "caption": text,
            "licence": text,
        }

    def missing(self) -> str:
        if find_spec("scenedetect") is None or find_spec("cv2") is None:
            return 'PySceneDetect is not installed: run pip install "videofactory[curate]"'
        if self.detector == "transnetv2":
            if find_spec("onnxruntime") is None:
                return "TransNetV2 needs onnxruntime: run pip install onnxruntime"
            if not os.path.isfile(self.model):
                return f"scenes.model: there is no file {self.model or '(none is named)'}; name TransNetV2's .onnx"
        return ""

    def open(self) -> Work:
        import cv2

        cv2.setNumThreads(1)
        return lambda rows: [{"clips": self._clips(row)} for row in rows]

    def _clips(self, row: Row) -> list[Row]:
        """The clips of a source."""
        source = content(row)
        found = probe(source)
        begin, end = row.get("start") or 0.0, row.get("end")
        scenes, clock = self._scenes(source, begin, math.inf if end is None else end)
        clips: list[Row] = []
        for start, end in self._parts(scenes):
            clip = {key: row.get(key) for key in ("source_id", "path", "offset", "length", "caption", "licence")}
            clip["clip_id"] = f"{row['source_id']}-{round(start * 1000)}-{round(end * 1000)}"
            clip["name"] = f"{row['name']} {start:.2f}-{end:.2f} s"
            clip |= {"start": start, "end": end, "start_pts": clock.ticks(start), "end_pts": clock.ticks(end)}
            clip["time_base"] = str(clock.time_base)
            clip |= {"width": found.width, "height": found.height, "fps": found.fps}
            clips.append(clip)
        return clips

    def _parts(self, scenes: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
        """Start and end of what becomes a clip."""
        for begin, end in scenes:
            begin, length = begin + self.trim_seconds, end - begin - 2 * self.trim_seconds
            if length <= 0 or length < self.min_seconds - ROUNDING:
                continue
            count = max(1, math.ceil((length - ROUNDING) / self.max_seconds)) if self.max_seconds else 1
            for part in range(count):
                yield begin + length * part / count, begin + length * (part + 1) / count

    def _scenes(self, source: Pathlike | bytes, begin: float, end: float) -> tuple[list[tuple[float, float]], Clock]:
        """Start and end of the scenes between two times, and the clock of the file."""
        scenes: list[tuple[float, float]] = []
        run, small, time = _Run(self._detector()), _Scaler(), begin
        with _entered(source, begin) as (clock, moments):
            for time, frame in moments:
                if time >= end - clock.tolerance:
                    break
                if time < begin - clock.tolerance:
                    continue
                if frame is None:
                    if run.times:
                        scenes += run.scenes(time)
                        run = _Run(self._detector())
                    continue
                run.add(max(time, begin), small(frame))
            else:
                # The last frame stands for as long as any other.
                time += clock.interval
            if run.times:
                scenes += run.scenes(min(time, end))
        if not scenes:
            raise ValueError(f"{name_of(source)} shows no sound frame after {begin:.2f} seconds: choose another part")
        return scenes, clock

    def _detector(self) -> Any:
        """A new one, that has seen nothing."""
        from scenedetect import detectors
        from scenedetect.detectors.transnet_v2 import TransnetV2Detector

        settings = {"threshold": self.threshold} if self.threshold else {}
        if self.detector == "adaptive":
            return detectors.AdaptiveDetector(**{f"adaptive_{key}": value for key, value in settings.items()})
        if self.detector == "transnetv2":
            # With a least length of its own it loses the first cut.
            return TransnetV2Detector(self.model, min_scene_len=0, **settings)
        kinds = {
            "content": detectors.ContentDetector,
            "histogram": detectors.HistogramDetector,
            "hash": detectors.HashDetector,
            "threshold": detectors.ThresholdDetector,
        }
        return kinds[self.detector](**settings)


@dataclass
class _Run:
    """Sound frames that follow each other, the times at which they begin, and the numbers of those after a cut."""

    detector: Any
    times: array[float] = field(default_factory=lambda: array("d"))
    cuts: list[int] = field(default_factory=list)

    def add(self, time: float, picture: Any) -> None:
        # Some files have times that step back.
        self.times.append(max(time, self.times[-1]) if self.times else time)
        self._note(self.detector.process_frame(self._position(), picture))

    def scenes(self, end: float) -> list[tuple[float, float]]:
        """Start and end of each scene, the last of which ends at `end`."""
        self._note(self.detector.post_process(self._position()))
        begins = [self.times[0], *(self.times[cut] for cut in sorted(set(self.cuts)) if cut > 0)]
        return list(zip(begins, [*begins[1:], end], strict=True))

    def _note(self, cuts: list[Any]) -> None:
        self.cuts += [cut.frame_num for cut in cuts]

    def _position(self) -> Any:
        """The library's word for the last frame: at one frame a second, its times are numbers of frames."""
        from scenedetect import FrameTimecode

        return FrameTimecode(len(self.times) - 1, fps=Fraction(1))


class _Scaler:
    """Frames as BGR `[H, W, 3]` in the size for detection, as they are stored."""

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        # Each keeps what it has set up for frames of one kind.
        self.scale, self.convert = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: Any) -> Any:
        factor = max(1.0, max(frame.width, frame.height) / DETECTION_SIDE)
        width, height = (max(1, round(side / factor)) for side in (frame.width, frame.height))
        # In one step rounding would give colours to black, which detectors take for cuts.
        small = self.scale.reformat(frame, width, height, "yuv420p", interpolation="AREA")
        return self.convert.reformat(small, format="bgr24").to_ndarray()


# Reading


class Moment(NamedTuple):
    """A decoded frame and the seconds at which it begins; None stands for a frame that is damaged."""

    time: float
    frame: Any


@dataclass(frozen=True)
class Clock:
    """How a file counts time: seconds at its first frame, seconds a tick, and mean seconds from frame to frame."""

    origin: float
    time_base: Fraction
    interval: float

    @property
    def tolerance(self) -> float:
        """Seconds by which the times of frames may be rounded."""
        tick = float(self.time_base)
        return ROUNDING + (tick if tick <= self.interval / 2 else 0.0)

    def ticks(self, seconds: float) -> int:
        """`seconds` since the first frame, as the file counts."""
        return round((self.origin + seconds) / self.time_base)


@contextmanager
def _entered(source: Pathlike | bytes, begin: float) -> Iterator[tuple[Clock, Iterator[Moment]]]:
    """The moments of a file since its first frame, from `begin` or earlier on.

    Decoding, in one thread, starts at the last key frame before `begin` where the file can be entered there, else at
    the beginning.
    """
    for lead in SEEK_LEADS:
        with reading(source), open_file(source) as file:
            stream = video_stream(file, source)
            # With more, FFmpeg's H.264 decoder hides damage.
            stream.codec_context.thread_count = 1
            moments = _decoded(file, stream)
            first = next(moments, None)
            if first is None:
                raise ValueError(f"{name_of(source)} has no frames: choose another file")
            clock = Clock(first.time, Fraction(stream.time_base), interval_of(stream))
            moments = chain([first], moments)
            if lead is not None and begin - lead > SEEK_FROM and first.frame and is_timed(file, first.frame):
                entry = _seek(file, stream, first.time + begin - lead)
                if entry is None or not first.time <= entry[0].time <= first.time + begin:
                    continue
                moments = chain([entry[0]], entry[1])
            yield clock, (Moment(moment.time - first.time, moment.frame) for moment in moments)
            return


def _seek(file: Any, stream: Any, time: float) -> tuple[Moment, Iterator[Moment]] | None:
    """The key frame before `time`, on the file's clock, and what follows; None when the file cannot be entered."""
    import av

    with suppress(av.FFmpegError):
        file.seek(int(time / stream.time_base), stream=stream)
        moments = _decoded(file, stream)
        first = next(moments, None)
        if first and first.frame and first.frame.key_frame and is_timed(file, first.frame):
            return first, moments
    return None


def _decoded(file: Any, stream: Any) -> Iterator[Moment]:
    """All moments on the file's clock, as far as it can be read."""
    import av

    packets, interval, time = file.demux(stream), interval_of(stream), 0.0
    # Everything counts as damaged from a damaged frame until the next key frame, which must be at `since` or later:
    # decoders give frames later than they take packets.
    shown, damaged, since = False, False, None
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.FFmpegError:
            damaged, since = True, packet.pts
            # A recording may begin between two key frames.
            if shown:
                yield Moment(time, None)
                time += 0 if is_timed(file, packet) else interval
            continue
        for frame in frames:
            time, shown = frame.time if is_timed(file, frame) else time, True
            if frame.is_corrupt:
                damaged, since = True, frame.pts
            elif frame.key_frame and (since is None or frame.pts is None or frame.pts >= since):
                damaged, since = False, None
            yield Moment(time, None if damaged else frame)
            # For a frame without a time, which follows the one before.
            time += interval
