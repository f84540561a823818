"""RCAN (Zhang et al., arXiv 1807.02758): pictures four times as wide and high, in the authors' key layout."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .checkpoint import CheckpointError, modelspec, read_header, write

# What the authors subtract from pictures in 0..1 before, and add after, when a file has the keys for it.
MEAN = (0.4488, 0.4371, 0.4040)
AUTHORS_RANGE = 255.0


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
            nn.ReLU(),
            nn.Conv2d(features, features, 3, padding=1),
            ChannelAttention(features, reduction),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ResidualGroup(nn.Module):
    """Blocks and a convolution beside the short skip connection (eq. 5-7)."""

    def __init__(self, config: UpscalerConfig) -> None:
        super().__init__()
        blocks = [ResidualBlock(config.features, config.reduction) for _ in range(config.blocks)]
        self.body = nn.Sequential(*blocks, nn.Conv2d(config.features, config.features, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


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

    def forward(self, x: Tensor) -> Tensor:
        if not self.config.mean_shift:
            return self.enlarge(x)
        return self.add_mean(self.enlarge(self.sub_mean(x * AUTHORS_RANGE))) / AUTHORS_RANGE

    def enlarge(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(x + self.body(x))


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


def load(path: str | os.PathLike[str]) -> Upscaler:
    """An upscaler from a safetensors file, in eval mode; CheckpointError, a ValueError, for any other file."""
    header = read_header(path)
    try:
        model = Upscaler(detect(header.shapes))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with safe_open(path, "pt") as file:
        model.load_state_dict({key: file.get_tensor(key).float() for key in header.shapes})
    return model.eval()


def save(path: str | os.PathLike[str], model: Upscaler, title: str, licence: str, origin: str) -> None:
    """Write `model` in half precision; raises what `checkpoint.write` raises."""
    strings = {
        "format": "videofactory-upscaler",
        "sizes": json.dumps(vars(model.config)),
        **modelspec("rcan", title, licence, origin),
    }
    write(path, model.state_dict(), strings, torch.float16)
