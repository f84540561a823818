"""Between latents and frames."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.v0_0_2 import io
from einops import rearrange
from torch import Tensor

from . import host
from .load import CATEGORY
from .progress import pieces


def frames_per_chunk() -> io.Int.Input:
    return io.Int.Input(
        "frames_per_chunk",
        default=0,
        min=0,
        max=4096,
        tooltip="Frames at a time: fewer need less memory and give the same pictures. 0 lets free memory decide.",
    )


class Decode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryDecode",
            display_name="VideoFactory Decode",
            category=CATEGORY,
            description="Turns a clip's latent into frames, a few at a time, in tiles when memory does not hold one.",
            inputs=[
                io.Latent.Input("latent", tooltip="The clip of a sampler."),
                io.Vae.Input("vae", tooltip="The autoencoder of Load VideoFactory."),
                frames_per_chunk(),
            ],
            outputs=[io.Image.Output(display_name="frames", tooltip="Frames one after the other, clip behind clip.")],
        )

    @classmethod
    def execute(cls, latent: dict[str, Any], vae: Any, frames_per_chunk: int) -> io.NodeOutput:
        samples = latent["samples"]
        if samples.ndim == 5:
            samples = rearrange(samples, "B C F H W -> (B F) C H W")
        channels = getattr(vae, "latent_channels", None)
        if samples.ndim != 4 or samples.shape[1] != channels or getattr(vae, "latent_dim", 2) != 2:
            raise ValueError(
                f"this VAE belongs to another family of models (it wants {channels} latent channels, the latent has"
                f" {samples.shape[1]}): connect the VAE of Load VideoFactory"
            )
        if not len(samples):
            raise ValueError("this latent has 0 frames: make at least 1")
        out: Tensor | None = None
        for piece in pieces(len(samples), frames_per_chunk or len(samples)):
            # The host splits further by free memory, and goes over to tiles when a frame does not fit.
            frames = vae.decode(samples[piece])
            if out is None:
                out = frames.new_empty((len(samples), *frames.shape[1:]))
            out[piece] = frames
        return io.NodeOutput(out)


class Encode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryEncode",
            display_name="VideoFactory Encode",
            category=CATEGORY,
            description="Turns frames into a latent: the beginning of video to video.",
            inputs=[
                io.Image.Input("frames", tooltip="The frames of one clip."),
                io.Vae.Input("vae", tooltip="The autoencoder of Load VideoFactory."),
                frames_per_chunk(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For VideoFactory Sampler with denoise below 1.")],
        )

    @classmethod
    def execute(cls, frames: Tensor, vae: Any, frames_per_chunk: int) -> io.NodeOutput:
        return io.NodeOutput({"samples": encode(frames, vae, frames_per_chunk), host.FRAMES: len(frames)})


def encode(frames: Tensor, vae: Any, frames_per_chunk: int = 0) -> Tensor:
    """Latents `[F, C, h, w]` of frames `[F, H, W, 3 or 4]` in 0..1, so many at a time; 0 lets free memory decide."""
    if not len(frames):
        raise ValueError("there are 0 frames to encode: give at least 1")
    parts = []
    for piece in pieces(len(frames), frames_per_chunk or len(frames)):
        parts.append(vae.encode(frames[piece, :, :, :3]))
        if parts[-1].ndim != 4:
            raise ValueError("this VAE belongs to another family of models: connect the VAE of Load VideoFactory")
    return torch.cat(parts)


NODES = [Decode, Encode]
