"""Frames as conditions: pictures and clips that a new clip begins with, ends with, goes through or goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
import comfy.samplers
import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..videofactory_core.fit import FITS, Fit, fit_frames
from ..videofactory_core.pipeline import UNTRAINED
from . import host
from .decode import encode
from .host import FRAMES
from .load import CATEGORY


class Parts(NamedTuple):
    """What stays as it is: frames `[F, H, W, 3]` before and behind a piece of `length` frames, and `shown` at `places`
    inside it."""

    before: Tensor
    shown: Tensor
    places: Sequence[int]
    after: Tensor
    length: int


PARTS = io.Custom("VIDEOFACTORY_PARTS")


def vae_input() -> io.Input:
    return io.Vae.Input("vae", tooltip="The autoencoder of Load VideoFactory.")


def size_inputs() -> list[io.Input]:
    return [
        io.Int.Input("width", default=128, min=8, max=8192, step=8, tooltip="Pixels of the clip."),
        io.Int.Input("height", default=72, min=8, max=8192, step=8, tooltip="Pixels of the clip."),
    ]


def fit_input(what: str) -> io.Input:
    return io.Combo.Input(
        "fit",
        options=[*FITS],
        default="crop",
        tooltip=f"What happens to {what} of another shape: cut about the centre, black bars, or pulled.",
    )


def context_input(what: str) -> io.Input:
    return io.Int.Input("context", default=4, min=1, max=256, tooltip=f"How many frames {what} the model is shown.")


def model_input() -> io.Input:
    return io.Model.Input(
        "model", optional=True, tooltip="Connect it to be told what it was not trained for. It changes nothing else."
    )


def latent_output(what: str) -> io.Output:
    return io.Latent.Output(display_name="latent", tooltip=f"{what}, for any sampler.")


def info_output() -> io.Output:
    return io.String.Output(
        display_name="info", tooltip="What was done to pictures, and what is unusual for the model."
    )


def parts_output() -> io.Output:
    return PARTS.Output(display_name="parts", tooltip="What VideoFactory Join needs besides the new frames.")


class ImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryImageToVideo",
            display_name="VideoFactory Image to Video",
            category=CATEGORY,
            description="A clip that begins with a picture.",
            inputs=[
                vae_input(),
                io.Image.Input("image", tooltip="The first frame."),
                *size_inputs(),
                io.Int.Input("frames", default=16, min=2, max=4096, tooltip="Length of the clip."),
                fit_input("a picture"),
                model_input(),
            ],
            outputs=[latent_output("A clip whose first frame is given"), info_output()],
        )

    @classmethod
    def execute(
        cls, vae: Any, image: Tensor, width: int, height: int, frames: int, fit: Fit, model: Any = None
    ) -> io.NodeOutput:
        picture, said = fitted_picture(vae, image, "the picture", width, height, fit)
        return io.NodeOutput(latent_with(vae, picture, [0], frames), told(model, frames, picture, said))


class FirstLastFrame(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryFirstLastFrame",
            display_name="VideoFactory First and Last Frame",
            category=CATEGORY,
            description="A clip that leads from one picture to another.",
            inputs=[
                vae_input(),
                io.Image.Input("first_image", tooltip="The first frame."),
                io.Image.Input("last_image", tooltip="The last frame."),
                *size_inputs(),
                io.Int.Input("frames", default=16, min=3, max=4096, tooltip="Length of the clip, with both."),
                fit_input("a picture"),
                model_input(),
            ],
            outputs=[latent_output("A clip whose first and last frame are given"), info_output()],
        )

    @classmethod
    def execute(
        cls,
        vae: Any,
        first_image: Tensor,
        last_image: Tensor,
        width: int,
        height: int,
        frames: int,
        fit: Fit,
        model: Any = None,
    ) -> io.NodeOutput:
        first, of_first = fitted_picture(vae, first_image, "the first picture", width, height, fit)
        last, of_last = fitted_picture(vae, last_image, "the last picture", width, height, fit)
        pictures = torch.cat([first, last])
        latent = latent_with(vae, pictures, [0, frames - 1], frames)
        return io.NodeOutput(latent, told(model, frames, pictures, of_first, of_last))


class ExtendVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryExtendVideo",
            display_name="VideoFactory Extend Video",
            category=CATEGORY,
            description="Frames behind a clip, or before it. VideoFactory Join puts them and the clip together.",
            inputs=[
                vae_input(),
                io.Image.Input("images", tooltip="The frames of the clip."),
                io.Int.Input("new_frames", default=12, min=1, max=4096, tooltip="How many frames to add."),
                io.Combo.Input(
                    "direction",
                    options=["forward", "backward"],
                    default="forward",
                    tooltip="Whether the new frames come behind the clip or before it.",
                ),
                context_input("of the clip"),
                model_input(),
            ],
            outputs=[
                latent_output("The frames that are shown, and room for the new ones"),
                parts_output(),
                info_output(),
            ],
        )

    @classmethod
    def execute(
        cls, vae: Any, images: Tensor, new_frames: int, direction: str, context: int, model: Any = None
    ) -> io.NodeOutput:
        clip, said = fitted_clip(vae, images, "the clip")
        check_context("the clip", clip, context)
        length = context + new_frames
        if direction == "forward":
            parts = Parts(clip[:-context], clip[-context:], range(context), clip[:0], length)
        else:
            parts = Parts(clip[:0], clip[:context], range(new_frames, length), clip[context:], length)
        return io.NodeOutput(latent_of(vae, parts), parts, told(model, length, clip, said))


class Inbetween(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryInbetween",
            display_name="VideoFactory In-between Frames",
            category=CATEGORY,
            description="New frames between those of a clip, for more frames a second or slow motion.",
            inputs=[
                vae_input(),
                io.Image.Input("images", tooltip="The frames of the clip."),
                io.Int.Input(
                    "times",
                    default=2,
                    min=2,
                    max=8,
                    tooltip="How many times as many frames: 2 adds one between any two.",
                ),
                model_input(),
            ],
            outputs=[
                latent_output("A clip in which the frames are given at equal distances"),
                info_output(),
                parts_output(),
            ],
        )

    @classmethod
    def execute(cls, vae: Any, images: Tensor, times: int, model: Any = None) -> io.NodeOutput:
        if len(images) < 2:
            raise ValueError("there is nothing between the frames of a clip of 1: give at least 2")
        clip, said = fitted_clip(vae, images, "the clip")
        length = (len(clip) - 1) * times + 1
        parts = Parts(clip[:0], clip, range(0, length, times), clip[:0], length)
        return io.NodeOutput(latent_of(vae, parts), told(model, length, clip, said), parts)


class Transition(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryTransition",
            display_name="VideoFactory Transition",
            category=CATEGORY,
            description="Frames that lead from one clip to another. VideoFactory Join puts all three together.",
            inputs=[
                vae_input(),
                io.Image.Input("before", tooltip="The frames of the first clip; its size is the result's."),
                io.Image.Input("after", tooltip="The frames of the second clip."),
                io.Int.Input("frames", default=8, min=1, max=4096, tooltip="How many new frames lie between them."),
                context_input("of each clip"),
                fit_input("a second clip"),
                model_input(),
            ],
            outputs=[latent_output("The frames that are shown, and room between them"), parts_output(), info_output()],
        )

    @classmethod
    def execute(
        cls, vae: Any, before: Tensor, after: Tensor, frames: int, context: int, fit: Fit, model: Any = None
    ) -> io.NodeOutput:
        first, of_first = fitted_clip(vae, before, "the first clip")
        height, width = first.shape[1:3]
        second, of_second = fit_frames(after, width, height, fit)
        check_context("the first clip", first, context)
        check_context("the second clip", second, context)
        length = context + frames + context
        shown = torch.cat([first[-context:], second[:context].to(first)])
        places = [*range(context), *range(context + frames, length)]
        parts = Parts(first[:-context], shown, places, second[context:], length)
        of_second = of_second and f"of the second clip, {of_second}"
        return io.NodeOutput(latent_of(vae, parts), parts, told(model, length, first, of_first, of_second))


class Join(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryJoin",
            display_name="VideoFactory Join",
            category=CATEGORY,
            description="New frames and the clips that they were made for, as one clip. Frames of the clips stay as"
            " they are, and none is there twice.",
            inputs=[
                io.Image.Input("images", tooltip="What VideoFactory Decode gives of the sampled latent."),
                PARTS.Input("parts", tooltip="Of VideoFactory Extend Video, In-between Frames or Transition."),
            ],
            outputs=[io.Image.Output(display_name="frames", tooltip="All frames in the order of time.")],
        )

    @classmethod
    def execute(cls, images: Tensor, parts: Parts) -> io.NodeOutput:
        if len(images) != parts.length:
            raise ValueError(
                f"these are {len(images)} frames, and the latent between the clips has {parts.length}: connect what"
                " VideoFactory Decode gives, and change the number of frames behind VideoFactory Join"
            )
        height, width = parts.shown.shape[1:3]
        if images.shape[1:3] != (height, width):
            raise ValueError(
                f"these frames are {images.shape[2]}x{images.shape[1]} and the clips {width}x{height}: connect what"
                " VideoFactory Decode gives, and change the size behind VideoFactory Join"
            )
        piece = images[..., :3].clone()
        piece[[*parts.places]] = parts.shown.to(piece)
        return io.NodeOutput(torch.cat([parts.before.to(piece), piece, parts.after.to(piece)]))


class FrameGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryFrameGuidance",
            display_name="VideoFactory Frame Guidance",
            category=CATEGORY,
            description="Follow given frames harder, as cfg does with the prompt. Each step costs one pass of the"
            " network more.",
            inputs=[
                io.Model.Input("model", tooltip="A model that knows given frames."),
                io.Float.Input(
                    "scale", default=1.5, min=1.0, max=10.0, step=0.1, tooltip="How hard to follow them; 1 is off."
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, for any sampler.")],
        )

    @classmethod
    def execute(cls, model: Any, scale: float) -> io.NodeOutput:
        config = host.config_of(model)
        if config is None:
            raise ValueError("this model belongs to another family: connect the model of Load VideoFactory")
        if not config.given_frames:
            raise ValueError("this model knows no given frames: train it with train/recipes/image-to-video-16gb.toml")
        if scale == 1:
            return io.NodeOutput(model)
        model = model.clone()
        model.set_model_sampler_post_cfg_function(partial(guide_frames, scale))
        return io.NodeOutput(model)


def guide_frames(scale: float, found: dict[str, Any]) -> Tensor:
    """What guidance over the text has `found` at a step, guided over the frames too; see the core's `guide_frames`."""
    # Without guidance over the text the prompt stays where it is all that guides.
    conditions, known = found["uncond"], found["uncond_denoised"]
    if conditions is None:
        conditions, known = found["cond"], found["cond_denoised"]
    hidden = found["model"].hide(conditions)
    if hidden is None:
        return found["denoised"]
    (without,) = comfy.samplers.calc_cond_batch(
        found["model"], [hidden], found["input"], found["sigma"], found["model_options"]
    )
    return found["denoised"] + (scale - 1) * (known - without)


