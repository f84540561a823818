"""What a curation found, as a page that opens without a network, and the same numbers as JSON."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from videofactory_core.atomic import write_text

from ..page import page, table
from .curation import Curation, rows_of
from .decide import Decision, Rules, decide
from .figures import Bars, Histogram, draw_bars, draw_histogram
from .stage import Row

if TYPE_CHECKING:
    import pyarrow as pa

# Categories of figure 1: seconds, and words of a caption.
SECONDS = (2, 5, 10, 20, 30)
WORDS = (6, 11, 16, 21)
# How many pictures stand in a strip, and how wide they are.
STRIP, THUMBNAIL = 8, 160
# Bins of a score of which a strip is shown.
STRIPS = 5
# Different errors that the page lists, and clips that it names of each: a browser has trouble with very many.
LISTED, NAMED = 1000, 3
SCORES = {
    "o_avg": "average motion O_avg, pixels of 640",
    "o_md": "deviation of motion O_md, pixels of 640",
    "ratio": "O_avg / O_md",
    "affine_residual": "motion that no camera explains, pixels of 640",
    "text_edge": "share of text in the band along the edges",
    "aesthetic": "aesthetic score",
}
# What of the clips is needed here.
COLUMNS = ("name", "start", "end", "caption", "caption_text", *SCORES)


@dataclass(frozen=True)
class Removal:
    """Clips that a rule removes: all that break it, and those that no rule before it has removed."""

    rule: str
    alone: int
    in_order: int
    measured: int


@dataclass(frozen=True)
class Numbers:
    """Everything that the page shows but pictures."""

    clips: int
    kept: int
    seconds: float
    seconds_kept: float
    removals: tuple[Removal, ...]
    durations: Bars
    captions: Bars
    scores: Mapping[str, Histogram]
    errors: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Strip:
    """Clips of one bin of a score, by their places in the table."""

    score: str
    title: str
    places: Sequence[int]


@dataclass(frozen=True)
class Cell:
    """A clip that is shown; `picture` is an address, "" without any."""

    row: Row
    decision: Decision
    picture: str


def count(clips: pa.Table, rules: Rules) -> Numbers:
    """The numbers of a curation, from its table with `COLUMNS`."""
    gone, removals = np.zeros(len(clips), bool), []
    for rule, passes in rules.passes(clips).items():
        breaking = ~np.array(passes.fill_null(True))
        in_order = int((breaking & ~gone).sum())
        removals.append(Removal(rule, int(breaking.sum()), in_order, len(passes) - passes.null_count))
        gone |= breaking
    failed = clips["errors"].to_numpy() != ""
    kept = ~gone & ~failed
    seconds = clips["end"].to_numpy() - clips["start"].to_numpy()
    captions = map(caption_of, rows_of(clips.select(["caption", "caption_text"])))
    measured = {name: clips[name].drop_null().to_numpy() for name in SCORES}
    thresholds = {name: (value,) for name, value in vars(rules).items()}
    return Numbers(
        len(clips),
        int(kept.sum()),
        sum(seconds.tolist()),
        sum(seconds[kept].tolist()),
        tuple(removals),
        Bars.of(seconds, SECONDS, "s"),
        Bars.of(np.array([len(caption.split()) for caption in captions if caption]), WORDS, "words"),
        {name: Histogram.of(values, thresholds.get(name, ())) for name, values in measured.items() if len(values)},
        tuple((row["name"], error) for row in rows_of(clips.filter(failed)) for error in row["errors"].splitlines()),
    )


def caption_of(row: Row) -> str:
    """A clip's caption: the one made for it, else the one that its source had; "" without any."""
    return row.get("caption_text") or row.get("caption") or ""


def write_report(curation: Curation) -> Path:
    """Write `report.json` and `report.html` into the curation's folder; returns the page's path."""
    import pyarrow as pa

    rules, clips = curation.config.decide, curation.table(COLUMNS)
    numbers, failed = count(clips, rules), list(curation.failed_sources())
    data = {**dataclasses.asdict(numbers), "failed_sources": [list(item) for item in failed]}
    # Names of files may have what UTF-8 does not.
    write_text(curation.folder / "report.json", json.dumps(data, indent=2, ensure_ascii=False), "replace")
    strips = list(_strips(clips))
    places = sorted({place for strip in strips for place in strip.places})
    shown = clips.take(pa.array(places, pa.int64()))
    pictures = curation.pictures(shown["clip_id"].to_pylist())
    cells = {
        place: Cell(row, decision, thumbnail(pictures[row["clip_id"]]) if row["clip_id"] in pictures else "")
        for place, row, decision in zip(places, rows_of(shown), decide(shown, rules), strict=True)
    }
    path = curation.folder / "report.html"
    write_text(path, _page(numbers, rules, strips, cells, failed), "replace")
    return path


