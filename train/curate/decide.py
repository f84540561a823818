"""Which clips stay: the paper's rules over the scores, in its order (section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .motion import moves

if TYPE_CHECKING:
    import pyarrow as pa


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

    def passes(self, clips: pa.Table) -> dict[str, pa.Array]:
        """Each rule by its name: whether the clips pass, null where its score was not measured."""
        import pyarrow as pa
        import pyarrow.compute as pc

        limits = {"o_avg_over": self.o_avg, "ratio_under": self.ratio, "o_md_over": self.o_md}
        motion = [
            None if o_avg is None else moves(o_avg, o_md, **limits)
            for o_avg, o_md in zip(clips["o_avg"].to_pylist(), clips["o_md"].to_pylist(), strict=True)
        ]
        return {
            "duration": pc.greater_equal(pc.subtract(clips["end"], clips["start"]), self.min_seconds - 1e-6),
            "text": pc.less(clips["text_edge"], self.text_edge),
            "motion": pa.array(motion, pa.bool_()),
            "aesthetics": pc.greater_equal(clips["aesthetic"], self.aesthetic),
        }

    def told(self) -> dict[str, str]:
        """Each rule by its name, in words."""
        return {
            "duration": f"{self.min_seconds:g} s or longer",
            "text": f"less than {self.text_edge:g} of every text in the band along the edges",
            "motion": f"O_avg > {self.o_avg:g}, and O_avg / O_md < {self.ratio:g} or O_md > {self.o_md:g}",
            "aesthetics": f"score {self.aesthetic:g} or higher",
        }


@dataclass(frozen=True)
class Decision:
    """What becomes of a clip: `removed_by` names every rule that it breaks, in order; `errors` what went wrong."""

    removed_by: tuple[str, ...]
    errors: tuple[str, ...]

    @property
    def kept(self) -> bool:
        return not self.removed_by and not self.errors


def decide(clips: pa.Table, rules: Rules) -> Iterator[Decision]:
    """Join the scores of each clip: rules whose score was not measured remove nothing, an error removes."""
    passes = {name: column.to_pylist() for name, column in rules.passes(clips).items()}
    for i, errors in enumerate(clips["errors"].to_pylist()):
        yield Decision(tuple(name for name in passes if passes[name][i] is False), tuple(errors.splitlines()))
