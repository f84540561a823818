"""Every workflow of the pack on the real server, and what the clip that leaves it shows."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from comfy_server import PACK, Host
from torch import Tensor
from videofactory_train.data.shape_checker import Verdict, check, of_frames

from benchmarks.given import JUMP, largest_step
from videofactory_core.video import read_video

API = PACK / "workflows" / "api"


def seen(frames: Tensor) -> Verdict:
    """What `frames [F, H, W, 3]` in 0..1 show."""
    return check(of_frames(frames))


def shows(*words: str) -> Callable[[Tensor], bool]:
    """A judge of clips that want these words, whatever else they show."""
    return lambda frames: set(words) <= set(vars(seen(frames)).values())


def ways(frames: Tensor, parts: int) -> list[str | None]:
    """Where the object moves in each of `parts` equal parts of the clip."""
    return [seen(part).direction for part in frames.chunk(parts)]


def changes_colour(frames: Tensor) -> bool:
    colours = seen(frames[:4]).colour, seen(frames[-4:]).colour
    return colours == ("yellow", "red") and shows("triangle", "right", "black")(frames)


def goes_there_and_back_and_there(frames: Tensor) -> bool:
    return ways(frames, 3) == ["right", "left", "right"] and shows("yellow", "square", "black")(frames)


def joins_its_ends(frames: Tensor) -> bool:
    """The step from the last frame to the first is no larger than the others."""
    steps = (frames - frames.roll(-1, 0)).square().mean((1, 2, 3)).sqrt()
    joined = bool(steps[-1] <= steps[:-1].max())
    return joined and ways(frames, 2) == ["right", "left"] and shows("orange", "circle", "black")(frames)


def turns_back(frames: Tensor) -> bool:
    return ways(frames, 2) == ["right", "left"] and shows("blue", "triangle", "white")(frames)


def keeps_on(*words: str) -> Callable[[Tensor], bool]:
    """A judge of clips that are one steady movement of these words."""
    return lambda frames: seen(frames).steady and shows(*words)(frames)


def leads_to_the_last(frames: Tensor) -> bool:
    return largest_step(frames) <= JUMP and keeps_on("yellow", "square", "left", "grey")(frames)


def goes_on(frames: Tensor) -> bool:
    """The 12 frames behind the first 16 show what these show, and the object goes on from where it was."""
    parts = frames[:16], frames[16:]
    return largest_step(frames) <= 2 and all(keeps_on("blue", "square", "right", "white")(part) for part in parts)


def leads_from_one_to_the_other(frames: Tensor) -> bool:
    first, between, second = frames.split((16, 8, 16))
    parted = keeps_on("red", "right")(first) and keeps_on("blue", "left")(second)
    return parted and all(shows("circle", "black")(part) for part in (first, between, second))


# Frames, width, height, and the judge.
EXPECTED: dict[str, tuple[int, int, int, Callable[[Tensor], bool]]] = {
    "text-to-video": (16, 128, 72, shows("yellow", "square", "right", "black")),
    "text-to-video-x4": (16, 512, 288, shows("yellow", "triangle", "left", "grey")),
    "prompt-schedule": (16, 128, 72, changes_colour),
    "long-clip": (48, 128, 72, goes_there_and_back_and_there),
    "seamless-loop": (32, 128, 72, joins_its_ends),
    "video-to-video": (16, 128, 72, shows("green", "square", "right", "grey")),
    "lora": (16, 128, 72, turns_back),
    "image-to-video": (16, 128, 72, keeps_on("green", "circle", "right", "black")),
    "first-and-last-frame": (16, 128, 72, leads_to_the_last),
    "extend-video": (28, 128, 72, goes_on),
    "in-between-frames": (31, 128, 72, keeps_on("red", "triangle", "up", "black")),
    "transition": (40, 128, 72, leads_from_one_to_the_other),
    "long-video": (48, 128, 72, keeps_on("yellow", "square", "right", "black")),
}
# Frames a second, where they are not the model's.
RATES = {"in-between-frames": 16}


def test_every_workflow_is_judged() -> None:
    assert {path.stem for path in API.glob("*.json")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_clip_that_leaves_the_graph_shows_the_prompt(host: Host, name: str) -> None:
    graph = json.loads((API / f"{name}.json").read_text())
    (file,) = host.files(host.run(graph))
    video = read_video(file)
    num_frames, width, height, judge = EXPECTED[name]
    assert video.frames.shape == (num_frames, height, width, 3)
    assert video.fps == RATES.get(name, 8)
    assert judge(video.frames), seen(video.frames)
