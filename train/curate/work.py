"""A stage at work on a few rows, in whatever process: from a part on disk to the next; a bad row is noted as such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .stage import Row, Stage, Work
from .store import Store

if TYPE_CHECKING:
    import pyarrow as pa

# A row's `status`: worked on, nothing came out of it, or it failed with `error`.
OK, EMPTY, ERROR = "ok", "empty", "error"
LONGEST_ERROR = 500


@dataclass(frozen=True)
class Task:
    """Rows for a stage, by the parts of the store that hold them and their ids; light, since it travels."""

    stage: Stage
    key: str
    folder: Path
    rows: tuple[tuple[Path, tuple[str, ...]], ...]

    def alone(self) -> list[Task]:
        """A task for each of the rows."""
        return [replace(self, rows=((part, (row,)),)) for part, ids in self.rows for row in ids]

    def read(self) -> list[Row]:
        """The rows themselves; those that have gone meanwhile are left out."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found: list[Row] = []
        for part, ids in self.rows:
            table = Store(self.folder).read_part(part)
            if table is not None:
                # Rows have pictures in them: the others stay Arrow's.
                chosen = pc.is_in(table.column(self.stage.identity), pa.array(ids, pa.string()))
                rows = {row[self.stage.identity]: row for row in table.filter(chosen).to_pylist()}
                found += rows.values()
        return found


@dataclass(frozen=True)
class Outcome:
    """How many rows a task was given, and how many of them failed."""

    rows: int
    failed: int


# Loading weights takes longer than using them once.
_opened: dict[str, Work] = {}


def carry_out(task: Task) -> Outcome:
    """Do a task and write its part."""
    work = _opened.get(task.key)
    if work is None:
        work = _opened[task.key] = task.stage.open()
    rows = task.read()
    try:
        found = [_good(result) for result in work(rows)]
    except Exception:
        # One of them spoils the batch: which one shows when each is alone.
        found = [_one(work, row) for row in rows]
    return _finish(task, rows, found)


def give_up(task: Task, reason: str) -> Outcome:
    """Write a task as failed whose rows cannot be worked on at all."""
    rows = task.read()
    return _finish(task, rows, [_bad(reason) for _ in rows])


def _finish(task: Task, rows: Sequence[Row], found: Sequence[Row]) -> Outcome:
    """Write what was found of each row."""
    stage, results = task.stage, []
    for row, result in zip(rows, found, strict=True):
        if not stage.splits:
            results.append({"clip_id": row["clip_id"], **result})
            continue
        source, clips = row["source_id"], result.pop("clips", [])
        results += [{**clip, "source_id": source, "status": OK} for clip in clips]
        if not clips:
            # So that it is done all the same.
            status = ERROR if result["status"] == ERROR else EMPTY
            results.append({**result, "source_id": source, "clip_id": f"{source}-{status}", "status": status})
    if results:
        Store(task.folder).write(task.key, results, schema(stage), "clip_id")
    return Outcome(len(rows), sum(result["status"] == ERROR for result in found))


def schema(stage: Stage) -> pa.Schema:
    """Of the parts of a stage."""
    import pyarrow as pa

    ids = {"source_id": pa.string()} if stage.splits else {}
    text = pa.string()
    return pa.schema({"clip_id": text, **ids, **stage.columns(), "status": text, "error": text})


def _one(work: Work, row: Row) -> Row:
    try:
        (result,) = work([row])
    except (ValueError, OSError) as error:
        return _bad(str(error))
    except Exception as error:
        # Libraries that read foreign files fail in many ways, and no row may stop the rest.
        return _bad(f"{type(error).__name__}: {error}")
    return _good(result)


def _good(result: Row) -> Row:
    return {**result, "status": OK, "error": None}


def _bad(reason: str) -> dict[str, Any]:
    return {"status": ERROR, "error": " ".join(reason.split())[:LONGEST_ERROR]}
