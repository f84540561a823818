"""Four times as wide and high."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from .load import CATEGORY
from .progress import pieces

SCALE = 4
# Pixels of the input that neighbouring tiles share: enough that seams do not show.
OVERLAP = 16
SMALLEST_TILE = 64


class Upscale(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryUpscale",
            display_name="VideoFactory Upscale",
            category=CATEGORY,
            description="Makes frames four times as wide and high, one by one, so that long clips need no more memory"
            " than short ones beside the result.",
            inputs=[
                io.UpscaleModel.Input("upscale_model", tooltip="The network of Load VideoFactory Upscaler."),
                io.Image.Input("frames", tooltip="Frames of any number."),
                io.Int.Input(
                    "tile",
                    default=512,
                    min=SMALLEST_TILE,
                    max=8192,
                    step=32,
                    tooltip="Larger frames are worked on in squares of this side, smaller ones when memory asks.",
                ),
            ],
            outputs=[io.Image.Output(display_name="frames", tooltip="The frames, four times as wide and high.")],
        )

    @classmethod
    def execute(cls, upscale_model: Any, frames: Tensor, tile: int) -> io.NodeOutput:
        if upscale_model.scale != SCALE:
            raise ValueError(
                f"this network makes pictures {upscale_model.scale} times as large and this node is for {SCALE} times:"
                " choose an x4 network, or use the host's upscaling node"
            )
        if not len(frames):
            raise ValueError("there are 0 frames to upscale: give at least 1")
        management = comfy.model_management
        device = management.get_torch_device()
        management.free_memory(management.module_size(upscale_model.model), device)
        upscale_model.to(device)
        count, height, width = frames.shape[:3]
        out = torch.empty((count, height * SCALE, width * SCALE, 3), dtype=torch.float32)
        try:
            for one in pieces(count, 1):
                picture = frames[one, :, :, :3].movedim(-1, 1).float()
                large, tile = upscale(upscale_model, picture.to(device), tile)
                out[one] = large.movedim(1, -1).clamp(0, 1).cpu()
        finally:
            upscale_model.to("cpu")
        return io.NodeOutput(out)


@torch.inference_mode()
def upscale(network: Any, picture: Tensor, tile: int) -> tuple[Tensor, int]:
    """`picture [1, 3, H, W]` four times as large, and the side of the tiles that memory allowed."""
    while True:
        try:
            if max(picture.shape[-2:]) <= tile:
                return network(picture), tile
            tiled = comfy.utils.tiled_scale(
                picture, network, tile_x=tile, tile_y=tile, overlap=OVERLAP, upscale_amount=SCALE
            )
            return tiled, tile
        except comfy.model_management.OOM_EXCEPTION:
            if tile // 2 < SMALLEST_TILE:
                raise
            tile //= 2


NODES = [Upscale]
