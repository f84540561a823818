"""Videos on this machine: in files and folders, in shards, and those that a manifest names, by their ids."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ..data.content import Place as Bytes
from ..data.content import read_place
from ..data.sources import CACHE_MARK, CAPTION_COLUMNS, TABLES, VIDEOS, decode_text, shard_samples
from .manifests import Entry, Manifest, Place, open_manifest, stem
from .tables import Problem, is_shard

SUFFIXES = frozenset(VIDEOS.split())
# Tables that say what a folder holds.
METADATA = frozenset(f"metadata{suffix}" for suffix in TABLES)
# To open a pipe would wait for ever.
NO_FILE = "it is no file, or a link to nowhere"

# How HD-VG's frame numbers become times where the whole video is at hand. They count from the beginning of clips that
# were copied out of it, thus at the last key frame before the span: found in the file, or taken for the span's start.
HdvgMode = Literal["stream_copy", "approx"]


@dataclass(frozen=True)
class Absent:
    """An entry of a manifest whose video is not here."""

    name: str


@dataclass(frozen=True)
class Found:
    """A video, or part of one, in a file."""

    path: str
    name: str
    start: float | None = None
    end: float | None = None
    # Offset and length in a shard.
    place: Bytes | None = None
    caption: Any = None
    licence: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


Item = Found | Absent | Problem


def is_video(name: str) -> bool:
    """Whether a file's name says that it is a video."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def reason_of(error: Exception) -> str:
    """What is wrong, to be read behind a name."""
    return f"it cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)


@dataclass(frozen=True)
class Origin:
    """What a named file or folder is, and what is in it."""

    # "file", "folder", "shard", or a manifest's format.
    kind: str
    licence: str
    items: Iterator[Item]


class Finder:
    """Looks into named files and folders."""

    def __init__(self, look_in: tuple[Path, ...], hdvg_mode: HdvgMode) -> None:
        self.look_in = look_in
        self.hdvg_mode = hdvg_mode
        self.index = lru_cache(maxsize=None)(_index)
        # Scenes of one clip follow each other.
        self.key_frame = lru_cache(maxsize=256)(_key_frame)

    def open(self, path: Path) -> Origin:
        """What stands behind a path that exists."""
        name = path.as_posix()
        try:
            if path.is_dir():
                return Origin("folder", "", self._folder(path))
            if not path.is_file():
                return Origin("file", "", iter([Problem(name, NO_FILE)]))
            if is_shard(path):
                return Origin("shard", "", _shard(path, name))
            manifest = None if is_video(name) else open_manifest(path)
            if manifest is not None:
                return Origin(manifest.format.name, manifest.format.licence, self._manifest(manifest, path))
        except (OSError, ValueError) as error:
            return Origin("file", "", iter([Problem(name, reason_of(error))]))
        return Origin("file", "", iter([_video(path, name)]))

    def _folder(self, folder: Path) -> Iterator[Item]:
        title = os.path.basename(os.path.abspath(folder))
        errors: list[OSError] = []
        for parent, folders, files in _walk(folder, errors):
            tables: list[tuple[Manifest, Path]] = []
            for file in sorted(METADATA.intersection(files)):
                path = Path(parent, file)
                try:
                    manifest = open_manifest(path)
                    tables += [(manifest, path)] if manifest else []
                except (OSError, ValueError) as error:
                    yield Problem(str(path), reason_of(error))
            if tables:
                folders.clear()
                files = []
            for table, path in tables:
                yield from self._manifest(table, path)
            for file in files:
                path = Path(parent, file)
                name = f"{title}/{path.relative_to(folder).as_posix()}"
                if is_video(file):
                    yield _video(path, name)
                elif path.suffix.lower() == ".tar":
                    yield from _shard(path, name)
        yield from (Problem(str(error.filename), reason_of(error)) for error in errors)

    def _manifest(self, manifest: Manifest, path: Path) -> Iterator[Item]:
        index, errors = self.index(self.look_in or (path.parent,))
        yield from (Problem(str(error.filename), reason_of(error)) for error in errors)
        try:
            for entry in manifest.entries():
                yield entry if isinstance(entry, Problem) else self._entry(entry, manifest, path.parent, index)
        except OSError as error:
            yield Problem(str(path), reason_of(error))

    def _entry(self, entry: Entry, manifest: Manifest, folder: Path, index: Mapping[str, list[str]]) -> Item:
        for place in entry.places:
            path = os.path.abspath(os.path.join(folder, place.file)) if is_video(place.file) else ""
            paths = [path] if os.path.isfile(path) else index.get(stem(place.file), [])
            if len(paths) > 1:
                return Problem(entry.name, f"{' and '.join(paths[:2])} are both called so: keep one of them")
            if not paths:
                continue
            try:
                start, end = self._times(paths[0], place)
            except (OSError, ValueError) as error:
                return Problem(entry.name, reason_of(error))
            extra = {"manifest": manifest.format.name, **entry.extra}
            return Found(paths[0], entry.name, start, end, None, entry.caption, manifest.format.licence, extra)
        return Absent(entry.name)

    def _times(self, path: str, place: Place) -> tuple[float | None, float | None]:
        """Seconds of the file at which an entry begins and ends.

        Of frames first to last, those between count: the first is the cut itself.
        """
        if place.frames is None:
            return place.start, place.end
        first, last = place.frames
        origin, rate = place.start or 0.0, place.fps
        if rate is None or (place.start is not None and self.hdvg_mode == "stream_copy"):
            key_frame, found_rate = self.key_frame(path, origin)
            rate = rate or found_rate
            origin = key_frame if self.hdvg_mode == "stream_copy" else origin
        if last == -1:
            start, end = origin + (first + 1) / rate if first else origin, place.end
        else:
            start, end = origin + (first + 1) / rate, origin + last / rate
        return (round(start, 6) if start or place.start is not None else None), end if end is None else round(end, 6)