def factor_of(vae: Any) -> int:
    """How many pixels a latent is wide and high; ValueError for a VAE that packs time too."""
    factor = getattr(vae, "downscale_ratio", None)
    if not isinstance(factor, int):
        raise ValueError("this VAE belongs to another family of models: connect the VAE of Load VideoFactory")
    return factor


def fitted_picture(vae: Any, image: Tensor, name: str, width: int, height: int, fit: Fit) -> tuple[Tensor, str]:
    """The first of `image` as `[1, height, width, 3]`, and what was done to it."""
    factor = factor_of(vae)
    if width % factor or height % factor:
        nearest = " x ".join(str(max(1, round(side / factor)) * factor) for side in (width, height))
        raise ValueError(f"width and height must be multiples of {factor}, not {width} x {height}: try {nearest}")
    picture, said = fit_frames(image[:1], width, height, fit)
    several = f"the first of {len(image)} was taken" if len(image) > 1 else ""
    words = "; ".join(filter(None, [several, said]))
    return picture, words and f"of {name}, {words}"


def fitted_clip(vae: Any, images: Tensor, name: str) -> tuple[Tensor, str]:
    """Frames cut to the largest size that suits the VAE, `[F, H, W, 3]`, and what was done to them."""
    factor = factor_of(vae)
    old_height, old_width = images.shape[1:3]
    height, width = old_height // factor * factor, old_width // factor * factor
    if not height or not width:
        raise ValueError(
            f"these frames are {old_width}x{old_height} and the model needs {factor}x{factor} or more: scale them"
        )
    top, left = (old_height - height) // 2, (old_width - width) // 2
    clip, said = fit_frames(images[:, top : top + height, left : left + width], width, height)
    cut = "" if clip.shape[1:3] == images.shape[1:3] else f"{old_width}x{old_height} was cut to {width}x{height}"
    words = "; ".join(filter(None, [cut, said]))
    return clip, words and f"of {name}, {words}"


