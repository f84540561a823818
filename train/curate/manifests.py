"""Lists of public data sets, read as what to look for among local files: nothing is fetched from anywhere.

The lists name videos and parts of them by ids. A local file is known by such an id as its name without ending.
"""

from __future__ import annotations

import ast
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ..data.sources import CAPTION_COLUMNS, PATH_COLUMNS, is_media
from .tables import Problem, Record, read_records

Values = Mapping[str, Any]
# What reading an entry raises that is not built as it should be.
NONSENSE = (ValueError, KeyError, TypeError, AttributeError)
# Records among which the first good one is looked for.
FIRST = 100


@dataclass(frozen=True)
class Place:
    """A file in which an entry may lie, and which part of it that is."""

    # Its name without ending, or its path, relative to the manifest.
    file: str
    # Seconds; None is the file's beginning and end.
    start: float | None = None
    end: float | None = None
    # First and last frame, -1 for its end, of a copy of that part made without encoding it again; and its rate where
    # the manifest has it.
    frames: tuple[int, int] | None = None
    fps: float | None = None


@dataclass(frozen=True)
class Entry:
    """What a manifest names."""

    name: str
    # The first that is there counts.
    places: tuple[Place, ...]
    caption: Any
    # What the manifest says besides.
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """How a kind of manifest is recognised and read."""

    name: str
    # One sentence for people.
    licence: str
    # Whether a record is one of this format.
    fits: Callable[[Values], bool]
    # A record's entries: what `entry` takes, a mapping for each.
    split: Callable[[Record], Iterable[Values]]
    entry: Callable[[Values], Entry]


@dataclass(frozen=True)
class Manifest:
    """A file of entries."""

    format: Format
    records: Iterator[Record | Problem]

    def entries(self) -> Iterator[Entry | Problem]:
        """The entries, and what stands there that is none."""
        for record in self.records:
            if isinstance(record, Problem):
                yield record
                continue
            try:
                for number, values in enumerate(self.format.split(record)):
                    try:
                        yield self.format.entry(values)
                    except NONSENSE as error:
                        yield Problem(f"{record.where}, entry {number + 1}", self._reason(error))
            except NONSENSE as error:
                yield Problem(record.where, self._reason(error))

    def _reason(self, error: Exception) -> str:
        if isinstance(error, ValueError):
            return str(error)
        return f"it has no {error}" if isinstance(error, KeyError) else f"it is not built as in {self.format.name}"


def open_manifest(path: Path) -> Manifest | None:
    """The manifest in a file, recognised by what it holds; None when that is neither Parquet nor text.

    Raises ValueError when it is, but no known manifest; OSError when the file cannot be opened.
    """
    records = read_records(path)
    if records is None:
        return None
    problems: list[Problem] = []
    for record in records:
        if isinstance(record, Record):
            for known in FORMATS:
                if known.fits(record.values):
                    return Manifest(known, chain(problems, [record], records))
            keys = ", ".join(str(key) for key in list(record.values)[:10])
            raise ValueError(f"it is no manifest that is known ({', '.join(f.name for f in FORMATS)}): it has {keys}")
        problems.append(record)
        if len(problems) == FIRST:
            break
    raise ValueError(f"it is no manifest: {problems[0].reason}" if problems else "it has no entries")


# Cells


def seconds(value: Any) -> float | None:
    """A time as `1:02:03.5`, `62.5` or a number; None when there is none, ValueError when it is something else."""
    if value is None or value == "" or value != value:
        return None
    total = 0.0
    try:
        numbers = [float(part) for part in str(value).strip().split(":")]
    except ValueError:
        numbers = []
    for number in numbers:
        total = 60 * total + number
    if not 1 <= len(numbers) <= 3 or not all(0 <= number < math.inf for number in numbers) or total == math.inf:
        raise ValueError(f"{_short(value)} is no time")
    return round(total, 6)


def literal(cell: Any) -> Any:
    """The Python value that is written in a cell; nothing is carried out. ValueError when there is none."""
    if not isinstance(cell, str):
        return cell
    try:
        with warnings.catch_warnings():
            # Of backslashes in captions.
            warnings.simplefilter("ignore")
            return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{_short(cell)} is no list of values") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _listed(cell: Any) -> Sequence[Any]:
    values = literal(cell)
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{_short(cell)} is no list of values")
    return values


def _span(cell: Any) -> tuple[float, float]:
    """Beginning and end in seconds."""
    times = [seconds(value) for value in _listed(cell)]
    if len(times) != 2 or times[0] is None or times[1] is None or times[1] <= times[0]:
        raise ValueError(f"{_short(cell)} is no beginning and end")
    return times[0], times[1]


def _frames(cell: Any) -> tuple[int, int]:
    frames = _listed(cell)
    if len(frames) != 2 or not all(type(frame) is int for frame in frames):
        raise ValueError(f"{_short(cell)} is no first and last frame")
    first, last = frames
    if not 0 <= first < 1 << 31 or not (last == -1 or first + 1 < last < 1 << 31):
        raise ValueError(f"{_short(cell)} is no first and last frame")
    return first, last


def _rate(cell: Any) -> float | None:
    if cell is None or cell == "":
        return None
    rate = float(cell)
    if not 0 < rate < math.inf:
        raise ValueError(f"{_short(cell)} is no frame rate")
    return rate


def _name(cell: Any) -> str:
    """An id, which spreadsheets may take for a number."""
    if not isinstance(cell, (str, int)) or not str(cell).strip():
        raise ValueError(f"{_short(cell)} is no name of a video")
    return str(cell).strip()


def stem(name: str) -> str:
    """A file's name without folders and ending, as which only those of videos count: ids have dots too."""
    base = os.path.basename(name)
    return os.path.splitext(base)[0] if is_media(base) else base


