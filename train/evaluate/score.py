"""Measuring a folder of generated videos: every metric with its interval, what real videos get, and its settings."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, stack
from tqdm import tqdm

from .metrics import Array, ClipMetric, Metric, SetMetric
from .result import Floor, Result, ScoredClip, Scores, relative
from .videos import Sampling, Videos, differences, read_videos

LIBRARIES = ("videofactory", "torch", "torchvision", "numpy", "av", "transformers")
# Of an interval, in percent.
QUANTILES = (2.5, 97.5)
# Over how many random choices of real videos the floor is the mean.
DRAWS = 5
# Streams of random numbers, so that none depends on which others are used.
INTERVAL, FLOOR = 1, 2


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is found besides the values, and how fast."""

    # Of the interval; 0 gives none.
    resamples: int = 200
    # Whether metrics that are straight lines in 1/n are followed to their limit.
    extrapolate: bool = False
    # Videos that are given to a network at a time, and that are decoded at a time (None: one for each core).
    batch: int = 8
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.resamples < 0:
            raise ValueError(f"resamples: {self.resamples} is no number; use 200, or 0 for no intervals")
        for key in ("batch", "workers"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key}: {value} is too few; use 1 or more")


@dataclass(frozen=True)
class Measured:
    """What metrics make of videos, in their order."""

    videos: Videos
    # Of each metric of sets by its name, `[N, ...]`.
    features: Mapping[str, Array]
    # Of each metric of clips by its key, NaN where it does not apply.
    scores: Mapping[str, Array]

    @cached_property
    def digest(self) -> str:
        return self.videos.digest()


def score(
    generated: Path,
    metrics: Sequence[Metric],
    out: Path,
    *,
    real: Path | None = None,
    second_real: Path | None = None,
    sampling: Sampling | None = None,
    scoring: Scoring | None = None,
    log: Callable[[str], None] = print,
) -> Scores:
    """Measure the videos in `generated`, against those in `real` where a metric compares.

    The floor is what real videos get in place of the generated: as many of `second_real` against `real`, or else of a
    random part of `real` against the rest. Paths of the scored clips are relative to `out`. Neither the order in which
    files are read nor `workers` changes a number, and `batch` only by rounding.

    Raises ValueError with the remedy when there is nothing to measure, a metric needs more frames than `sampling`
    has, or none of the metrics can be had from so few videos; a metric that cannot, among others, is told in the notes.
    """
    sampling, scoring = sampling or Sampling(), scoring or Scoring()
    _check(metrics, sampling, real)
    workers = scoring.workers or os.cpu_count() or 1
    sides: dict[str, Measured] = {}
    for side, folder in (("generated", generated), ("real", real), ("second real", second_real)):
        if folder is not None:
            videos = read_videos(folder, sampling, workers)
            sides[side] = measure(videos, metrics, scoring.batch, workers, side)
            log(f"{side}: {sides[side].videos.describe()}")
    made, given, more = (sides.get(side) for side in ("generated", "real", "second real"))
    assert made is not None
    if given is not None and more is not None and given.digest == more.digest:
        raise ValueError(f"{second_real} holds the same videos as {real}: name others, or none to split those")
    common = {
        "frames": sampling.frames,
        "fps": sampling.fps or "the files' own",
        "start": sampling.start,
        "seed": sampling.seed,
        "versions": _versions(),
    }
    found = _Findings(made, given, more, common, scoring)
    if given is not None:
        found.notes += differences(made.videos, given.videos)
    for metric in metrics:
        if isinstance(metric, SetMetric):
            found.add_sets(metric)
        else:
            found.add_clips(metric)
    if not found.results:
        raise ValueError("; ".join(found.notes))
    for note in found.notes:
        log(note)
    left_out = [
        (f"{side}: {name}", reason) for side, measured in sides.items() for name, reason in measured.videos.left_out
    ]
    less = [result.metric for result in found.results if any(m.less_is_better(result.metric) for m in metrics)]
    return Scores(
        generated=made.videos.describe(),
        real=given.videos.describe() if given else "",
        results=tuple(found.results),
        clips=tuple(_scored(made, out)),
        left_out=tuple(left_out),
        notes=tuple(found.notes),
        less_is_better=tuple(less),
    )


