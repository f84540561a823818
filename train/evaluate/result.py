"""What a measurement found, with all that it depends on, as a file; and results side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from videofactory_core.atomic import write_text

RESULTS = "results.json"
# Raised when older files can no longer be read.
FORMAT = 1
# Two results may differ in these settings and stand side by side.
NO_MATTER = ("versions",)


@dataclass(frozen=True)
class Floor:
    """What real videos get where generated ones stood: `value` of `n` videos against `against` others.

    `generated` is what as many generated videos get against the same others, to be compared with it: equal to the
    result's own value only where `n` and `against` are. A metric of single clips needs no others, and has 0 there.
    """

    value: float
    n: int
    against: int
    generated: float
    # Where the real videos come from, in words.
    source: str


@dataclass(frozen=True)
class Result:
    """One metric's value of `n` generated videos.

    `interval` holds its 95 % (None: there are too few videos to tell), `floor` is None where nothing real was given,
    and `limit` is the value that a line in 1/n has without end, None where it was not asked for.
    """

    metric: str
    value: float
    interval: tuple[float, float] | None
    n: int
    # All that the value depends on but the generated videos: numbers, words, and a dictionary `versions`.
    settings: Mapping[str, Any]
    floor: Floor | None = None
    limit: float | None = None


@dataclass(frozen=True)
class ScoredClip:
    """A generated video with its scores, None where a metric does not apply to it."""

    name: str
    # Relative to the folder of the file, with slashes; absolute where another drive leaves no choice.
    path: str
    caption: str
    scores: Mapping[str, float | None]


@dataclass(frozen=True)
class Scores:
    """The results of one set of generated videos."""

    # In words, with the counts.
    generated: str
    real: str
    results: tuple[Result, ...]
    clips: tuple[ScoredClip, ...]
    # Names and reasons, of both sides.
    left_out: tuple[tuple[str, str], ...] = ()
    # What whoever reads the results should know.
    notes: tuple[str, ...] = ()
    # Of metrics in whose values less is better.
    less_is_better: tuple[str, ...] = field(default=())

    def of(self, metric: str) -> Result:
        return next(result for result in self.results if result.metric == metric)


def write_results(scores: Scores, folder: Path) -> Path:
    """Write `results.json` into a folder, which is made; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS
    text = json.dumps({"format": FORMAT, **asdict(scores)}, indent=1, ensure_ascii=False, allow_nan=False)
    # Names of files need not be text.
    write_text(path, text + "\n", "replace")
    return path


def read_results(path: Path) -> Scores:
    """What `write_results` wrote, from the file or its folder; ValueError with the remedy when it is no such file."""
    path = path / RESULTS if path.is_dir() else path
    remedy = "score the videos again"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("format") != FORMAT:
            raise ValueError("of another version")
        return Scores(**{**data, **{key: _READ[key](value) for key, value in data.items() if key in _READ}})
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name a file {RESULTS} or its folder") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} holds no results ({error}): {remedy}") from error


def _result(data: Mapping[str, Any]) -> Result:
    interval, floor = data["interval"], data["floor"]
    return Result(
        **{
            **data,
            "interval": None if interval is None else (float(interval[0]), float(interval[1])),
            "floor": None if floor is None else Floor(**floor),
        }
    )


_READ: Mapping[str, Any] = {
    "results": lambda items: tuple(_result(item) for item in items),
    "clips": lambda items: tuple(ScoredClip(**item) for item in items),
    "left_out": lambda items: tuple((name, reason) for name, reason in items),
    "notes": tuple,
    "less_is_better": tuple,
}


def differing(one: Result, other: Result) -> dict[str, tuple[Any, Any]]:
    """The settings in which two results differ, with both values, None where one has no such setting."""
    first, second = one.settings, other.settings
    keys = [key for key in dict.fromkeys((*first, *second)) if key not in NO_MATTER]
    return {key: (first.get(key), second.get(key)) for key in keys if first.get(key) != second.get(key)}


def check_comparable(sets: Mapping[str, Scores]) -> None:
    """ValueError, naming metrics, settings and both values, when results of one metric differ in a setting."""
    refused = []
    for metric in metrics_of(list(sets.values())):
        found = {name: result for name, scores in sets.items() for result in scores.results if result.metric == metric}
        first, *others = found
        for other in others:
            refused += [
                f"{metric}: {key} is {_said(a)} in {first} and {_said(b)} in {other}"
                for key, (a, b) in differing(found[first], found[other]).items()
            ]
    if refused:
        raise ValueError(f"the results do not compare ({'; '.join(refused)}): score again alike, or ask for it anyway")


def metrics_of(sets: Sequence[Scores]) -> list[str]:
    """The metrics of which any of them has a result, each once."""
    return list(dict.fromkeys(result.metric for scores in sets for result in scores.results))


def relative(path: Path, folder: Path) -> str:
    """How a file in `folder` names `path`."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        # Windows has no way from one drive to another.
        return Path(path).absolute().as_posix()


def _said(value: Any) -> str:
    return "not set" if value is None else str(value)
