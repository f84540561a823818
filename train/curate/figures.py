"""Figures of a report as SVG: bars of categories, and histograms with a threshold drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT, LABELS = 460, 200, 34
BINS = 24


@dataclass(frozen=True)
class Bars:
    """How many of something there are in each category."""

    labels: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: Sequence[float], edges: Sequence[float], unit: str) -> Bars:
        """Values in the categories between `edges`, the first from 0 and the last without an end."""
        bounds = [0.0, *edges, math.inf]
        labels = [f"{a:g}-{b:g} {unit}" if b < math.inf else f"from {a:g} {unit}" for a, b in pairwise(bounds)]
        counts = [sum(a <= value < b for value in values) for a, b in pairwise(bounds)]
        return cls(tuple(labels), tuple(counts))


@dataclass(frozen=True)
class Histogram:
    """How values are spread between `low` and `high`; what lies beyond counts at the ends."""

    low: float
    high: float
    counts: tuple[int, ...]
    thresholds: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float], thresholds: Sequence[float]) -> Histogram:
        """Up to the value that one in a hundred exceeds, and beyond the thresholds."""
        ordered = sorted(value for value in values if math.isfinite(value))
        top = ordered[int(0.99 * (len(ordered) - 1))] if ordered else 1.0
        low = min([0.0, *ordered[:1]])
        high = max([top, *(1.2 * threshold for threshold in thresholds), low + 1e-6])
        counts = [0] * BINS
        for value in values:
            share = (min(max(value, low), high) - low) / (high - low)
            counts[min(BINS - 1, int(share * BINS))] += 1
        return cls(low, high, tuple(counts), tuple(thresholds))

    def edges(self) -> list[float]:
        """Where bins begin and end."""
        return [self.low + (self.high - self.low) * i / BINS for i in range(BINS + 1)]


def draw_bars(title: str, bars: Bars) -> str:
    """The categories as an SVG element."""
    return _frame(title, list(bars.labels), bars.counts, marks=[])


def draw_histogram(title: str, histogram: Histogram) -> str:
    """The histogram as an SVG element, its thresholds as dashed lines."""
    edges = histogram.edges()
    labels = [f"{edges[i]:.3g}" if i % (BINS // 4) == 0 else "" for i in range(BINS)]
    marks = [(x - histogram.low) / (histogram.high - histogram.low) for x in histogram.thresholds]
    return _frame(title, labels, histogram.counts, marks, list(histogram.thresholds))


def _frame(
    title: str, labels: Sequence[str], counts: Sequence[int], marks: Sequence[float], values: Sequence[float] = ()
) -> str:
    most, room = max([1, *counts]), HEIGHT - LABELS
    step = WIDTH / max(1, len(counts))
    parts = [f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for i, (label, count) in enumerate(zip(labels, counts, strict=True)):
        height = (room - 18) * count / most
        x = i * step
        parts.append(
            f'<rect x="{x + step * 0.08:.1f}" y="{room - height:.1f}" width="{step * 0.84:.1f}" '
            f'height="{height:.1f}"><title>{escape(label)}: {count}</title></rect>'
        )
        if count and step > 40:
            parts.append(
                f'<text x="{x + step / 2:.1f}" y="{room - height - 4:.1f}" text-anchor="middle">{count}</text>'
            )
        if label:
            anchor = "middle" if step > 40 else "start"
            place = x + step / 2 if step > 40 else x + 1
            parts.append(f'<text x="{place:.1f}" y="{room + 14}" text-anchor="{anchor}">{escape(label)}</text>')
    for share, value in zip(marks, values, strict=True):
        x = share * WIDTH
        parts.append(f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{room}"><title>{value:g}</title></line>')
        parts.append(f'<text class="mark" x="{x + 3:.1f}" y="12" text-anchor="start">{value:g}</text>')
    return "".join(parts) + "</svg></figure>"
