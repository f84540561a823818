"""Which clips stay: the paper's rules over the scores, in its order (section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .motion import moves
from .stage import Row


@dataclass(frozen=True)
class Rules:
    """The `[decide]` table: thresholds, which can change without anything being computed again."""

    # Seconds that a clip lasts at least.
    min_seconds: float = 2.0
    # Text: the largest share of a box that may lie in the band along the edges.
    text_edge: float = 0.5
    # Motion: it must be above this on average, and uneven by one of these two (see `moves`).
    o_avg: float = 0.2
    ratio: float = 2.0
    o_md: float = 6.0
    # Aesthetic score.
    aesthetic: float = 4.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not math.isfinite(value):
                raise ValueError(f"{name}: {value} is no threshold; use a number")

    def named(self) -> dict[str, Callable[[Row], bool | None]]:
        """Each rule by its name: whether a clip passes, None where its score was not measured."""
        return {
            "duration": lambda row: row["end"] - row["start"] >= self.min_seconds - 1e-6,
            "text": lambda row: None if row.get("text_edge") is None else row["text_edge"] < self.text_edge,
            "motion": self._motion,
            "aesthetics": lambda row: None if row.get("aesthetic") is None else row["aesthetic"] >= self.aesthetic,
        }

    def _motion(self, row: Row) -> bool | None:
        if row.get("o_avg") is None:
            return None
        return moves(row["o_avg"], row["o_md"], o_avg_over=self.o_avg, ratio_under=self.ratio, o_md_over=self.o_md)


@dataclass(frozen=True)
class Decision:
    """What becomes of a clip: `removed_by` names every rule that it breaks, in order; `errors` what went wrong."""

    removed_by: tuple[str, ...]
    errors: tuple[str, ...]

    @property
    def kept(self) -> bool:
        return not self.removed_by and not self.errors


def decide(row: Row, rules: Rules) -> Decision:
    """Join the scores of a clip: rules whose score was not measured remove nothing, an error removes."""
    removed = tuple(name for name, passes in rules.named().items() if passes(row) is False)
    return Decision(removed, tuple(row.get("errors") or ()))
