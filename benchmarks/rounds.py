"""Timing in turns, so that what else the machine does meets all sides alike."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

ROUNDS = 3

Run = Callable[[], object]


def seconds(runs: dict[str, Run], device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run, one after the other in each of `ROUNDS` rounds behind one of warm-up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_:
                found[name].append(time.perf_counter() - start)
    return found
