"""Says by plain image processing what a clip of a moving shape shows, and whether its caption asked for that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor
from videofactory_train.data.moving_shapes import (
    AREA,
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MIN_TRAVEL,
    SHAPES,
    Combination,
    signed_distance,
)

# Clips are judged at one height in pixels, so that the thresholds below mean the same at every resolution.
HEIGHT = 72
RIM = 3

# Lengths are in picture heights, areas in their squares, colour differences in 0..1.
MIN_AREA = 0.03
MIN_CONTRAST = 0.2
MIN_CHROMA = 0.2
# Half the difference between grey and its neighbours: a background beyond it is none of the three.
MAX_BACKGROUND_ERROR = 0.25
# Between the overlap of a triangle upside down with a circle, 0.69, and that of a square with a circle, 0.84.
MIN_OVERLAP = 0.75
MIN_NET_TRAVEL = MIN_TRAVEL / 2
MAX_JUMP = 0.15
AREA_RANGE = (0.5, 1.6)
MAX_RIVAL = 0.5


@dataclass(frozen=True)
class Verdict:
    """What a clip shows; None where it shows none of the words.

    `steady`: one object is there in every frame, keeps its area and does not jump.
    """

    colour: str | None
    shape: str | None
    direction: str | None
    background: str | None
    steady: bool

    def matches(self, combination: Combination) -> dict[str, bool]:
        """For each of the four attributes, whether the clip shows the word that `combination` asks for."""
        return {name: getattr(self, name) == word for name, word in combination._asdict().items()}

    def agrees(self, combination: Combination) -> bool:
        """Whether the clip shows all four words, steadily."""
        return self.steady and all(self.matches(combination).values())


def of_frames(frames: Tensor) -> Tensor:
    """Frames `[F, H, W, 3]` in 0..1, as files hold them, as the clip `[3, F, H, W]` in -1..1 that is judged here."""
    return rearrange(frames, "F H W C -> C F H W") * 2 - 1


def check(video: Tensor) -> Verdict:
    """Judge a clip `[3, F, H, W]` in -1..1 of any size and length.

    Colour, shape and background are what more than half of the frames show; the direction is the axis along which
    the object's centre moves at least twice as far as along the other. Raises `ValueError` for another layout.
    """
    frames = shown(video)
    behind = border_colour(frames)
    foreground = find_foreground(frames, behind)
    mask = find_object(foreground)
    areas, centres = area(mask), centre(mask)
    seen = areas > 0
    return Verdict(
        colour=majority([name_colour(rgb) for rgb in core_colour(frames, mask)]),
        shape=majority(name_shapes(mask)),
        direction=name_direction(centres, seen),
        background=majority([name_background(rgb) for rgb in behind]),
        steady=bool(seen.all()) and is_steady(areas, area(largest_component(foreground & ~mask)), centres),
    )


def follow(video: Tensor) -> Tensor:
    """Where the object's centre is in every frame of a clip `[3, F, H, W]` in -1..1: `[F, 2]` in picture heights.

    x and y are nan where there is no object. Raises `ValueError` for another layout.
    """
    frames = shown(video)
    mask = find_object(find_foreground(frames, border_colour(frames)))
    return centre(mask).masked_fill(area(mask)[:, None] == 0, torch.nan)


def shown(video: Tensor) -> Tensor:
    """A clip `[3, F, H, W]` in -1..1 as frames `[F, 3, H, W]` in 0..1 of the height at which clips are judged."""
    if video.ndim != 4 or video.shape[0] != 3 or video.numel() == 0:
        raise ValueError(
            f"Give the clip to check as a tensor [3, F, H, W] of one frame or more, not {list(video.shape)}."
        )
    width = max(1, round(video.shape[3] * HEIGHT / video.shape[2]))
    frames = rearrange(video.detach().float().cpu(), "C F H W -> F C H W").clamp(-1, 1).add(1).div(2)
    return F.interpolate(frames, (HEIGHT, width), mode="bilinear", antialias=True)


def summarise(results: Iterable[tuple[Combination, Verdict]]) -> dict[str, float]:
    """The share of clips, 0..1, with the right colour, shape, direction and background, steady ones, and `all` five.

    Raises `ValueError` where there are no results.
    """
    rows = [
        {**verdict.matches(combination), "steady": verdict.steady, "all": verdict.agrees(combination)}
        for combination, verdict in results
    ]
    if not rows:
        raise ValueError("There are no results to summarise; check at least one clip first.")
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def majority(words: Sequence[str | None]) -> str | None:
    """The word that more than half of the frames show."""
    word, count = Counter(words).most_common(1)[0]
    return word if 2 * count > len(words) else None


def border_colour(frames: Tensor) -> Tensor:
    """The median colour `[F, 3]` of the rim of `frames [F, 3, H, W]`, of which an object covers a small part."""
    rim = torch.ones(frames.shape[2:], dtype=torch.bool)
    rim[RIM:-RIM, RIM:-RIM] = False
    return frames[:, :, rim].median(dim=2).values


def find_foreground(frames: Tensor, behind: Tensor) -> Tensor:
    """Where `frames [F, 3, H, W]` differ from `behind [F, 3]` by half of what the object does: `[F, H, W]`, boolean.

    The object's contrast is that of the smallest area that counts as an object, in the median frame.
    """
    difference = (frames - behind[:, :, None, None]).square().sum(dim=1).sqrt()
    rank = min(round(MIN_AREA * HEIGHT**2), difference[0].numel())
    contrast = difference.flatten(1).topk(rank).values[:, -1].median()
    return difference > max(contrast.item(), MIN_CONTRAST) / 2


def find_object(foreground: Tensor) -> Tensor:
    """The largest component `[F, H, W]` of each frame's foreground; empty where that is too small for an object."""
    mask = largest_component(foreground)
    return mask & (area(mask) >= MIN_AREA)[:, None, None]


