"""Load a model, load an upscaler."""

from __future__ import annotations

from typing import Any

import comfy.utils
from comfy_api.v0_0_2 import io
from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError

from . import files, host

CATEGORY = "VideoFactory"


class LoadVideoFactory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryLoader",
            display_name="Load VideoFactory",
            category=CATEGORY,
            description="Opens a VideoFactory checkpoint. The demo that comes with the pack is always in the list.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=files.names(files.CHECKPOINTS),
                    tooltip="A file of models/videofactory, or the bundled demo of moving shapes.",
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
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        return files.refusal(files.CHECKPOINTS, checkpoint)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str) -> str:
        return files.state(files.CHECKPOINTS, checkpoint)

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        model, clip, vae, file = host.load(files.find(files.CHECKPOINTS, checkpoint))
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
        return io.NodeOutput(network)


def _keep_input(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].clone(), *inputs[1:]


NODES = [LoadVideoFactory, LoadUpscaler]
