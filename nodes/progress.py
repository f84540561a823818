"""Long work in pieces, with a bar on the node, and a place to stop between any two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import comfy.model_management
import comfy.utils

Item = TypeVar("Item")


def pieces(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that make up `range(count)`; raises the host's exception when the user interrupts."""
    progress = comfy.utils.ProgressBar(count)
    for start in range(0, count, size):
        comfy.model_management.throw_exception_if_processing_interrupted()
        end = min(start + size, count)
        yield slice(start, end)
        progress.update(end - start)


def watched(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, of which there are `count`; raises the host's exception when the user interrupts."""
    progress = comfy.utils.ProgressBar(count)
    for item in items:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item
        progress.update(1)
