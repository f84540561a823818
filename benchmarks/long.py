"""Given frames and long clips: what a step costs with and without, what chunks cost, and whether 600 frames drift.

Times are taken in turns; memory is the highest of a process of its own. What is drawn does not change its brightness at
all, so the bound of the drift is what real single shots do: name a folder of them in `LONG_VIDEOS`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from videofactory_train.data.moving_shapes import MovingShapes

from videofactory_core import checkpoint
from videofactory_core.long import generate_long
from videofactory_core.pipeline import generate
from videofactory_core.video import open_frames

from .rounds import ROUNDS, seconds
from .upscale import video_files

PROMPT = "a red circle moving right on a black background"
CLIP, CHUNK, OVERLAP, FRAMES = 16, 32, 4, 600
SEEDS = 3
VIDEOS = "LONG_VIDEOS"
# Chunks that are timed.
CHUNKS = 4
BAR_STEP, BAR_CHUNKS, BAR_MEMORY = 1.02, 1.15, 1.05

PEAK = """
import sys
from benchmarks.long import pieces
from videofactory_train.processes import peak_memory
for _ in pieces(int(sys.argv[1]), steps=2):
    pass
print(peak_memory())
"""


def pieces(num_frames: int, **settings: Any) -> Iterator[Tensor]:
    """A long clip of the demo, in pieces."""
    warnings.simplefilter("ignore")
    model = checkpoint.load(checkpoint.DEMO)
    yield from generate_long(model, PROMPT, num_frames=num_frames, chunk=CHUNK, overlap=OVERLAP, **settings)


def look(frames: Tensor) -> Tensor:
    """Brightness and saturation of frames `[F, H, W, 3]`: their means, `[2]`."""
    frames = frames.clamp(0, 1)
    return torch.stack([frames.mean(), (frames.amax(dim=3) - frames.amin(dim=3)).mean()])


def drift(clips: Iterable[Tensor]) -> tuple[float, float]:
    """How far brightness and saturation of later pieces lie from those of the first, at most."""
    looks = torch.stack([look(clip) for clip in clips])
    brightness, saturation = (looks - looks[0]).abs().amax(dim=0).tolist()
    return brightness, saturation


def filmed(path: Path) -> Iterator[Tensor]:
    """A video file in pieces as long as those that are made."""
    with open_frames(path) as frames:
        while piece := [frame.pixels for frame in islice(frames, CHUNK - OVERLAP)]:
            yield torch.stack(piece).float() / 255


def peak(num_frames: int) -> int:
    """Bytes that a process holds at most which makes a clip of so many frames."""
    folder = Path(__file__).parent.parent
    command = [sys.executable, "-c", PEAK, str(num_frames)]
    return int(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)


def report() -> None:
    """Print everything as Markdown."""
    warnings.simplefilter("ignore")
    cpu = torch.device("cpu")
    model = checkpoint.load(checkpoint.DEMO)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n\n| | here | bar |\n|---|---|---|")

    first = {0: generate(model, PROMPT, steps=5)[0]}
    long = CHUNK + (CHUNKS - 1) * (CHUNK - OVERLAP)
    took = seconds(
        {
            "plain": lambda: generate(model, PROMPT),
            "given": lambda: generate(model, PROMPT, given=first),
            "long": lambda: sum(
                len(piece) for piece in generate_long(model, PROMPT, num_frames=long, chunk=CHUNK, overlap=OVERLAP)
            ),
        },
        cpu,
    )
    given = median(a / b for a, b in zip(took["given"], took["plain"], strict=True))
    chunked = median(a / (b * long / CLIP) for a, b in zip(took["long"], took["plain"], strict=True))
    print(f"| a clip with its first frame given / without, time | {given:.3f} | {BAR_STEP} |")
    print(f"| {long} frames / as many in clips of {CLIP}, time | {chunked:.3f} | {BAR_CHUNKS} |")
    # What the allocator keeps differs from run to run by several hundredths.
    long_peak, short_peak = (median(peak(num_frames) for _ in range(ROUNDS)) for num_frames in (FRAMES, 64))
    print(f"| peak memory of {FRAMES} frames / of 64 | {long_peak / short_peak:.3f} | {BAR_MEMORY} |", flush=True)

    print(f"\n| largest difference from the first {CHUNK - OVERLAP} frames | brightness | saturation |\n|---|---|---|")
    for name, match_colours in (("made", False), ("made with colours matched", True)):
        clips = (torch.cat([*pieces(FRAMES, seed=seed, match_colours=match_colours)]) for seed in range(SEEDS))
        row(name, [drift(clip.split(CHUNK - OVERLAP)) for clip in clips])
    shapes = MovingShapes(8, FRAMES, model.config.height, model.config.width, seed=5)
    videos = (shapes[index]["video"].split(CHUNK - OVERLAP, dim=1) for index in range(len(shapes)))
    row("drawn", [drift(piece.permute(1, 2, 3, 0) / 2 + 0.5 for piece in video) for video in videos])
    folder = os.environ.get(VIDEOS)
    if folder is None:
        print(f"\nfor real single shots of your own name their folder in {VIDEOS}")
    else:
        row("filmed", [drift(filmed(path)) for path in video_files(Path(folder))])


def row(name: str, drifts: list[tuple[float, float]]) -> None:
    """The medians over clips."""
    brightness, saturation = (median(values) for values in zip(*drifts, strict=True))
    print(f"| {name}, {len(drifts)} | {brightness:.4f} | {saturation:.4f} |", flush=True)
