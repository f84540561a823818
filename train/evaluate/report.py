"""What a measurement found, for reading: Markdown, and a page on which the videos play beside their prompts."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import quote

import numpy as np

from videofactory_core.atomic import write_text

from ..curate.figures import Histogram, draw_histogram
from ..page import page, table
from .result import Result, ScoredClip, Scores, check_comparable, metrics_of

PLAYED, SHOWN = (".mp4", ".webm", ".m4v", ".mov", ".ogv", ".mkv"), (".gif",)
HEAD = ("metric", "value", "95 %", "n", "real videos get", "limit")


def write_report(scores: Scores, folder: Path) -> Path:
    """Write `report.md` and `report.html` into the folder to which the clips' paths are relative; returns the page."""
    write_text(folder / "report.md", markdown(scores), "replace")
    path = folder / "report.html"
    write_text(path, _page(scores), "replace")
    return path


# Markdown


def markdown(scores: Scores) -> str:
    """The results with their settings, and what was left out."""
    lines = [f"Generated: {scores.generated}", ""]
    if scores.real:
        lines += [f"Real: {scores.real}", ""]
    lines += [*_rows(HEAD, [_cells(result, scores) for result in scores.results]), ""]
    lines += [f"* {_plain(note)}" for note in scores.notes]
    for names, told in _settings(scores):
        lines += ["", f"`{names}`: {_plain(told)}"]
    if scores.left_out:
        lines += ["", *_rows(("left out", "why"), scores.left_out)]
    return "\n".join(lines) + "\n"


def side_by_side(sets: Mapping[str, Scores], anyway: bool = False) -> str:
    """A table in Markdown of several sets by their names.

    Raises ValueError, naming the settings, when these differ; `anyway` tells them below the table instead.
    """
    differ = ""
    try:
        check_comparable(sets)
    except ValueError as error:
        if not anyway:
            raise
        differ = str(error)
    rows = []
    for metric in metrics_of(list(sets.values())):
        found = [[result for result in scores.results if result.metric == metric] for scores in sets.values()]
        rows.append([metric, *(f"{_value(some[0])} {_interval(some[0])}".strip() if some else "" for some in found)])
    lines = _rows(("metric", *sets), rows)
    return "\n".join([*lines, "", _plain(differ)] if differ else lines) + "\n"


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in row)} |" for row in cells]


def _plain(text: str) -> str:
    """Without line breaks, and without what Markdown would take for HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _cells(result: Result, scores: Scores) -> tuple[str, ...]:
    """A result's line of the table `HEAD`."""
    less = " (less is better)" if result.metric in scores.less_is_better else ""
    floor, limit = result.floor, result.limit
    real = ""
    if floor is not None:
        real = f"{floor.value:.4g} (n = {floor.n})"
        if floor.generated != result.value:
            real = f"{floor.value:.4g}, generated {floor.generated:.4g} (n = {floor.n} against {floor.against})"
    return (
        result.metric + less,
        _value(result),
        _interval(result),
        f"{result.n:,}",
        real,
        "" if limit is None else f"{limit:.4g}",
    )


def _value(result: Result) -> str:
    return f"{result.value:.4g}"


def _interval(result: Result) -> str:
    return "" if result.interval is None else f"[{result.interval[0]:.4g}, {result.interval[1]:.4g}]"


def _settings(scores: Scores) -> Iterator[tuple[str, str]]:
    """The settings of the results in a line, with the names of all that have these."""
    names: dict[str, list[str]] = {}
    for result in scores.results:
        parts = []
        for key, value in result.settings.items():
            many = isinstance(value, Mapping)
            parts.append(f"{key}: {', '.join(f'{name} {item}' for name, item in value.items()) if many else value}")
        if result.floor is not None:
            parts.append(f"what real videos get: {result.floor.source}")
        names.setdefault("; ".join(parts), []).append(result.metric)
    return ((", ".join(some), told) for told, some in names.items())


# The page

