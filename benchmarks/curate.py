"""Curation: clips a second of every stage, beside bare PySceneDetect, on all cores, on Ray, and what 130 M clips take.

"Decoding" is what PyAV takes for the same frames alone, on one thread of the same process and in turns with the stage:
all frames for scenes; for keyframe and motion, which enter the file anew, those from the key frame before the first
that is wanted to the last; for text the JPEG. A file that cannot be entered where it should be costs a stage more.
"""

from __future__ import annotations

import io
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import av
import cv2
import numpy as np
from PIL import Image
from videofactory_train.curate import runner
from videofactory_train.curate.config import CurateConfig
from videofactory_train.curate.curation import Curation
from videofactory_train.curate.runner import Runner
from videofactory_train.curate.scenes import Scenes
from videofactory_train.curate.sources import content, find_sources, text_path
from videofactory_train.curate.stage import Row, Stage, Work
from videofactory_train.curate.store import Store
from videofactory_train.curate.work import OK, schema

from videofactory_core.video.file import open_file, timed_frames, video_stream
from videofactory_core.video.read import SEEK_FROM

# A folder with videos of one's own, instead of those that are drawn.
VIDEOS = "CURATE_VIDEOS"
# Seconds of the scenes of a drawn video, in an order that differs from video to video.
SCENES = (3.0, 9.0, 6.0)
# As websites encode: the quality, and seconds from key frame to key frame at most.
CRF, KEY_FRAMES = 23, 5
BAR_SCENES, BAR_CORES = 0.9, 0.8

# What is planned for: clips of HD-VG-130M, and videos and hours of HD-VILA-100M, of which it was cut.
CLIPS, SOURCES, HOURS = 130e6, 3.3e6, 371_500.0
# Assumptions, in dollars; and cores of the cluster.
CORE_HOUR, GPU_HOUR, CORES = 0.04, 2.50, 1000
# Stages that look at every frame: what they take goes by hours and not by clips.
BY_HOURS = ("scenes", "motion")

Run = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    # Videos that are drawn, and how many of those found are used for stages and for PySceneDetect.
    videos: int = 24
    few: int = 6
    width: int = 1280
    height: int = 720
    fps: int = 30
    # Rows that nothing is done to.
    idle: int = 8192
    rounds: int = 3
    processes: int = os.cpu_count() or 1


@dataclass(frozen=True)
class Rate:
    """A stage at work in one process: clips, seconds of video, and median seconds for all and for decoding alone."""

    clips: int
    video: float
    took: float
    decoding: float


@dataclass(frozen=True)
class Bytes:
    """On disk: of a part without rows, and of each row."""

    part: float
    row: float


@dataclass(frozen=True)
class Nothing(Stage):
    """Makes a clip of every source without looking at it."""

    name: ClassVar[str] = "nothing"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()
    rows_per_part: ClassVar[int] = 16
    splits: ClassVar[bool] = True

    @classmethod
    def columns(cls) -> dict[str, Any]:
        return {}

    def open(self) -> Work:
        return lambda rows: [{"clips": [{"clip_id": row["source_id"]}]} for row in rows]


@dataclass(frozen=True)
class Idle(CurateConfig):
    """Only that stage."""

    def stages(self) -> list[Stage]:
        return [Nothing()]


def report(size: Size = Size()) -> None:
    """Print everything as Markdown."""
    with videos(size) as folder:
        sources = list(find_sources([folder]))
        if not sources:
            sys.exit(f"{folder} has no videos: name another folder in {VIDEOS}, or none")
        some = sources[: size.few]
        megabits = sum(Path(text_path(row["path"])).stat().st_size for row in some) * 8e-6
        rates, stored = stages(some, size)
        seconds = rates["scenes"].video
        print(
            f"{len(sources)} videos, {megabits / seconds:.1f} Mbit/s; {len(some)} of them, {seconds:.0f} s, for stages "
            f"and PySceneDetect; PyAV {av.__version__}, OpenCV {cv2.__version__}, {platform.machine()}, "
            f"{size.processes} cores, medians of {size.rounds} rounds"
        )
        print_stages(rates)
        beside_scenedetect(some, size)
        on_all_cores(sources, size)
    overhead(size)
    plan(rates, stored)


# Videos


