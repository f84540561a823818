"""The paper's claim in small: `videofactory evaluate ablation` on moving shapes, Table 2's rows in windows.

Every run starts from the demo model as it stands before its first stage with Swap-CA, trains the same batches with the
same noise, and is measured on combinations of words that no training saw.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

import torch
from videofactory_train.evaluate.ablation import Outcome, compare
from videofactory_train.evaluate.bench import Budget
from videofactory_train.loop import Schedule
from videofactory_train.recipe import ModelRecipe, read_recipe

from videofactory_core.objective import Objective

RECIPE = Path("train/recipes/demo.toml")
FOLDER = Path("runs/merges")
# A variable, because how many runs fit beside each other depends on the machine alone.
WORKERS = "MERGES_WORKERS"
MERGES = ("none", "temporal queries", "spatial queries", "swapped")
SEEDS = (0, 1, 2)
BUDGET = Budget(
    Schedule(
        steps=1000, batch_size=8, learning_rate=5e-4, warmup_steps=50, ema_decay=0.99, log_every=50, save_every=250
    ),
    Objective(timestep_shift=4.0),
)
SCORES = ("colour", "shape", "direction", "background", "steady", "all")


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(outcomes: Mapping[str, Sequence[Outcome]], budget: Budget) -> str:
    """The comparison in Markdown: the mean over the seeds, their standard deviation, and each seed."""
    first = next(iter(outcomes.values()))
    seeds = [f"seed {outcome.seed}" for outcome in first]
    quantiles = [f"at {(i + 0.5) / budget.quantiles:g}" for i in range(budget.quantiles)]
    lines = [row(["validation loss", "mean", "deviation", *seeds, *quantiles, "U-Net weights"])]
    lines.append(row(["---"] * (4 + len(seeds) + len(quantiles))))
    start = first[0].before
    lines.append(row(["(start)", f"{mean(start):.5f}", "", *[""] * len(seeds), *(f"{x:.5f}" for x in start), ""]))
    for name, found in outcomes.items():
        losses = [outcome.loss for outcome in found]
        by_quantile = [mean(at) for at in zip(*(outcome.after for outcome in found), strict=True)]
        numbers = [mean(losses), spread(losses), *losses, *by_quantile]
        lines.append(row([name, *(f"{x:.5f}" for x in numbers), f"{found[0].parameters / 1e6:.2f} M"]))
    lines += ["", row(["checker, mean (each seed)", *SCORES]), row(["---"] * (1 + len(SCORES)))]
    for name, found in outcomes.items():
        shares = [[outcome.scores[score] for outcome in found] for score in SCORES]
        cells = [f"{mean(each):.0%} ({', '.join(f'{share:.0%}' for share in each)})" for each in shares]
        lines.append(row([name, *cells]))
    return "\n".join(lines)


def spread(values: Sequence[float]) -> float:
    """Standard deviation, 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def report() -> None:
    """Make what is missing of the comparison in `runs/merges`, then print its tables."""
    recipe = read_recipe(RECIPE)
    assert isinstance(recipe, ModelRecipe)
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    try:
        workers = max(1, int(os.environ.get(WORKERS, cores)))
    except ValueError:
        sys.exit(f"{WORKERS}={os.environ[WORKERS]!r} is not a number of processes")
    found = compare(recipe, FOLDER, MERGES, SEEDS, BUDGET, workers)
    if found.missing:
        sys.exit(f"missing: {found.missing}")
    device, steps = found.outcomes["none"][0].device, BUDGET.schedule.steps
    print(f"{steps} steps of {BUDGET.schedule.batch_size} clips on {device}, torch {torch.__version__};", end=" ")
    print(f"{BUDGET.clips} held-out clips for the loss, {BUDGET.samples} samples a run for the checker")
    print(table(found.outcomes, BUDGET))
