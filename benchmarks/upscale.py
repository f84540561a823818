"""The upscaler: how fast it is beside spandrel's network and the machine's own limit, and what it gains on frames."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from videofactory_train.curate.finder import is_video
from videofactory_train.data.moving_shapes import HELD_OUT, MovingShapes, draw
from videofactory_train.degradation import downscale
from videofactory_train.metrics import psnr, ssim

from videofactory_core import checkpoint
from videofactory_core.upscaler import BUNDLED, PRESETS, Upscaler, load, upscale
from videofactory_core.video import open_frames

from .rounds import Run, seconds

SMALL = 192, 344
FRAMES = 16
# A folder with video files of one's own, for `python -m benchmarks upscale-quality`.
VIDEOS = "UPSCALE_VIDEOS"
# What changes less from frame to frame, in 0..1 and in all channels, is a region that stands still.
STILL = 2 / 255
VIDEO_FRAMES = 8


def products(device: torch.device, dtype: torch.dtype) -> tuple[float, Run]:
    """Operations, and what takes them: one product of two matrices."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.rand(side, side, device=device).to(dtype)
    return 2.0 * side**3, lambda: a @ a


def passes(model: Callable[[Tensor], Tensor], frames: Tensor) -> Run:
    """All frames through a network, one by one."""

    @torch.inference_mode()
    def run() -> None:
        for frame in frames.split(1):
            model(frame)

    return run


def speed() -> None:
    """16 frames of 344 x 192 through both presets: spandrel's network, ours, and on a GPU in half precision."""
    from spandrel import ModelLoader

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, "
    where += "" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"{FRAMES} frames of {SMALL[1]}x{SMALL[0]}, torch {torch.__version__}, {where}")
    frames = torch.rand(FRAMES, 3, *SMALL, device=device)
    for name, config in PRESETS.items():
        torch.manual_seed(0)
        model = Upscaler(config)
        theirs = ModelLoader().load_from_state_dict(model.state_dict()).model.to(device).eval()
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            Upscaler(config)(torch.empty(1, 3, *SMALL))
        work = float(counter.get_total_flops())
        runs, rates = {"spandrel": passes(theirs, frames)}, {"spandrel": torch.float32}
        halves = (torch.float16, torch.bfloat16) if device.type == "cuda" else ()
        for dtype in (torch.float32, *halves):
            ours = Upscaler(config)
            ours.load_state_dict(model.state_dict())
            ours.prepare(device, dtype)
            kind = str(dtype).removeprefix("torch.")
            runs[f"ours, {kind}"], rates[f"ours, {kind}"] = passes(ours, frames), dtype
            if device.type == "cuda":
                compiled = f"ours, {kind}, compiled"
                runs[compiled], rates[compiled] = passes(torch.compile(ours), frames), dtype
        limits = {dtype: products(device, dtype) for dtype in dict.fromkeys(rates.values())}
        timed = seconds({**runs, **{str(dtype): run for dtype, (_, run) in limits.items()}}, device)
        print(f"\n{name}: {work / 1e9:.0f} GFLOP a frame\n\n| | frames/s | times spandrel | of the products' rate |")
        print("|---|---|---|---|")
        for run, dtype in rates.items():
            ratio = statistics.median(a / b for a, b in zip(timed["spandrel"], timed[run], strict=True))
            share = statistics.median(
                FRAMES * work / took / (limits[dtype][0] / limit)
                for took, limit in zip(timed[run], timed[str(dtype)], strict=True)
            )
            print(f"| {run} | {FRAMES / statistics.median(timed[run]):.3g} | {ratio:.2f} | {share:.0%} |")


def bicubic(small: Tensor, scale: int) -> Tensor:
    """`[F, 3, H, W]` enlarged without a network."""
    return F.interpolate(small, scale_factor=scale, mode="bicubic").clamp(0, 1)


def networked(model: Upscaler, small: Tensor) -> Tensor:
    """`[F, 3, H, W]` enlarged by the network, as the command does."""
    frames = upscale(model, rearrange(small, "F C H W -> F H W C"), model.config.scale)
    return rearrange(torch.stack(list(frames)), "F H W C -> F C H W")


def flicker(frames: Tensor, originals: Tensor) -> float:
    """Mean absolute second difference in time where the original stands still; nan where nothing does."""
    still = (originals[1:] - originals[:-1]).abs().amax(1) < STILL
    still = still[1:] & still[:-1]
    second = (frames[2:] - 2 * frames[1:-1] + frames[:-2]).abs().mean(1)
    return float(second[still].mean())


def demo_clips(every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Clips of held-out words as the demo's decoder gives them, and the same scenes drawn larger, in 0..1."""
    model = checkpoint.load(checkpoint.DEMO)
    config = model.config
    clips = MovingShapes(len(HELD_OUT), config.frames, config.height, config.width, 1234, HELD_OUT)
    for number in range(0, len(clips), every):
        scene = clips.scene(number)
        small = draw(scene, config.frames, config.height, config.width)
        large = draw(scene, config.frames, 4 * config.height, 4 * config.width)
        with torch.no_grad():
            decoded = model.autoencoder.decode(model.autoencoder.encode(small[None]))[0].clamp(-1, 1)
        yield tuple(rearrange(x, "C F H W -> F C H W") / 2 + 0.5 for x in (decoded, large))  # type: ignore[misc]


def video_files(folder: Path) -> list[Path]:
    """In the order of their names."""
    return sorted(path for path in folder.iterdir() if is_video(path.name))


def video_clips(folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """The first frames of every file, made small by four, and as they are but for sides that four does not divide."""
    for path in video_files(folder):
        with open_frames(path) as clip:
            frames = torch.stack([frame.pixels for frame, _ in zip(clip, range(VIDEO_FRAMES), strict=False)])
        large = rearrange(frames, "F H W C -> F C H W")[..., : frames.shape[1] // 4 * 4, : frames.shape[2] // 4 * 4]
        large = large.float() / 255
        yield downscale(large, 4), large


def compare(clips: Iterable[tuple[Tensor, Tensor]], model: Upscaler) -> tuple[int, dict[str, list[float]]]:
    """How many clips, and the means of PSNR, SSIM and flicker over them, of bicubic and of the network."""
    found: dict[str, list[list[float]]] = {"bicubic": [], "upscaler": []}
    for small, large in clips:
        for name, frames in (("bicubic", bicubic(small, 4)), ("upscaler", networked(model, small))):
            figures = [float(psnr(frames, large).mean()), float(ssim(frames, large).mean()), flicker(frames, large)]
            found[name].append(figures)
    means = {name: torch.tensor(rows, dtype=torch.float64).nanmean(0).tolist() for name, rows in found.items()}
    return len(found["bicubic"]), means


def table(clips: Iterable[tuple[Tensor, Tensor]], model: Upscaler) -> None:
    """The comparison in Markdown."""
    count, means = compare(clips, model)
    print(f"| {count} clips | PSNR, dB | SSIM | flicker of still regions |\n|---|---|---|---|")
    for name, (ratio, similarity, change) in means.items():
        print(f"| {name} | {ratio:.2f} | {similarity:.4f} | {change:.5f} |")


def quality() -> None:
    """The shipped upscaler beside bicubic, on drawn clips through the demo's decoder and on files of one's own."""
    model = load(BUNDLED).prepare()
    table(demo_clips(), model)
    folder = os.environ.get(VIDEOS)
    if folder is None:
        print(f"\nfor video files of your own name their folder in {VIDEOS}")
    else:
        table(video_clips(Path(folder)), model)
