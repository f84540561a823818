"""Captioned clips on disk: a folder with sidecars, a table of metadata, or WebDataset shards."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .content import Place, read_place

# Files that are meant as clips, whether this machine can read them or not.
VIDEOS = (
    ".3gp .asf .avi .divx .f4v .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .rm .ts .vob .webm .wmv"
)
PICTURES = ".avif .bmp .heic .heif .jpeg .jpg .jxl .png .tif .tiff .webp"
MEDIA = frozenset(f"{VIDEOS} {PICTURES}".split())
TABLES = (".jsonl", ".csv", ".parquet")
PATH_COLUMNS = ("path", "video_path", "video", "file_name", "file", "media_path", "image_path")
CAPTION_COLUMNS = ("text", "caption", "prompt")
# A folder with this file says that programs made what is in it, and may make it again.
CACHE_MARK = "CACHEDIR.TAG"
# https://bford.info/cachedir/
CACHE_SIGNATURE = "Signature: 8a477f597d28d172789f06886806bc55"


@dataclass(frozen=True)
class Clip:
    """A captioned video, part of a video, or picture of a dataset."""

    # For reports: the path relative to the dataset.
    name: str
    # The file, or the shard that holds it.
    path: Path
    # None: there is none, or the clip cannot be used; `note` has the reason.
    caption: str | None
    # Seconds of the file; None is its end.
    start: float = 0.0
    end: float | None = None
    # Offset and length in the shard.
    place: Place | None = None
    # What the user should know, for instance that the caption was not UTF-8.
    note: str = ""


# What a folder has in it that `videofactory curate` wrote.
CURATION = "curation.json"
# How the note of a clip begins that lacks nothing but its caption.
NO_CAPTION = "no caption"


def read_dataset(path: Path, caption_extension: str = ".txt") -> list[Clip]:
    """The clips of a folder, of a table (`.jsonl`, `.csv`, `.parquet`), of a shard (`.tar`) or of a curation.

    A folder with a `metadata.jsonl`, `.csv` or `.parquet` has the clips that this names. Any other has all videos and
    pictures in it, with their captions beside them, and those in its shards, sorted by path; passed over are hidden
    folders and files, folders marked as caches (CACHEDIR.TAG), and files of other kinds. Captions are UTF-8, UTF-16
    with its mark, or else Windows-1252, which `note` says. What is meant as a clip but cannot be one stands in the list
    without a caption and with the reason in `note`.

    Raises ValueError with the remedy when there are no clips or a table is broken.
    """
    if (path / CURATION).is_file():
        from ..curate.export import read_curation

        clips, remedy = read_curation(path), "keep more of them: see its report"
    elif path.is_dir():
        tables = [path / f"metadata{suffix}" for suffix in TABLES if (path / f"metadata{suffix}").is_file()]
        if len(tables) > 1:
            raise ValueError(f"{path} has {tables[0].name} and {tables[1].name}: name one of them as the dataset")
        clips = _read_table(tables[0]) if tables else _read_folder(path, caption_extension)
        remedy = (
            f"put videos there, each with its caption in a {caption_extension} file of the same name, or name a table"
        )
    elif not path.exists():
        raise ValueError(f"there is no folder or file {path}: check the path of the dataset")
    elif path.suffix.lower() in TABLES:
        clips, remedy = _read_table(path), "write one in each line"
    elif path.suffix.lower() == ".tar":
        return list(_read_shard(path, path.name, caption_extension))
    else:
        raise ValueError(f"{path} is no dataset: name a folder, or a file that ends with {', '.join(TABLES)} or .tar")
    if not clips:
        raise ValueError(f"{path} holds no clips: {remedy}")
    return clips


def without_captions(clips: list[Clip]) -> list[Clip]:
    """Clips for what learns from pictures alone: a caption that is not there is empty."""
    return [
        replace(clip, caption="", note="") if clip.caption is None and clip.note.startswith(NO_CAPTION) else clip
        for clip in clips
    ]


def is_media(name: str) -> bool:
    """Whether a file's name says that it is a video or a picture."""
    return os.path.splitext(name)[1].lower() in MEDIA


