"""The demo model on the combinations of words that its training never saw: a table, a contact sheet, a mosaic.

Every clip comes from `pipeline.generate` with the defaults of `videofactory generate`; the checker looks at pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm
from videofactory_train.contact_sheet import contact_sheet
from videofactory_train.data.moving_shapes import HELD_OUT, Combination, caption
from videofactory_train.data.shape_checker import Verdict, check, of_frames, summarise

from videofactory_core import checkpoint
from videofactory_core.pipeline import generate
from videofactory_core.video import write_video

SEEDS = 4
# A third of the combinations, taken in strides that meet every word.
SAMPLE = tuple(HELD_OUT[7 * i % len(HELD_OUT)] for i in range(len(HELD_OUT) // 3))
BAR = {"colour": 0.95, "shape": 0.90, "direction": 0.95, "background": 0.95, "steady": 1.0}


def judge(
    model: checkpoint.Model, combinations: Sequence[Combination], seeds: int
) -> tuple[dict[Combination, Tensor], list[tuple[Combination, Verdict]]]:
    """The first clip `[F, H, W, 3]` of every combination, and the verdict on every clip."""
    first: dict[Combination, Tensor] = {}
    verdicts = []
    with tqdm(total=len(combinations) * seeds, unit="clip") as bar:
        for combination in combinations:
            for seed in range(seeds):
                frames = generate(model, caption(combination), seed=seed)
                first.setdefault(combination, frames)
                verdicts.append((combination, check(of_frames(frames))))
                bar.update()
    return first, verdicts


def mosaic(clips: Sequence[Tensor], columns: int = 4) -> Tensor:
    """Clips side by side in one clip `[F, H, W, 3]`."""
    return rearrange(torch.stack(list(clips)), "(R N) F H W C -> F (R H) (N W) C", N=columns)


def report(path: Path = checkpoint.DEMO, folder: Path = Path("runs/demo-report")) -> None:
    """36 combinations x 4 seeds: print the table beside the bar, and write a contact sheet and a mosaic."""
    model = checkpoint.load(path)
    clips, verdicts = judge(model, HELD_OUT, SEEDS)
    shares = summarise(verdicts)
    folder.mkdir(parents=True, exist_ok=True)
    contact_sheet([(caption(words), clip) for words, clip in clips.items()]).save(
        folder / "held-out.png", optimize=True
    )
    write_video(folder / "held-out.gif", mosaic([clips[combination] for combination in SAMPLE]), model.config.fps)
    print(f"{len(verdicts)} clips of {len(HELD_OUT)} held-out combinations, torch {torch.__version__}")
    for name, share in shares.items():
        bar = f"{BAR[name]:.0%}" if name in BAR else ""
        print(f"{name:<12}{share:8.1%}  {bar:>5}")
    for combination, verdict in verdicts:
        if not verdict.agrees(combination):
            print(f"missed: {caption(combination)}: {verdict}")
    print(f"pictures: {folder}")
    if any(shares[name] < least for name, least in BAR.items()):
        sys.exit("below the bar")
