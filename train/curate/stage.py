"""What a stage of curation is: a function from rows to columns, with a name that changes when its results would."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
# Maps rows to as many rows that hold the stage's columns.
Work = Callable[[Sequence[Row]], list[Row]]


@dataclass(frozen=True)
class Stage(ABC):
    """One stage; its fields are its settings."""

    name: ClassVar[str]
    # Raised with every change of its results.
    version: ClassVar[int]
    # Stages that come before it; its rows are those of the last, and without any they are sources.
    needs: ClassVar[tuple[str, ...]]
    # Rows that are worked on and written together: what a killed run loses.
    rows_per_part: ClassVar[int] = 64
    # Whether its rows are sources, each of which becomes clips: the result of a row is then `{"clips": [...]}`.
    splits: ClassVar[bool] = False

    @property
    def identity(self) -> str:
        """The column that tells its rows apart."""
        return "source_id" if self.splits else "clip_id"

    @classmethod
    @abstractmethod
    def columns(cls) -> dict[str, pa.DataType]:
        """What it adds to a row."""

    def missing(self) -> str:
        """A sentence that names what would enable the stage, "" when nothing is missing."""
        return ""

    @abstractmethod
    def open(self) -> Work:
        """Load what it works with, in the process that works; ValueError and OSError of the result concern a row."""

    def key(self, before: Sequence[str] = ()) -> str:
        """`name@hash`, where the hash is of version, settings and the keys `before` of the stages that it needs."""
        facts = [self.name, self.version, dataclasses.asdict(self), *before]
        digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=6)
        return f"{self.name}@{digest.hexdigest()}"