STYLE = """
body { overflow-wrap: anywhere; } .box { max-height: 36rem; }
a { color: var(--bar); }
table { overflow-wrap: normal; }
td { font-variant-numeric: tabular-nums; } .results :is(th, td) { white-space: nowrap; }
.results :is(th, td):is(:nth-child(2), :nth-child(4), :nth-child(6)) { text-align: right; }
.results td + td + td { color: var(--faint); }
.left td { overflow-wrap: anywhere; font-size: .85rem; min-width: 7rem; }
small, dd, dt { font-size: .8rem; color: var(--faint); } li { margin: .2rem 0; }
.order { display: flex; flex-wrap: wrap; gap: .5rem 1rem; margin: 1rem 0; } select { font: inherit; max-width: 100%; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(15rem, 100%), 1fr)); gap: 1.5rem; }
.clip { content-visibility: auto; contain-intrinsic-size: auto 20rem; min-width: 0; line-height: 1.35; }
.clip :is(video, img, i) {
  display: grid; place-items: center; width: 100%; aspect-ratio: 16 / 9; object-fit: contain;
  background: var(--line); color: var(--faint);
}
.clip p { margin: .4rem 0; } .clip p:empty { display: none; }
dl { display: grid; grid-template-columns: 1fr auto; gap: 0 1rem; margin: .4rem 0 0; }
dt, dd { margin: 0; } dd { text-align: right; font-variant-numeric: tabular-nums; }
dt.chosen, dd.chosen { color: var(--ink); font-weight: 600; }
"""
SCRIPT = """
const clips = document.querySelector('.clips'), cards = [...clips.children];
const [score, order] = document.querySelectorAll('.order select');
const scores = new Map(cards.map(card => [card, JSON.parse(card.dataset.scores)]));
function arrange() {
  const key = score.selectedIndex - 1, sign = order.selectedIndex ? -1 : 1, sorted = [...cards];
  const value = card => scores.get(card)[key];
  // What has no score comes last in both orders; equal ones stay in the order of their names.
  if (key >= 0) sorted.sort((a, b) => (value(a) === null) - (value(b) === null) || sign * (value(a) - value(b)));
  else if (sign < 0) sorted.reverse();
  clips.replaceChildren(...sorted);
  for (const card of cards)
    card.querySelectorAll('dt, dd').forEach((cell, i) => cell.classList.toggle('chosen', i >> 1 === key));
}
for (const chooser of [score, order]) chooser.addEventListener('change', arrange);
arrange();
// Only what is seen plays, and nothing by itself where motion is not wanted.
const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
const watcher = new IntersectionObserver(entries => entries.forEach(({target, isIntersecting}) => {
  if (!isIntersecting) target.pause(); else if (!still) target.play().catch(() => {});
}));
document.querySelectorAll('video').forEach(video => watcher.observe(video));
"""
# Whatever stands in names and prompts, the page loads only files beside it and runs only its own script.
POLICY = (
    "default-src 'none'; media-src 'self' file:; img-src 'self' file:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
)


def _page(scores: Scores) -> str:
    title = f"Scores of {len(scores.clips):,} videos"
    parts = [f"<h1>{title}</h1>", f"<p>Generated: {escape(scores.generated)}</p>"]
    if scores.real:
        parts.append(f"<p>Real: {escape(scores.real)}</p>")
    parts.append(table("results", HEAD, [_cells(result, scores) for result in scores.results]))
    if scores.notes:
        parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in scores.notes)}</ul>")
    keys = list(dict.fromkeys(key for clip in scores.clips for key in clip.scores))
    figures = "".join(_histograms(scores, keys))
    if figures:
        parts.append(f'<h2>Scores of single clips</h2><div class="figures">{figures}</div>')
    parts += ["<h2>Clips</h2>", _choosers(keys), '<div class="clips">']
    parts += [_clip(clip, keys) for clip in scores.clips]
    parts.append("</div>")
    if scores.left_out:
        parts += [f"<h2>Left out ({len(scores.left_out):,})</h2>", table("left", ("video", "why"), scores.left_out)]
    told = "".join(f"<h3>{escape(names)}</h3><p><small>{escape(some)}</small></p>" for names, some in _settings(scores))
    parts.append(f"<h2>Settings</h2>{told}")
    return page(title, POLICY, STYLE, parts, SCRIPT)


def _histograms(scores: Scores, keys: Sequence[str]) -> Iterator[str]:
    for key in keys:
        values = np.array([value for clip in scores.clips if (value := clip.scores.get(key)) is not None])
        if len(values) > 1:
            yield draw_histogram(key, Histogram.of(values, ()))


def _choosers(keys: Sequence[str]) -> str:
    names = "".join(f"<option>{escape(key)}</option>" for key in keys)
    return (
        f'<div class="order"><label>order by <select><option>name</option>{names}</select></label>'
        "<label><select aria-label=direction><option>least first</option><option>most first</option></select></label>"
        "</div>"
    )


def _clip(clip: ScoredClip, keys: Sequence[str]) -> str:
    address, suffix = escape(address_of(clip.path)), PurePosixPath(clip.path).suffix.lower()
    caption = escape(clip.caption)
    if suffix in PLAYED:
        picture = (
            f'<video src="{address}" controls muted loop playsinline preload="none" aria-label="{caption}"></video>'
        )
    elif suffix in SHOWN:
        picture = f'<img src="{address}" loading="lazy" alt="{caption}">'
    else:
        picture = "<i>browsers do not play this file</i>"
    found = [clip.scores.get(key) for key in keys]
    cells = "".join(
        f"<dt>{escape(key)}</dt><dd>{'' if value is None else f'{value:.4g}'}</dd>"
        for key, value in zip(keys, found, strict=True)
    )
    return (
        f'<div class="clip" data-scores="{escape(json.dumps(found))}">{picture}<p>{caption}</p>'
        f'<small><a href="{address}">{escape(clip.name)}</a></small><dl>{cells}</dl></div>'
    )


def address_of(path: str) -> str:
    """The address of a file, relative to the page where the path is."""
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(path).is_absolute():
            return kind(path).as_uri()
    # A colon would make a scheme of what stands before it.
    return quote(path, errors="surrogateescape")
