"""Figures of a report as SVG: bars of categories, and histograms with a threshold drawn."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# Of a drawing, in its own units; room above for a threshold and a count, and below for labels.
WIDTH, HEIGHT, ABOVE, BELOW = 440, 200, 30, 20
BINS = 24
# How many numbers stand below a histogram, about, and how much room one needs beside a line.
TICKS, NUMBER = 6, 50


@dataclass(frozen=True)
class Bars:
    """How many of something there are in each category."""

    labels: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: NDArray[np.float64], edges: Sequence[float], unit: str) -> Bars:
        """Values in the categories between `edges`, the first from 0 and the last without an end."""
        bounds = [0.0, *edges, math.inf]
        labels = [f"{a:g}-{b:g} {unit}" if b < math.inf else f"from {a:g} {unit}" for a, b in pairwise(bounds)]
        counts = [int(((a <= values) & (values < b)).sum()) for a, b in pairwise(bounds)]
        return cls(tuple(labels), tuple(counts))


@dataclass(frozen=True)
class Histogram:
    """How values are spread between `low` and `high`; what lies beyond counts at the ends."""

    low: float
    high: float
    counts: tuple[int, ...]
    thresholds: tuple[float, ...]

    @classmethod
    def of(cls, values: NDArray[np.float64], thresholds: Sequence[float]) -> Histogram:
        """Up to the value that one in a hundred exceeds, and beyond the thresholds; what is no number is left out."""
        ordered = np.sort(values[np.isfinite(values)])
        low = min([0.0, *ordered[:1].tolist(), *thresholds])
        top = float(ordered[int(0.99 * (len(ordered) - 1))]) if len(ordered) else 1.0
        high = max([top, *(1.2 * threshold for threshold in thresholds), low + 1e-6])
        shares = (np.clip(values[~np.isnan(values)], low, high) - low) / (high - low)
        places = np.minimum((shares * BINS).astype(int), BINS - 1)
        return cls(low, high, tuple(np.bincount(places, minlength=BINS).tolist()), tuple(thresholds))

    def edges(self) -> list[float]:
        """Where bins begin and end."""
        return [self.low + (self.high - self.low) * i / BINS for i in range(BINS + 1)]

    def place(self, value: float) -> float:
        """Where a value stands in a drawing."""
        return WIDTH * (value - self.low) / (self.high - self.low)


def draw_bars(title: str, bars: Bars) -> str:
    """The categories as an SVG element."""
    step, most = WIDTH / len(bars.counts), max(1, *bars.counts)
    parts = list(_bars(bars.counts, bars.labels))
    for i, (label, count) in enumerate(zip(bars.labels, bars.counts, strict=True)):
        x = (i + 0.5) * step
        parts.append(_text(x, HEIGHT - 5, label))
        parts.append(_text(x, _top(count, most) - 4, f"{count:,}"))
    return _figure(title, parts)


def draw_histogram(title: str, histogram: Histogram) -> str:
    """The histogram as an SVG element, its thresholds as dashed lines."""
    edges, bottom = histogram.edges(), HEIGHT - BELOW
    labels = [f"{a:.3g} to {b:.3g}" for a, b in pairwise(edges)]
    # What lies beyond counts at the ends.
    labels[-1] = f"from {edges[-2]:.3g}"
    parts = [f'<line x1="0" y1="{ABOVE}" x2="{WIDTH}" y2="{ABOVE}"/>', *_bars(histogram.counts, labels)]
    parts.append(_text(WIDTH, ABOVE - 4, f"{max(histogram.counts):,} clips", "end"))
    for tick in _ticks(histogram.low, histogram.high):
        x = histogram.place(tick)
        anchor = "start" if x < 10 else "end" if x > WIDTH - 10 else "middle"
        parts.append(f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}"/>')
        parts.append(_text(x, HEIGHT - 5, f"{tick:g}", anchor))
    for threshold in histogram.thresholds:
        x = histogram.place(threshold)
        side, anchor = (-4, "end") if x > WIDTH - NUMBER else (4, "start")
        parts.append(f'<line class="threshold" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{bottom}"/>')
        parts.append(_text(x + side, 11, f"{threshold:g}", anchor, "threshold"))
    return _figure(title, parts)


def _bars(counts: Sequence[int], labels: Sequence[str]) -> Iterator[str]:
    """Bars side by side, which say what they are under the pointer."""
    step, most = WIDTH / len(counts), max(1, *counts)
    for i, (count, label) in enumerate(zip(counts, labels, strict=True)):
        top = _top(count, most)
        yield (
            f'<rect x="{(i + 0.08) * step:.1f}" y="{top:.1f}" width="{0.84 * step:.1f}" '
            f'height="{HEIGHT - BELOW - top:.1f}"><title>{escape(label)}: {count:,}</title></rect>'
        )


def _top(count: int, most: int) -> float:
    """Where a bar ends; one that is not empty is seen."""
    bottom = HEIGHT - BELOW
    return bottom - max((bottom - ABOVE) * count / most, 1.0 if count else 0.0)


def _ticks(low: float, high: float) -> Iterator[float]:
    """Round numbers from `low` to `high`, steps of 1, 2 or 5 apart."""
    least = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        # 3 * 0.1 is 0.30000000000000004.
        yield float(f"{i * step:.6g}")


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "") -> str:
    mark = f' class="{kind}"' if kind else ""
    return f'<text{mark} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _figure(title: str, parts: Sequence[str]) -> str:
    name, bottom = escape(title), HEIGHT - BELOW
    ground = f'<line x1="0" y1="{bottom}" x2="{WIDTH}" y2="{bottom}"/>'
    return (
        f"<figure><figcaption>{name}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{"".join(parts)}{ground}</svg></figure>'
    )
