"""Run one benchmark: `python -m benchmarks NAME`."""

from __future__ import annotations

import sys

from . import unet

BENCHMARKS = {"unet": unet.against_diffusers, "swap": unet.cost_of_swap_attention}

if len(sys.argv) != 2 or sys.argv[1] not in BENCHMARKS:
    sys.exit(f"usage: python -m benchmarks NAME, where NAME is one of {', '.join(BENCHMARKS)}")
BENCHMARKS[sys.argv[1]]()
