"""RCAN (Zhang et al., arXiv 1807.02758): pictures four times as wide and high, in the authors' key layout."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from .checkpoint import DEMO, CheckpointError, modelspec, write
from .convert.sources import open_source
from .detect import identify
from .memory import is_out_of_memory, total_memory
from .video import DamagedVideo, open_frames, write_frames

BUNDLED = DEMO.with_name("demo-x4.safetensors")
# What the authors subtract from pictures in 0..1 before, and add after, when a file has the keys for it.
MEAN = (0.4488, 0.4371, 0.4040)
AUTHORS_RANGE = 255.0
# Pixels of the input that neighbouring tiles share; convolutions of the light preset look 19 far.
OVERLAP = 32
SMALLEST_TILE = 64
# Memory that RCANs of 64 features take in float32 for each pixel of a result: its features about three times.
BYTES_A_PIXEL = 768
# Tags that describe the file that they stand in.
OF_THE_CONTAINER = {"major_brand", "minor_version", "compatible_brands", "encoder", "duration"}


@dataclass(frozen=True)
class UpscalerConfig:
    """Sizes of an RCAN; the defaults are the paper's with 8 residual blocks in each of 10 groups (6.66 M)."""

    groups: int = 10
    blocks: int = 8
    features: int = 64
    reduction: int = 16
    scale: int = 4
    # The authors' files shift the mean and work on 0..255; our own work on 0..1.
    mean_shift: bool = False

    def __post_init__(self) -> None:
        if min(self.groups, self.blocks, self.features, self.reduction) < 1 or self.features % self.reduction:
            raise ValueError(f"no RCAN has {self.groups} groups of {self.blocks} blocks of {self.features} features")
        if self.scale not in (2, 3, 4, 8):
            raise ValueError(f"an RCAN enlarges 2, 3, 4 or 8 times, not {self.scale} times")


# The paper's size, and a light one (0.97 M).
PRESETS = {"rcan": UpscalerConfig(), "rcan-light": UpscalerConfig(groups=1)}