def decode_text(data: bytes) -> tuple[str, str]:
    """The text, and a note when its encoding had to be guessed."""
    marked = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig"), ""
    except UnicodeDecodeError:
        # Five codes have no character there.
        return data.decode("cp1252", "replace"), "is not UTF-8; it was read as Windows-1252"


def _caption(data: bytes, name: str) -> tuple[str | None, str]:
    """The caption in a file's content, and a note; where there is none, the note is the reason."""
    text, note = decode_text(data)
    return (text.strip(), note and f"{name} {note}") if text.strip() else (None, f"{NO_CAPTION}: {name} is empty")


# Folders


def _read_folder(folder: Path, caption_extension: str) -> list[Clip]:
    clips: list[Clip] = []
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in _files(folder)):
        if path.suffix.lower() == ".tar":
            clips += _read_shard(path, name, caption_extension)
        elif is_media(name):
            sidecar = path.with_suffix(caption_extension)
            try:
                caption, note = _caption(sidecar.read_bytes(), sidecar.name)
            except FileNotFoundError:
                caption, note = None, f"{NO_CAPTION}: write one into {sidecar.name}"
            except OSError as error:
                caption, note = None, f"{NO_CAPTION}: {sidecar.name} cannot be read ({error.strerror})"
            clips.append(Clip(name, path, caption, note=note))
    return clips


def _files(folder: Path) -> Iterator[Path]:
    """Every file in a folder and in those below, behind links too."""
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}): check who may") from error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        # A link may lead back to a folder above it.
        place = os.path.realpath(parent)
        if place in seen or (CACHE_MARK in files and Path(parent) != folder):
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        yield from (Path(parent, name) for name in files if not name.startswith("."))


# Tables


class Row(NamedTuple):
    """A line of a table, with a note on how it was read."""

    line: int
    values: Mapping[str, Any]
    note: str = ""


def _read_table(path: Path) -> list[Clip]:
    read = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix.lower()]
    rows = list(read(path))
    if rows and not any(key in row.values for row in rows for key in PATH_COLUMNS):
        raise ValueError(
            f"{path} does not say where the videos are: call that column {PATH_COLUMNS[0]!r}, "
            f"not one of {', '.join(rows[0].values) or 'none'}"
        )
    return [_clip(path, row) for row in rows]


def _clip(table: Path, row: Row) -> Clip:
    """The clip that a row describes, relative to the table's folder."""
    values = row.values
    where = next((values[key] for key in PATH_COLUMNS if values.get(key)), None)
    if not isinstance(where, str):
        return Clip(f"{table.name}, line {row.line}", table, None, note="the line names no file")
    name, path = Path(where).as_posix(), table.parent / where
    times: list[float | None] = []
    for key in ("start", "end"):
        try:
            times.append(_seconds(values.get(key)))
        except ValueError:
            return Clip(name, path, None, note=f"{key} is {values[key]!r}, not a number of seconds")
    start, end = times[0] or 0.0, times[1]
    if start or end is not None:
        name += f" {start:g}-{'' if end is None else f'{end:g}'} s"
    if end is not None and end <= start:
        return Clip(name, path, None, note="it ends before it starts")
    caption = next((values[key] for key in CAPTION_COLUMNS if values.get(key)), None)
    if not isinstance(caption, str) or not caption.strip():
        return Clip(name, path, None, start, end, note=f"{NO_CAPTION}: line {row.line} of {table.name} has none")
    return Clip(name, path, caption.strip(), start, end, note=row.note)


def _seconds(value: Any) -> float | None:
    """A cell as a time; ValueError when it is none."""
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except TypeError as error:
        raise ValueError(value) from error
    if not 0 <= seconds < math.inf:
        raise ValueError(value)
    return seconds


