"""How steady clips are, without weights: whether what moves keeps its look, and what stands still its light.

A blurred clip has less of both than a sharp one and a frozen one nothing, so that less alone is not better.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..curate.motion import LEAST_HEIGHT, UNIT_WIDTH, Estimator, Motion, dis
from .metrics import ClipMetric

# There and back a point may miss itself by a part of both ways' squares, and by some square pixels
# (Sundaram et al., ECCV 2010).
RELATIVE, ABSOLUTE = 0.01, 0.5
# What moves less within two frames, in 640ths of the picture's width, stands still.
STILL = 0.5


def warping_error(frames: Tensor, estimate: Estimator) -> float:
    """How much points change on their way to the next frame: the mean of (I'(x + F(x)) - I(x))^2, and over pairs.

    Of `frames [F, H, W, 3]`, uint8, whose values count in 0..1 (Lai et al., ECCV 2018). The mean is over points x that
    can be followed, those that do not leave the picture and come back by the flow F' from the next frame:
    |F(x) + F'(x + F(x))|^2 <= 0.01 (|F(x)|^2 + |F'(x + F(x))|^2) + 0.5. NaN where there are none, as in a single frame.
    """
    errors = []
    if min(frames.shape[1:3]) >= LEAST_HEIGHT:
        for first, second in pairwise(frames):
            error = _changes(first, second, estimate)
            if len(error):
                errors.append(float(error.mean(dtype=torch.float64)))
    return sum(errors) / len(errors) if errors else math.nan


def _changes(first: Tensor, second: Tensor, estimate: Estimator) -> Tensor:
    """Squared changes `[N, 3]` of the points of a picture that can be followed into the second."""
    there = torch.from_numpy(estimate(first.numpy(), second.numpy()))
    back = torch.from_numpy(estimate(second.numpy(), first.numpy()))
    height, width = there.shape[:2]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    target = torch.stack([x, y], -1) + there
    last = torch.tensor([width - 1, height - 1])
    inside = ((target >= 0) & (target <= last)).all(-1)
    arrived = _sample(torch.cat([second / 255, back], -1), target / last * 2 - 1)
    colours, back = arrived.split([3, 2], -1)
    missed = (there + back).square().sum(-1)
    ways = there.square().sum(-1) + back.square().sum(-1)
    followed = inside & (missed <= RELATIVE * ways + ABSOLUTE)
    return (colours - first / 255)[followed].square()


def _sample(values: Tensor, places: Tensor) -> Tensor:
    """`values [H, W, C]` at `places [H, W, 2]`, which are -1 to 1 from the first pixel's middle to the last's."""
    sampled = F.grid_sample(values.permute(2, 0, 1)[None], places[None], padding_mode="border", align_corners=True)
    return sampled[0].permute(1, 2, 0)


def flicker(frames: Tensor, estimate: Estimator) -> float:
    """How far points that stand still are from the mean of the frames around: the mean of |I_t - (I_t-1 + I_t+1) / 2|.

    Of `frames [F, H, W, 3]`, uint8, whose values count in 0..1; what changes by a from one frame to the next and back
    has a, and what grows evenly brighter 0. A point stands still in t when the flow from t - 1 to t + 1 is less than
    1/1280 of the picture's width. NaN where none does, as in fewer than 3 frames.
    """
    height, width = frames.shape[1:3]
    if len(frames) < 3 or min(height, width) < LEAST_HEIGHT:
        return math.nan
    total, count = 0.0, 0
    for before, now, after in zip(frames, frames[1:], frames[2:], strict=False):
        lengths = torch.from_numpy(estimate(before.numpy(), after.numpy())).norm(dim=-1)
        still = lengths < STILL * width / UNIT_WIDTH
        changes = (now.float() - (before.float() + after.float()) / 2).abs()[still] / 255
        total += float(changes.sum(dtype=torch.float64))
        count += changes.numel()
    return total / count if count else math.nan


def metrics() -> list[ClipMetric]:
    """Both, by OpenCV's dense inverse search; ValueError when it is not installed."""
    if reason := Motion().missing():
        raise ValueError(f"warping error and flicker cannot be measured: {reason}")
    estimate = dis()
    settings = {"flow": "DIS, medium, at the clip's own size"}
    return [
        ClipMetric(
            "warping-error",
            lambda frames, caption: {"": warping_error(frames, estimate)},
            settings={
                **settings,
                "variant": "mean squared change in 0..1 along the flow",
                "left out": f"what misses itself by more than {RELATIVE} of both ways' squares + {ABSOLUTE} pixels",
            },
            remedy="have no points that can be followed from one frame to the next",
        ),
        ClipMetric(
            "flicker",
            lambda frames, caption: {"": flicker(frames, estimate)},
            settings={
                **settings,
                "variant": "mean absolute change in 0..1 against the frames around",
                "still": f"flow under {STILL} of {UNIT_WIDTH}ths of the width in two frames",
            },
            remedy="have no points that stand still for three frames",
        ),
    ]
