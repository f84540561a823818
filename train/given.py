"""What is given to a clip, as frames: pictures, and videos whose own frames stay in their files."""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from videofactory_core.config import ModelConfig
from videofactory_core.fit import Fit, fit_frames
from videofactory_core.video import open_frames
from videofactory_core.video.file import open_file

# What brings frames back into the shape that they had before they were fitted.
BACK: dict[Fit, Fit] = {"crop": "stretch", "pad": "crop", "stretch": "stretch"}


@dataclass(frozen=True)
class Source:
    """A video that was looked through once; its frames stay in the file, but for a few at its ends."""

    path: Path
    width: int
    height: int
    # Mean rate, and whether the times keep to it.
    fps: float
    variable: bool
    # Seconds since the first frame.
    times: Sequence[float]
    # `[F, H, W, 3]`, uint8.
    head: Tensor
    tail: Tensor

    @property
    def end(self) -> float:
        """Seconds at which the last frame has been shown."""
        return self.times[-1] + 1 / self.fps

    @property
    def has_sound(self) -> bool:
        with open_file(self.path) as file:
            return bool(file.streams.audio)

    def frames(self) -> Iterator[Tensor]:
        """All frames `[H, W, 3]`, uint8, one after the other from the file."""
        with open_frames(self.path) as stream:
            for frame in stream:
                yield frame.pixels


def look(path: Path, keep: int) -> Source:
    """Read a video to its end, and keep `keep` frames, or all that there are, of its start and of its end.

    Raises what `open_frames` raises, for a damaged frame too.
    """
    times = array("d")
    head: list[Tensor] = []
    tail: deque[Tensor] = deque(maxlen=keep)
    with open_frames(path) as stream:
        for frame in tqdm(stream, f"reading {path.name}", stream.frames, unit="frame", leave=False):
            times.append(frame.time)
            tail.append(frame.pixels)
            head += [frame.pixels] if len(head) < keep else []
        return Source(
            path=path,
            width=stream.width,
            height=stream.height,
            fps=stream.fps,
            variable=stream.variable,
            times=times,
            head=torch.stack(head),
            tail=torch.stack(list(tail)),
        )


@dataclass(frozen=True)
class Screen:
    """Between the frames of a video, which may be of any size, and those that the model makes."""

    source: Source
    # Pixels of the model's frames, and how a video of another shape is fitted into them.
    width: int
    height: int
    fit: Fit

    @classmethod
    def of(cls, source: Source, config: ModelConfig, size: tuple[int, int] | None, fit: Fit) -> Screen:
        """Without a `size`, frames in the shape of the video, with the area that the model was trained on.

        ValueError for a size of another shape into which the video would have to be cut: nothing could be put back at
        its edges.
        """
        if size is None:
            return cls(source, *size_like(source.width, source.height, config), "stretch")
        width, height = size
        if fit == "crop" and fit_frames(source.head[:1], width, height)[1]:
            raise ValueError(
                f"{source.path} is {source.width}x{source.height} and would be cut to the shape of {width}x{height};"
                " leave --size out, or add --fit pad or --fit stretch"
            )
        return cls(source, width, height, fit)

    def to_model(self, frames: Tensor) -> Tensor:
        """Frames `[F, H, W, 3]` of the video, uint8, as the model's, float32 in 0..1."""
        return fit_frames(frames.float() / 255, self.width, self.height, self.fit)[0]

    def to_video(self, frame: Tensor) -> Tensor:
        """One frame `[H, W, 3]` of the model, or the same enlarged, in the size of the video."""
        return fit_frames(frame[None], self.source.width, self.source.height, BACK[self.fit])[0][0]


class Spread(Mapping[int, Tensor]):
    """The frames of a video at every n-th place of a clip, as the model's; read when they are asked for, in order."""

    def __init__(self, source: Source, every: int, screen: Screen) -> None:
        self.source, self.every, self.screen = source, every, screen
        self.places = range(0, len(source.times) * every, every)
        self.number, self.frames = -1, source.frames()

    def __getitem__(self, index: int) -> Tensor:
        if index not in self.places:
            raise KeyError(index)
        number = self.places.index(index)
        if number <= self.number:
            self.number, self.frames = -1, self.source.frames()
        frame = next(islice(self.frames, number - self.number - 1, None))
        self.number = number
        return self.screen.to_model(frame[None])[0]

    def __contains__(self, index: object) -> bool:
        return index in self.places

    def __iter__(self) -> Iterator[int]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def read_picture(path: Path) -> Tensor:
    """A picture as `[H, W, 1 to 4]` in 0..1 (float32), upright, with its transparency where it has some.

    Of a picture that moves it is the first. Raises ValueError for what is none, FileNotFoundError for a missing file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: check the name")
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode == "F":
                raise ValueError("nothing says what its floating-point numbers mean")
            deep = picture.mode.startswith("I")
            if not deep:
                picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
            pixels = np.asarray(picture, dtype=np.float32)
    # A broken file is a SyntaxError for some formats.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): choose or make another file") from error
    # Grey of 16 bits, or colours of 8.
    return torch.from_numpy(pixels[..., None] / 65535 if deep else pixels / 255)


def size_like(width: int, height: int, config: ModelConfig) -> tuple[int, int]:
    """The size of this shape that the model can make, with about the area that it was trained on."""
    cell = config.autoencoder.downscale
    scale = math.sqrt(config.width * config.height / (width * height)) / cell
    return max(1, round(width * scale)) * cell, max(1, round(height * scale)) * cell
