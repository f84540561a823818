"""What the clip shows: prompts, or prompts that change over the frames."""

from __future__ import annotations

from typing import Any

from comfy_api.v0_0_2 import io

from ..videofactory_core import prompts
from . import host
from .load import CATEGORY


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryTextEncode",
            display_name="VideoFactory Text Encode",
            category=CATEGORY,
            description='Prompt and negative prompt in one node. A prompt like "0": "a cat", "8": "a dog" changes over'
            " the frames.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of Load VideoFactory."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a red circle moving right on a black background",
                    tooltip='What the clip shows, of any length; or prompts for frames: "0": "...", "8": "...".',
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What to steer away from.",
                ),
                io.Int.Input(
                    "frames",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip="Only for several clips in one KSampler: the frames of one clip. 0 takes all as one clip;"
                    " VideoFactory Sampler knows without it.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="What the clip shows."),
                io.Conditioning.Output(display_name="negative", tooltip="What to steer away from."),
            ],
        )

    @classmethod
    def execute(cls, clip: Any, prompt: str, negative_prompt: str, frames: int) -> io.NodeOutput:
        told = {host.FRAMES: frames} if frames else {}
        return io.NodeOutput(encode(clip, prompt, told), encode(clip, negative_prompt, told))


def encode(clip: Any, prompt: str, told: dict[str, Any]) -> Any:
    """The host's CONDITIONING of a prompt, or of prompts for key frames; `told` goes along with it."""
    keys = prompts.parse(prompt)
    if keys is None:
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt), add_dict=told)
    encoded = {
        frame: clip.encode_from_tokens_scheduled(clip.tokenize(text), add_dict=told) for frame, text in keys.items()
    }
    entries = []
    # The host makes several entries of a prompt when LoRAs change over the steps; every key frame has the same.
    for parts in zip(*encoded.values(), strict=True):
        changing = prompts.build({frame: part[0] for frame, part in zip(encoded, parts, strict=True)})
        entries.append([parts[0][0], {**parts[0][1], host.SCHEDULE: changing}])
    return entries


NODES = [TextEncode]