def measure(videos: Videos, metrics: Sequence[Metric], batch: int, workers: int, title: str = "") -> Measured:
    """Decode every video once and give it to all metrics; what turns out to be damaged is left out.

    Raises ValueError when nothing is left.
    """
    sets = [metric for metric in metrics if isinstance(metric, SetMetric)]
    single = [metric for metric in metrics if isinstance(metric, ClipMetric)]
    features: dict[str, dict[int, Array]] = {metric.name: {} for metric in sets}
    scores: dict[int, dict[str, float]] = {}
    broken: dict[int, str] = {}
    # Only videos of one size fit into one tensor.
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}

    def extract(some: Sequence[tuple[int, Tensor]]) -> None:
        frames = stack([frames for _, frames in some])
        # Some metrics share a network.
        made = {id(metric.extractor): metric.extractor for metric in sets}
        found = {key: extractor(frames).cpu().numpy() for key, extractor in made.items()}
        for metric in sets:
            features[metric.name].update(zip((number for number, _ in some), found[id(metric.extractor)], strict=True))

    frames_of = videos.decoded(workers)
    for number, frames in enumerate(tqdm(frames_of, title or "measure", len(videos), unit="clip", disable=None)):
        if isinstance(frames, str):
            broken[number] = frames
            continue
        caption = videos.videos[number].caption
        scores[number] = {key: value for metric in single for key, value in metric.keyed(frames, caption).items()}
        some = waiting.setdefault(tuple(frames.shape), [])
        some.append((number, frames))
        if len(some) == batch:
            extract(waiting.pop(tuple(frames.shape)))
        elif sum(map(len, waiting.values())) > 2 * batch:
            # Of many sizes, the largest group: videos that wait take memory.
            extract(waiting.pop(max(waiting, key=lambda shape: len(waiting[shape]))))
    for some in waiting.values():
        extract(some)
    kept = sorted(scores)
    if not kept:
        name, reason = videos.videos[0].name, broken[0]
        raise ValueError(f"none of the {len(videos)} videos in {videos.folder} can be decoded ({name}: {reason})")
    keys = dict.fromkeys(key for metric in single for key in metric.keys)
    return Measured(
        videos.without(broken.items()),
        {name: np.stack([rows[number] for number in kept]) for name, rows in features.items()},
        {key: np.array([scores[number].get(key, math.nan) for number in kept]) for key in keys},
    )