def _rest(values: Values, *known: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key and key not in known and value not in (None, "")}


def _whole(record: Record) -> Iterable[Values]:
    return [record.values]


def _has(*columns: str) -> Callable[[Values], bool]:
    return lambda values: all(column in values for column in columns)


# Formats


def _split_hdvg(record: Record) -> Iterator[Values]:
    for clip_id, clip in record.values["clip"].items():
        shared = {"video_id": record.where, "source_clip": clip_id, **_rest(clip, "scene_split")}
        for scene in clip["scene_split"]:
            yield {**shared, **scene}


def _hdvg(values: Values) -> Entry:
    """A scene lies in its own file, in that of HD-VILA's clip, or in the whole video."""
    name, (start, end) = _name(values["clip_id"]), _span(values["span"])
    frames, fps = _frames(values["scene_cut"]), _rate(values.get("fps"))
    places = (
        Place(stem(name)),
        Place(stem(_name(values["source_clip"])), frames=frames, fps=fps),
        Place(_name(values["video_id"]), start, end, frames, fps),
    )
    return Entry(name, places, values.get("caption"), _rest(values, "caption"))


def _split_hdvila(record: Record) -> Iterator[Values]:
    shared = _rest(record.values, "clip")
    return ({**shared, **clip} for clip in record.values["clip"])


def _hdvila(values: Values) -> Entry:
    name = _name(values["clip_id"])
    places = Place(stem(name)), Place(_name(values["video_id"]), *_span(values["span"]))
    return Entry(name, places, values.get("caption"), _rest(values, "caption"))


def _split_panda(record: Record) -> Iterator[Values]:
    """A row has lists with a value for each clip."""
    columns = {
        key: literal(cell) if isinstance(cell, str) and cell.lstrip().startswith("[") else cell
        for key, cell in record.values.items()
    }
    count = len(_listed(columns["timestamp"]))
    if len(_listed(columns["caption"])) != count:
        raise ValueError("it has not as many captions as timestamps")
    for number in range(count):
        clip = {
            key: cell[number] if isinstance(cell, list) and len(cell) == count else cell
            for key, cell in columns.items()
        }
        yield {**clip, "clip": number}


def _panda(values: Values) -> Entry:
    known = values.get("videoID") or values.get("video_id")
    video = _name(known or str(values["url"]).rpartition("v=")[2].partition("&")[0])
    start, end = _span(values["timestamp"])
    extra = _rest(values, "caption", "timestamp")
    return Entry(f"{video}.{values['clip']}", (Place(video, start, end),), values["caption"], extra)


def _lvd(values: Values) -> Entry:
    """A clip lies in its own file or in the whole video, there as HD-VG's where it comes from that."""
    name, places = _name(values["key"]), []
    if values.get("span"):
        places = [Place(_name(values["video_id"]), *_span(values["span"]))]
    elif values.get("orig_span") and values.get("scene_cut"):
        start, end = _span(values["orig_span"])
        places = [Place(_name(values["video_id"]), start, end, _frames(values["scene_cut"]), _rate(values.get("fps")))]
    extra = _rest(values, "refined_caption")
    return Entry(name, (Place(stem(name)), *places), values["refined_caption"], extra)


def _openvid(values: Values) -> Entry:
    name = _name(values["video"])
    return Entry(name, (Place(name),), values["caption"], _rest(values, "caption"))


def _webvid(values: Values) -> Entry:
    name = _name(values["videoid"])
    return Entry(name, (Place(name),), values["name"], _rest(values, "name"))


def _table(values: Values) -> Entry:
    where = _name(next((values[key] for key in PATH_COLUMNS if values.get(key)), None))
    start, end = seconds(values.get("start")), seconds(values.get("end"))
    if end is not None and end <= (start or 0):
        raise ValueError("it ends before it starts")
    column = next((key for key in CAPTION_COLUMNS if values.get(key)), None)
    name = Path(where).as_posix()
    if start or end is not None:
        name += f" {start or 0:g}-{'' if end is None else f'{end:g}'} s"
    extra = _rest(values, "start", "end", column or "")
    return Entry(name, (Place(where, start or None, end),), values[column] if column else None, extra)


FORMATS = (
    Format(
        "HD-VG-130M",
        "HD-VG-130M: for academic use only, not to be passed on; the videos belong to their owners.",
        lambda values: isinstance(values.get("clip"), dict),
        _split_hdvg,
        _hdvg,
    ),
    Format(
        "HD-VILA-100M",
        "HD-VILA-100M: for research only (Microsoft R-UDA); the videos belong to their owners.",
        lambda values: isinstance(values.get("clip"), list),
        _split_hdvila,
        _hdvila,
    ),
    Format(
        "Panda-70M",
        "Panda-70M: not for commercial use (Snap); the videos belong to their owners.",
        _has("timestamp", "caption", "url"),
        _split_panda,
        _panda,
    ),
    Format(
        "LVD-2M",
        "LVD-2M: as HD-VILA-100M for research only (Microsoft R-UDA); the videos belong to their owners.",
        _has("key", "video_id", "refined_caption"),
        _whole,
        _lvd,
    ),
    Format(
        "OpenVid-1M",
        "OpenVid-1M: the list is CC BY 4.0; each video is under the licence of the data set that it comes from.",
        _has("video", "caption", "aesthetic score"),
        _whole,
        _openvid,
    ),
    Format(
        "WebVid",
        "WebVid: there is no licence; the videos belong to the agencies that sell them.",
        _has("videoid", "name"),
        _whole,
        _webvid,
    ),
    Format("VideoFolder", "", lambda values: any(key in values for key in PATH_COLUMNS), _whole, _table),
)
