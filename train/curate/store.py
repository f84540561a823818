"""Rows on disk: Parquet parts that appear whole or not at all, so that what is there is what is done."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from videofactory_core.atomic import replacing

from .stage import Row

if TYPE_CHECKING:
    import pyarrow as pa

PART = "part-*.parquet"


@dataclass(frozen=True)
class Store:
    """The folder of a curation: `sources`, and `stages/<stage>@<hash>`, each with parts of rows."""

    folder: Path
    # Told of a part that cannot be read, which is then as if it were not there.
    log: Callable[[str], None] = print

    def place(self, key: str) -> Path:
        """The folder of "sources", or of a stage's key."""
        return self.folder / "sources" if key == "sources" else self.folder / "stages" / key

    def write(self, key: str, rows: Sequence[Row], schema: pa.Schema, identity: str) -> None:
        """Write a part of rows, named by the ids in the column `identity`: the same ones again replace it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        place = self.place(key)
        place.mkdir(parents=True, exist_ok=True)
        ids = "\n".join(str(row[identity]) for row in rows)
        name = hashlib.blake2b(ids.encode(), digest_size=8).hexdigest()
        with replacing(place / f"part-{name}.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(list(rows), schema), temporary)

    def replace(self, part: Path, table: pa.Table) -> None:
        """Put other rows into a part, which goes when there are none."""
        import pyarrow.parquet as pq

        if not table.num_rows:
            part.unlink()
            return
        with replacing(part) as temporary:
            pq.write_table(table, temporary)

    def parts(self, key: str) -> Iterator[Path]:
        """The parts, in the order of their names."""
        yield from sorted(self.place(key).glob(PART))

    def read_part(self, path: Path, columns: Sequence[str] | None = None) -> pa.Table | None:
        """A part's rows, None when it cannot be read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # Half the time of read_table, which looks for a data set around the file.
            with pq.ParquetFile(path) as file:
                return file.read(None if columns is None else list(columns))
        except (OSError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0]
            self.log(f"{path} cannot be read ({reason}) and is made again")
            return None

    def read(self, key: str, schema: pa.Schema, identity: str, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows in the order of their ids, each once, without the columns that are not asked for."""
        import pyarrow as pa

        wanted = schema if columns is None else pa.schema([schema.field(name) for name in columns])
        tables = [self.read_part(path, wanted.names) for path in self.parts(key)]
        whole = pa.concat_tables(
            [table.select(wanted.names) for table in tables if table is not None] or [wanted.empty_table()]
        )
        # Two runs at the same time may have worked on the same rows.
        order = _first_places(whole.column(identity).to_pylist())
        return whole.take(pa.array(order, pa.int64()))


def _first_places(ids: Sequence[str]) -> list[int]:
    """Where each id stands first, in the order of the ids."""
    first: dict[str, int] = {}
    for place, name in enumerate(ids):
        first.setdefault(name, place)
    return [first[name] for name in sorted(first)]