def interval(
    function: Callable[..., Mapping[str, float]],
    sets: Sequence[Array],
    values: Mapping[str, float],
    resamples: int,
    seed: int,
    repeats: bool = True,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> dict[str, tuple[float, float]]:
    """Where 95 % of the values of `function` fall in resamples of the `sets`, moved so that their mean is at `values`.

    A resample draws as many rows, with repeats; or half of them without, for functions that a row beside its copy
    misleads: the mean of n / 2 of n rows spreads as that of n repeated ones. Both hold fewer different rows than the
    sets have, which moves a distance, so that only how the values spread counts, and not where.
    """
    random = np.random.default_rng((seed, INTERVAL))

    def draw(rows: Array) -> Array:
        count = len(rows)
        return rows[random.integers(count, size=count) if repeats else random.permutation(count)[: count // 2]]

    found = [function(*map(draw, sets)) for _ in range(resamples)]
    intervals = {}
    for key, value in values.items():
        drawn = [some[key] for some in found]
        low, high = np.clip(np.percentile(drawn, QUANTILES) - np.mean(drawn) + value, *bounds).tolist()
        intervals[key] = low, high
    return intervals


# Results


@dataclass
class _Findings:
    """Results of what was measured, as they come together."""

    made: Measured
    given: Measured | None
    more: Measured | None
    # Settings that all metrics share.
    common: Mapping[str, Any]
    scoring: Scoring
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_sets(self, metric: SetMetric) -> None:
        """The results of a metric of sets, or a note on why there are none."""
        sides = {"generated": self.made.features[metric.name]}
        if metric.needs_real:
            assert self.given is not None
            sides["real"] = self.given.features[metric.name]
        side, fewest = min(((side, len(rows)) for side, rows in sides.items()), key=lambda item: item[1])
        if fewest < metric.least:
            self.notes.append(
                f"{metric.name} is not measured: it needs {metric.least} videos or more on each side, "
                f"and there is {fewest} {side}: add videos"
            )
            return
        sets, seed, resamples = list(sides.values()), self.common["seed"], self.scoring.resamples
        values, intervals = metric.keyed(*sets), {}
        if resamples and fewest >= (max(metric.least, 2) if metric.repeats else 2 * metric.least):
            intervals = interval(metric.keyed, sets, values, resamples, seed, metric.repeats, metric.bounds)
        floors = self._floors(metric)
        limits: Mapping[str, float] = {}
        if self.scoring.extrapolate:
            try:
                limits = metric.limits(*sets, seed=seed)
            except ValueError as error:
                self.notes.append(f"{metric.name}: {error}")
        settings = {
            "variant": metric.extractor.variant,
            **metric.extractor.describe(),
            **self.common,
            "interval": _told(resamples, metric.repeats),
            "generated videos": len(sides["generated"]),
        }
        if metric.needs_real and self.given is not None:
            settings |= {"real videos": len(self.given.videos), "real": self.given.digest}
        for key, value in values.items():
            found = intervals.get(key), len(sides["generated"]), settings, floors.get(key), limits.get(key)
            self.results.append(Result(key, value, *found))
        floor = next(iter(floors.values()), None)
        if floor is not None and floor.n < len(sides["generated"]):
            self.notes.append(
                f"{metric.name}: real videos are too few for their value at n = {len(sides['generated'])}; what they "
                f"get is of {floor.n} against {floor.against}, and so is the generated videos' value beside it"
            )

    def _floors(self, metric: SetMetric) -> dict[str, Floor]:
        """What real videos get in place of the generated, and as many generated against the same others."""
        if self.given is None:
            return {}
        real, generated = self.given.features[metric.name], self.made.features[metric.name]
        pool, splits = (self.more.features[metric.name], False) if self.more else (real, metric.needs_real)
        count = min(len(generated), len(pool) // 2 if splits else len(pool))
        if count < metric.least:
            return {}
        random = np.random.default_rng((self.common["seed"], FLOOR))
        pairs: dict[str, list[tuple[float, float]]] = {}
        for _ in range(1 if count == len(pool) == len(generated) else DRAWS):
            order, some = random.permutation(len(pool)), random.permutation(len(generated))[:count]
            others = [real[np.sort(order[count:])] if splits else real] if metric.needs_real else []
            stands_in = metric.keyed(pool[np.sort(order[:count])], *others)
            for key, value in metric.keyed(generated[np.sort(some)], *others).items():
                pairs.setdefault(key, []).append((stands_in[key], value))
        source = "a second set" if self.more else "a random part against the rest" if splits else "all of them"
        against = (len(real) - count if splits else len(real)) if metric.needs_real else 0
        means = {key: np.mean(found, axis=0).tolist() for key, found in pairs.items()}
        return {key: Floor(value, count, against, other, source) for key, (value, other) in means.items()}

    def add_clips(self, metric: ClipMetric) -> None:
        """The results of a metric of single clips, means over those that it applies to."""
        resamples = self.scoring.resamples
        settings = {**metric.settings, **self.common, "interval": _told(resamples)}
        if metric.needs_caption:
            settings["prompts"] = self.made.videos.prompts()
        for key in metric.keys:
            found, floor = _known(self.made.scores[key]), None
            missing = len(self.made.videos) - len(found)
            if missing and key == metric.keys[0]:
                self.notes.append(f"{metric.name}: {missing} of {len(self.made.videos)} videos {metric.remedy}")
            if not len(found):
                continue
            value, between = _mean(found), None
            if resamples and len(found) > 1:
                bounds = float(found.min()), float(found.max())
                between = interval(_mean, [found], value, resamples, self.common["seed"], bounds=bounds)[""]
            real = _known(self.given.scores[key]) if self.given else found[:0]
            if len(real):
                floor = Floor(_mean(real)[""], len(real), 0, value[""], "all of them")
            self.results.append(Result(key, value[""], between, len(found), settings, floor))


def _known(scores: Array) -> Array:
    return scores[~np.isnan(scores)]


def _mean(scores: Array) -> dict[str, float]:
    return {"": float(scores.mean())}


def _told(resamples: int, repeats: bool = True) -> str:
    return f"95 % of {resamples} {'bootstrap resamples' if repeats else 'random halves'}" if resamples else "none"


def _check(metrics: Sequence[Metric], sampling: Sampling, real: Path | None) -> None:
    """ValueError when the metrics cannot be had at all, before anything is decoded."""
    assert metrics, "no metrics"
    for metric in metrics:
        if isinstance(metric, SetMetric):
            if sampling.frames < metric.extractor.least_frames:
                raise ValueError(
                    f"{metric.name} needs {metric.extractor.least_frames} frames of each video or more, "
                    f"not {sampling.frames}: measure longer videos"
                )
            if real is None and metric.needs_real:
                raise ValueError(f"{metric.name} compares with real videos: name a folder of them")


def _scored(made: Measured, out: Path) -> list[ScoredClip]:
    keys = list(made.scores)
    table = [[None if math.isnan(value) else value for value in made.scores[key].tolist()] for key in keys]
    return [
        ScoredClip(
            video.name,
            relative(video.path, out),
            video.caption,
            {key: column[number] for key, column in zip(keys, table, strict=True)},
        )
        for number, video in enumerate(made.videos.videos)
    ]


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
