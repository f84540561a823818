"""What a curation found, as a page that opens without a network, and the same numbers as JSON."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from videofactory_core.atomic import write_text

from .curation import Curation
from .decide import Decision, Rules
from .figures import Bars, Histogram, draw_bars, draw_histogram
from .stage import Row

# Categories of figure 1: seconds, and words of a caption.
SECONDS = (2, 5, 10, 20, 30)
WORDS = (6, 11, 16, 21)
# How many pictures stand in a strip, and how wide they are.
STRIP, THUMBNAIL = 8, 160
# Bins of a score of which a strip is shown.
STRIPS = 5
SCORES = {
    "o_avg": "average motion O_avg, pixels of 640",
    "o_md": "deviation of motion O_md, pixels of 640",
    "ratio": "O_avg / O_md",
    "affine_residual": "motion that no camera explains, pixels of 640",
    "text_edge": "share of text in the band along the edges",
    "aesthetic": "aesthetic score",
}


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


def count(clips: Sequence[tuple[Row, Decision]], rules: Rules) -> Numbers:
    """The numbers of a curation."""
    named = rules.named()
    names = list(named)
    kept = [row for row, decision in clips if decision.kept]
    removals = []
    for place, name in enumerate(names):
        breaking = [decision for _, decision in clips if name in decision.removed_by]
        first = sum(not set(names[:place]) & set(decision.removed_by) for decision in breaking)
        measured = sum(named[name](row) is not None for row, _ in clips)
        removals.append(Removal(name, len(breaking), first, measured))
    thresholds = {
        "o_avg": (rules.o_avg,),
        "o_md": (rules.o_md,),
        "ratio": (rules.ratio,),
        "text_edge": (rules.text_edge,),
        "aesthetic": (rules.aesthetic,),
    }
    scores = {}
    for name in SCORES:
        values = [row[name] for row, _ in clips if row.get(name) is not None]
        if values:
            scores[name] = Histogram.of(values, thresholds.get(name, ()))
    words = [len(text.split()) for row, _ in clips if (text := caption_of(row))]
    return Numbers(
        len(clips),
        len(kept),
        sum(length(row) for row, _ in clips),
        sum(length(row) for row in kept),
        tuple(removals),
        Bars.of([length(row) for row, _ in clips], SECONDS, "s"),
        Bars.of(words, WORDS, "words"),
        scores,
        tuple((row["name"], error) for row, _ in clips for error in row["errors"]),
    )


def length(row: Row) -> float:
    """Seconds of a clip."""
    return float(row["end"] - row["start"])


def caption_of(row: Row) -> str:
    """A clip's caption: the one made for it, else the one that its source had; "" without any."""
    return row.get("caption_text") or row.get("caption") or ""


def write_report(curation: Curation) -> Path:
    """Write `report.json` and `report.html` into the curation's folder; returns the page's path."""
    clips = list(curation.clips())
    failed = list(curation.failed_sources())
    numbers = count(clips, curation.config.decide)
    strips = _strips(clips)
    pictures = curation.pictures({row["clip_id"] for _, rows in strips for row in rows})
    data = {**dataclasses.asdict(numbers), "failed_sources": [list(item) for item in failed]}
    # Names of files may have what UTF-8 does not.
    write_text(curation.folder / "report.json", json.dumps(data, indent=2, ensure_ascii=False), "replace")
    decisions = {row["clip_id"]: decision for row, decision in clips}
    page = _page(numbers, strips, decisions, failed, {name: thumbnail(image) for name, image in pictures.items()})
    path = curation.folder / "report.html"
    write_text(path, page, "replace")
    return path