def largest_component(foreground: Tensor) -> Tensor:
    """The largest group of touching pixels in each frame of a boolean mask `[F, H, W]`, as such a mask."""
    # Every pixel starts with a label of its own, and takes the highest in its row and column until none changes.
    num_pixels = foreground[0].numel()
    labels = torch.arange(1, num_pixels + 1).view(foreground.shape[1:]) * foreground
    while True:
        before = labels
        for axis in (1, 2):
            labels = highest_in_run(labels, foreground, axis)
        if torch.equal(labels, before):
            break
    flat = labels.flatten(1)
    sizes = torch.zeros(len(flat), num_pixels + 1, dtype=torch.long).scatter_add_(1, flat, torch.ones_like(flat))
    sizes[:, 0] = 0
    return foreground & (labels == sizes.argmax(dim=1)[:, None, None])


def highest_in_run(labels: Tensor, foreground: Tensor, axis: int) -> Tensor:
    """`labels [F, H, W]` with each replaced by the highest in its unbroken run of foreground along `axis`."""
    for _ in range(2):
        # Labels rise by more than their range at each background pixel, so that a running maximum starts afresh there.
        rise = (~foreground).cumsum(axis) * (labels.max() + 1)
        labels = ((labels + rise).cummax(axis).values - rise) * foreground
        labels, foreground = labels.flip(axis), foreground.flip(axis)
    return labels


def area(mask: Tensor) -> Tensor:
    """The area `[F]` of a mask `[F, H, W]`."""
    return reduce(mask.float(), "F H W -> F", "sum") / HEIGHT**2


