"""A report as one HTML file that needs nothing else: its frame, its colours in light and dark, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fff; --ink: #222; --faint: #666; --line: #ddd; --bar: #3b6ea5; --mark: #c0392b;
}
@media (prefers-color-scheme: dark) {
  :root { --ground: #17191c; --ink: #e6e6e6; --faint: #a5a8ad; --line: #3a3d42; --bar: #6ea3dc; --mark: #ff8577; }
}
body {
  font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--ground);
}
h1, h2, h3 { font-weight: 600; line-height: 1.25; } h2 { margin-top: 2.5rem; } h3 { font-size: 1rem; }
.box { overflow: auto; margin: 1rem 0; }
table { border-collapse: collapse; } tr + tr { border-top: 1px solid var(--line); }
th, td { padding: .3rem 1rem .3rem 0; text-align: left; vertical-align: top; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1.5rem 2.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .4rem; }
svg { display: block; width: 100%; } svg rect { fill: var(--bar); } svg line { stroke: var(--line); }
svg text { font-size: 11.5px; fill: var(--faint); }
"""


def page(title: str, policy: str, style: str, parts: Iterable[str], script: str = "") -> str:
    """The whole page of `parts`; `policy` says what it may load, `style` what it looks like beyond `STYLE`."""
    run = f"<script>{script}</script>" if script else ""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}{style}</style><body>'
        f"{''.join(parts)}{run}</body></html>\n"
    )


def table(kind: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of class `kind`, in a box that scrolls by itself."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="box" tabindex="0"><table class="{kind}"><tr>{names}</tr>{lines}</table></div>'
