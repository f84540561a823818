"""What is cut out of a dataset's clips: windows in time, sizes in space, and the frames themselves."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor
from tqdm import tqdm

from videofactory_core.config import ModelConfig
from videofactory_core.video import Probe, probe, read_frames

from .content import content, digest_pieces
from .sources import Clip

Extraction = Literal["head", "chunk", "slide", "uniform"]
Crop = Literal["bucket", "16:9"]

# What `decode` makes of a file; to be raised with every change of its numbers, for then caches are stale.
DECODING = 1
# A last frame that is shown for less than this share of its time does not count.
LEAST_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One `[[datasets]]` table of a recipe; see `train/recipes/lora-12gb.toml` for the meaning of every key."""

    path: str
    # Share of the batches, against the weights of the other datasets.
    weight: float = 1.0
    # How often an epoch shows each sample.
    num_repeats: int = 1
    # Width and height, and frames, of the buckets; by default those of the model. Pictures need a bucket of 1 frame.
    sizes: tuple[tuple[int, int], ...] = ()
    frames: tuple[int, ...] = ()
    # Rate to which clips are resampled; 0 is the model's.
    fps: float = 0.0
    # The first window of a clip, all that follow each other, one every `frame_stride` frames, or `frame_sample`
    # spread over the clip.
    frame_extraction: Extraction = "head"
    frame_stride: int = 1
    frame_sample: int = 1
    # Cut to the shape of the bucket at once, or to 16:9 first.
    crop: Crop = "bucket"
    caption_extension: str = ".txt"

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path: it is empty; name a folder, a table or a shard")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"weight: {self.weight} is no share; use a number above 0, or remove the dataset")
        if not 0 <= self.fps <= 240:
            raise ValueError(f"fps: {self.fps} is no frame rate; use at most 240, or 0 for the model's")
        for key in ("num_repeats", "frame_stride", "frame_sample"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: {getattr(self, key)} is too few; use 1 or more")
        for width, height in self.sizes:
            if width < 1 or height < 1:
                raise ValueError(f"sizes: {width}x{height} is no picture; write [width, height] in pixels")
        for frames in self.frames:
            if frames < 1:
                raise ValueError(f"frames: a bucket of {frames} is empty; use 1 for pictures or more for clips")
        for key, kind in (("frame_stride", "slide"), ("frame_sample", "uniform")):
            if getattr(self, key) > 1 and self.frame_extraction != kind:
                raise ValueError(f'{key}: it needs frame_extraction = "{kind}", not "{self.frame_extraction}"')
        if not self.caption_extension.startswith(".") or len(self.caption_extension) < 2:
            raise ValueError(f'caption_extension: {self.caption_extension!r} is no ending; write ".txt"')


class Bucket(NamedTuple):
    """The shape that a batch of samples has."""

    frames: int
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.frames} x {self.width}x{self.height}"


@dataclass(frozen=True)
class Sample:
    """One thing to train on: the frames of `clip` shown at `times` seconds, cut and scaled to `bucket`."""

    clip: Clip
    times: tuple[float, ...]
    bucket: Bucket
    crop: Crop


@dataclass(frozen=True)
class Planned:
    """A clip and what it gives to train on: at least one of `samples`, or none for `reason`."""

    clip: Clip
    # What is known of the file; None where it was not looked at or cannot be read.
    probe: Probe | None = None
    # Frames that the clip has at the rate to which it is resampled.
    available: int = 0
    samples: tuple[Sample, ...] = ()
    reason: str = ""
    note: str = ""

    @property
    def used(self) -> int:
        """How many of the available frames occur in a sample."""
        return len({time for sample in self.samples for time in sample.times})