@contextmanager
def videos(size: Size) -> Iterator[Path]:
    """The folder that `VIDEOS` names, else one with drawn videos."""
    named = os.environ.get(VIDEOS)
    if named:
        yield Path(named)
        return
    with tempfile.TemporaryDirectory() as folder:
        for number in range(size.videos):
            draw(Path(folder) / f"{number:03d}.mp4", number, size)
        yield Path(folder)


def draw(path: Path, number: int, size: Size) -> None:
    """A video with a cut between scenes, in each of which something moves over ground that the camera passes."""
    random = np.random.default_rng(number)
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=size.fps)
        stream.width, stream.height, stream.pix_fmt = size.width, size.height, "yuv420p"
        stream.options = {"crf": str(CRF), "preset": "veryfast", "g": str(KEY_FRAMES * size.fps)}
        first = number % len(SCENES)
        for seconds in (*SCENES[first:], *SCENES[:first]):
            for picture in scene(random, round(seconds * size.fps), size):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        file.mux(stream.encode())


def scene(random: np.random.Generator, frames: int, size: Size) -> Iterator[np.ndarray[Any, Any]]:
    """Frames `[H, W, 3]` (uint8)."""
    width, height = size.width, size.height
    ground = texture(random, height + height // 4, width + width // 4)
    thing = texture(random, height // 3, width // 4)
    turns = random.uniform(0.5, 2, size=2)
    for number in range(frames):
        done = number / frames
        top, left = int(height / 4 * done), int(width / 4 * done)
        picture = ground[top : top + height, left : left + width].copy()
        y, x = (0.5 + 0.5 * np.sin(2 * np.pi * turns * done)) * (height - len(thing), width - thing.shape[1])
        picture[int(y) : int(y) + len(thing), int(x) : int(x) + thing.shape[1]] = thing
        yield picture


def texture(random: np.random.Generator, height: int, width: int) -> np.ndarray[Any, Any]:
    """A picture `[H, W, 3]` (uint8) with coarse and fine parts."""
    picture = np.zeros((height, width, 3), np.float32)
    for cells, weight in ((4, 0.4), (16, 0.3), (64, 0.2), (256, 0.1)):
        grid = random.random((cells, cells, 3), dtype=np.float32)
        picture += weight * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return (picture.clip(0, 1) * 255).astype(np.uint8)


# Stages


def alternate(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run, one after the other in each round."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - start)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of each round's ratio, so that a machine whose speed drifts favours neither."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def stages(sources: Sequence[Row], size: Size) -> tuple[dict[str, Rate], dict[str, Bytes]]:
    """Every stage that needs no weights, in this process; rows that cannot be worked on are named and left out."""
    config = CurateConfig()
    runs: dict[str, Run] = {}
    numbers: dict[str, tuple[int, float]] = {}
    stored: dict[str, Bytes] = {}

    def add(stage: Stage, rows: Sequence[Row], decoding: Callable[[Row, Row], object]) -> list[tuple[Row, Row]]:
        """What a stage makes of rows, clip by clip; and what is to be timed."""
        work = stage.open()
        pairs = list(sound(work, rows))
        clips = [(clip, clip) for _, found in pairs for clip in found["clips"]] if stage.splits else pairs
        numbers[stage.name] = len(clips), sum(row["end"] - row["start"] for row, _ in clips)
        stored[stage.name] = on_disk(stage, [{"clip_id": row["clip_id"], **found} for row, found in clips])
        runs[stage.name] = partial(work, [row for row, _ in pairs])
        runs[f"{stage.name} decoding"] = lambda: [decoding(row, found) for row, found in pairs]
        return clips

    cut = add(config.scenes, sources, lambda row, _: decode(row, row["start"] or 0.0, row["end"] or math.inf))
    clips = [clip for clip, _ in cut]
    shown = add(config.keyframe, clips, lambda row, found: decode(row, found["time"], found["time"]))
    if reason := config.text.missing():
        print(f"text: {reason}")
    else:
        pictures = [{**row, **found} for row, found in shown]
        add(config.text, pictures, lambda row, _: Image.open(io.BytesIO(row["image"])).load())
    step = 1 / config.motion.fps
    add(config.motion, clips, lambda row, found: decode(row, row["start"], row["start"] + found["pairs"] * step))
    timed = {name: statistics.median(values) for name, values in alternate(runs, size.rounds).items()}
    return {name: Rate(*numbers[name], timed[name], timed[f"{name} decoding"]) for name in numbers}, stored


def sound(work: Work, rows: Sequence[Row]) -> Iterator[tuple[Row, Row]]:
    """Rows that can be worked on, and what comes of them."""
    for row in rows:
        try:
            (found,) = work([row])
        except (ValueError, OSError) as error:
            print(f"left out: {error}")
        else:
            yield row, found


def decode(row: Row, begin: float, end: float) -> None:
    """Decode a file from the key frame at `begin` or before to the frame behind `end`, in seconds."""
    source = content(row)
    with open_file(source) as file:
        stream = video_stream(file, source)
        stream.codec_context.thread_count = 1
        frames = timed_frames(file, stream)
        origin, _ = next(frames)
        if begin > SEEK_FROM:
            file.seek(int((origin + begin) / stream.time_base), stream=stream)
            frames = timed_frames(file, stream)
        for moment, _ in frames:
            if moment - origin > end:
                break


def on_disk(stage: Stage, rows: Sequence[Row]) -> Bytes:
    """From a part with one row that is empty, and one with all rows."""
    sizes = []
    for some in ([{"clip_id": ""}], rows):
        with tempfile.TemporaryDirectory() as folder:
            store = Store(Path(folder))
            store.write(stage.key(), [{"source_id": "", **row, "status": OK} for row in some], schema(stage), "clip_id")
            sizes.append(sum(path.stat().st_size for path in store.parts(stage.key())))
    return Bytes(sizes[0], (sizes[1] - sizes[0]) / len(rows))


def print_stages(rates: dict[str, Rate]) -> None:
    print("\n| stage, one process | clips/s | times real time | decoding |\n|---|---|---|---|")
    for name, rate in rates.items():
        share = rate.decoding / rate.took
        print(f"| {name} | {rate.clips / rate.took:.3g} | {rate.video / rate.took:.3g} | {share:.0%} |")


# Against others


def beside_scenedetect(sources: Sequence[Row], size: Size) -> None:
    """The scenes of each file, by the stage and by PySceneDetect alone: its usual detector, on one thread."""
    from scenedetect import AdaptiveDetector, detect

    os.environ["OPENCV_FFMPEG_THREADS"] = "1"
    work = Scenes(min_seconds=0).open()
    # In shards there is no file for it.
    whole = [row for row in sources if row["offset"] is None and row["start"] is None]
    paths = {text_path(row["path"]): row for row, _ in sound(work, whole)}
    if not paths:
        return

    def ours(path: str) -> int:
        return len(work([paths[path]])[0]["clips"])

    def theirs(path: str) -> int:
        return len(detect(path, AdaptiveDetector(), start_in_scene=True))

    # It is the warm-up too.
    scenes = [sum(side(path) for path in paths) for side in (ours, theirs)]
    runs: dict[str, Run] = {f"{side.__name__} {path}": partial(side, path) for path in paths for side in (ours, theirs)}
    timed = alternate(runs, size.rounds)
    here, bare = ([value for path in paths for value in timed[f"{side} {path}"]] for side in ("ours", "theirs"))
    print("\n| files | scenes here | of bare PySceneDetect | speed here / its speed | bar |\n|---|---|---|---|---|")
    print(f"| {len(paths)} | {scenes[0]} | {scenes[1]} | {ratio(bare, here):.2f} | {BAR_SCENES} |")


def curate(config: CurateConfig, rows: Sequence[Row], run: Runner, processes: int, names: Sequence[str] = ()) -> None:
    """A curation from the beginning."""
    with tempfile.TemporaryDirectory() as folder:
        curation = Curation(Path(folder), config, log=lambda line: None)
        curation.add_sources(rows)
        curation.run(run, processes, names)


def on_all_cores(sources: Sequence[Row], size: Size, names: Sequence[str] = ()) -> None:
    """The stages called `names`, or all that need no weights, in one process and in as many as there are cores.

    Processes start anew for each stage, which weighs much in minutes and nothing in days: so the difference between all
    sources and a few is compared as well.
    """
    few = sources[: max(1, len(sources) // 4)]
    runs: dict[str, Run] = {
        f"{count} {kind}": partial(curate, CurateConfig(), rows, runner.local(count), count, names)
        for count in (1, size.processes)
        for kind, rows in (("few", few), ("all", sources))
    }
    timed = alternate(runs, size.rounds)
    more = {
        count: [a - b for a, b in zip(timed[f"{count} all"], timed[f"{count} few"], strict=True)]
        for count in (1, size.processes)
    }
    kind = ", ".join(names) or "all stages without weights"
    print(
        f"\n| processes, {kind} | {len(sources)} videos, s | times one | more than {len(few)} videos, s | times one |"
    )
    print("|---|---|---|---|---|")
    for count, values in more.items():
        whole = timed[f"{count} all"]
        cells = [f"{statistics.median(whole):.1f}", f"{ratio(timed['1 all'], whole):.2f}"]
        cells += [f"{statistics.median(values):.1f}", f"{ratio(more[1], values):.2f}"]
        print(f"| {count} | {' | '.join(cells)} |")
    print(f"\nbar: {BAR_CORES * size.processes:.1f} times one")


def overhead(size: Size) -> None:
    """What the runners take for rows that nothing is done to: at first, for every stage, and for every row."""
    empty: Row = dict.fromkeys(("start", "end", "offset", "length", "caption"))
    empty |= dict.fromkeys(("path", "name", "licence", "extra"), "")
    rows = [{**empty, "source_id": f"{number:024x}"} for number in range(size.idle)]
    few = rows[: size.processes]
    runners = {"local": runner.local(size.processes)}
    if find_spec("ray"):
        runners["ray"] = runner.ray(size.processes)
    # Ray starts once and stays.
    runs: dict[str, Run] = {name: partial(curate, Idle(), few, run, size.processes) for name, run in runners.items()}
    first = alternate(runs, 1)
    runs |= {f"{name} all": partial(curate, Idle(), rows, run, size.processes) for name, run in runners.items()}
    timed = alternate(runs, size.rounds)
    print(f"\n| runner, {size.processes} processes, nothing to do | first start, s | each stage, s | each clip, ms |")
    print("|---|---|---|---|")
    for name in runners:
        each = [(a - b) / (len(rows) - len(few)) for a, b in zip(timed[f"{name} all"], timed[name], strict=True)]
        stage, clip = statistics.median(timed[name]), statistics.median(each) * 1000
        print(f"| {name} | {first[name][0]:.2f} | {stage:.2f} | {clip:.3f} |")


# The plan


def core_hours(name: str, rate: Rate) -> float:
    """Of a stage for all that is planned for."""
    return HOURS * rate.took / rate.video if name in BY_HOURS else CLIPS / 3600 * rate.took / rate.clips


def plan(rates: dict[str, Rate], stored: dict[str, Bytes]) -> None:
    """What HD-VG-130M would take at these rates; see docs/curation-at-scale.md."""
    every = {stage.name: stage for stage in CurateConfig().stages()}
    print(
        f"\n{CLIPS / 1e6:.0f} M clips of {SOURCES / 1e6:.1f} M videos, {HOURS:,.0f} hours; assumed: {CORE_HOUR} $ a "
        f"core-hour, {CORES} cores\n\n| stage | core-hours | $ | hours on {CORES} cores | parts | TB |\n"
        "|---|---|---|---|---|---|"
    )
    whole = [0.0, 0.0, 0.0]
    for name, rate in rates.items():
        hours, stage = core_hours(name, rate), every[name]
        parts = (SOURCES if stage.splits else CLIPS) / stage.rows_per_part
        terabytes = (parts * stored[name].part + CLIPS * stored[name].row) / 1e12
        whole = [a + b for a, b in zip(whole, (hours, parts, terabytes), strict=True)]
        print(plan_line(name, hours, parts, terabytes))
    print(plan_line("all of these", *whole))
    print(
        f"\naesthetics and caption: {CLIPS / 3600:,.0f} GPU-hours each at one picture a second, "
        f"{CLIPS / 3600 * GPU_HOUR:,.0f} $ at {GPU_HOUR:.2f} $; divide by the rate of your model"
    )
    print("\n| stage | bytes a part | bytes a row |\n|---|---|---|")
    for name, size in stored.items():
        print(f"| {name} | {size.part:,.0f} | {size.row:,.0f} |")


def plan_line(name: str, hours: float, parts: float, terabytes: float) -> str:
    cells = (f"{hours:,.0f}", f"{hours * CORE_HOUR:,.0f}", f"{hours / CORES:,.1f}", f"{parts:,.0f}")
    return f"| {name} | {' | '.join(cells)} | {terabytes:.3g} |"
