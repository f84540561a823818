"""Given frames: what the demo makes of a first frame, of two ends, of a beginning and of every n-th frame.

Clips are drawn in words that no training saw, frames of them are given, and the rest is compared with what was drawn by
a checker that looks at pixels. Beside it stand two that any model can do: known frames blended in as noise (the naive
way of inpainting, with the same weights), and the last given frame again and again; and what was drawn, for the best
that there is.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm
from videofactory_train.contact_sheet import contact_sheet
from videofactory_train.data.moving_shapes import HELD_OUT, MovingShapes, Scene, draw, path
from videofactory_train.data.shape_checker import HEIGHT, check, follow, of_frames

from videofactory_core import checkpoint
from videofactory_core.checkpoint import Model
from videofactory_core.long import generate_long

CLIP, EXTENSION = 16, 48
# How far from the given place the object may be one frame later, in heights: no drawn one moves further, and a pixel.
STEP = 0.09
# The largest step between neighbours, over the mean.
JUMP = 1.5
# The way that a continued object goes, over that of the drawn one, and how far it leaves its line, in heights.
WAY, ASIDE = (0.5, 1.5), 0.1
# Around given frames in pictures: no shape has this colour.
FRAME = (0.0, 0.8, 0.9)
# Of a place, in pixels of the demo.
PIXELS = 1.5

# The frames `[F, H, W, 3]` in 0..1 of a clip, of which some are given.
Way = Callable[[Scene, int, Mapping[int, Tensor]], Tensor]


@dataclass(frozen=True)
class Row:
    """What is asked for: frames of a clip, which are given, and how a result is judged."""

    name: str
    frames: int
    given: Sequence[int]
    judge: Callable[[Scene, Tensor, Tensor], float]
    # The bar, and whether it is a share that should be high or a distance that should be low.
    bar: float
    share: bool = True


def begins(scene: Scene, made: Tensor, drawn: Tensor) -> float:
    """Whether shape, colour and ground are those of the first frame, which stays in place, and the motion as asked."""
    centres = follow(of_frames(made))
    kept = (centres[1] - drawn[0]).norm() <= STEP
    return float(bool(kept) and check(of_frames(made)).agrees(scene.combination))


def largest_step(frames: Tensor) -> float:
    """Of an object, between neighbouring frames `[F, H, W, 3]` in 0..1, over the mean step.

    Without an object in every frame it is as bad as one single jump.
    """
    steps = follow(of_frames(frames)).diff(dim=0).norm(dim=1)
    return float((steps.max() / steps.mean()).nan_to_num(len(steps)))


def connects(scene: Scene, made: Tensor, drawn: Tensor) -> float:
    """How evenly the object goes: the largest step over the mean."""
    return largest_step(made)


def goes_on(scene: Scene, made: Tensor, drawn: Tensor) -> float:
    """Whether the object is kept to the end, and goes on along its line about as far as the drawn one."""
    verdict = check(of_frames(made))
    words = verdict.matches(scene.combination)
    centres = follow(of_frames(made))
    along = 0 if scene.direction in ("left", "right") else 1
    way, asked = (at[-1, along] - at[CLIP - 1, along] for at in (centres, drawn))
    aside = (centres[:, 1 - along] - drawn[0, 1 - along]).abs().max()
    kept = verdict.steady and words["colour"] and words["shape"] and words["background"]
    return float(kept and WAY[0] <= float(way / asked) <= WAY[1] and bool(aside <= ASIDE))


def misses(scene: Scene, made: Tensor, drawn: Tensor) -> float:
    """Mean distance from the drawn path in pixels, of frames not given; without an object it is the height."""
    distances = (follow(of_frames(made)) - drawn).norm(dim=1).nan_to_num(1.0)
    stride = (len(made) - 1) // (CLIP - 1)
    return float(distances[torch.arange(len(made)) % stride != 0].mean() * HEIGHT)


ROWS = (
    Row("first frame", CLIP, (0,), begins, 0.95),
    Row("first and last frame, largest step / mean", CLIP, (0, CLIP - 1), connects, JUMP, share=False),
    Row("48 frames more", CLIP + EXTENSION, range(CLIP), goes_on, 0.90),
    Row("every 2nd frame, error in pixels", 2 * CLIP - 1, range(0, 2 * CLIP, 2), misses, PIXELS, share=False),
    Row("every 4th frame, error in pixels", 4 * CLIP - 3, range(0, 4 * CLIP, 4), misses, PIXELS, share=False),
)


def by_model(model: Model, seed: int = 0) -> Way:
    """What the model makes, as `videofactory generate` would."""

    def make(scene: Scene, num_frames: int, given: Mapping[int, Tensor]) -> Tensor:
        return torch.cat([*generate_long(model, scene.caption, num_frames=num_frames, given=given, seed=seed)])

    return make


def repeat(scene: Scene, num_frames: int, given: Mapping[int, Tensor]) -> Tensor:
    """The last frame that was given, until the next is."""
    found: list[Tensor] = []
    for index in range(num_frames):
        found.append(given[index] if index in given else found[-1])
    return torch.stack(found)


def as_drawn(scene: Scene, num_frames: int, given: Mapping[int, Tensor]) -> Tensor:
    """The clip itself: what the judges say of that is the best there is."""
    return rearrange(draw(scene, num_frames), "C F H W -> F H W C") / 2 + 0.5


def measure(row: Row, ways: Mapping[str, Way], scenes: Sequence[Scene]) -> tuple[dict[str, list[float]], list[Tensor]]:
    """What the row's judge says of every scene, by way; and the clips of the first way."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    clips = []
    for scene in tqdm(scenes, row.name, unit="clip"):
        clip = as_drawn(scene, row.frames, {})
        given = {index: clip[index] for index in row.given}
        for number, (name, way) in enumerate(ways.items()):
            made = way(scene, row.frames, given)
            found[name].append(row.judge(scene, made, path(scene, row.frames)))
            if number == 0:
                clips.append(made)
    return found, clips


