"""A curation: its stages in order, what each has still to do, and the table that comes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from .config import CurateConfig
from .decide import Decision, decide
from .runner import Runner
from .stage import Row, Stage
from .store import Store
from .work import ERROR, OK, Task, schema

if TYPE_CHECKING:
    import pyarrow as pa

SOURCES = "sources"
SOURCES_PER_PART = 10_000
# Columns whose content is read only where it is worked on.
HEAVY = {"image"}
# Tasks that every process has at least, where there are enough rows: the last to finish keeps few waiting.
TASKS_A_PROCESS = 4


def source_schema() -> pa.Schema:
    """Of the parts of sources: see `find_sources`."""
    import pyarrow as pa

    text, number, count = pa.string(), pa.float64(), pa.int64()
    texts = dict.fromkeys(("source_id", "path", "name"), text)
    places = {"start": number, "end": number, "offset": count, "length": count}
    return pa.schema({**texts, **places, "caption": text, "licence": text, "extra": text})


@dataclass(frozen=True)
class Curation:
    """The rows of `folder` under `config`; stages that lack something are left out, with a line in the log."""

    folder: Path
    config: CurateConfig
    log: Callable[[str], None] = print

    @property
    def store(self) -> Store:
        return Store(self.folder, self.log)

    def stages(self) -> list[Stage]:
        """What can be done, in order; the log says what cannot and why."""
        ready: list[Stage] = []
        for stage in self.config.stages():
            names = {other.name for other in ready}
            reason = stage.missing()
            if not reason and not names.issuperset(stage.needs):
                reason = f"it needs {' and '.join(name for name in stage.needs if name not in names)}"
            if reason:
                self.log(f"{stage.name}: left out, {reason}")
            else:
                ready.append(stage)
        return ready

    def keys(self) -> dict[str, str]:
        """What each stage's folder is called under these settings."""
        keys: dict[str, str] = {}
        for stage in self.config.stages():
            keys[stage.name] = stage.key([keys[name] for name in stage.needs])
        return keys

    def add_sources(self, rows: Iterable[Row]) -> int:
        """Note sources that are not noted yet; returns how many."""
        known = {row for _, ids in self._ids(SOURCES, "source_id") for row in ids}
        fresh, count = (row for row in rows if row["source_id"] not in known), 0
        while part := list(islice(fresh, SOURCES_PER_PART)):
            self.store.write(SOURCES, part, source_schema(), "source_id")
            count += len(part)
        return count

    def run(self, runner: Runner, processes: int, names: Sequence[str] = ()) -> None:
        """Carry out what is not done yet of the stages called `names`, or of all, in so many processes."""
        keys = self.keys()
        for stage in self.stages():
            if names and stage.name not in names:
                continue
            todo = self._todo(stage, keys)
            count, failed = sum(len(ids) for _, ids in todo), 0
            unit = "source" if stage.splits else "clip"
            with tqdm(total=count, desc=stage.name, unit=unit, disable=None) as bar:
                size = max(1, min(stage.rows_per_part, count // (TASKS_A_PROCESS * processes)))
                for outcome in runner(self._tasks(stage, keys[stage.name], todo, size)):
                    bar.update(outcome.rows)
                    failed += outcome.failed
            self.log(f"{stage.name}: {count} done now, {failed} of them failed")

    def clips(self) -> Iterator[tuple[Row, Decision]]:
        """Every clip with all scores and what becomes of it, without pictures."""
        keys = self.keys()
        columns: dict[str, dict[str, Row]] = {}
        for stage in self.config.stages():
            light = [field.name for field in schema(stage) if field.name not in HEAVY]
            table = self.store.read(keys[stage.name], schema(stage), "clip_id", light)
            columns[stage.name] = {row["clip_id"]: row for row in table.to_pylist()}
        for clip_id, clip in columns.pop("scenes", {}).items():
            if clip["status"] != OK:
                continue
            row, errors = dict(clip), []
            for name, found in columns.items():
                result = found.get(clip_id)
                if result is None:
                    continue
                if result["status"] == ERROR:
                    errors.append(f"{name}: {result['error']}")
                else:
                    row |= {key: value for key, value in result.items() if key not in ("status", "error")}
            row["errors"] = errors
            yield row, decide(row, self.config.decide)

    def failed_sources(self) -> Iterator[tuple[str, str]]:
        """Names of sources that gave no clips because of an error, and that."""
        names: dict[str, str] = {}
        for part in self.store.parts(SOURCES):
            table = self.store.read_part(part, ["source_id", "name"])
            if table is not None:
                names |= {row["source_id"]: row["name"] for row in table.to_pylist()}
        for part in self.store.parts(self.keys()["scenes"]):
            table = self.store.read_part(part, ["source_id", "status", "error"])
            for row in table.to_pylist() if table is not None else ():
                if row["status"] == ERROR:
                    yield names.get(row["source_id"], row["source_id"]), row["error"]

    def pictures(self, ids: set[str]) -> dict[str, bytes]:
        """The key frames of these clips, as JPEG."""
        found: dict[str, bytes] = {}
        for part in self.store.parts(self.keys()["keyframe"]):
            table = self.store.read_part(part, ["clip_id", "image"])
            for row in table.to_pylist() if table is not None else ():
                if row["clip_id"] in ids and row["image"] is not None:
                    found[row["clip_id"]] = row["image"]
        return found

    def _todo(self, stage: Stage, keys: dict[str, str]) -> list[tuple[Path, list[str]]]:
        """Rows that a stage has still to work on, by the parts that they lie in."""
        # With or without success.
        seen = {row for _, ids in self._ids(keys[stage.name], stage.identity) for row in ids}
        last = keys[stage.needs[-1]] if stage.needs else SOURCES
        todo: list[tuple[Path, list[str]]] = []
        for part, ids in self._ids(last, stage.identity, good=bool(stage.needs)):
            fresh = [row for row in dict.fromkeys(ids) if row not in seen]
            seen.update(fresh)
            if fresh:
                todo.append((part, fresh))
        return todo

    def _ids(self, key: str, identity: str, good: bool = False) -> Iterator[tuple[Path, list[str]]]:
        """The ids in each part, or those of rows that went well."""
        for part in self.store.parts(key):
            table = self.store.read_part(part, [identity, "status"] if good else [identity])
            if table is not None:
                yield part, [row[identity] for row in table.to_pylist() if not good or row["status"] == OK]

    def _tasks(self, stage: Stage, key: str, todo: Sequence[tuple[Path, list[str]]], size: int) -> Iterator[Task]:
        """Tasks of `size` rows each."""
        rows: list[tuple[Path, tuple[str, ...]]] = []
        free = size
        for part, ids in todo:
            while ids:
                taken, ids = ids[:free], ids[free:]
                rows.append((part, tuple(taken)))
                free -= len(taken)
                if not free:
                    yield Task(stage, key, self.folder, tuple(rows))
                    rows, free = [], size
        if rows:
            yield Task(stage, key, self.folder, tuple(rows))
