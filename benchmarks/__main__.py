"""Run one benchmark: `python -m benchmarks NAME`."""

from __future__ import annotations

import sys
from importlib import import_module

# Each is imported when it runs, so that a benchmark needs only what it uses.
BENCHMARKS = {
    "unet": ("unet", "against_diffusers"),
    "swap": ("unet", "cost_of_swap_attention"),
    "demo": ("demo", "report"),
    "given": ("given", "report"),
    "long": ("long", "report"),
    "command": ("command", "report"),
    "gpu": ("gpu", "report"),
    "training": ("training", "report"),
    "recipes": ("recipes", "report"),
    "merges": ("merges", "report"),
    "convert": ("convert", "report"),
    "upscale": ("upscale", "speed"),
    "upscale-quality": ("upscale", "quality"),
    "curate": ("curate", "report"),
    "fvd": ("fvd", "report"),
}

if len(sys.argv) != 2 or sys.argv[1] not in BENCHMARKS:
    sys.exit(f"usage: python -m benchmarks NAME, where NAME is one of {', '.join(BENCHMARKS)}")
module, function = BENCHMARKS[sys.argv[1]]
getattr(import_module(f"benchmarks.{module}"), function)()
