"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """Hidden, beside `path`, and this process's alone."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write a file to, which then takes the place of `path`.

    Whatever is raised meanwhile leaves `path` as it was and nothing beside it. Raises OSError when the disk does not
    take the file.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        # A full disk may show only when the system flushes what it has buffered.
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write a text file in UTF-8, as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)