def check_context(name: str, clip: Tensor, context: int) -> None:
    if len(clip) < context:
        raise ValueError(
            f"{name} has {len(clip)} frames and {context} of it are to be shown: set context to {len(clip)} or less, or"
            " give a longer clip"
        )


def latent_with(vae: Any, frames: Tensor, places: Sequence[int], num_frames: int) -> dict[str, Any]:
    """A LATENT of so many frames whose noise mask leaves those at `places` alone, which are `frames [N, H, W, 3]`."""
    known = encode(frames, vae).to(comfy.model_management.intermediate_device())
    samples = known.new_zeros(num_frames, *known.shape[1:])
    mask = known.new_ones(num_frames, 1, *known.shape[2:])
    samples[[*places]], mask[[*places]] = known, 0
    return {"samples": samples, "noise_mask": mask, FRAMES: num_frames}


def latent_of(vae: Any, parts: Parts) -> dict[str, Any]:
    """The LATENT of the piece, in which the frames that are shown are given."""
    return latent_with(vae, parts.shown, parts.places, parts.length)


def told(model: Any, num_frames: int, frames: Tensor, *said: str) -> str:
    """What an artist should know, a line each: what was done to `frames [F, H, W, 3]`, what the model never learned."""
    lines = [sentence(words) for words in said if words]
    config = host.config_of(model) if model is not None else None
    if config is not None:
        lines.append(host.unusual(config, num_frames, frames.shape[2], frames.shape[1]))
        if num_frames > config.chunk:
            lines.append("VideoFactory Long Sampler makes it in chunks as long as the model knows.")
        if not config.given_frames:
            lines.append(sentence(UNTRAINED))
    return "\n".join(filter(None, lines))


def sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


NODES = [ImageToVideo, FirstLastFrame, ExtendVideo, Inbetween, Transition, Join, FrameGuidance]
