"""FVD: features a second beside cd-fvd's own, the Frechet distance of 400 features, and decoding's share of the time.

Weights are random: speed does not depend on them. cd-fvd is compared where it is installed (pip install cd-fvd).
"""

from __future__ import annotations

import os
import platform
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
import torch
from videofactory_train.evaluate import frechet
from videofactory_train.evaluate.fvd import FVD, VARIANTS, load, load_videomae
from videofactory_train.evaluate.i3d import I3D
from videofactory_train.evaluate.videomae import GIANT, VideoViT

from videofactory_core.video import read_frames, write_video

from .rounds import Run, seconds

FRAMES, HEIGHT, WIDTH, FPS = 16, 256, 456, 24.0
# Of the Frechet distance: features a video, videos a side, and what it may take in seconds.
FEATURES, VIDEOS, BAR = 400, 2048, 0.1


def prepare(folder: Path, device: torch.device) -> dict[str, tuple[FVD, str, Path]]:
    """Our extractors, with cd-fvd's name of the network and the weights of both; VideoMAE's is for GPUs alone."""
    torch.manual_seed(0)
    weights = folder / "i3d.pt"
    torch.save(I3D().state_dict(), weights)
    found = {"fvd-i3d": (load("fvd-i3d", weights, device), "i3d", weights)}
    if device.type == "cuda":
        weights = folder / "videomae.pth"
        with device:
            giant = VideoViT(GIANT)
        head = {"head.weight": torch.zeros(174, GIANT.width), "head.bias": torch.zeros(174)}
        torch.save({"module": {key: w.half() for key, w in {**giant.state_dict(), **head}.items()}}, weights)
        ours = FVD(VARIANTS["fvd-videomae"], load_videomae(weights).to(device), "", device)
        found["fvd-videomae"] = ours, "videomae", weights
    return found


def theirs(name: str, weights: Path, clips: np.ndarray, device: torch.device) -> Run:
    """cd-fvd's features of the same clips."""
    from cdfvd.fvd import cdfvd

    evaluator = cdfvd(name, n_real="full", ckpt_path=str(weights), device=str(device))
    return lambda: evaluator.add_real_stats(clips)


def report() -> None:
    """Print clips a second, seconds of the distance beside its bar, and what part of the time decoding takes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = 16 if device.type == "cuda" else 2
    where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{batch} clips of {FRAMES} frames of {WIDTH}x{HEIGHT}; torch {torch.__version__}, {where}")
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # Smooth, as videos are, or decoding would be all about noise.
        coarse = torch.from_numpy(random.random((FRAMES, 3, 8, 14), np.float32))
        frames = torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1)
        video = folder / "clip.mp4"
        write_video(video, frames.permute(0, 2, 3, 1), FPS)
        times = [(number + 0.5) / FPS for number in range(FRAMES)]
        decode = median(seconds({"decode": lambda: read_frames(video, times)}, torch.device("cpu"))["decode"])
        print(f"decoding{1 / decode:20.2f} clips/s on each of {os.cpu_count()} cores")
        clips = random.integers(0, 256, (batch, FRAMES, HEIGHT, WIDTH, 3), np.uint8)
        tensor = torch.from_numpy(clips)
        for name, (extractor, their_name, weights) in prepare(folder, device).items():
            runs: dict[str, Run] = {"ours": partial(extractor, tensor)}
            if find_spec("cdfvd") is not None:
                runs["cd-fvd"] = theirs(their_name, weights, clips, device)
            for whose, rounds in seconds(runs, device).items():
                taken = median(rounds)
                share = decode / (decode + taken / batch)
                print(f"{name:<14}{whose:<8}{batch / taken:6.2f} clips/s, {share:.0%} of the time decoding on one core")
    a, b = (frechet.Moments.of(random.normal(size=(VIDEOS, FEATURES))) for _ in range(2))
    run = partial(frechet.distance, a.mean, a.covariance, b.mean, b.covariance)
    distance = median(seconds({"distance": run}, torch.device("cpu"))["distance"])
    print(f"distance of {FEATURES} features: {distance:.3f} s, bar {BAR} s: {'met' if distance < BAR else 'missed'}")
