"""Records of JSON, JSON Lines, CSV and Parquet files, one at a time: manifests are larger than memory."""

from __future__ import annotations

import csv
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

# What a file is recognised by, and what is read of it at a time.
HEAD = 1 << 16
CHUNK = 1 << 20
LONGEST_CELL = 1 << 24
BATCH = 1024
UTF16 = (b"\xff\xfe", b"\xfe\xff")
SPACE = re.compile(r"\s*")
# An object whose first value is an object too is a mapping of many; others are the first of many lines.
MAPPING = re.compile(r'\{\s*"(?:[^"\\]|\\.)*"\s*:\s*\{')


class Problem(NamedTuple):
    """What is left out, and why."""

    name: str
    reason: str


class Record(NamedTuple):
    """A line, row, or member of a file: its number or key, and what it holds."""

    where: str
    values: dict[str, Any]


def is_shard(path: Path) -> bool:
    """Whether a file is a tar archive without compression."""
    with open(path, "rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def read_records(path: Path) -> Iterator[Record | Problem] | None:
    """The records of a file, whatever its name; None when it is neither Parquet nor text.

    Bytes that are not text become lone surrogates, as in the names of files. What cannot be read is a Problem: a line
    or row alone, or all that follows. Raises OSError when the file cannot be opened, ValueError without pyarrow.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"PAR1"):
        return _parquet_records(path)
    encoding = "utf-16" if head.startswith(UTF16) else "utf-8-sig"
    if not head or (b"\0" in head and encoding != "utf-16"):
        return None
    start = head.decode(encoding, "ignore").lstrip()
    if start.startswith("[") or MAPPING.match(start):
        return _json_records(path, encoding)
    return _line_records(path, encoding) if start.startswith("{") else _csv_records(path, encoding)


def _open(path: Path, encoding: str, newline: str | None = None) -> TextIO:
    errors = "replace" if encoding == "utf-16" else "surrogateescape"
    return open(path, encoding=encoding, errors=errors, newline=newline)


# JSON


class _Json:
    """A text of which values are taken off the front, read only as far as they reach."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text = ""
        self.at = 0
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not white, "" at the end."""
        while True:
            space = SPACE.match(self.text, self.at)
            self.at = space.end() if space else self.at
            if self.at < len(self.text):
                return self.text[self.at]
            self.text, self.at = self.file.read(CHUNK), 0
            if not self.text:
                return ""

    def take(self, expected: str) -> str:
        """Pass the next character, which must be one of those expected."""
        found = self.peek()
        if not found or found not in expected:
            raise ValueError(f"{found!r} stands where {' or '.join(expected)} should be")
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value; ValueError when there is none."""
        self.peek()
        whole = False
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except json.JSONDecodeError:
                if whole:
                    raise
            else:
                # A number may go on behind what was read.
                if end < len(self.text) or whole:
                    self.at = end
                    return value
            # As much again, so that long values are not parsed too often.
            more = self.file.read(max(CHUNK, len(self.text) - self.at))
            self.text, self.at, whole = self.text[self.at :] + more, 0, not more


def _json_records(path: Path, encoding: str) -> Iterator[Record | Problem]:
    """The members of an object, or the items of an array."""
    count = 0
    with _open(path, encoding) as file:
        text = _Json(file)
        try:
            close = "}" if text.take("{[") == "{" else "]"
            more = text.peek() != close
            while more:
                count += 1
                where = f"item {count}"
                if close == "}":
                    where = str(text.value())
                    text.take(":")
                values = text.value()
                yield Record(where, values) if isinstance(values, dict) else Problem(where, "it is no object")
                more = text.take("," + close) == ","
        except (ValueError, RecursionError) as error:
            reason = f"it is not JSON from there on ({error}); what stands before is used"
            yield Problem(f"item {count} of {path.name}", reason)


def _line_records(path: Path, encoding: str) -> Iterator[Record | Problem]:
    with _open(path, encoding) as file:
        for number, line in enumerate(file, 1):
            where = f"line {number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield Problem(f"{where} of {path.name}", f"it is not JSON ({error})")
                continue
            yield Record(where, values) if isinstance(values, dict) else Problem(where, "it is no object")


# Tables


def _csv_records(path: Path, encoding: str) -> Iterator[Record | Problem]:
    # Lists of hundreds of captions do not fit into the usual limit.
    csv.field_size_limit(LONGEST_CELL)
    with _open(path, encoding, newline="") as file:
        head = file.readline(HEAD)
        file.seek(0)
        # Spreadsheets use semicolons where the comma stands in numbers.
        reader = csv.DictReader(file, delimiter=max(",;\t", key=head.count), skipinitialspace=True)
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Problem(f"line {reader.line_num} of {path.name}", f"it is not CSV ({error})")
                continue
            yield Record(f"line {reader.line_num}", {key.strip(): cell for key, cell in values.items() if key})


def _parquet_records(path: Path) -> Iterator[Record | Problem]:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(f'{path} needs pyarrow to be read: run pip install "videofactory[train]"') from error

    def holds_bytes(kind: pa.DataType) -> bool:
        inner = [kind.field(number).type for number in range(kind.num_fields)]
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or any(map(holds_bytes, inner))

    number = 0
    try:
        with ParquetFile(path) as file:
            # Whole videos may stand there.
            columns = [field.name for field in file.schema_arrow if not holds_bytes(field.type)]
            for batch in file.iter_batches(BATCH, columns=columns):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(f"row {number}", values)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        yield Problem(f"row {number + 1} of {path.name}", f"it cannot be read from there on ({reason})")
