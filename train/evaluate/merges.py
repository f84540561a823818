"""The paper's rows: which merge stands at the ends of blocks, and what the paper found of it (Tables 2 and 3)."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from videofactory_core.config import UNetConfig

# The row that all others are compared with.
WITHOUT = "none"


@dataclass(frozen=True)
class Paper:
    """What the paper says of a row, on its own data; None where it says nothing, or it is not known here.

    Millions of weights, and GB and milliseconds of a forward pass over 4 x 16 x 32 x 32.
    """

    weights: float | None = None
    gigabytes: float | None = None
    milliseconds: float | None = None
    fvd: float | None = None
    clipsim: float | None = None


@dataclass(frozen=True)
class Row:
    """What a row changes in a U-Net's configuration."""

    changes: Mapping[str, Any]
    paper: Paper = field(default_factory=Paper)

    def config(self, unet: UNetConfig) -> UNetConfig:
        """`unet` with the row's merge, in the windows that it has, or the paper's where it has none."""
        return replace(unet, **{"swap_window": unet.swap_window or UNetConfig.swap_window, **self.changes})


ROWS: Mapping[str, Row] = {
    # Table 2: without Swap-CA, which leaves the 1x1x1 fusion; with it, by who asks, in windows and over whole clips.
    WITHOUT: Row({"merge": "fuse"}, Paper(1480, 9.37, 135.35, 566.16, 0.3070)),
    "temporal queries": Row({"merge": "swap", "swap_query": "temporal"}, Paper(1601, fvd=563.12, clipsim=0.3086)),
    "spatial queries": Row({"merge": "swap", "swap_query": "spatial"}, Paper(1601, fvd=490.60, clipsim=0.3076)),
    "swapped": Row({"merge": "swap", "swap_query": "swapped"}, Paper(1601, 9.83, 148.24, 475.09, 0.3107)),
    "global temporal queries": Row({"merge": "swap", "swap_query": "temporal", "swap_window": None}),
    "global spatial queries": Row({"merge": "swap", "swap_query": "spatial", "swap_window": None}),
    "global swapped": Row({"merge": "swap", "swap_query": "swapped", "swap_window": None}, Paper(1601, 22.96, 201.5)),
    # Table 3, besides the first row and "swapped": CogVideo's, Tune-A-Video's, and windows that ask themselves.
    "mixture": Row({"merge": "mixture"}),
    "sparse causal": Row({"merge": "sparse_causal"}),
    "window self-attention": Row({"merge": "window_self"}),
}


def file_name(row: str) -> str:
    """A row's name without blanks, as files and options have it."""
    return row.replace(" ", "-")


def choose(names: Sequence[str]) -> tuple[str, ...]:
    """The rows that `names` name, with blanks or hyphens, in the order of the tables; all when it is empty.

    Raises ValueError for a name that is none.
    """
    known = {file_name(row): row for row in ROWS}
    chosen = set()
    for name in names:
        key = file_name(name.strip())
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1)
            meant = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(known)}"
            raise ValueError(f"there is no row {name!r}; {meant}")
        chosen.add(known[key])
    return tuple(row for row in ROWS if row in chosen) or tuple(ROWS)
