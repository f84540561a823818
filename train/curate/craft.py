"""CRAFT (Baek et al., 2019): characters, and what joins them to words, as maps of scores; with the authors' keys."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .text import Box

Array = np.ndarray[Any, Any]
# Channels of VGG16's convolutions (Simonyan and Zisserman, arXiv 1409.1556, configuration D), with a halving of the
# picture between the groups; and where its parts begin.
GROUPS = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 2)
SLICES = (0, 12, 19, 29, 39)
# Of the pictures that VGG16 was trained on.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What sides are multiples of.
MULTIPLE = 32
# Scores from which on a pixel belongs to writing or to what joins it, and that a word reaches somewhere.
LOW, LINK, HIGH = 0.4, 0.4, 0.7
# Pixels of the map that a word has at least.
LEAST_PIXELS = 10


class Craft(nn.Module):
    """Scores of characters and of links, `[B, 2, H / 2, W / 2]` in about 0..1, of pictures `[B, 3, H, W]` in 0..1.

    Sides that are no multiples of 32 are filled up with black.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.basenet = Backbone()
        self.upconv1 = Merge(1024, 512, 256)
        self.upconv2 = Merge(512, 256, 128)
        self.upconv3 = Merge(256, 128, 64)
        self.upconv4 = Merge(128, 64, 32)
        sizes = ((32, 32, 3), (32, 32, 3), (32, 16, 3), (16, 16, 1), (16, 2, 1))
        layers = [(nn.Conv2d(a, b, size, padding=size // 2), nn.ReLU()) for a, b, size in sizes]
        self.conv_cls = nn.Sequential(*[layer for pair in layers for layer in pair][:-1])
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        height, width = pictures.shape[2:]
        pictures = F.pad(pictures, (0, -width % MULTIPLE, 0, -height % MULTIPLE))
        *skips, deep, x = self.basenet((pictures - self.mean) / self.deviation)
        x = self.upconv1(x, deep)
        for merge, skip in zip((self.upconv2, self.upconv3, self.upconv4), reversed(skips), strict=True):
            x = merge(F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False), skip)
        return self.conv_cls(x)[:, :, : (height + 1) // 2, : (width + 1) // 2]


class Backbone(nn.Module):
    """VGG16 with batch norm up to its fifth group, in slices, and the two dilated layers after it."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for group in GROUPS:
            for channels in group:
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
                before = channels
            layers.append(nn.MaxPool2d(2))
        for number, (begin, end) in enumerate(pairwise(SLICES), 1):
            part = nn.Sequential()
            for place in range(begin, end):
                part.add_module(str(place), layers[place])
            self.add_module(f"slice{number}", part)
        self.slice5 = nn.Sequential(
            nn.MaxPool2d(3, 1, 1), nn.Conv2d(512, 1024, 3, padding=6, dilation=6), nn.Conv2d(1024, 1024, 1)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features at 1/2, 1/4, 1/8 and twice 1/16 of the picture's size."""
        found: list[Tensor] = []
        for number in range(1, len(SLICES) + 1):
            x = getattr(self, f"slice{number}")(x)
            found.append(x)
        # Slices end before a ReLU. All but the last of VGG's are joined behind it: in the authors' code the next slice
        # began by changing them in place.
        return [*(F.relu(x) for x in found[:3]), *found[3:]]


class Merge(nn.Module):
    """Two maps of the same size into one."""

    def __init__(self, first: int, second: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(first + second, second, 1),
            nn.BatchNorm2d(second),
            nn.ReLU(),
            nn.Conv2d(second, out, 3, padding=1),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        )

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([x, skip], 1))


def find_boxes(characters: Array, links: Array, threshold: float) -> list[Box]:
    """Words in a picture, from maps `[H, W]` of half its size.

    A word is connected writing and links that reaches `threshold` somewhere. Its box is that of the writing, grown by
    what the maps leave out around characters: in the authors' measure sqrt(n min(w, h) / (w h)) for n of w x h pixels.
    """
    import cv2

    written, linked = characters > LOW, links > LINK
    count, labels, stats, _ = cv2.connectedComponentsWithStats((written | linked).astype(np.uint8), connectivity=4)
    boxes: list[Box] = []
    for label in range(1, count):
        left, top, width, height, pixels = stats[label].tolist()
        place = np.s_[top : top + height, left : left + width]
        word = (labels[place] == label) & written[place]
        if pixels < LEAST_PIXELS or not word.any():
            continue
        score = float(characters[place][word].max())
        if score < threshold:
            continue
        grown = int((pixels * min(width, height) / (width * height)) ** 0.5 * 2) / 2
        rows, columns = (np.flatnonzero(word.any(axis)) for axis in (1, 0))
        x0, x1 = left + int(columns[0]) - grown, left + int(columns[-1]) + 1 + grown
        y0, y1 = top + int(rows[0]) - grown, top + int(rows[-1]) + 1 + grown
        boxes.append(Box(2 * x0, 2 * y0, 2 * x1, 2 * y1, min(1.0, score)))
    return boxes