class ChannelAttention(nn.Module):
    """Every channel times a weight that depends on the means of all channels (eq. 10-12)."""

    def __init__(self, features: int, reduction: int) -> None:
        super().__init__()
        self.conv_du = nn.Sequential(
            nn.Conv2d(features, features // reduction, 1),
            nn.ReLU(),
            nn.Conv2d(features // reduction, features, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv_du(x.mean(dim=(2, 3), keepdim=True))


class ResidualBlock(nn.Module):
    """Two convolutions and channel attention beside the identity (eq. 13)."""

    def __init__(self, features: int, reduction: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(features, features, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(features, features, 3, padding=1),
            ChannelAttention(features, reduction),
        )

    def forward(self, x: Tensor) -> Tensor:
        return _add(self.body(x), x)


class ResidualGroup(nn.Module):
    """Blocks and a convolution beside the short skip connection (eq. 5-7)."""

    def __init__(self, config: UpscalerConfig) -> None:
        super().__init__()
        blocks = [ResidualBlock(config.features, config.reduction) for _ in range(config.blocks)]
        self.body = nn.Sequential(*blocks, nn.Conv2d(config.features, config.features, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return _add(self.body(x), x)


def _add(fresh: Tensor, x: Tensor) -> Tensor:
    """Their sum, in the memory of `fresh`, which nothing else needs."""
    return fresh.add_(x) if fresh.dtype == x.dtype else fresh + x


class Upscaler(nn.Module):
    """Pictures `[N, 3, H, W]` in 0..1 to `[N, 3, scale H, scale W]`; results may leave 0..1 a little."""

    def __init__(self, config: UpscalerConfig) -> None:
        super().__init__()
        self.config = config
        features = config.features
        groups = [ResidualGroup(config) for _ in range(config.groups)]
        self.head = nn.Sequential(nn.Conv2d(3, features, 3, padding=1))
        self.body = nn.Sequential(*groups, nn.Conv2d(features, features, 3, padding=1))
        self.tail = nn.Sequential(_enlarge(features, config.scale), nn.Conv2d(features, 3, 3, padding=1))
        if config.mean_shift:
            self.sub_mean, self.add_mean = (_shift(sign) for sign in (-1, 1))

    def prepare(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Upscaler:
        """For inference: on `device`, channels last, and in `dtype` but for both ends, which stay in float32.

        The ends read and write colours, whose rounding shows; of bfloat16's error half is theirs.
        """
        self.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        self.body.to(dtype)
        self.tail[0].to(dtype)
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(_dtype(self.head))
        if not self.config.mean_shift:
            return self.enlarge(x)
        return self.add_mean(self.enlarge(self.sub_mean(x * AUTHORS_RANGE))) / AUTHORS_RANGE

    def enlarge(self, x: Tensor) -> Tensor:
        x = self.head(x).to(_dtype(self.body))
        x = self.tail[0](_add(self.body(x), x))
        return self.tail[1](x.to(_dtype(self.tail[1])))


def _dtype(layer: nn.Module) -> torch.dtype:
    return next(layer.parameters()).dtype


def _enlarge(features: int, scale: int) -> nn.Sequential:
    factors = [3] if scale == 3 else [2] * int(math.log2(scale))
    layers: list[nn.Module] = []
    for factor in factors:
        layers += [nn.Conv2d(features, features * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
    return nn.Sequential(*layers)


def _shift(sign: int) -> nn.Conv2d:
    layer = nn.Conv2d(3, 3, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3)[:, :, None, None])
        layer.bias.copy_(sign * AUTHORS_RANGE * torch.tensor(MEAN))  # type: ignore[union-attr]
    return layer.requires_grad_(False)


def detect(shapes: Mapping[str, tuple[int, ...]]) -> UpscalerConfig:
    """The sizes that keys and shapes tell; ValueError when they are no RCAN's."""
    try:
        features = shapes["head.0.weight"][0]
        groups = _count(shapes, r"body\.(\d+)\.body\.0\.body\.0\.weight")
        blocks = _count(shapes, r"body\.0\.body\.(\d+)\.body\.0\.weight")
        reduction = features // shapes["body.0.body.0.body.3.conv_du.0.weight"][0]
        steps = _count(shapes, r"tail\.0\.(\d+)\.weight")
        scale = math.isqrt(shapes["tail.0.0.weight"][0] // features) ** steps
        config = UpscalerConfig(groups, blocks, features, reduction, scale, "sub_mean.weight" in shapes)
        with torch.device("meta"):
            expected = {key: tuple(value.shape) for key, value in Upscaler(config).state_dict().items()}
    except (ArithmeticError, LookupError, ValueError) as error:
        raise ValueError("these are not the weights of an RCAN: choose another file") from error
    if expected != dict(shapes):
        raise ValueError("these weights are nearly an RCAN's, but not quite: choose another file")
    return config


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in shapes)


def build(tensors: Mapping[str, Tensor]) -> Upscaler:
    """The upscaler with these weights, in float32 and eval mode; ValueError when they are no RCAN's."""
    model = Upscaler(detect({key: tuple(tensor.shape) for key, tensor in tensors.items()}))
    model.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    return model.eval()


def load(path: str | os.PathLike[str]) -> Upscaler:
    """An upscaler in float32 and eval mode, from .safetensors or a pickle that holds nothing but tensors.

    Raises CheckpointError, a ValueError, for any other file; networks of other kinds are named.
    """
    source = open_source(Path(path))
    kind = identify(source.shapes)
    if kind.name not in ("rcan", "unknown"):
        raise CheckpointError(f"{path} is {kind.description} and no RCAN: {kind.use}")
    try:
        detect(source.shapes)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return build({key: source.read(key) for key in source.shapes})


def save(
    path: str | os.PathLike[str],
    model: Upscaler,
    title: str,
    licence: str,
    origin: str,
    other: Mapping[str, str] | None = None,
) -> None:
    """Write `model` in half precision, with `other` as further metadata; raises what `checkpoint.write` raises."""
    strings = {
        **(other or {}),
        "format": "videofactory-upscaler",
        "sizes": json.dumps(vars(model.config)),
        **modelspec("rcan", title, licence, origin),
    }
    write(path, model.state_dict(), strings, torch.float16)


# Frames


def upscale(
    network: Callable[[Tensor], Tensor],
    frames: Iterable[Tensor],
    scale: int,
    *,
    device: torch.device | str = "cpu",
    tile: int = 0,
    batch: int = 1,
) -> Iterator[Tensor]:
    """Frames `[H, W, 3]`, uint8 or in 0..1 and of one size, as `[scale H, scale W, 3]` in 0..1, float32, on the CPU.

    They are taken and given one after the other, so that memory holds `batch` of them. `network` takes `[N, 3, H, W]`
    in 0..1 on `device` and makes it `scale` times as large. It sees whole frames, because its channel attention does;
    tiles of `tile` pixels a side with soft seams when asked to, or when memory runs out, and then from there on, with
    sides halved until they fit. Raises ValueError for tiles too small to be of use, and MemoryError when even those do
    not fit.
    """
    check_tile(tile)
    assert batch >= 1, batch
    device = torch.device(device)
    # On a CPU a batch is no faster, and the last bits would depend on its size.
    batch = 1 if device.type == "cpu" else batch
    frames = iter(frames)
    while group := list(islice(frames, batch)):
        pictures = rearrange(torch.stack(group), "N H W C -> N C H W")
        pictures = pictures.float().div_(255) if pictures.dtype == torch.uint8 else pictures.float()
        tile = tile or largest_tile(pictures, scale, device)
        while True:
            try:
                large = _upscaled(network, pictures, scale, device, tile)
                break
            except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                side = min(tile, max(pictures.shape[2:]))
                tile = side // 2
                if tile < SMALLEST_TILE:
                    raise MemoryError(
                        f"memory is not enough for pictures of {side} pixels a side: close other programs, or choose a "
                        "smaller network"
                    ) from error
        yield from rearrange(large, "N C H W -> N H W C")


def upscale_video(
    network: Callable[[Tensor], Tensor],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    scale: int,
    *,
    device: torch.device | str = "cpu",
    tile: int = 0,
    batch: int = 1,
    repeat_damaged: bool = False,
    watch: Callable[[Iterator[Tensor], int], Iterable[Tensor]] = lambda frames, count: frames,
) -> str:
    """The video `source` enlarged as `out`, with its times, its metadata and its sound, in the memory of a few frames.

    `watch` gets the frames on their way to the encoder, and how many there are. Returns a sentence about damage that
    was passed over, or "". Raises what `upscale`, `open_frames` and `write_frames` raise.
    """
    try:
        with open_frames(source, repeat_damaged=repeat_damaged) as clip:
            times: list[float] = []
            tags = {
                tag: text for tag, text in clip.metadata.items() if tag.isidentifier() and tag not in OF_THE_CONTAINER
            }

            def pictures() -> Iterator[Tensor]:
                for frame in clip:
                    times.append(frame.time)
                    yield frame.pixels

            large = upscale(network, pictures(), scale, device=device, tile=tile, batch=batch)
            write_frames(
                out,
                watch(large, clip.frames),
                clip.fps,
                tags,
                # Grows as frames are read, which is before they are written.
                times=times if clip.variable else None,
                audio=source,
            )
            damage = [f"{clip.repeated} damaged frames show the one before them"] if clip.repeated else []
            damage += [f"the video breaks off {clip.missing:.2f} seconds before its end"] if clip.missing else []
            return " and ".join(damage)
    except DamagedVideo as error:
        raise DamagedVideo(f"{error}, or allow damaged frames to be repeated") from error


def check_tile(tile: int) -> None:
    """ValueError for tiles that are mostly seams; 0 is none."""
    if tile and tile < SMALLEST_TILE:
        raise ValueError(f"tiles of {tile} pixels are too small to be of use; use {SMALLEST_TILE} or more, or 0")


def largest_tile(pictures: Tensor, scale: int, device: torch.device) -> int:
    """The side of tiles to begin with: that of the whole picture where its working memory should fit.

    A GPU says when it does not; a system may rather end the process, so there it has half of the memory.
    """
    side = max(pictures.shape[2:])
    memory = None if device.type == "cuda" else total_memory(device)
    if memory is None or pictures[0, 0].numel() * scale**2 * BYTES_A_PIXEL <= memory / 2:
        return side
    return max(SMALLEST_TILE, math.isqrt(memory // 2 // BYTES_A_PIXEL) // scale // 8 * 8)


@torch.no_grad()
def _upscaled(
    network: Callable[[Tensor], Tensor], pictures: Tensor, scale: int, device: torch.device, tile: int
) -> Tensor:
    """`pictures [N, 3, H, W]` enlarged and clamped, on the CPU: whole, or the weighted means of overlapping tiles."""
    tops, lefts = (_starts(side, tile) for side in pictures.shape[2:])
    if len(tops) == len(lefts) == 1:
        return network(pictures.to(device)).float().clamp(0, 1).cpu()
    count, _, height, width = pictures.shape
    total = torch.zeros(count, 3, height * scale, width * scale)
    weights = torch.zeros(height * scale, width * scale)
    for top in tops:
        for left in lefts:
            small = pictures[:, :, top : top + tile, left : left + tile].to(device)
            large = network(small).float().cpu()
            rows = slice(top * scale, top * scale + large.shape[2])
            columns = slice(left * scale, left * scale + large.shape[3])
            weight = _ramp(rows, height * scale, scale)[:, None] * _ramp(columns, width * scale, scale)
            total[:, :, rows, columns] += large * weight
            weights[rows, columns] += weight
    return total.div_(weights).clamp_(0, 1)


def _starts(side: int, tile: int) -> list[int]:
    """Where tiles begin that cover a side, evenly spread, with `OVERLAP` pixels or more in common."""
    if side <= tile:
        return [0]
    count = math.ceil((side - OVERLAP) / (tile - OVERLAP))
    return [round(i * (side - tile) / (count - 1)) for i in range(count)]


def _ramp(part: slice, side: int, scale: int) -> Tensor:
    """Weights of a tile's pixels along one axis: they rise from its seams over the overlap, not from the border."""
    places = torch.arange(part.start, part.stop) + 0.5
    rise = torch.full_like(places, math.inf) if part.start == 0 else places - part.start
    fall = torch.full_like(places, math.inf) if part.stop == side else part.stop - places
    return (torch.minimum(rise, fall) / (OVERLAP * scale)).clamp(max=1)
