"""Four times as wide and high: frames of the graph, and video files that memory would not hold."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_api.v0_0_2 import InputImpl, io
from torch import Tensor

from ..videofactory_core.upscaler import BYTES_A_PIXEL, check_tile, upscale, upscale_video
from .load import CATEGORY
from .progress import pieces, watched

SCALE = 4


def upscale_model() -> io.UpscaleModel.Input:
    return io.UpscaleModel.Input("upscale_model", tooltip="The network of Load VideoFactory Upscaler.")


def tile() -> io.Int.Input:
    return io.Int.Input(
        "tile",
        default=0,
        min=0,
        max=8192,
        step=32,
        tooltip="0 works on whole frames, which is best, and on tiles when memory asks. Otherwise larger frames are"
        " worked on in squares of this side, 64 or more.",
    )


class Upscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryUpscale",
            display_name="VideoFactory Upscale",
            category=CATEGORY,
            description="Makes frames four times as wide and high, one by one, so that long clips need no more memory"
            " than short ones beside the result.",
            inputs=[upscale_model(), io.Image.Input("frames", tooltip="Frames of any number."), tile()],
            outputs=[io.Image.Output(display_name="frames", tooltip="The frames, four times as wide and high.")],
        )

    @classmethod
    def execute(cls, upscale_model: Any, frames: Tensor, tile: int) -> io.NodeOutput:
        if not len(frames):
            raise ValueError("there are 0 frames to upscale: give at least 1")
        count, height, width = frames.shape[:3]
        out = torch.empty((count, height * SCALE, width * SCALE, 3), dtype=torch.float32)
        with ready(upscale_model, tile, width * height) as device:
            large = upscale(upscale_model, iter(frames[..., :3]), SCALE, device=device, tile=tile)
            for one, frame in zip(pieces(count, 1), large, strict=True):
                out[one] = frame
        return io.NodeOutput(out)


class UpscaleVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryUpscaleVideo",
            display_name="VideoFactory Upscale Video",
            category=CATEGORY,
            description="Makes a video file four times as wide and high, frame by frame from file to file, so that its"
            " length does not matter. The sound stays as it is.",
            inputs=[
                upscale_model(),
                io.Video.Input("video", tooltip="Of Load Video. Frames of the graph: use VideoFactory Upscale."),
                tile(),
                io.Boolean.Input(
                    "repeat_damaged",
                    default=False,
                    tooltip="Where a frame cannot be decoded, show the one before it instead of stopping.",
                ),
            ],
            outputs=[io.Video.Output(display_name="video", tooltip="For Save Video, which keeps it as it is.")],
        )

    @classmethod
    def execute(cls, upscale_model: Any, video: Any, tile: int, repeat_damaged: bool) -> io.NodeOutput:
        folder = folder_paths.get_temp_directory()
        Path(folder).mkdir(parents=True, exist_ok=True)
        # The host empties this folder when it starts and when it ends.
        place = Path(tempfile.mkdtemp(prefix="videofactory-", dir=folder))
        out = place / "upscaled.mp4"
        source = file_of(video, place)
        width, height = video.get_dimensions()
        with ready(upscale_model, tile, width * height) as device:
            damage = upscale_video(
                upscale_model,
                source,
                out,
                SCALE,
                device=device,
                tile=tile,
                repeat_damaged=repeat_damaged,
                watch=watched,
            )
        if damage:
            logging.warning("VideoFactory: %s", damage)
        return io.NodeOutput(InputImpl.VideoFromFile(str(out)))


def file_of(video: Any, place: Path) -> Path:
    """The file of the host's VIDEO: its own, or one in `place` when it has none or shows only a part of it."""
    source = video.get_stream_source() if isinstance(video, InputImpl.VideoFromFile) else None
    if isinstance(source, str) and video.get_duration() == InputImpl.VideoFromFile(source).get_duration():
        return Path(source)
    path = place / "source.mp4"
    video.save_to(str(path))
    return path


@contextmanager
def ready(upscale_model: Any, tile: int, pixels: int) -> Iterator[Any]:
    """The device that the network is on meanwhile; ValueError when it is not for this node."""
    if upscale_model.scale != SCALE:
        raise ValueError(
            f"this network makes pictures {upscale_model.scale} times as large and this node is for {SCALE} times:"
            " choose an x4 network, or use the host's upscaling node"
        )
    check_tile(tile)
    management = comfy.model_management
    device = management.get_torch_device()
    working = min(pixels, tile**2 or pixels) * SCALE**2 * BYTES_A_PIXEL
    management.free_memory(management.module_size(upscale_model.model) + working, device)
    upscale_model.to(device)
    try:
        yield device
    finally:
        upscale_model.to("cpu")


NODES = [Upscale, UpscaleVideo]
