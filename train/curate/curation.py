"""A curation: its stages in order, what each has still to do, and the table that comes of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from .config import CurateConfig, keep, kept
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
HEAVY = {"image", "text_boxes"}
# Rows of a table that are Python's at a time.
ROWS_AT_ONCE = 1000
# Tasks that every process has at least, where there are enough rows: the last to finish keeps few waiting.
TASKS_A_PROCESS = 4


def source_schema() -> pa.Schema:
    """Of the parts of sources: see `find_sources`."""
    import pyarrow as pa

    text, number, count = pa.string(), pa.float64(), pa.int64()
    texts = dict.fromkeys(("source_id", "path", "name"), text)
    places = {"start": number, "end": number, "offset": count, "length": count}
    return pa.schema({**texts, **places, "caption": text, "licence": text, "extra": text})


def rows_of(table: pa.Table) -> Iterator[Row]:
    """The rows of a table, most of which stay Arrow's."""
    for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
        yield from batch.to_pylist()


@dataclass(frozen=True)
class Curation:
    """The rows of `folder` under `config`; stages that lack something are left out, with a line in the log."""

    folder: Path
    config: CurateConfig
    log: Callable[[str], None] = print
    # What the stages' folders were called in the last run, whose weights need not be here any more.
    recorded: Mapping[str, str] | None = None

    @classmethod
    def read(cls, folder: Path) -> Curation:
        """What the last run left in `folder`; ValueError where there was none."""
        config, keys = kept(folder)
        return cls(folder, config, recorded=keys)

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
        keys = dict(self.recorded or {})
        for stage in self.config.stages() if self.recorded is None else ():
            keys[stage.name] = stage.key([keys[name] for name in stage.needs])
        return keys

    def keep(self) -> None:
        """Write down the settings of this run."""
        keep(self.config, self.keys(), self.folder)

    def forget_failures(self, names: Sequence[str] = ()) -> None:
        """Take out the rows that failed in the stages called `names`, or in all, so that they are done again."""
        import pyarrow.compute as pc

        for name, key in self.keys().items():
            for part in self.store.parts(key) if not names or name in names else ():
                table = self.store.read_part(part)
                if table is not None and ERROR in (status := table["status"]).unique().to_pylist():
                    self.store.replace(part, table.filter(pc.not_equal(status, ERROR)))

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

    def table(self, columns: Collection[str] | None = None) -> pa.Table:
        """Every clip in the order of the ids, with these columns, or with all that are light, and with `errors`.

        Null is what was not measured or failed; `errors` has a line for each stage that failed, "" when none did.
        """
        import pyarrow.compute as pc

        keys, (scenes, *others) = self.keys(), self.config.stages()
        found = self._light(scenes, keys, columns)
        clips = found.filter(pc.equal(found["status"], OK)).drop_columns(["status", "error"])
        errors = []
        for stage in others:
            found = self._light(stage, keys, columns)
            failed = pc.equal(found["status"], ERROR)
            good, bad = found.filter(pc.invert(failed)), found.filter(failed)
            places = pc.index_in(clips["clip_id"], bad["clip_id"])
            line = pc.binary_join_element_wise(f"{stage.name}: ", bad["error"].take(places), "\n", "")
            errors.append(pc.fill_null(line, ""))
            places = pc.index_in(clips["clip_id"], good["clip_id"])
            # What a stage hands on is known already.
            for name in (name for name in good.column_names if name not in {*clips.column_names, "status", "error"}):
                clips = clips.append_column(name, good[name].take(places))
        return clips.append_column("errors", pc.binary_join_element_wise(*errors, ""))

    def clips(self) -> Iterator[tuple[Row, Decision]]:
        """Every clip with all scores and what becomes of it, without what is heavy."""
        clips = self.table()
        yield from zip(rows_of(clips), decide(clips, self.config.decide), strict=True)

    def failed_sources(self) -> Iterator[tuple[str, str]]:
        """Names of sources that gave no clips because of an error, and that."""
        parts = self.store.parts(self.keys()["scenes"])
        failed = [row for part in parts for row in self._rows(part, ["status", "source_id", "error"], [ERROR])]
        ids = [row["source_id"] for row in failed]
        names: dict[str, str] = {}
        for part in self.store.parts(SOURCES):
            names |= {row["source_id"]: row["name"] for row in self._rows(part, ["source_id", "name"], ids)}
        for row in failed:
            yield names.get(row["source_id"]) or row["source_id"], row["error"]

    def pictures(self, ids: Collection[str]) -> dict[str, bytes]:
        """The key frames of these clips, as JPEG."""
        found: dict[str, bytes] = {}
        for part in self.store.parts(self.keys()["keyframe"]):
            # Most parts have none of them, and it takes long to read pictures.
            if self._rows(part, ["clip_id"], ids):
                found |= {row["clip_id"]: row["image"] for row in self._rows(part, ["clip_id", "image"], ids)}
        return {clip_id: image for clip_id, image in found.items() if image is not None}

    def _light(self, stage: Stage, keys: dict[str, str], columns: Collection[str] | None) -> pa.Table:
        """All rows of a stage with those of the columns that it has."""
        wanted = schema(stage).names if columns is None else ["clip_id", "status", "error", *columns]
        light = [name for name in schema(stage).names if name in wanted and name not in HEAVY]
        return self.store.read(keys[stage.name], schema(stage), "clip_id", light)

    def _rows(self, part: Path, columns: Sequence[str], values: Collection[str]) -> list[Row]:
        """The rows of a part of which the first column has one of the values."""
        import pyarrow as pa
        import pyarrow.compute as pc

        table = self.store.read_part(part, columns)
        if table is None:
            return []
        return table.filter(pc.is_in(table[columns[0]], pa.array(values, pa.string()))).to_pylist()

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
        import pyarrow.compute as pc

        for part in self.store.parts(key):
            table = self.store.read_part(part, [identity, "status"] if good else [identity])
            if table is not None:
                yield part, (table.filter(pc.equal(table["status"], OK)) if good else table)[identity].to_pylist()

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
