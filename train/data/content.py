"""A file, or a part of one such as a video in a shard: its bytes, and what stands for them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

# Offset and length in bytes.
Place = tuple[int, int]
# Bytes of each of the three pieces that stand for a file.
PIECE = 1 << 16


def content(path: Path, place: Place | None = None) -> Path | bytes:
    """What to open: the file itself, or the bytes of its part. Raises OSError when these cannot be read."""
    if place is None:
        return path
    with open(path, "rb") as file:
        return read_place(file, place)


def read_place(file: BinaryIO, place: Place) -> bytes:
    """A part of an open file."""
    offset, length = place
    file.seek(offset)
    return file.read(length)


def digest_pieces(digest: Any, path: str | Path, place: Place | None = None) -> int:
    """Feed a hash of hashlib with the beginning, middle and end of a file or of its part; returns the length.

    Raises OSError when they cannot be read.
    """
    with open(path, "rb") as file:
        offset, length = place or (0, os.fstat(file.fileno()).st_size)
        for start in (0, (length - PIECE) // 2, length - PIECE):
            digest.update(read_place(file, (offset + max(0, start), min(PIECE, length))))
    return length


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
