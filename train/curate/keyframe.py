"""The keyframe: the picture in the middle of a clip, decoded once for all that look at a single one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from videofactory_core.video import read_frames

from .sources import content
from .stage import Row, Stage, Work

if TYPE_CHECKING:
    import pyarrow as pa

# Pixels across, to which larger pictures are scaled.
WIDTH = 640
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Keyframe(Stage):
    """The frame on screen at `time` = (start + end) / 2 as JPEG, upright and at most `WIDTH` wide."""

    name: ClassVar[str] = "keyframe"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("scenes",)

    @classmethod
    def columns(cls) -> dict[str, pa.DataType]:
        import pyarrow as pa

        # The caption goes along for those who see key frames alone.
        return {"time": pa.float64(), "image": pa.binary(), "caption": pa.string()}

    def open(self) -> Work:
        return _keyframes


def _keyframes(rows: Sequence[Row]) -> list[Row]:
    return [_keyframe(row) for row in rows]


def _keyframe(row: Row) -> Row:
    time = (row["start"] + row["end"]) / 2
    size = (WIDTH, max(1, round(row["height"] * WIDTH / row["width"]))) if row["width"] > WIDTH else None
    file = io.BytesIO()
    Image.fromarray(read_frames(content(row), [time], size)[0].numpy()).save(file, "JPEG", quality=JPEG_QUALITY)
    return {"time": time, "image": file.getvalue(), "caption": row.get("caption")}


def read_pictures(images: Sequence[bytes]) -> list[Image.Image]:
    """Key frames as Pillow's pictures."""
    return [Image.open(io.BytesIO(image), formats=["JPEG"]).convert("RGB") for image in images]
