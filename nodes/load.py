"""Load a model, load an upscaler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.v0_0_2 import io
from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError

from ..videofactory_core import checkpoint as checkpoints
from ..videofactory_core import upscaler as upscalers
from ..videofactory_core.convert import convert
from . import files, host

CATEGORY = "VideoFactory"
NO_MOTION = "none"
BY_THE_FILE = "by the file"


def place(checkpoint: str) -> tuple[str, str]:
    """What an entry of the list of checkpoints stands for."""
    return files.place(checkpoint, files.CHECKPOINTS, files.IMAGE_MODELS)


def motion_place(motion: str) -> tuple[str, str]:
    """What an entry of the list of motion modules stands for."""
    return files.place(motion, files.MOTION_MODULES, files.CHECKPOINTS)


def open_file(path: Path, motion: Path | None, image_model: bool, prediction_type: str) -> host.ModelFile:
    """A checkpoint of ours, or an image model that becomes one, with or without a motion module."""
    if image_model:
        told: Any = None if prediction_type == BY_THE_FILE else prediction_type
        return convert(path, motion, temporal=False, prediction_type=told)
    if motion is not None:
        raise ValueError(
            f"{path.name} has its own motion: set motion to {NO_MOTION}, or choose an image model of models/"
            f"{files.IMAGE_MODELS}"
        )
    return checkpoints.check(path)[0]


class LoadVideoFactory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryLoader",
            display_name="Load VideoFactory",
            category=CATEGORY,
            description="Opens a VideoFactory checkpoint, or a Stable Diffusion model with a motion module.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=[*files.names(files.CHECKPOINTS), *files.guests(files.IMAGE_MODELS)],
                    tooltip="A file of models/videofactory, the bundled demo of moving shapes, or an image model.",
                ),
                io.Combo.Input(
                    "motion",
                    options=[NO_MOTION, *files.names(files.MOTION_MODULES), *files.guests(files.CHECKPOINTS)],
                    default=NO_MOTION,
                    optional=True,
                    tooltip="For image models, an AnimateDiff file of models/animatediff_models or videofactory.",
                ),
                io.Combo.Input(
                    "prediction_type",
                    options=[BY_THE_FILE, "epsilon", "v_prediction"],
                    default=BY_THE_FILE,
                    optional=True,
                    tooltip="For Stable Diffusion 2 alone: epsilon for 2.1-base, v_prediction for 2.1 at 768 pixels.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The video U-Net, for any sampler."),
                io.Clip.Output(display_name="clip", tooltip="The text encoder."),
                io.Vae.Output(display_name="vae", tooltip="The autoencoder between latents and frames."),
                io.String.Output(display_name="info", tooltip="Title, trained clips and licence of the model."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str, motion: str = NO_MOTION) -> bool | str:
        found = files.refusal(*place(checkpoint))
        return found if found is not True or motion == NO_MOTION else files.refusal(*motion_place(motion))

    @classmethod
    def fingerprint_inputs(
        cls, checkpoint: str, motion: str = NO_MOTION, prediction_type: str = BY_THE_FILE
    ) -> tuple[str, ...]:
        moving = "" if motion == NO_MOTION else files.state(*motion_place(motion))
        return files.state(*place(checkpoint)), moving, prediction_type

    @classmethod
    def execute(cls, checkpoint: str, motion: str = NO_MOTION, prediction_type: str = BY_THE_FILE) -> io.NodeOutput:
        kind, name = place(checkpoint)
        moving = None if motion == NO_MOTION else files.find(*motion_place(motion))
        file = open_file(files.find(kind, name), moving, kind == files.IMAGE_MODELS, prediction_type)
        if file.note:
            logging.warning("VideoFactory: %s", file.note)
        model, clip, vae = host.load(file)
        config = file.config
        info = (
            f"{file.metadata.title}: {config.frames} frames of {config.width} x {config.height}"
            f" at {config.fps:g} a second; licence {file.metadata.licence}"
        )
        return io.NodeOutput(model, clip, vae, f"{info}\n{file.note}".strip())


class LoadUpscaler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryUpscalerLoader",
            display_name="Load VideoFactory Upscaler",
            category=CATEGORY,
            description="Opens an RCAN, or another network that makes pictures four times as wide and high.",
            inputs=[
                io.Combo.Input(
                    "upscaler",
                    options=files.names(files.UPSCALERS),
                    tooltip="A file of models/upscale_models, or the small one that comes with the pack.",
                ),
            ],
            outputs=[
                io.UpscaleModel.Output(
                    display_name="upscale_model", tooltip="For VideoFactory Upscale or the host's own upscaling node."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, upscaler: str) -> bool | str:
        return files.refusal(files.UPSCALERS, upscaler)

    @classmethod
    def fingerprint_inputs(cls, upscaler: str) -> str:
        return files.state(files.UPSCALERS, upscaler)

    @classmethod
    def execute(cls, upscaler: str) -> io.NodeOutput:
        path = files.find(files.UPSCALERS, upscaler)
        try:
            weights = comfy.utils.load_torch_file(str(path), safe_load=True)
            network = ModelLoader().load_from_state_dict(weights).eval()
        except UnsupportedModelError as error:
            raise ValueError(f"{upscaler} is no upscaling network that is known here: choose another file") from error
        except Exception as error:  # readers of foreign files fail in many ways
            raise ValueError(f"{upscaler} cannot be read ({error}): get the file again, as .safetensors") from error
        if not isinstance(network, ImageModelDescriptor):
            raise ValueError(f"{upscaler} does not turn one picture into one picture: choose an upscaling network")
        # The library's RCAN scales its input in place, and with it pictures that the graph still holds.
        network.model.register_forward_pre_hook(_keep_input)
        return io.NodeOutput(with_our_network(network) or network)


def with_our_network(found: ImageModelDescriptor) -> ImageModelDescriptor | None:
    """The library's description of an RCAN around ours, which is faster; None for other networks."""
    weights = found.model.state_dict()
    try:
        model = upscalers.build(weights)
    except ValueError:
        return None
    half = comfy.model_management.should_use_fp16(comfy.model_management.get_torch_device())
    return ImageModelDescriptor(
        model.prepare(dtype=torch.float16 if half else torch.float32),
        weights,
        found.architecture,
        found.purpose,
        found.tags,
        supports_half=False,
        supports_bfloat16=False,
        scale=found.scale,
        input_channels=found.input_channels,
        output_channels=found.output_channels,
    )


def _keep_input(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].clone(), *inputs[1:]


NODES = [LoadVideoFactory, LoadUpscaler]
