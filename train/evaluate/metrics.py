"""Metrics by their names: of sets of videos by a network's features, and of single clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.moving_shapes import COMBINATIONS, Combination, caption
from ..data.shape_checker import check, summarise
from . import frechet

if TYPE_CHECKING:
    from .fvd import FVD

Array = NDArray[Any]


class Extractor(Protocol):
    """Makes features of videos, with a network or by hand."""

    # The network and what is done before it, in a word.
    variant: str
    # ValueError below.
    least_frames: int

    def describe(self) -> dict[str, str]:
        """What the features depend on: the hash of weights, and preprocessing in words."""
        ...

    def __call__(self, frames: Tensor) -> Tensor:
        """`[B, D]` or `[B, F, D]`, float32 on the CPU, of `frames [B, F, H, W, 3]`, uint8."""
        ...


@dataclass(frozen=True)
class SetMetric:
    """A metric of generated videos together, mostly against real ones, by features `[N, ...]` of both."""

    name: str
    extractor: Extractor
    # The values by the ends of their names ("" is the metric's own), of generated and, if needed, real features.
    compare: Callable[..., Mapping[str, float]]
    needs_real: bool = True
    # Videos of a side.
    least: int = 2
    # Whether a video may be drawn twice for the interval.
    repeats: bool = True
    bounds: tuple[float, float] = (0.0, math.inf)
    less: bool = True
    # The limit of each value without end, of the same features and a seed.
    follow: Callable[..., Mapping[str, float]] | None = None

    def keyed(self, *sets: Array) -> dict[str, float]:
        """The values by their whole names."""
        return {key_of(self.name, end): value for end, value in self.compare(*sets).items()}

    def limits(self, *sets: Array, seed: int) -> dict[str, float]:
        found = self.follow(*sets, seed=seed) if self.follow is not None else {}
        return {key_of(self.name, end): value for end, value in found.items()}

    def less_is_better(self, key: str) -> bool:
        return self.less and key.startswith(self.name)


@dataclass(frozen=True)
class ClipMetric:
    """A metric of each clip alone, or with its caption; a folder has the mean."""

    name: str
    # The values by the ends of their names, of `frames [F, H, W, 3]`, uint8, and a caption; none where none applies.
    measure: Callable[[Tensor, str], Mapping[str, float]]
    ends: tuple[str, ...] = ("",)
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs_caption: bool = False
    # Whether less is better, which of steadiness it is not: nothing is as steady as a still.
    less: bool = False
    # What to say of videos that it does not apply to.
    remedy: str = "have no caption: write it into a .txt file of the same name"

    @property
    def keys(self) -> list[str]:
        return [key_of(self.name, end) for end in self.ends]

    def keyed(self, frames: Tensor, caption: str) -> dict[str, float]:
        """The values by their whole names; none for a clip that lacks the caption that is needed."""
        if self.needs_caption and not caption:
            return {}
        return {key_of(self.name, end): float(value) for end, value in self.measure(frames, caption).items()}

    def less_is_better(self, key: str) -> bool:
        return self.less and key in self.keys


Metric = SetMetric | ClipMetric


def key_of(name: str, end: str) -> str:
    return f"{name}-{end}" if end else name


# By name

STEADINESS = ("warping-error", "flicker")
FVDS = ("fvd-styleganv", "fvd-videogpt", "fvd-i3d", "fvd-videomae")
INCEPTION = ("fid", "is")
NAMES = (*FVDS, "stream", "clipsim", *STEADINESS, "shapes", *INCEPTION)


def open_metrics(
    names: Sequence[str], weights: Mapping[str, Path], device: torch.device, *, run_code: bool = False
) -> list[Metric]:
    """The metrics called `names`, each once, with `weights` by their names (of `fid` and `is`: "inception").

    `run_code` allows StyleGAN-V's TorchScript. Raises ValueError with the remedy for a name or for weights that are
    not known, and when weights or a library are missing or are others.
    """
    known = {*NAMES, "inception"} - {*STEADINESS, "shapes", *INCEPTION}
    for name, among in [*((name, set(NAMES)) for name in names), *((name, known) for name in weights)]:
        if name not in among:
            what = "metric" if among is not known else "metric with weights"
            raise ValueError(f"{name!r} is no {what}: use {', '.join(sorted(among))}")
    names = list(dict.fromkeys(names))
    metrics: list[Metric] = []
    for name in names:
        if name in FVDS:
            from . import fvd

            metrics.append(fvd_metric(fvd.load(name, _weights(name, weights), device, run_code=run_code)))
        elif name == "stream":
            from . import stream

            metrics.append(stream.metric(_weights(name, weights), device))
        elif name == "clipsim":
            from . import clipsim

            metrics.append(clipsim.metric(_weights(name, weights), device))
        elif name in STEADINESS:
            from . import steadiness

            metrics += [metric for metric in steadiness.metrics() if metric.name == name]
        elif name == "shapes":
            metrics.append(shapes())
    if chosen := [name for name in names if name in INCEPTION]:
        from . import inception

        found = inception.metrics(_weights("inception", weights), device)
        metrics += [metric for metric in found if metric.name in chosen]
    return metrics


def _weights(name: str, weights: Mapping[str, Path]) -> Path:
    if name not in weights:
        raise ValueError(f"{name} is measured by a network: give a local copy of its weights")
    return weights[name]


def fvd_metric(extractor: FVD) -> SetMetric:
    """The Frechet distance of an extractor's features."""
    ddof = extractor.ddof
    return SetMetric(
        extractor.variant,
        extractor,
        lambda generated, real: {"": frechet.between(generated, real, ddof)},
        follow=lambda generated, real, seed: {"": frechet.extrapolate(generated, real, seed=seed, ddof=ddof).value},
    )


def shapes() -> ClipMetric:
    """Whether clips of moving shapes show what their captions say, by the pixel checker; folders have shares."""
    combinations = {caption(combination): combination for combination in COMBINATIONS}

    def judge(frames: Tensor, prompt: str) -> Mapping[str, float]:
        combination = combinations.get(prompt)
        if combination is None:
            return {}
        return summarise([(combination, check(frames.permute(3, 0, 1, 2) / 127.5 - 1))])

    return ClipMetric(
        "shapes",
        judge,
        (*Combination._fields, "steady", "all"),
        settings={"variant": "pixel checker"},
        needs_caption=True,
        remedy="have no caption of a moving shape",
    )
