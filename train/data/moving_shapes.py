"""Clips of one coloured shape that moves in a straight line, each with the caption that says so.

Lengths are in picture heights: x runs from 0 to width / height to the right, y from 0 to 1 downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 45),
    "green": (40, 170, 60),
    "blue": (40, 80, 225),
    "yellow": (250, 230, 30),
    "purple": (160, 45, 190),
    "orange": (240, 125, 20),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128)}

MIN_SIZE, MAX_SIZE = 0.17, 0.28
MIN_TRAVEL = 0.2
# Keeps the anti-aliased edge inside the picture too.
MARGIN = 0.025

# Half the side of a square, and the radius of a triangle's inscribed circle, for a circle of radius 1.
# The square has the circle's area; the triangle four fifths of it, so that it does not fill the whole height.
SQUARE_HALF_SIDE = math.sqrt(math.pi) / 2
TRIANGLE_INRADIUS = 0.7

# The area of a shape of size 1.
AREA = {"circle": math.pi, "square": 4 * SQUARE_HALF_SIDE**2, "triangle": 3 * math.sqrt(3) * TRIANGLE_INRADIUS**2}

# How far a shape of size 1 reaches from its centre to the left, right, up and down.
REACH = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (SQUARE_HALF_SIDE,) * 4,
    "triangle": (math.sqrt(3) * TRIANGLE_INRADIUS,) * 2 + (2 * TRIANGLE_INRADIUS, TRIANGLE_INRADIUS),
}


class Combination(NamedTuple):
    """The four words in which captions differ."""

    colour: str
    shape: str
    direction: str
    background: str


def caption(combination: Combination) -> str:
    """The sentence that describes a clip."""
    colour, shape, direction, background = combination
    return f"a {colour} {shape} moving {direction} on a {background} background"


def is_held_out(colour: int, shape: int, direction: int, background: int) -> bool:
    """Whether the combination with these word indices is kept from training: `c + 2 s + 3 d + b = 0 (mod 6)`.

    One combination in six; every word is held out equally often, and every two or three words meet in training.
    """
    return (colour + 2 * shape + 3 * direction + background) % 6 == 0


COMBINATIONS = tuple(Combination(*words) for words in product(COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS))
HELD_OUT = tuple(
    Combination(c, s, d, b)
    for (i, c), (j, s), (k, d), (l, b) in product(*map(enumerate, (COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS)))
    if is_held_out(i, j, k, l)
)
TRAINING = tuple(combination for combination in COMBINATIONS if combination not in HELD_OUT)


@dataclass(frozen=True)
class Scene:
    """One clip, whatever its resolution and frame rate; lengths in picture heights.

    The shape's centre goes at constant speed from `(start_x, start_y)` in the first frame to `travel` further along
    `direction` in the last, or with `returns` in the middle, and back. `size` is the radius of a circle; squares and
    triangles look as large as that circle.
    """

    colour: str
    shape: str
    direction: str
    background: str
    size: float
    start_x: float
    start_y: float
    travel: float
    returns: bool = False

    @property
    def combination(self) -> Combination:
        return Combination(self.colour, self.shape, self.direction, self.background)

    @property
    def caption(self) -> str:
        return caption(self.combination)


def random_scene(combination: Combination, generator: torch.Generator, aspect: float = 16 / 9) -> Scene:
    """A scene of random size, place and speed whose shape is wholly inside a picture of `aspect` width / height.

    Sizes are 0.17 to 0.28 heights; the shape covers 0.3 to 0.7 of the room that it has along its direction, and 0.2
    heights at least. Raises `ValueError` for pictures too narrow for that.
    """
    if aspect < 1:
        raise ValueError(
            f"Moving shapes need a picture at least as wide as it is high, not one of aspect {aspect:.3g}."
        )
    along, size, share, across = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    size = MIN_SIZE + (MAX_SIZE - MIN_SIZE) * size
    left, right, up, down = (size * reach + MARGIN for reach in REACH[combination.shape])
    free_x, free_y = aspect - left - right, 1 - up - down
    step_x, step_y = DIRECTIONS[combination.direction]
    room = free_x if step_x else free_y
    travel = max(MIN_TRAVEL, (0.3 + 0.4 * share) * room)
    # The first position along the direction is random among those that leave `travel` ahead.
    start = along * (room - travel)
    if step_x + step_y < 0:
        start = room - start
    x, y = (start, across * free_y) if step_x else (across * free_x, start)
    return Scene(*combination, size=size, start_x=left + x, start_y=up + y, travel=travel)


def signed_distance(shape: str, size: float | Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How far `(x, y)`, relative to the shape's centre, is from its straight or round edges; negative inside.

    `size`, `x` and `y` broadcast; beyond a corner the distance is that to the nearer edge's line.
    """
    if shape == "circle":
        return (x.square() + y.square()).sqrt_().sub_(size)
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()).sub_(SQUARE_HALF_SIDE * size)
    assert shape == "triangle", shape
    return torch.maximum(math.sqrt(3) / 2 * x.abs() - y / 2, y).sub_(TRIANGLE_INRADIUS * size)