def grid(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels' centres `x [W]` and `y [H, 1]`."""
    return (torch.arange(mask.shape[2]) + 0.5) / HEIGHT, ((torch.arange(mask.shape[1]) + 0.5) / HEIGHT)[:, None]


def centre(mask: Tensor) -> Tensor:
    """The centre of mass `[F, 2]`, x and y, of a mask `[F, H, W]`; 0 where it is empty."""
    x, y = grid(mask)
    count = reduce(mask.float(), "F H W -> F", "sum").clamp(min=1)
    return torch.stack([reduce(mask * at, "F H W -> F", "sum") / count for at in (x, y)], dim=1)


def core_colour(frames: Tensor, mask: Tensor) -> Tensor:
    """The mean colour `[F, 3]` of the object without its edge; black where there is none."""
    core = 1 - F.max_pool2d(1 - mask.float(), 5, stride=1, padding=2)
    total = reduce(frames * core[:, None], "F C H W -> F C", "sum")
    return total / reduce(core, "F H W -> F 1", "sum").clamp(min=1)


def hue(rgb: Tensor) -> Tensor:
    """The hue angle of `rgb [..., 3]` in radians."""
    red, green, blue = rgb.unbind(-1)
    return torch.atan2(3**0.5 * (green - blue), 2 * red - green - blue)


def name_colour(rgb: Tensor) -> str | None:
    """The colour of nearest hue, which blur, fading and shading leave alone; None for greys."""
    if not rgb.max() - rgb.min() >= MIN_CHROMA:
        return None
    apart = 1 - torch.cos(hue(torch.tensor(list(COLOURS.values())) / 255) - hue(rgb))
    return list(COLOURS)[int(apart.argmin())]


def name_background(rgb: Tensor) -> str | None:
    """The background that `rgb [3]` is, within a quarter of full scale in every channel."""
    error = (torch.tensor(list(BACKGROUNDS.values())) / 255 - rgb).abs().amax(dim=1)
    best = int(error.argmin())
    return list(BACKGROUNDS)[best] if error[best] <= MAX_BACKGROUND_ERROR else None


def name_shapes(mask: Tensor) -> list[str | None]:
    """For each frame the shape that, drawn with the object's centre and area, overlaps it best.

    The overlap is intersection over union; None where it is poor for all three shapes.
    Area and centre, unlike the bounding box, hardly move when blur rounds the corners.
    """
    x, y = (at[None] - at_centre[:, None, None] for at, at_centre in zip(grid(mask), centre(mask).T, strict=True))
    overlaps = []
    for shape in SHAPES:
        size = (area(mask) / AREA[shape]).sqrt()[:, None, None]
        ideal = signed_distance(shape, size, x, y) <= 0
        overlaps.append(area(mask & ideal) / area(mask | ideal).clamp(min=MIN_AREA))
    best = torch.stack(overlaps).max(dim=0)
    return [
        SHAPES[index] if overlap >= MIN_OVERLAP else None
        for overlap, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def name_direction(centres: Tensor, seen: Tensor) -> str | None:
    """The direction of the straight line fitted to `centres [F, 2]` over time, where `seen [F]`."""
    if seen.sum() < 2:
        return None
    time = torch.linspace(0, 1, len(centres))[seen]
    time = time - time.mean()
    travel = (time[:, None] * centres[seen]).sum(dim=0) / time.square().sum()
    along = int(travel.abs().argmax())
    if travel[along].abs() < max(MIN_NET_TRAVEL, 2 * travel[1 - along].abs().item()):
        return None
    step = tuple(int(travel[axis].sign()) if axis == along else 0 for axis in (0, 1))
    return next(word for word, unit in DIRECTIONS.items() if unit == step)


def is_steady(areas: Tensor, rivals: Tensor, centres: Tensor) -> bool:
    """Whether the object keeps its area `[F]`, which `rivals [F]` do not come near, and its centre never jumps."""
    low, high = (factor * areas.median() for factor in AREA_RANGE)
    steps = centres.diff(dim=0).norm(dim=1)
    jumps = len(steps) > 0 and bool((steps > steps.median() + MAX_JUMP).any())
    return bool(((areas >= low) & (areas <= high) & (rivals <= MAX_RIVAL * areas)).all()) and not jumps