def _walk(folder: Path, errors: list[OSError]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Folder, folders below and files in it, as `os.walk`, sorted, behind links too and each once."""
    seen: set[str] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=errors.append):
        # A link may lead back to a folder above it.
        place = os.path.realpath(parent)
        if place in seen or (CACHE_MARK in files and Path(parent) != folder):
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        yield parent, folders, sorted(name for name in files if not name.startswith("."))


def _index(folders: tuple[Path, ...]) -> tuple[dict[str, list[str]], list[OSError]]:
    """The videos in folders by their names without ending, each file once; and what could not be read."""
    found: dict[str, list[str]] = {}
    errors: list[OSError] = []
    for folder in folders:
        for parent, _, files in _walk(folder, errors):
            for file in filter(is_video, files):
                path = os.path.abspath(os.path.join(parent, file))
                paths = found.setdefault(os.path.splitext(file)[0], [])
                if not paths or os.path.realpath(path) not in map(os.path.realpath, paths):
                    paths.append(path)
    return found, errors


def _video(path: Path, name: str) -> Found:
    sidecar = path.with_suffix(".txt")
    try:
        caption = decode_text(sidecar.read_bytes())[0] if sidecar.is_file() and sidecar != path else None
    except OSError:
        caption = None
    return Found(os.path.abspath(path), name, caption=caption)


def _shard(path: Path, name: str) -> Iterator[Item]:
    """The videos of a WebDataset shard."""
    if not path.is_file():
        yield Problem(name, NO_FILE)
        return
    try:
        with open(path, "rb") as file:
            samples, broken = shard_samples(file)
            if broken:
                yield Problem(name, broken)
            for members in samples:
                yield from _packed(file, path, name, members)
    except OSError as error:
        yield Problem(name, reason_of(error))


def _packed(file: BinaryIO, path: Path, name: str, members: Mapping[str, tarfile.TarInfo]) -> Iterator[Item]:
    """The videos of one sample, with what its other files say."""
    videos = [member for member in members.values() if is_video(member.name)]

    def text(extension: str) -> str:
        member = members[extension]
        return decode_text(read_place(file, (member.offset_data, member.size)))[0]

    about: Any = {}
    if videos and ".json" in members:
        try:
            about = json.loads(text(".json"))
        except (ValueError, RecursionError) as error:
            yield Problem(f"{name}/{members['.json'].name}", f"it is not JSON ({error}), and the video stays without")
    about = about if isinstance(about, dict) else {}
    caption = text(".txt") if videos and ".txt" in members else ""
    for member in videos:
        yield Found(
            os.path.abspath(path),
            f"{name}/{member.name}",
            place=(member.offset_data, member.size),
            caption=caption.strip() or next((about[key] for key in CAPTION_COLUMNS if about.get(key)), None),
            extra={"member": member.name, **about},
        )


def _key_frame(path: str, seconds: float) -> tuple[float, float]:
    """When the last key frame at or before `seconds` is shown, where a copy of the stream begins, and the file's rate.

    Times are seconds since the first frame. Raises ValueError when that cannot be had.
    """
    from videofactory_core.video.file import interval_of, open_file, reading, timed_frames, video_stream

    with reading(path), open_file(path) as file:
        stream = video_stream(file, path)
        stream.codec_context.thread_count = 1
        origin, rate = next(timed_frames(file, stream), (0.0, None))[0], 1 / interval_of(stream)
        file.seek(int((origin + seconds) / stream.time_base), stream=stream)
        tick = float(stream.time_base)
        found = None
        for packet in file.demux(stream):
            time = None if packet.pts is None else packet.pts * tick - origin
            if time is not None and time > seconds + tick:
                break
            if time is not None and packet.is_keyframe:
                found = time
    if found is None:
        raise ValueError(f"{path} has no key frame before {seconds:.3f} seconds: choose the mode approx")
    return max(0.0, found), rate