def path(scene: Scene, num_frames: int = 16) -> Tensor:
    """Where the shape's centre is in every frame: `[F, 2]`, x and y."""
    step_x, step_y = DIRECTIONS[scene.direction]
    moved = torch.linspace(0, scene.travel, num_frames)
    if scene.returns:
        moved = scene.travel - (scene.travel - 2 * moved).abs()
    return torch.stack([scene.start_x + step_x * moved, scene.start_y + step_y * moved], dim=1)


def object_mask(scene: Scene, num_frames: int = 16, height: int = 72, width: int = 128) -> Tensor:
    """How much of every pixel the shape covers: `[F, H, W]` in 0..1, with an anti-aliased edge one pixel wide."""
    centre_x, centre_y = path(scene, num_frames).unbind(1)
    x = ((torch.arange(width) + 0.5) / height - centre_x[:, None])[:, None, :]
    y = ((torch.arange(height) + 0.5) / height - centre_y[:, None])[:, :, None]
    return signed_distance(scene.shape, scene.size, x, y).mul_(-height).add_(0.5).clamp_(0, 1)


def paint(scene: Scene, mask: Tensor) -> Tensor:
    """The clip `[3, F, H, W]` in -1..1 of a scene's colours, where `mask [F, H, W]` says how much the shape covers."""
    colour, background = (
        torch.tensor(rgb, dtype=mask.dtype).div(127.5).sub(1).view(3, 1, 1, 1)
        for rgb in (COLOURS[scene.colour], BACKGROUNDS[scene.background])
    )
    return torch.addcmul(background, colour - background, mask)


def draw(scene: Scene, num_frames: int = 16, height: int = 72, width: int = 128) -> Tensor:
    """The scene's clip, `[3, F, H, W]` float32 in -1..1."""
    return paint(scene, object_mask(scene, num_frames, height, width))


class Clip(TypedDict):
    """`video [3, F, H, W]` in -1..1, its caption, and `mask [F, H, W]` in 0..1, the part of a pixel the shape fills."""

    video: Tensor
    caption: str
    mask: Tensor


class MovingShapes(Dataset[Clip]):
    """`num_clips` clips drawn as they are asked for; clip `i` depends on `seed` and `i` only.

    Each lap of `len(combinations)` clips shows every combination once, in an order of its own. Asking for a clip raises
    `ValueError` where the picture is higher than wide.
    """

    def __init__(
        self,
        num_clips: int,
        num_frames: int = 16,
        height: int = 72,
        width: int = 128,
        seed: int = 0,
        combinations: Sequence[Combination] = TRAINING,
        returns: bool = False,
    ) -> None:
        self.num_clips = num_clips
        self.num_frames = num_frames
        self.height = height
        self.width = width
        self.seed = seed
        self.combinations = tuple(combinations)
        self.returns = returns

    def __len__(self) -> int:
        return self.num_clips

    def scene(self, index: int) -> Scene:
        """What clip `index` shows."""
        lap, place = divmod(index, len(self.combinations))
        order = torch.randperm(len(self.combinations), generator=generator_for(self.seed, lap, stream=0))
        combination = self.combinations[int(order[place])]
        scene = random_scene(combination, generator_for(self.seed, index, stream=1), self.width / self.height)
        return replace(scene, returns=self.returns)

    def __getitem__(self, index: int) -> Clip:
        if not 0 <= index < self.num_clips:
            raise IndexError(f"Clip {index} is not one of the {self.num_clips} clips.")
        scene = self.scene(index)
        mask = object_mask(scene, self.num_frames, self.height, self.width)
        return Clip(video=paint(scene, mask), caption=scene.caption, mask=mask)


def generator_for(seed: int, index: int, stream: int) -> torch.Generator:
    """A generator of its own for every `seed`, `index` and `stream`."""
    # torch's CPU generator keeps only the low 32 bits of a seed, so the three are hashed into them.
    state = np.random.SeedSequence((seed, index, stream)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))
