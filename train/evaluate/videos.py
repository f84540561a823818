"""The videos that are measured: which there are, which of their frames, and which had to be left out."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, overload

from torch import Tensor

from videofactory_core.video import Probe, probe, read_frames

from ..data.content import Place, content, digest_pieces
from ..data.sources import PICTURES, Clip, is_media, read_dataset, without_captions

Start = Literal["head", "centre", "random"]
Given = TypeVar("Given")
Made = TypeVar("Made")

# A last frame that is shown for less than this share of its time does not count.
LEAST_SHARE = 0.05
# Files that are named in a sentence; the report has all.
NAMED = 3


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are measured."""

    frames: int = 16
    # Frames a second; 0 takes the file's own frames, one after the other.
    fps: float = 0.0
    # The first frames, those in the middle, or from anywhere, as `seed` and the video's name say.
    start: Start = "head"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames: {self.frames} are too few to measure; use 1 or more")
        if not 0 <= self.fps <= 240:
            raise ValueError(f"fps: {self.fps} is no frame rate; use at most 240, or 0 for the file's own frames")
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is negative; use 0 or more")
        if self.start not in ("head", "centre", "random"):
            raise ValueError(f'start: {self.start!r} is not known; use "head", "centre" or "random"')


class Video(NamedTuple):
    """A video that is measured, or the part of one."""

    # The path relative to the folder.
    name: str
    # The file, or the shard that holds it.
    path: Path
    # "" when it is not known.
    caption: str
    # Seconds of the frames that are measured.
    times: tuple[float, ...]
    # Width and height in pixels, frames a second and number of frames of the whole file.
    size: tuple[int, int]
    fps: float
    frames: int
    place: Place | None = None

    def decode(self) -> Tensor:
        """The frames `[F, H, W, 3]`, uint8; ValueError when they cannot be had."""
        try:
            return read_frames(content(self.path, self.place), self.times)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error.strerror}): check the disk and who may") from error


@dataclass(frozen=True)
class Videos(Sequence[Tensor]):
    """Videos in the order of their names, as their frames `[F, H, W, 3]`, uint8, decoded when they are asked for."""

    folder: Path
    sampling: Sampling
    videos: tuple[Video, ...]
    # Names and reasons.
    left_out: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.videos)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        """ValueError when a file turns out to be damaged."""
        if isinstance(index, slice):
            return replace(self, videos=self.videos[index])
        return self.videos[index].decode()

    def decoded(self, workers: int = 1) -> Iterator[Tensor | str]:
        """The frames of every video in order, or why they cannot be had, decoded `workers` at a time, a few ahead."""

        def look(video: Video) -> Tensor | str:
            try:
                return video.decode()
            except ValueError as error:
                return _reason(error, video.path)

        return ahead(look, self.videos, workers)

    def without(self, broken: Iterable[tuple[int, str]]) -> Videos:
        """Without the videos of these numbers, which are left out for these reasons."""
        reasons = dict(broken)
        kept = tuple(video for number, video in enumerate(self.videos) if number not in reasons)
        gone = tuple((self.videos[number].name, reason) for number, reason in reasons.items())
        return replace(self, videos=kept, left_out=tuple(sorted((*self.left_out, *gone))))

    def describe(self) -> str:
        """How many videos there are of each size and length, and what was left out, in a sentence."""
        sizes = Counter(_size(video.size) for video in self.videos)
        lengths = Counter(video.frames for video in self.videos)
        rates = Counter(_rate(video.fps) for video in self.videos)
        long = f"{min(lengths)} to {max(lengths)}" if len(lengths) > 1 else f"{min(lengths, default=0)}"
        said = f"{len(self)} videos of {_counted(sizes)} pixels, {_counted(rates)} fps and {long} frames"
        if self.left_out:
            some = "; ".join(f"{name}: {reason}" for name, reason in self.left_out[:NAMED])
            more = f"; and {len(self.left_out) - NAMED} more" if len(self.left_out) > NAMED else ""
            said += f". Left out: {len(self.left_out)} ({some}{more})"
        return said

    def digest(self) -> str:
        """A name for what is measured, equal wherever the folder lies: BLAKE2b of pieces of the files, and the times.

        Raises ValueError when a file cannot be read.
        """
        return _hashed(_digest(video) for video in self.videos)

    def prompts(self) -> str:
        """A name for the captions, equal whichever video has which name: BLAKE2b of them."""
        return _hashed(video.caption.encode("utf-8", "surrogatepass") for video in self.videos)


