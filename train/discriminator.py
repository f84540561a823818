"""Networks that tell originals from pictures that an upscaler made, with spectral norm except at both ends."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

Kind = Literal["unet", "patch"]
# What a picture's sides must be multiples of, and the least that they can be.
STEP: dict[Kind, int] = {"unet": 8, "patch": 1}
LEAST: dict[Kind, int] = {"unet": 8, "patch": 24}

FEATURES = 64
SLOPE = 0.2


def build(kind: Kind) -> nn.Module:
    """A fresh discriminator; it maps pictures `[N, 3, H, W]` in 0..1 to logits `[N, 1, h, w]`, high for originals."""
    return UNetDiscriminator() if kind == "unet" else PatchDiscriminator()


def _conv(channels: int, out_channels: int, kernel: int, stride: int = 1, bias: bool = False) -> nn.Module:
    return spectral_norm(nn.Conv2d(channels, out_channels, kernel, stride, padding=1, bias=bias))


class UNetDiscriminator(nn.Module):
    """A logit for every pixel, from a U-Net with additive skips (Real-ESRGAN, arXiv 2107.10833, figure 6).

    Sides must be multiples of 8.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [FEATURES, 2 * FEATURES, 4 * FEATURES, 8 * FEATURES]
        self.first = nn.Conv2d(3, FEATURES, 3, padding=1)
        self.down = nn.ModuleList(_conv(a, b, 4, 2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(_conv(a, b, 3) for a, b in pairwise(widths[::-1]))
        self.flat = nn.ModuleList(_conv(FEATURES, FEATURES, 3) for _ in range(2))
        self.last = nn.Conv2d(FEATURES, 1, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(pictures), SLOPE)
        skips = []
        for layer in self.down:
            skips.append(x)
            x = F.leaky_relu(layer(x), SLOPE)
        for layer in self.up:
            x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = F.leaky_relu(layer(x), SLOPE) + skips.pop()
        for layer in self.flat:
            x = F.leaky_relu(layer(x), SLOPE)
        return self.last(x)


class PatchDiscriminator(nn.Module):
    """A logit for every patch of 70 pixels (Isola et al., arXiv 1611.07004, appendix 6.1.2).

    Spectral norm in place of batch norm keeps a picture's logits from depending on the others of the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, FEATURES, 4, 2, padding=1),
            nn.LeakyReLU(SLOPE),
            _conv(FEATURES, 2 * FEATURES, 4, 2, bias=True),
            nn.LeakyReLU(SLOPE),
            _conv(2 * FEATURES, 4 * FEATURES, 4, 2, bias=True),
            nn.LeakyReLU(SLOPE),
            _conv(4 * FEATURES, 8 * FEATURES, 4, bias=True),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(8 * FEATURES, 1, 4, padding=1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)


def real_loss(logits: Tensor) -> Tensor:
    """-log sigmoid(D), the mean: low where the discriminator believes that pictures are originals."""
    return F.softplus(-logits.float()).mean()


def fake_loss(logits: Tensor) -> Tensor:
    """-log(1 - sigmoid(D)), the mean: low where the discriminator does not believe that."""
    return F.softplus(logits.float()).mean()


def held(discriminator: nn.Module, pictures: Tensor) -> Tensor:
    """The logits of `pictures` with weights that are constants, so that the gradient reaches the pictures alone."""
    constants = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    return torch.func.functional_call(discriminator, constants, (pictures,))