def thumbnail(image: bytes) -> str:
    """A small JPEG as the address of a picture."""
    from PIL import Image

    picture = Image.open(io.BytesIO(image), formats=["JPEG"])
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _strips(clips: Sequence[tuple[Row, Decision]]) -> list[tuple[str, list[Row]]]:
    """Clips to be shown: of each score its worst, its best and some between."""
    strips = []
    for name in SCORES:
        rows = sorted((row for row, _ in clips if row.get(name) is not None), key=lambda row: row[name])
        for part in range(STRIPS) if rows else ():
            low, high = part * len(rows) // STRIPS, (part + 1) * len(rows) // STRIPS
            chosen = rows[low:high]
            chosen = chosen[:STRIP] if part == 0 else chosen[-STRIP:] if part == STRIPS - 1 else _spread(chosen)
            if chosen:
                title = f"{SCORES[name]}: {chosen[0][name]:.3g} to {chosen[-1][name]:.3g}"
                strips.append(
                    (title + (" (lowest)" if part == 0 else " (highest)" if part == STRIPS - 1 else ""), chosen)
                )
    return strips


def _spread(rows: Sequence[Row]) -> list[Row]:
    return [rows[i * len(rows) // STRIP] for i in range(STRIP)] if len(rows) > STRIP else list(rows)


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222; }
h1, h2 { font-weight: 600; } table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .9rem .25rem 0; text-align: right; } th:first-child, td:first-child { text-align: left; }
tr + tr { border-top: 1px solid #ddd; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(26rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; }
rect { fill: #3b6ea5; } text { font-size: 11px; fill: #444; }
line { stroke: #c0392b; stroke-dasharray: 4 3; } text.mark { fill: #c0392b; }
.strip { display: flex; gap: .4rem; overflow-x: auto; } .strip div { width: 160px; flex: none; font-size: 12px; }
.strip img { width: 160px; display: block; } .removed { opacity: .55; }
"""


def _page(
    numbers: Numbers,
    strips: Sequence[tuple[str, Sequence[Row]]],
    decisions: Mapping[str, Decision],
    failed: Sequence[tuple[str, str]],
    pictures: Mapping[str, str],
) -> str:
    share = numbers.kept / numbers.clips if numbers.clips else 0.0
    parts = [
        f"<h1>{numbers.kept} of {numbers.clips} clips kept ({share:.0%})</h1>",
        f"<p>{numbers.seconds_kept:.0f} of {numbers.seconds:.0f} seconds.</p>",
        "<h2>What the rules removed</h2>",
        _table(
            ("rule", "clips that break it", "share", "removed in this order", "measured"),
            [
                (r.rule, r.alone, f"{r.alone / max(1, r.measured):.1%}", r.in_order, f"{r.measured} of {numbers.clips}")
                for r in numbers.removals
            ],
        ),
        '<h2>Distributions</h2><div class="figures">',
        draw_bars("duration of the clips", numbers.durations),
        draw_bars("length of the captions", numbers.captions) if any(numbers.captions.counts) else "",
        *(draw_histogram(SCORES[name], histogram) for name, histogram in numbers.scores.items()),
        "</div><h2>Clips by score</h2>",
    ]
    for title, rows in strips:
        cells = "".join(_cell(row, decisions[row["clip_id"]], pictures.get(row["clip_id"], "")) for row in rows)
        parts.append(f'<h3>{escape(title)}</h3><div class="strip">{cells}</div>')
    errors = [*failed, *numbers.errors]
    parts.append(f"<h2>Errors ({len(errors)})</h2>")
    counts = Counter(error.partition(":")[0] for _, error in errors)
    parts.append(_table(("what", "how often"), counts.most_common()) if counts else "<p>None.</p>")
    parts.append(_table(("clip or source", "error"), errors) if errors else "")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Curation</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _cell(row: Row, decision: Decision, picture: str) -> str:
    kind = "" if decision.kept else ' class="removed"'
    why = "kept" if decision.kept else ", ".join(decision.removed_by) or "error"
    image = f'<img src="{picture}" alt="">' if picture else ""
    return f"<div{kind}>{image}{escape(row['name'])}<br>{escape(why)}<br>{escape(caption_of(row))}</div>"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ("".join(f"<td>{escape(str(value))}</td>" for value in row) for row in rows)
    return f"<table><tr>{cells}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
