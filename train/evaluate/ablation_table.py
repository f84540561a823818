"""A comparison of merges as the paper's tables, with the paper's figures beside those that were found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

import torch

from . import costs
from .merges import ROWS, WITHOUT
from .result import metrics_of

if TYPE_CHECKING:
    from .ablation import Comparison, Outcome

# Of the paper: headings, and what stands under them by its field, as it is or against the row without Swap-CA.
PAPER_QUALITY = (("paper: FVD", "fvd", "{:.2f}"), ("CLIPSIM", "clipsim", "{:.4f}"))
PAPER_COSTS = (("paper: M", "weights", "{:.0f}"), ("ms", "milliseconds", "{:.1f}"), ("GB", "gigabytes", "{:.2f}"))
# Ours: headings, fields, and the unit's size.
COSTS = (
    ("weights, M", "parameters", 1e6),
    ("forward, ms", "forward_seconds", 1e-3),
    ("GiB", "forward_gib", 1.0),
    ("step, ms", "step_seconds", 1e-3),
    ("GiB", "step_gib", 1.0),
)
# Student's t for 95 % on both sides, by degrees of freedom from 1 on; beyond the last it would be a little narrower.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % in which the mean of more seeds would lie, by Student's t; None of a single one."""
    if len(values) < 2:
        return None
    half = STUDENT[min(len(values) - 1, len(STUDENT)) - 1] * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def against(outcomes: Sequence[Outcome], others: Sequence[Outcome]) -> list[float]:
    """Ratios of validation losses, of the seeds that both have: these saw the same batches and the same noise."""
    losses = {other.seed: other.loss for other in others}
    return [outcome.loss / losses[outcome.seed] for outcome in outcomes if outcome.seed in losses]


def tables(found: Comparison) -> str:
    """All that there is to say of a comparison, in Markdown."""
    schedule = found.budget.schedule
    every = [outcome for of_row in found.outcomes.values() for outcome in of_row]
    batch = schedule.batch_size * schedule.gradient_accumulation_steps
    lines = [
        f"{len(every)} runs of {schedule.steps} steps of {batch} clips, seeds {', '.join(map(str, found.seeds))};"
        f" {found.budget.clips} held-out clips for the loss, {found.budget.samples} sampled by each run;"
        f" torch {', '.join(sorted({outcome.torch for outcome in every})) or torch.__version__}"
    ]
    if every:
        lines += [f"{title}: {value}" for title, value in _origins(every)]
        lines.append("Means over seeds [95 % by Student's t], ratios seed by seed; the paper's figures: its own data.")
        lines += ["", *_markdown(_quality(found)), "", *_verdict(found)]
    if found.costs:
        lines += [
            "",
            f"Forward pass over one clip and step of the training, each in a process of its own; medians of"
            f" {len(found.costs)} rounds, memory at the peak with weights. The paper's pass is over 4 x 16 x 32 x 32.",
            "",
            *_markdown(_costs(found)),
        ]
    if found.missing:
        lines += ["", "Missing:", *_missing(found)]
    return "\n".join(lines)


def _origins(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str]]:
    for what, title in (("data", "Learned from"), ("device", "On")):
        if values := sorted({getattr(outcome, what) for outcome in outcomes} - {""}):
            yield title, ", ".join(values)


def _missing(found: Comparison) -> Iterator[str]:
    """A line for every row that lacks seeds, with how far they are or why they cannot be had."""
    for name in found.outcomes:
        seeds = [f"seed {seed} ({reason})" for (row, seed), reason in found.missing.items() if row == name]
        if seeds:
            yield f"* {name}: {', '.join(seeds)}"


def _quality(found: Comparison) -> Iterator[list[str]]:
    """Losses and scores, over a row of headings."""
    without = found.outcomes.get(WITHOUT, ())
    shares = list(next((o.scores for of_row in found.outcomes.values() for o in of_row if o.scores), {}))
    scored = {name: [s for o in of_row if (s := found.scores(o))] for name, of_row in found.outcomes.items()}
    metrics = metrics_of([scores for of_row in scored.values() for scores in of_row])
    yield ["merge", "seeds", "validation loss", "to none", *shares, *metrics, *_headings(PAPER_QUALITY)]
    for name, outcomes in found.outcomes.items():
        cells = [name, str(len(outcomes))]
        cells.append(_over_seeds([outcome.loss for outcome in outcomes], "{:.5f}"))
        cells.append(_over_seeds([] if name == WITHOUT else against(outcomes, without), "{:.3f}"))
        cells += [_over_seeds([o.scores[share] for o in outcomes if o.scores], "{:.0%}", 0, 1) for share in shares]
        for metric in metrics:
            values = [r.value for scores in scored[name] for r in scores.results if r.metric == metric]
            cells.append(_over_seeds(values, "{:.4g}"))
        yield [*cells, *_paper(name, PAPER_QUALITY)]


def _costs(found: Comparison) -> Iterator[list[str]]:
    """Weights, time and memory, over a row of headings."""
    yield ["merge", *_headings(COSTS), *_headings(PAPER_COSTS)]
    for name in found.outcomes:
        cells = [name]
        for _, field, unit in COSTS:
            ratio = math.nan if name == WITHOUT else costs.ratio(found.costs, name, WITHOUT, field)
            cells += [_number(costs.median(found.costs, name, field) / unit, "{:.4g}"), _number(ratio, "{:.3f}")]
        yield [*cells, *_paper(name, PAPER_COSTS)]


def _headings(columns: Sequence[tuple[str, str, object]]) -> list[str]:
    """Each with one for its ratio."""
    return [heading for title, *_ in columns for heading in (title, "to none")]


def _paper(name: str, columns: Sequence[tuple[str, str, str]]) -> list[str]:
    """The paper's figures of a row, each with its ratio to that of the row without Swap-CA."""
    cells = []
    for _, field, form in columns:
        value, base = (getattr(ROWS[row].paper, field) for row in (name, WITHOUT))
        cells += [_number(value, form), "" if value is None or name == WITHOUT else f"{value / base:.3f}"]
    return cells


def _verdict(found: Comparison) -> Iterator[str]:
    """Which rows differ from the one without Swap-CA by more than their seeds do."""
    without = found.outcomes.get(WITHOUT, ())
    kinds: dict[str, list[str]] = {"lower": [], "higher": [], "not told apart from it": []}
    for name, outcomes in found.outcomes.items():
        bounds = interval(against(outcomes, without))
        if name == WITHOUT or bounds is None:
            continue
        low, high = bounds
        kinds["lower" if high < 1 else "higher" if low > 1 else "not told apart from it"].append(name)
    if said := [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]:
        yield f"Validation loss against {WITHOUT}, by these seeds: {'; '.join(said)}."


def _over_seeds(values: Sequence[float], form: str, low: float = -math.inf, high: float = math.inf) -> str:
    """The mean with its interval, cut to `low` and `high`."""
    if not values:
        return ""
    bounds = interval(values)
    if bounds is None:
        return form.format(values[0])
    bounds = max(low, bounds[0]), min(high, bounds[1])
    return f"{form.format(mean(values))} [{form.format(bounds[0])}, {form.format(bounds[1])}]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else form.format(value)


def _markdown(rows: Iterator[list[str]]) -> Iterator[str]:
    """Rows of cells, the first with headings, as lines of a table."""
    for number, cells in enumerate(rows):
        yield f"| {' | '.join(cells)} |"
        if not number:
            yield f"| {' | '.join(['---'] * len(cells))} |"
