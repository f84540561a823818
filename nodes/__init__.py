"""The graph nodes, and their registration with the host."""

from __future__ import annotations

import importlib
import logging
from typing import Any

ROOMS = ("load", "refine", "write", "sample", "long", "decode", "condition", "upscale", "train")


def extension() -> Any:
    """What the host registers: the nodes of every room that could be imported; the others are named in the log."""
    from comfy_api.v0_0_2 import ComfyExtension

    from . import files

    files.register()
    nodes: list[Any] = []
    for room in ROOMS:
        try:
            nodes += importlib.import_module(f".{room}", __name__).NODES
        except Exception as error:  # whatever a host of another age lacks
            logging.error(
                "VideoFactory: the nodes of %s are missing, because %s: %s", room, type(error).__name__, error
            )

    class VideoFactory(ComfyExtension):
        async def get_node_list(self) -> list[Any]:
            return nodes

    return VideoFactory()