def plan(clips: Sequence[Clip], config: DatasetConfig, model: ModelConfig, workers: int = 1) -> list[Planned]:
    """Look into every file, `workers` at a time, and choose bucket and windows of each clip, in the order of `clips`.

    The bucket has the size whose shape is nearest (by the logarithm of width / height) and the most frames that the
    clip fills at the rate; pictures go to that of one frame, clips only where there is no other.

    Raises ValueError when the model cannot take a size.
    """
    sizes = config.sizes or ((model.width, model.height),)
    cell = model.autoencoder.downscale
    for width, height in sizes:
        if width % cell or height % cell:
            fitting = f"{max(cell, width // cell * cell)}x{max(cell, height // cell * cell)}"
            raise ValueError(f"sizes: {width}x{height} does not divide into cells of {cell} pixels; use {fitting}")
    frames, fps = config.frames or (model.frames,), config.fps or model.fps
    probes = _probes(clips, workers)
    return [_plan(clip, probes.get((clip.path, clip.place), ""), config, sizes, frames, fps) for clip in clips]


def samples_of(
    clips: Sequence[Clip], config: DatasetConfig, model: ModelConfig, workers: int, log: Callable[[str], None]
) -> list[Sample]:
    """What `plan` can cut out of the clips; what it cannot is logged with its reason."""
    planned = plan(clips, config, model, workers)
    for clip in planned:
        if clip.reason:
            log(f"left out {clip.clip.name}: {clip.reason}")
        elif clip.note:
            log(f"{clip.clip.name}: {clip.note}")
    found = [sample for clip in planned for sample in clip.samples]
    left_out = sum(1 for clip in planned if clip.reason)
    log(f"{config.path}: {len(found)} samples of {len(planned) - left_out} clips, {left_out} left out")
    return found


def decode(sample: Sample) -> Tensor:
    """The sample's frames `[F, H, W, 3]` (uint8 RGB); ValueError with one sentence when they cannot be had."""
    crop = 16 / 9 if sample.crop == "16:9" else None
    try:
        return read_frames(content(sample.clip.path, sample.clip.place), sample.times, sample.bucket[1:], crop)
    except (ValueError, OSError) as error:
        raise ValueError(f"{sample.clip.name} {_reason(error, sample.clip)}") from error


def hold_out(parts: Sequence[list[Sample]], count: int, seed: int) -> tuple[list[list[Sample]], list[Sample]]:
    """`parts` without `count` clips, and the samples of those; which they are depends on names and `seed` alone."""
    names = {sample.clip.name for part in parts for sample in part}
    if len(names) <= count:
        raise ValueError(
            f"validation holds out {count} of {len(names)} clips, which leaves none to train on; lower its clips, or "
            "name a path for it"
        )
    chosen = set(sorted(names, key=lambda name: hashlib.blake2b(f"{seed} {name}".encode()).digest())[:count])
    left = [[sample for sample in part if sample.clip.name not in chosen] for part in parts]
    return left, [sample for part in parts for sample in part if sample.clip.name in chosen]


def fingerprint(sample: Sample) -> str:
    """A name for the sample's frames, equal wherever the file lies: BLAKE2b of what they depend on.

    Of the file or member these are its length and three pieces of 64 KiB. Raises OSError when it cannot be read.
    """
    clip = sample.clip
    digest = hashlib.blake2b(digest_size=20)
    length = digest_pieces(digest, clip.path, clip.place)
    digest.update(struct.pack(f"<5q{len(sample.times)}d", DECODING, length, *sample.bucket, *sample.times))
    digest.update(sample.crop.encode())
    return digest.hexdigest()


def _reason(error: Exception, clip: Clip) -> str:
    """What is wrong with a clip's file, to be read behind its name."""
    if isinstance(error, FileNotFoundError):
        return "is not there: check the path"
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror}): check the disk and who may"
    return str(error).removeprefix(f"{clip.path} ").removeprefix("the file in memory ")