def framed(frames: Tensor, given: Sequence[int]) -> Tensor:
    """The clip, with a frame around those that are given."""
    inner = frames.new_tensor(FRAME).expand_as(frames).clone()
    inner[:, 2:-2, 2:-2] = frames[:, 2:-2, 2:-2]
    marked = frames.clone()
    marked[[*given]] = inner[[*given]]
    return marked


def report(path: Path = checkpoint.DEMO, folder: Path = Path("runs/given-report")) -> None:
    """36 combinations: print the table beside the bars and the two baselines, and write contact sheets."""
    model = checkpoint.load(path)
    if not model.config.given_frames:
        sys.exit(f"{path} never learned given frames: train it with train/recipes/demo-frames.toml")
    warnings.simplefilter("ignore")
    naive = replace(model, config=replace(model.config, given_frames=False))
    ways = {"here": by_model(model), "noised": by_model(naive), "repeated": repeat, "drawn": as_drawn}
    # One clip of every combination.
    shapes = MovingShapes(len(HELD_OUT), CLIP, seed=77, combinations=HELD_OUT)
    scenes = [shapes.scene(index) for index in range(len(shapes))]
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{len(scenes)} clips a row, torch {torch.__version__}\n")
    print(f"| given | {' | '.join(ways)} | bar |\n|{'---|' * (len(ways) + 2)}")
    below, examples = [], []
    for number, row in enumerate(ROWS):
        found, clips = measure(row, ways, scenes)
        means = {name: sum(values) / len(values) for name, values in found.items()}
        shown = [f"{value:.0%}" if row.share else f"{value:.2f}" for value in (*means.values(), row.bar)]
        print(f"| {row.name} | {' | '.join(shown)} |", flush=True)
        ours, *others, _ = means.values() if row.share else (-value for value in means.values())
        if ours < (row.bar if row.share else -row.bar) or ours <= max(others):
            below.append(row.name)
        sheet = contact_sheet([(scene.caption, clip) for scene, clip in zip(scenes, clips, strict=True)])
        example = 8 * number % len(scenes)
        label = f"{row.name.split(',')[0]}: {scenes[example].caption}"
        examples.append((label, framed(clips[example], row.given)))
        sheet.save(folder / f"{row.name.split(',')[0].replace(' ', '-')}.png", optimize=True)
    contact_sheet(examples, columns=1, shown=8).save(folder / "given-frames.png", optimize=True)
    print(f"\npictures: {folder}")
    if below:
        sys.exit(f"below the bar or a baseline: {', '.join(below)}")
