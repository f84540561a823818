"""Stable Diffusion 1.x and 2.x, and fine-tunes of them: which of our tensors stands where in their files.

A table maps a module path of ours to theirs; everything below a path moves with it, and the longest path wins. Our
names are those of the original single files, so only diffusers' and open_clip's differ.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..config import AutoencoderConfig, UNetConfig
from ..detect import Shapes, count

Table = Mapping[str, str]
# Parts that image models do not have.
VIDEO_PARTS = {"temporal", "temporal_skip", "merge"}

RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


class Place(NamedTuple):
    """A ResBlock, the spatial transformer behind it if there is one, and diffusers' name and number for both."""

    resnet: str
    transformer: str | None
    stage: str
    number: int


def places(config: UNetConfig) -> Iterator[Place]:
    """Every ResBlock in the order of the forward pass."""
    levels, block = len(config.channel_mult), 1
    for level, depth in enumerate(config.transformer_depth):
        for number in range(config.num_res_blocks):
            here = f"input_blocks.{block}"
            yield Place(f"{here}.0", f"{here}.1" if depth else None, f"down_blocks.{level}", number)
            block += 1
        # The number of the resampling layer.
        block += 1
    yield Place("middle_block.0", "middle_block.1", "mid_block", 0)
    yield Place("middle_block.2", None, "mid_block", 1)
    blocks = itertools.count()
    for stage in range(levels):
        depth = config.transformer_depth[levels - 1 - stage]
        for number in range(config.num_res_blocks + 1):
            here = f"output_blocks.{next(blocks)}"
            yield Place(f"{here}.0", f"{here}.1" if depth else None, f"up_blocks.{stage}", number)


def resamplers(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Every change of resolution: our path and diffusers'."""
    levels = len(config.channel_mult)
    for i in range(levels - 1):
        down = (i + 1) * (config.num_res_blocks + 1)
        yield f"input_blocks.{down}.0.op", f"down_blocks.{i}.downsamplers.0.conv"
        up = (i + 1) * (config.num_res_blocks + 1) - 1
        behind = 2 if config.transformer_depth[levels - 1 - i] else 1
        yield f"output_blocks.{up}.{behind}.conv", f"up_blocks.{i}.upsamplers.0.conv"


def diffusers_unet(config: UNetConfig) -> dict[str, str]:
    """The spatial network in diffusers' `UNet2DConditionModel`."""
    table = {**ENDS, **dict(resamplers(config))}
    for place in places(config):
        for ours, theirs in RESNET.items():
            table[f"{place.resnet}.{ours}"] = f"{place.stage}.resnets.{place.number}.{theirs}"
        if place.transformer:
            table[place.transformer] = f"{place.stage}.attentions.{place.number}"
    return table


def lookup(table: Table, name: str) -> str | None:
    """Their name of a tensor of ours; None when the table does not have it."""
    parts = name.split(".")
    for cut in range(len(parts), -1, -1):
        path, rest = ".".join(parts[:cut]), parts[cut:]
        if path in table:
            return None if VIDEO_PARTS & set(rest) else ".".join(filter(None, [table[path], *rest]))
    return None


def detect_diffusers_unet(shapes: Shapes) -> dict[str, Any]:
    """The sizes of a U-Net in diffusers' names; LookupError when it is none."""
    widths = [
        shapes[f"down_blocks.{i}.resnets.0.conv1.weight"][0]
        for i in range(count(shapes, "down_blocks.{}.resnets.0.conv1.weight"))
    ]
    blocks = "down_blocks.{}.attentions.0.transformer_blocks.{{}}.norm1.weight"
    return {
        "in_channels": shapes["conv_in.weight"][1],
        "out_channels": shapes["conv_out.weight"][0],
        "model_channels": widths[0],
        "channel_mult": tuple(width // widths[0] for width in widths),
        "num_res_blocks": count(shapes, "down_blocks.0.resnets.{}.conv1.weight"),
        "transformer_depth": tuple(count(shapes, blocks.format(i)) for i in range(len(widths))),
        "context_dim": shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_in_transformer": len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2,
    }


# Autoencoder

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# Before diffusers 0.13.
OLD_ATTENTION = {"norm": "group_norm", "q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def diffusers_autoencoder(config: AutoencoderConfig, shapes: Shapes) -> dict[str, str]:
    """diffusers' `AutoencoderKL`; `shapes` tell which of its two names for attention a file has."""
    levels = len(config.channel_mult)
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    attention = OLD_ATTENTION if any(".query." in name for name in shapes) else ATTENTION
    for half, stage, extra in (("encoder.down", "encoder.down_blocks", 0), ("decoder.up", "decoder.up_blocks", 1)):
        side = half.split(".")[0]
        table |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        table[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        for ours, theirs in (("block_1", "resnets.0"), ("block_2", "resnets.1")):
            table[f"{side}.mid.{ours}"] = f"{side}.mid_block.{theirs}"
        for ours, theirs in attention.items():
            table[f"{side}.mid.attn_1.{ours}"] = f"{side}.mid_block.attentions.0.{theirs}"
        for level in range(levels):
            # Theirs count in the order of the forward pass, ours from fine to coarse.
            number = levels - 1 - level if extra else level
            for i in range(config.num_res_blocks + extra):
                block = f"{half}.{level}.block.{i}"
                table[block] = f"{stage}.{number}.resnets.{i}"
                table[f"{block}.nin_shortcut"] = f"{stage}.{number}.resnets.{i}.conv_shortcut"
            resample = "upsample" if extra else "downsample"
            table[f"{half}.{level}.{resample}"] = f"{stage}.{number}.{resample}rs.0"
    return table


def detect_diffusers_autoencoder(shapes: Shapes) -> dict[str, Any]:
    """The sizes of an `AutoencoderKL`; LookupError when it is none."""
    channels, in_channels = shapes["encoder.conv_in.weight"][:2]
    levels = count(shapes, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    widths = [shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    return {
        "in_channels": in_channels,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "channels": channels,
        "channel_mult": tuple(width // channels for width in widths),
        "num_res_blocks": count(shapes, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
    }


# Text encoder

OPEN_CLIP_OUTER = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def detect_open_clip(shapes: Shapes) -> dict[str, Any]:
    """The sizes of open_clip's text tower; LookupError when it is none."""
    vocab_size, width = shapes["token_embedding.weight"]
    return {
        "width": width,
        "layers": count(shapes, "transformer.resblocks.{}.ln_1.weight"),
        "max_tokens": shapes["positional_embedding"][0],
        "vocab_size": vocab_size,
    }


def open_clip(name: str) -> tuple[str, int | None]:
    """open_clip's name of a tensor of ours, and which third of it ours is (None: all of it)."""
    if name in OPEN_CLIP_OUTER:
        return OPEN_CLIP_OUTER[name], None
    match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match is not None, name
    number, part, kind = match.groups()
    layer = f"transformer.resblocks.{number}"
    if part in OPEN_CLIP_LAYER:
        return f"{layer}.{OPEN_CLIP_LAYER[part]}.{kind}", None
    return f"{layer}.attn.in_proj_{kind}", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].index(part)