def _json_rows(path: Path) -> Iterator[Row]:
    text, note = decode_text(path.read_bytes())
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} is not JSON ({error}): mend or remove it") from error
        if not isinstance(values, dict):
            raise ValueError(f'line {number} of {path} is no JSON object: write {{"path": ..., "text": ...}}')
        yield Row(number, values, note and f"{path.name} {note}")


def _csv_rows(path: Path) -> Iterator[Row]:
    text, note = decode_text(path.read_bytes())
    head = text.split("\n", 1)[0]
    # Spreadsheets use semicolons where the comma stands in numbers.
    delimiter = max(",;\t", key=head.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        for values in reader:
            named = {key.strip(): value for key, value in values.items() if key is not None}
            yield Row(reader.line_num, named, note and f"{path.name} {note}")
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of {path} is not CSV ({error}): mend or remove it") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f'{path} needs pyarrow to be read: run pip install "videofactory[train]"') from error
    try:
        with ParquetFile(path) as file:
            known = file.schema_arrow.names
            wanted = [name for name in known if name in (*PATH_COLUMNS, *CAPTION_COLUMNS, "start", "end")]
            # A table without any of them is refused with the names that it has.
            batches = file.iter_batches(columns=wanted or known)
            rows = (values for batch in batches for values in batch.to_pylist())
            yield from (Row(number, values) for number, values in enumerate(rows, 1))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a Parquet file ({error}): write it again") from error


# Shards


def _read_shard(path: Path, name: str, caption_extension: str) -> Iterator[Clip]:
    """The clips of a WebDataset shard."""
    with open(path, "rb") as file:
        samples, broken = shard_samples(file)
        found = False
        for members in samples:
            caption, note = _packed_caption(file, members, caption_extension)
            for member in (member for member in members.values() if is_media(member.name)):
                place = (member.offset_data, member.size)
                yield Clip(f"{name}/{member.name}", path, caption, place=place, note=note)
                found = True
    if broken or not found:
        note = f"{broken}: unpack or copy it again" if broken else "the shard holds no videos or pictures"
        yield Clip(name, path, None, note=note)


def shard_samples(file: BinaryIO) -> tuple[list[Mapping[str, tarfile.TarInfo]], str]:
    """The samples of a WebDataset shard, each its members by extension in lower case, and what is wrong with it or "".

    Members of one folder and one name up to its first dot are a sample.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    broken = ""
    try:
        # Without compression, so that clips can be read where they lie.
        with tarfile.open(fileobj=file, mode="r:") as shard:
            for member in shard:
                folder, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                if member.isreg() and key:
                    samples.setdefault(f"{folder}/{key}", {})[f".{extension.lower()}"] = member
    except (tarfile.TarError, EOFError) as error:
        broken = f"the shard cannot be read to its end ({error})"
    return list(samples.values()), broken


def _packed_caption(
    file: BinaryIO, members: Mapping[str, tarfile.TarInfo], caption_extension: str
) -> tuple[str | None, str]:
    """The caption of one sample, and a note, as `_caption`."""
    for extension in (caption_extension.lower(), ".json"):
        if extension in members:
            member = members[extension]
            data = read_place(file, (member.offset_data, member.size))
            if extension != ".json":
                return _caption(data, member.name)
            text, note = decode_text(data)
            try:
                values = json.loads(text)
            except (json.JSONDecodeError, RecursionError):
                return None, f"{NO_CAPTION}: {member.name} is not JSON"
            found = [values[key] for key in CAPTION_COLUMNS if values.get(key)] if isinstance(values, dict) else []
            if found and isinstance(found[0], str) and found[0].strip():
                return found[0].strip(), note and f"{member.name} {note}"
            return None, f"{NO_CAPTION}: {member.name} has none"
    return None, f"{NO_CAPTION}: the shard has no {caption_extension} or .json file for it"
