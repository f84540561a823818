"""From what is named on the command line to rows: video files, folders of them, shards, and lists of what to look for.

A source is known by its content, so that it is the same under any name, mount or machine, and worked on once however
it is reached; a file that has changed is another. Its path is text for Parquet: see `path_text`. A video inside a
WebDataset shard has the shard's path, and `offset` and `length` in bytes; `content` opens either.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..data.content import Place, digest_pieces
from ..data.content import content as file_content
from .finder import NO_FILE, Absent, Finder, Found, HdvgMode, reason_of
from .stage import Row
from .tables import Problem

# How many names of a kind a report shows.
SHOWN = 5
# Drives have one letter.
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:[/\\]", re.IGNORECASE)


@dataclass
class Tally:
    """What a named file or folder gave."""

    name: str
    # As of `Origin`.
    kind: str
    licence: str
    found: int = 0
    # Found before, there or under another name.
    again: int = 0
    # Entries of a manifest whose video is not here, and the first of them.
    absent: int = 0
    absent_names: list[str] = field(default_factory=list)
    # What is left out, and the first of them with the reason.
    problems: int = 0
    reasons: list[str] = field(default_factory=list)

    def miss(self, entry: Absent) -> None:
        self.absent += 1
        if len(self.absent_names) < SHOWN:
            self.absent_names.append(printable(entry.name))

    def leave_out(self, problem: Problem) -> None:
        self.problems += 1
        if len(self.reasons) < SHOWN:
            self.reasons.append(printable(f"{problem.name}: {problem.reason}"))

    def lines(self) -> Iterator[str]:
        """What to tell the user, a line for each kind of thing."""
        counts = f"{self.found} sources"
        counts += f", {self.again} known already" if self.again else ""
        counts += f", {self.absent} not here" if self.absent else ""
        counts += f", {self.problems} left out" if self.problems else ""
        yield f"{printable(self.name)} ({self.kind}): {counts}"
        if self.licence:
            yield f"  {self.licence}"
        if self.absent:
            more = self.absent - len(self.absent_names)
            yield f"  not here: {', '.join(self.absent_names)}{f' and {more} more' if more else ''}"
        yield from (f"  left out: {reason}" for reason in self.reasons)
        if self.problems > len(self.reasons):
            yield f"  left out: {self.problems - len(self.reasons)} more"


def find_sources(
    paths: Sequence[Path],
    look_in: Sequence[Path] = (),
    hdvg_mode: HdvgMode = "stream_copy",
    tell: Callable[[Tally], None] = lambda tally: None,
) -> Iterator[Row]:
    """The sources that `paths` stand for, each once, in an order that depends on names alone.

    A folder stands for the videos in it and below, also behind links; passed over are hidden folders and files and
    folders marked as caches (CACHEDIR.TAG). A folder with a `metadata.csv`, `.jsonl` or `.parquet` has the videos that
    this names. Captions are those beside the videos (`.txt`). The videos of a manifest are looked for by id in the
    folders `look_in`, by default in its own. Whether a file is a video shows when it is worked on.

    A row has `source_id`, `path`, `name`, `start` and `end` (seconds, None: all of it), `offset` and `length` (bytes in
    a shard, else None), `caption` (None: there is none), `licence` ("": nothing is said) and `extra` (JSON).

    `tell` gets a Tally of each path when it is through. Raises ValueError for a path that does not exist, at once.
    """
    for path in (*paths, *look_in):
        if ADDRESS.match(str(path)) and not os.path.exists(path):
            raise ValueError(f"{path} is an address: fetch the videos, and name the folder in which they are")
        if not os.path.exists(path):
            raise ValueError(f"there is no file or folder {printable(str(path))}: check its name")
    for path in look_in:
        if not path.is_dir():
            raise ValueError(f"{printable(str(path))} is not a folder: name one in which videos are to be looked for")
    return _find(paths, Finder(tuple(look_in), hdvg_mode), tell)


def content(row: Row) -> Path | bytes:
    """What to open: a file, or the bytes of a video in a shard. Raises OSError when these cannot be read."""
    place = None if row.get("offset") is None else (row["offset"], row["length"])
    return file_content(Path(text_path(row["path"])), place)


def path_text(path: str) -> str:
    """A path as text that Parquet and JSON can hold: itself, unless it has bytes that are not UTF-8.

    Such bytes, lone surrogates in Python, become NUL, which no path has, and four hexadecimal digits.
    """
    return re.sub("[\ud800-\udfff]", lambda found: f"\0{ord(found[0]):04x}", path)


def text_path(text: str) -> str:
    """The path that `path_text` has written."""
    return re.sub("\0([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), text)


def printable(name: str) -> str:
    """A name for people, in one line: what cannot be shown is escaped as in Python."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _find(paths: Sequence[Path], finder: Finder, tell: Callable[[Tally], None]) -> Iterator[Row]:
    seen: set[str] = set()
    # A video's parts follow each other in manifests.
    digest = lru_cache(maxsize=256)(fingerprint)
    for path in paths:
        origin = finder.open(path)
        tally = Tally(str(path), origin.kind, origin.licence)
        for item in origin.items:
            if isinstance(item, Found):
                try:
                    row = _row(item, digest(item.path, item.place))
                except (OSError, RecursionError) as error:
                    tally.leave_out(Problem(item.name, reason_of(error)))
                    continue
                if row["source_id"] in seen:
                    tally.again += 1
                    continue
                seen.add(row["source_id"])
                tally.found += 1
                yield row
            elif isinstance(item, Absent):
                tally.miss(item)
            else:
                tally.leave_out(item)
        tell(tally)


def _row(found: Found, digest: str) -> Row:
    part = f"{digest} {found.start} {found.end}" if found.start is not None or found.end is not None else digest
    offset, length = found.place or (None, None)
    return {
        "source_id": hashlib.blake2b(part.encode(), digest_size=12).hexdigest(),
        "path": path_text(found.path),
        "name": printable(found.name),
        "start": found.start,
        "end": found.end,
        "offset": offset,
        "length": length,
        "caption": _clean(found.caption),
        "licence": found.licence,
        "extra": _json(found.extra),
    }


def fingerprint(path: str, place: Place | None = None) -> str:
    """BLAKE2b of the length and of three pieces of a file or of a part of it.

    An empty file is known by its path instead: there may be several. Raises OSError when the file cannot be read.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(errno.ENOENT, NO_FILE, path)
    digest = hashlib.blake2b(digest_size=20)
    length = digest_pieces(digest, path, place)
    digest.update(str(length).encode() if length else os.fsencode(f"{path} {place[0] if place else 0}"))
    return digest.hexdigest()


def _clean(caption: Any) -> str | None:
    """A caption without what is no text; None when nothing is left."""
    if not isinstance(caption, str):
        return None
    return caption.encode("utf-8", "replace").decode().strip() or None


def _json(values: dict[str, Any]) -> str:
    text = json.dumps(values, default=str, skipkeys=True)
    if "NaN" in text or "Infinity" in text:
        # Which Python writes, but JSON does not have.
        text = json.dumps(json.loads(text, parse_constant=lambda _: None))
    return text
