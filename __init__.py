"""VideoFactory as a ComfyUI custom node pack; the graph nodes live in `nodes/`."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> Any:
    """Called by the host when it loads the pack."""
    from .nodes import extension

    return extension()
