"""How near pictures are to what they should be."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Pictures that are equal have this PSNR in decibels, so that it stays a number.
MOST_PSNR = 100.0
# Of the window of SSIM, in pixels (Wang et al. 2004).
WINDOW, SIGMA = 11, 1.5


def psnr(pictures: Tensor, originals: Tensor) -> Tensor:
    """-10 log10 of the mean squared error of each picture in decibels, at most 100: `[N]` of `[N, C, H, W]` in 0..1."""
    error = (pictures.double() - originals.double()).square().mean((1, 2, 3))
    return -10 * error.clamp_min(10 ** (-MOST_PSNR / 10)).log10()


def ssim(pictures: Tensor, originals: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004), the mean over channels and places: `[N]` of `[N, C, H, W]` in 0..1.

    Means, variances and the covariance are weighted by a Gaussian of 11 x 11 pixels, where it lies wholly inside.
    Raises ValueError for smaller pictures.
    """
    if min(pictures.shape[2:]) < WINDOW:
        height, width = pictures.shape[2:]
        raise ValueError(f"SSIM needs pictures of {WINDOW}x{WINDOW} pixels or more, not {width}x{height}")
    x, y = pictures.double(), originals.double()
    steps = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = (-(steps**2) / (2 * SIGMA**2)).exp()
    weights = (weights / weights.sum()).expand(x.shape[1], 1, 1, WINDOW)

    def mean(values: Tensor) -> Tensor:
        across = F.conv2d(values, weights, groups=len(weights))
        return F.conv2d(across, weights.mT, groups=len(weights))

    mean_x, mean_y = mean(x), mean(y)
    # The variances' sum is never negative but for rounding.
    variances = mean(x * x + y * y) - mean_x**2 - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    brightness, contrast = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + brightness) / (mean_x**2 + mean_y**2 + brightness)
    structure = (2 * covariance + contrast) / (variances + contrast)
    return (luminance * structure).mean((1, 2, 3))
