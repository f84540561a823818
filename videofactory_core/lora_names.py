"""What other programs call the layers of a U-Net and a text encoder in a LoRA file."""

from __future__ import annotations

import itertools
import re

from torch import nn

from .config import UNetConfig
from .convert.animatediff import motion_modules
from .convert.stable_diffusion import diffusers_unet
from .text import TextEncoder
from .unet.model import VideoUNet

# What a file's name of a layer has more, or spells otherwise, than the names of `layers`, in the order of treatment.
SPELLINGS = (
    (r"base_model\.model\.", ""),
    # The part of the model needs no name, because paths begin differently in each.
    (r"^(diffusion_model\.|unet\.|lora_unet_|text_encoder\.|text_encoders\.clip_[hl]\.transformer\.|lora_te_)", ""),
    # Before version 5 transformers had this level.
    (r"^text_model[._]", ""),
    # diffusers once kept a LoRA in the attention's processor, where the output has no number.
    (r"\.processor\.to_out$", ".to_out.0"),
    (r"\.processor\.", "."),
    # AnimateDiff's own names.
    (r"\.temporal_transformer\.", "."),
    (r"\.attention_blocks\.0\.", ".attn1."),
    (r"\.attention_blocks\.1\.", ".attn2."),
    # kohya writes every dot like this.
    (r"\.", "_"),
)


def spelled(name: str) -> str:
    """A file's name of a layer as `layers` spells it."""
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def layers(unet: VideoUNet, text_encoder: TextEncoder) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that a LoRA may change, each under our name and, where there is one, diffusers', dots as `_`."""
    # Not every configuration has a layer at each of diffusers' places.
    modules = dict(unet.named_modules())
    named = itertools.chain(
        modules.items(),
        text_encoder.text_model.named_modules(),
        *(
            modules[ours].named_modules(prefix=theirs)
            for theirs, ours in _diffusers_names(unet.config).items()
            if ours in modules
        ),
    )
    return {name.replace(".", "_"): module for name, module in named if isinstance(module, (nn.Linear, nn.Conv2d))}


def _diffusers_names(config: UNetConfig) -> dict[str, str]:
    """Paths of modules in diffusers' U-Net and in ours; the same names follow inside."""
    images = {theirs: ours for ours, theirs in diffusers_unet(config).items()}
    return images | {theirs: ours for ours, theirs in motion_modules(config).items()}