def thumbnail(image: bytes) -> str:
    """A small JPEG as the address of a picture."""
    from PIL import Image

    picture = Image.open(io.BytesIO(image), formats=["JPEG"])
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _strips(clips: pa.Table) -> Iterator[Strip]:
    """Clips to be shown: of each score its worst, its best and some between, from bins of as many clips each."""
    for score in SCORES:
        values = clips[score].to_numpy()
        # What is no number comes last.
        order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]
        bins = min(STRIPS, math.ceil(len(order) / STRIP))
        for i in range(bins):
            end, places = "", order[i * len(order) // bins : (i + 1) * len(order) // bins]
            if bins > 1 and i == 0:
                end, places = "lowest: ", places[:STRIP]
            elif bins > 1 and i == bins - 1:
                end, places = "highest: ", places[-STRIP:]
            places = places[:: math.ceil(len(places) / STRIP)]
            yield Strip(score, f"{end}{values[places[0]]:.3g} to {values[places[-1]]:.3g}", places.tolist())


STYLE = """
.box:has(.errors) { max-height: 36rem; }
h4 { font-size: .85rem; font-weight: 400; color: var(--faint); margin: .75rem 0 .25rem; }
.rules td { white-space: pre-line; font-variant-numeric: tabular-nums; color: var(--faint); }
.rules td::first-line { color: var(--ink); } .rules :is(th, td) + * { text-align: right; }
.rules td + td { white-space: pre; }
.errors { table-layout: fixed; width: 100%; } .errors th:nth-child(2) { width: 4rem; }
.errors td { white-space: pre-line; overflow-wrap: anywhere; font-size: .85rem; }
svg text.threshold { fill: var(--mark); font-weight: 600; }
svg line.threshold { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 4 3; }
.strip { display: flex; gap: .6rem; overflow-x: auto; padding-bottom: .5rem; }
.clip { width: 160px; flex: none; font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; }
.clip :is(img, i) { display: block; width: 160px; height: 90px; object-fit: contain; background: var(--line); }
.clip i { line-height: 90px; text-align: center; color: var(--faint); }
.clip small { display: block; color: var(--faint); } .removed b { color: var(--mark); } .removed img { opacity: .5; }
.clip span { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow: hidden; }
"""
# Whatever stands in names, the page fetches and runs nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def _page(
    numbers: Numbers,
    rules: Rules,
    strips: Sequence[Strip],
    cells: Mapping[int, Cell],
    failed: Sequence[tuple[str, str]],
) -> str:
    parts = [f"<h1>{numbers.kept:,} of {numbers.clips:,} clips kept</h1>"]
    if numbers.clips:
        unit, length = ("hours", 3600) if numbers.seconds > 7200 else ("seconds", 1)
        parts.append(f"<p>{numbers.seconds_kept / length:,.1f} of {numbers.seconds / length:,.1f} {unit}.</p>")
        parts += ["<h2>What the rules removed</h2>", _removals(numbers, rules), "<h2>Distributions</h2>"]
        parts.append("<p>The last bar of a score also holds what lies beyond.</p>")
        parts.append('<div class="figures">' + draw_bars("duration of the clips", numbers.durations))
        if any(numbers.captions.counts):
            parts.append(draw_bars("length of the captions", numbers.captions))
        parts += [draw_histogram(SCORES[score], histogram) for score, histogram in numbers.scores.items()]
        parts.append("</div>")
    if strips:
        parts.append("<h2>Clips by score</h2>")
    for score, group in groupby(strips, lambda strip: strip.score):
        parts.append(f"<h3>{escape(SCORES[score])}</h3>")
        for strip in group:
            clips = "".join(_clip(cells[place], score) for place in strip.places)
            parts.append(f'<h4>{escape(strip.title)}</h4><div class="strip" tabindex="0">{clips}</div>')
    errors = [*((name, f"scenes: {error}") for name, error in failed), *numbers.errors]
    parts += [f"<h2>Errors ({len(errors):,})</h2>", _errors(errors) if errors else "<p>None.</p>"]
    return page("Curation", POLICY, STYLE, parts)


def _removals(numbers: Numbers, rules: Rules) -> str:
    """The rules in their order, and how many clips are left after each."""
    words, left = rules.told(), numbers.clips
    rows = [("all clips", "", "", "", f"{left:,}")]
    for removal in numbers.removals:
        left -= removal.in_order
        alone, measured = removal.alone, removal.measured
        share = f"{alone / measured:.1%}\nof {measured:,}" if measured else "not measured"
        rule = f"{removal.rule}\n{words[removal.rule]}"
        rows.append((rule, f"{alone:,}", share, f"{removal.in_order:,}", f"{left:,}"))
    if left > numbers.kept:
        rows.append(("errors\nno stage fails", "", "", f"{left - numbers.kept:,}", f"{numbers.kept:,}"))
    head = ("rule", "break it", "share", "removed in order", "left")
    return table("rules", head, rows)


def _clip(cell: Cell, score: str) -> str:
    decision = cell.decision
    reasons = [f"removed: {', '.join(decision.removed_by)}"] if decision.removed_by else []
    reasons += [f"{error.partition(':')[0]} failed" for error in decision.errors]
    picture = f'<img src="{cell.picture}" alt="">' if cell.picture else "<i>no picture</i>"
    caption = escape(caption_of(cell.row))
    return (
        f'<div class="clip{"" if decision.kept else " removed"}">{picture}'
        f"{cell.row[score]:.3g} <b>{escape(', '.join(reasons) or 'kept')}</b>"
        f'<small>{escape(cell.row["name"])}</small><span title="{caption}">{caption}</span></div>'
    )


def _errors(errors: Sequence[tuple[str, str]]) -> str:
    """How often each stage failed; then how, the most frequent first, and where."""
    stages = Counter(error.partition(":")[0] for _, error in errors)
    names: dict[str, list[str]] = {}
    for name, error in errors:
        names.setdefault(error, []).append(name)
    alike = sorted(names.items(), key=lambda item: -len(item[1]))
    rows = [(error, f"{len(found):,}", _some(found)) for error, found in alike[:LISTED]]
    told = ", ".join(f"{stage} {number:,}" for stage, number in stages.most_common())
    left_out = f" The {LISTED:,} most frequent follow; report.json has all." if len(alike) > LISTED else ""
    return f"<p>{escape(told)}.{left_out}</p>{table('errors', ('error', 'number', 'clip or source'), rows)}"


def _some(names: Sequence[str]) -> str:
    more = [f"and {len(names) - NAMED:,} more"] if len(names) > NAMED else []
    return "\n".join([*names[:NAMED], *more])