def read_videos(path: Path, sampling: Sampling, workers: int = 1) -> Videos:
    """The videos of a folder or of whatever else `read_dataset` reads, or a single one; `workers` at a time.

    Those with too few frames for `sampling`, and those that cannot be read, are left out with the reason; pictures are
    passed over. Captions may be missing. Raises ValueError with the remedy when none is left.
    """
    if path.is_file() and is_media(path.name):
        beside = (clip for clip in read_dataset(path.parent) if clip.path.name == path.name)
        clips = [clip for clip in beside if clip.path.is_file() and clip.path.samefile(path)]
        clips = clips or [Clip(path.name, path, "")]
    else:
        clips = read_dataset(path)
    clips = [clip for clip in without_captions(clips) if clip.path.suffix.lower() not in PICTURES.split()]
    videos, left_out = [], []
    for clip, found in zip(clips, ahead(lambda clip: _look(clip, sampling), clips, workers), strict=True):
        if isinstance(found, str):
            left_out.append((clip.name, found))
        else:
            videos.append(found)
    if not clips:
        raise ValueError(f"{path} holds no videos: name a folder that does")
    if not videos:
        name, reason = left_out[0]
        raise ValueError(f"none of the {len(clips)} videos in {path} can be measured ({name}: {reason})")
    # Tables may have any order, and name a video for several of its parts.
    videos.sort(key=lambda video: (video.name, video.times, video.caption))
    return Videos(path, sampling, tuple(videos), tuple(sorted(left_out)))


def differences(generated: Videos, real: Videos) -> Iterator[str]:
    """In what two sets of videos differ that sways whatever compares them, in sentences with the counts."""
    what: list[tuple[str, Callable[[Video], str]]] = [("sizes", lambda video: _size(video.size))]
    if not generated.sampling.fps:
        what.append(("rates in frames a second", lambda video: _rate(video.fps)))
    for name, said in what:
        one, other = (Counter(map(said, videos.videos)) for videos in (generated, real))
        if set(one) != set(other) or len(one) > 1:
            yield f"the {name} differ: generated {_counted(one)}, real {_counted(other)}"


def ahead(function: Callable[[Given], Made], items: Iterable[Given], workers: int) -> Iterator[Made]:
    """What `function` makes of every item, in order, in `workers` threads, which never are more than a few ahead."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        waiting: deque[Future[Made]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _look(clip: Clip, sampling: Sampling) -> Video | str:
    """The video and its frames' times, or why it cannot be measured."""
    if clip.caption is None:
        return clip.note
    try:
        found = probe(content(clip.path, clip.place))
    except FileNotFoundError:
        return "it is not there: check the path"
    except OSError as error:
        return f"it cannot be read ({error.strerror}): check the disk and who may"
    except ValueError as error:
        return _reason(error, clip.path)
    times = _times(clip, found, sampling)
    if isinstance(times, str):
        return times
    size = (found.width, found.height)
    return Video(clip.name, clip.path, clip.caption, times, size, found.fps, found.frames, clip.place)


def _times(clip: Clip, found: Probe, sampling: Sampling) -> tuple[float, ...] | str:
    """When the frames that are measured are shown, or that there are too few."""
    rate = sampling.fps or found.fps
    end = min(found.duration, math.inf if clip.end is None else clip.end)
    available = 1 if found.frames == 1 else max(0, math.ceil((end - clip.start) * rate - LEAST_SHARE))
    spare = available - sampling.frames
    if spare < 0:
        at = f" at {sampling.fps:g} a second" if sampling.fps else ""
        return f"too short: it has {available} of {sampling.frames} frames{at}"
    if sampling.start == "random":
        place = hashlib.blake2b(f"{sampling.seed} {clip.name}".encode("utf-8", "replace"), digest_size=8).digest()
        first = int.from_bytes(place, "big") % (spare + 1)
    else:
        first = spare // 2 if sampling.start == "centre" else 0
    # The file's own frames are met in their middle, where neither rounded times nor a rounded rate miss them.
    offset = 0.0 if sampling.fps else 0.5
    if found.frames == 1:
        return (0.0,)
    return tuple(clip.start + (first + number + offset) / rate for number in range(sampling.frames))


def _reason(error: ValueError, path: Path) -> str:
    return str(error).replace(f"{path} ", "it ", 1).replace("the file in memory ", "it ", 1)


def _digest(video: Video) -> bytes:
    digest = hashlib.blake2b(repr(video.times).encode(), digest_size=20)
    try:
        digest_pieces(digest, video.path, video.place)
    except OSError as error:
        raise ValueError(f"{video.path} cannot be read ({error.strerror}): check the disk and who may") from error
    return digest.digest()


def _hashed(parts: Iterable[bytes]) -> str:
    """BLAKE2b of parts in any order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in sorted(parts):
        digest.update(hashlib.blake2b(part, digest_size=16).digest())
    return digest.hexdigest()


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _rate(fps: float) -> str:
    """Rounded, since a .gif's rate never is whole and film's is 24000 / 1001."""
    return f"{round(fps, 0 if fps >= 5 else 1):g}"


def _counted(counts: Counter[str]) -> str:
    """The most frequent, with their counts if there are several."""
    if len(counts) == 1:
        return next(iter(counts))
    # Equal counts in the order of their names, whatever was read first.
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    more = ["others"] if len(common) > NAMED else []
    return ", ".join([*(f"{word} ({count})" for word, count in common[:NAMED]), *more])
