"""What a stage of curation is: a function from rows to columns, with a name that changes when its results would."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..data.content import digest_pieces

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
# Maps rows to as many rows that hold the stage's columns.
Work = Callable[[Sequence[Row]], list[Row]]
# Parts of a file whose beginning, middle and end stand for its content: files of weights may differ in a few layers.
PARTS = 16


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
    # Fields that name a file or folder with weights.
    weights_in: ClassVar[tuple[str, ...]] = ()

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
        """`name@hash`, where the hash is of version, settings and the keys `before` of the stages that it needs.

        Weights count by what is in them and not by where they lie, as long as they are there; OSError when they cannot
        be read.
        """
        settings = dataclasses.asdict(self)
        settings |= {name: fingerprint(settings[name]) for name in self.weights_in if os.path.exists(settings[name])}
        facts = [self.name, self.version, settings, *before]
        digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=6)
        return f"{self.name}@{digest.hexdigest()}"


def fingerprint(place: str) -> str:
    """BLAKE2b of the lengths and of pieces of a file, or of the files in a folder and their names below it.

    Hidden files and descriptions (.md) do not count. OSError when one of the others cannot be read.
    """
    root = Path(place)
    digest = hashlib.blake2b(digest_size=16)
    for name, path in [("", root)] if root.is_file() else sorted(_files(root)):
        status = path.stat()
        pieces = _pieces(str(path.absolute()), status.st_size, status.st_mtime_ns)
        digest.update(f"{name}\0{status.st_size}\0{pieces}\0".encode(errors="surrogatepass"))
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names below a folder, and the files."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and path.suffix.lower() != ".md" and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), path


@cache
def _pieces(path: str, size: int, changed: int) -> str:
    """What stands for a file's content, read once as long as it is not `changed` (in nanoseconds)."""
    digest = hashlib.blake2b(digest_size=16)
    bounds = [size * part // PARTS for part in range(PARTS + 1)]
    for begin, end in pairwise(bounds):
        digest_pieces(digest, path, (begin, end - begin))
    return digest.hexdigest()
