"""I3D (Carreira and Zisserman, arXiv 1705.07750): Inception in three dimensions, under the names of VideoGPT's file."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import fuse_conv_bn_eval

CLASSES = 400
# Pixels across and down; and what remains of them before the logits.
SIDE, LAST_SIDE = 224, 7
# Fewer frames are halved to one before the mean of two.
LEAST_FRAMES = 9
# In time, height and width.
Steps = tuple[int, ...]
# Channels of a module's branches: 1x1x1; 1x1x1 and 3x3x3; 1x1x1 and 3x3x3; pooled and 1x1x1.
Branches = tuple[int, int, int, int, int, int]
MIXED: dict[str, Branches] = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}
# What is before some modules: kernel and stride of a pool.
POOLS: dict[str, tuple[Steps, Steps]] = {
    "3b": ((1, 3, 3), (1, 2, 2)),
    "4b": ((3, 3, 3), (2, 2, 2)),
    "5b": ((2, 2, 2), (2, 2, 2)),
}


class I3D(nn.Module):
    """Logits `[B, 400]`, the mean over time, of clips `[B, 3, F, 224, 224]` of 9 frames or more."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        channels = 192
        for name, branches in MIXED.items():
            module = Mixed(channels, branches)
            self.add_module(f"Mixed_{name}", module)
            channels = module.channels
        self.logits = Unit(channels, CLASSES, 1, normalise=False)

    def forward(self, x: Tensor) -> Tensor:
        x = _max_pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in MIXED:
            if name in POOLS:
                x = _max_pool(x, *POOLS[name])
            x = self.get_submodule(f"Mixed_{name}")(x)
        x = F.avg_pool3d(x, (2, LAST_SIDE, LAST_SIDE), stride=1)
        logits: Tensor = self.logits(x).mean((2, 3, 4))
        return logits

    def fold(self) -> None:
        """Take the normalisation into the convolutions: for use alone, with the weights that are there by now."""
        for module in self.modules():
            if isinstance(module, Unit) and isinstance(module.bn, nn.BatchNorm3d):
                module.conv3d = fuse_conv_bn_eval(module.conv3d, module.bn)
                module.bn = nn.Identity()


class Unit(nn.Module):
    """Convolution, padded so that only the stride makes it smaller, and with `normalise` batch norm and ReLU."""

    def __init__(self, channels: int, out: int, side: int, stride: int = 1, normalise: bool = True) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(channels, out, side, stride, bias=not normalise)
        self.bn: nn.Module | None = nn.BatchNorm3d(out) if normalise else None

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv3d.kernel_size, self.conv3d.stride
        x, inside = _pad(x, kernel, stride)
        x = F.conv3d(x, self.conv3d.weight, self.conv3d.bias, stride, inside)
        return x if self.bn is None else F.relu(self.bn(x), inplace=True)


class Mixed(nn.Module):
    """Four branches side by side."""

    def __init__(self, channels: int, branches: Branches) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3 = branches
        self.channels = b0 + b1b + b2b + b3
        self.b0 = Unit(channels, b0, 1)
        self.b1a, self.b1b = Unit(channels, b1a, 1), Unit(b1a, b1b, 3)
        self.b2a, self.b2b = Unit(channels, b2a, 1), Unit(b2a, b2b, 3)
        self.b3b = Unit(channels, b3, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = _max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


def _max_pool(x: Tensor, kernel: Steps, stride: Steps) -> Tensor:
    """Of `x` >= 0, so that it is the same whether zeros or nothing is around it."""
    x, inside = _pad(x, kernel, stride)
    return F.max_pool3d(x, kernel, stride, inside)


def _pad(x: Tensor, kernel: Steps, stride: Steps) -> tuple[Tensor, Steps]:
    """TensorFlow's padding: as little as lets every stride begin inside, the odd one behind.

    Returns `x [B, C, F, H, W]`, itself where the padding is the same on both sides, and then that for each.
    """
    # What the last kernel lacks where it begins at a stride.
    needed = [max(k - (size % s or s), 0) for size, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    if all(total % 2 == 0 for total in needed):
        return x, tuple(total // 2 for total in needed)
    sides = [side for total in reversed(needed) for side in (total // 2, total - total // 2)]
    return F.pad(x, sides), (0, 0, 0)