def _probes(clips: Iterable[Clip], workers: int) -> dict[tuple[Path, tuple[int, int] | None], Probe | str]:
    """What the files of captioned clips are, or why that is unknown; each file is looked at once."""
    files = {(clip.path, clip.place): clip for clip in clips if clip.caption is not None}

    def look(clip: Clip) -> Probe | str:
        try:
            return probe(content(clip.path, clip.place))
        except (ValueError, OSError) as error:
            return _reason(error, clip)

    with ThreadPool(max(1, workers)) as pool:
        found = tqdm(pool.imap(look, files.values()), "look at clips", len(files), unit="clip", disable=None)
        return dict(zip(files, found, strict=True))


def _plan(
    clip: Clip,
    found: Probe | str,
    config: DatasetConfig,
    sizes: Sequence[tuple[int, int]],
    frames: Sequence[int],
    fps: float,
) -> Planned:
    if clip.caption is None:
        return Planned(clip, reason=clip.note or "no caption")
    if isinstance(found, str):
        return Planned(clip, reason=found, note=clip.note)
    notes = [clip.note] if clip.note else []
    if found.frames == 1:
        available, fitting = 1, [1] if 1 in frames else []
        reason = "a picture needs a bucket of one frame: add 1 to frames"
    else:
        end = min(found.duration, math.inf if clip.end is None else clip.end)
        available = max(0, math.ceil((end - clip.start) * fps - LEAST_SHARE))
        lengths = [length for length in frames if length > 1] or [1]
        fitting = [length for length in lengths if length <= available]
        reason = (
            f"too short: at {fps:g} a second it has {available} of the {min(lengths)} frames of the smallest bucket"
        )
        if clip.end is not None and clip.end > found.duration + 1 / found.fps:
            notes.append(f"the file ends at {found.duration:.2f} s")
        if found.fps * 1.01 < fps:
            notes.append(f"frames repeat: the file has {found.fps:.4g} a second")
    if not fitting:
        return Planned(clip, found, available, reason=reason, note="; ".join(notes))
    size, scale = _nearest(found.width, found.height, sizes, config.crop)
    if scale > 1.01:
        notes.append(f"enlarged {scale:.1f} times")
    kept = size[0] / scale * (size[1] / scale) / (found.width * found.height)
    if kept < 0.5:
        notes.append(f"{1 - kept:.0%} of the picture is cut off")
    bucket = Bucket(max(fitting), *size)
    starts = _starts(available, bucket.frames, config)
    if config.frame_extraction == "uniform" and len(starts) < config.frame_sample and found.frames > 1:
        notes.append(f"only {len(starts)} different windows")
    first = clip.start if found.frames > 1 else 0.0
    samples = tuple(
        Sample(clip, tuple(first + index / fps for index in range(start, start + bucket.frames)), bucket, config.crop)
        for start in starts
    )
    return Planned(clip, found, available, samples, note="; ".join(notes))


def _nearest(width: int, height: int, sizes: Sequence[tuple[int, int]], crop: Crop) -> tuple[tuple[int, int], float]:
    """The size of the nearest shape, and how many times larger than the picture it is.

    Of equal shapes it is the largest that needs no more pixels than there are, else the smallest.
    """
    if crop == "16:9":
        cut = min(width, height * 16 / 9), min(height, width * 9 / 16)
    else:
        cut = float(width), float(height)

    def rank(size: tuple[int, int]) -> tuple[float, bool, float]:
        scale = max(size[0] / cut[0], size[1] / cut[1])
        distance = abs(math.log(size[0] / size[1]) - math.log(cut[0] / cut[1]))
        return round(distance, 6), scale > 1, abs(math.log(scale))

    best = min(sizes, key=rank)
    return best, max(best[0] / cut[0], best[1] / cut[1])


def _starts(available: int, length: int, config: DatasetConfig) -> Sequence[int]:
    """The first frames of the windows of `length` frames among those `available`."""
    last = available - length
    if config.frame_extraction == "head":
        return range(1)
    if config.frame_extraction == "uniform":
        gaps = max(1, config.frame_sample - 1)
        return sorted({round(number * last / gaps) for number in range(config.frame_sample)})
    return range(0, last + 1, length if config.frame_extraction == "chunk" else config.frame_stride)
