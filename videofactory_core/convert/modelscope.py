"""ModelScope text-to-video and ZeroScope: our network with addition for every merge, in their own files or diffusers'.

Their video U-Net is Stable Diffusion 2.1's with temporal convolutions, temporal transformers, and one more of those
behind the first convolution; all norms run over whole clips.
"""

from __future__ import annotations

from typing import Any

from ..config import UNetConfig
from .stable_diffusion import Shapes, places, resamplers

# What of our network theirs is.
SETTINGS: dict[str, Any] = {
    "temporal_attention_in": True,
    "temporal_skips": False,
    "fusion": "add",
}
# The files of an original folder by the parts of a model.
FILES = {
    "unet": "text2video_pytorch_model.pth",
    "autoencoder": "VQGAN_autoencoder.pth",
    "text_encoder": "open_clip_pytorch_model.bin",
}


def convolutions(ours: str, theirs: str) -> dict[str, str]:
    """A temporal convolution stack; the first of its four convolutions has no dropout in front."""
    table = {}
    for i in range(4):
        table[f"{ours}.norms.{i}"] = f"{theirs}.conv{i + 1}.0"
        table[f"{ours}.convs.{i}"] = f"{theirs}.conv{i + 1}.{3 if i else 2}"
    return table


def has_video_parts(shapes: Shapes) -> bool:
    """Whether the names are those of such a U-Net."""
    return any(".temopral_conv." in name or ".temp_convs." in name for name in shapes)


def table(config: UNetConfig, shapes: Shapes) -> dict[str, str]:
    """The video parts in the authors' file or diffusers' `UNet3DConditionModel`, whichever names `shapes` have."""
    original = any(".temopral_conv." in name for name in shapes)
    return original_unet(config) if original else diffusers_unet(config)


def original_unet(config: UNetConfig) -> dict[str, str]:
    """The video parts, and what their numbers displace, in `text2video_pytorch_model.pth`."""
    table = {"input_blocks.0.1": "input_blocks.0.1"}
    for place in places(config):
        resnet = "middle_block.3" if place.resnet == "middle_block.2" else place.resnet
        table[place.resnet] = resnet
        # Spelled like this in the files.
        table |= convolutions(f"{place.resnet}.temporal", f"{resnet}.temopral_conv")
        if place.transformer:
            block, number = place.transformer.rsplit(".", 1)
            table[f"{place.transformer}.temporal"] = f"{block}.{int(number) + 1}"
    for ours, _ in resamplers(config):
        block, number, layer = ours.rsplit(".", 2)
        if layer == "op":
            table[ours] = f"{block}.op"
        else:
            table[ours] = f"{block}.{3 if number == '2' else number}.{layer}"
    return table


def diffusers_unet(config: UNetConfig) -> dict[str, str]:
    """The video parts in diffusers' `UNet3DConditionModel`."""
    table = {"input_blocks.0.1": "transformer_in"}
    for place in places(config):
        table |= convolutions(f"{place.resnet}.temporal", f"{place.stage}.temp_convs.{place.number}")
        if place.transformer:
            table[f"{place.transformer}.temporal"] = f"{place.stage}.temp_attentions.{place.number}"
    return table
