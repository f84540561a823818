"""The clips that stay, for other programs: cut into files, listed, or in shards."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from videofactory_core.atomic import replacing
from videofactory_core.video import read_frames, write_frames

from ..data.sources import NO_CAPTION, Clip
from .curation import Curation
from .report import SCORES, caption_of
from .sources import content, text_path
from .stage import Row

Format = Literal["folder", "jsonl", "webdataset"]
# Frames that are decoded at once, and clips in a shard.
FRAMES, CLIPS = 32, 1000
# Columns that a list or a shard has of each clip, where they were measured.
TOLD = ("clip_id", "name", "licence", "fps", "width", "height", *SCORES)


def export(curation: Curation, form: Format, out: Path, watch: Callable[[Iterator[Row]], Iterator[Row]]) -> int:
    """Write the clips that stay to `out`; returns how many. What an earlier export has written is left as it is.

    Clips of this curation that are there and do not stay any more are removed.

    `folder`: each cut out and encoded anew as .mp4 with its caption beside it. `jsonl`: one list, `out/metadata.jsonl`,
    that points into the sources. `webdataset`: the files of `folder` in .tar shards of 1000, with a .json each.
    """
    out.mkdir(parents=True, exist_ok=True)
    known: set[str] = set()

    def stay() -> Iterator[Row]:
        for row, decision in curation.clips():
            known.add(row["clip_id"])
            if decision.kept:
                yield row

    rows = iter(watch(stay()))
    if form == "jsonl":
        return _list(rows, out / "metadata.jsonl")
    written = _files(rows, out) if form == "folder" else _shards(rows, out)
    for path in {*out.glob("*.mp4"), *out.glob("*.tar")} - written.keys():
        clips = set(_clips_in(path) if path.suffix == ".tar" else [path.stem])
        if clips and clips <= known:
            path.unlink()
            path.with_suffix(".txt").unlink(missing_ok=True)
    return sum(written.values())


def _list(rows: Iterator[Row], path: Path) -> int:
    count = 0
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(described(row), ensure_ascii=False) + "\n")
            count += 1
    return count


def described(row: Row) -> dict[str, Any]:
    """A clip as a line of a list that the trainer reads."""
    place = {"path": text_path(row["path"]), "start": row["start"], "end": row["end"], "text": caption_of(row)}
    scores = {name: row[name] for name in TOLD if row.get(name) is not None}
    return {**place, **scores}


def read_curation(folder: Path) -> list[Clip]:
    """The clips of a curation that stay, as the trainer's datasets have them, where they lie in their sources."""
    clips = []
    for row, decision in Curation.read(folder).clips():
        if decision.kept:
            place = None if row["offset"] is None else (row["offset"], row["length"])
            caption = caption_of(row) or None
            note = "" if caption else f"{NO_CAPTION}: the curation has none"
            clips.append(
                Clip(row["name"], Path(text_path(row["path"])), caption, row["start"], row["end"], place, note)
            )
    return clips


def _files(rows: Iterator[Row], out: Path) -> dict[Path, int]:
    """Writes files; how many clips each has."""
    written = {}
    for row in rows:
        path = out / f"{row['clip_id']}.mp4"
        if not path.is_file():
            # Before the clip, which says that both are there.
            path.with_suffix(".txt").write_text(caption_of(row), encoding="utf-8")
            cut(row, path)
        written[path] = 1
    return written


def cut(row: Row, path: Path) -> None:
    """Write a clip's frames at the source's rate, without its sound."""
    number = max(1, round((row["end"] - row["start"]) * row["fps"]))
    times = [row["start"] + i / row["fps"] for i in range(number)]

    source = content(row)

    def frames() -> Iterator[Tensor]:
        for first in range(0, number, FRAMES):
            yield from read_frames(source, times[first : first + FRAMES])

    write_frames(path, frames(), row["fps"])


def _shards(rows: Iterator[Row], out: Path) -> dict[Path, int]:
    """Writes shards; how many clips each has."""
    written: dict[Path, int] = {}
    while group := list(islice(rows, CLIPS)):
        path = out / f"{len(written):06d}.tar"
        if not path.is_file() or _clips_in(path) != [row["clip_id"] for row in group]:
            _shard(group, path)
        written[path] = len(group)
    return written


def _clips_in(path: Path) -> list[str]:
    """The ids of the clips in a shard, none when it cannot be read."""
    try:
        with tarfile.open(path, "r:") as shard:
            return [Path(name).stem for name in shard.getnames() if name.endswith(".mp4")]
    except (tarfile.TarError, EOFError):
        return []


def _shard(rows: list[Row], path: Path) -> None:
    with (
        replacing(path) as temporary,
        tarfile.open(temporary, "w") as shard,
        tempfile.TemporaryDirectory() as folder,
    ):
        for row in rows:
            video = Path(folder) / "clip.mp4"
            cut(row, video)
            told = json.dumps(described(row), ensure_ascii=False)
            _add(shard, f"{row['clip_id']}.mp4", video.read_bytes())
            _add(shard, f"{row['clip_id']}.txt", caption_of(row).encode())
            _add(shard, f"{row['clip_id']}.json", told.encode())


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    shard.addfile(entry, io.BytesIO(content))
