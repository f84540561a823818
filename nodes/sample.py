"""From an empty latent to a clip's latent."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import comfy.context_windows
import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from . import host
from .host import FRAMES
from .load import CATEGORY
from .network import OPTIONS


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryEmptyLatent",
            display_name="Empty VideoFactory Latent",
            category=CATEGORY,
            description="Room for one or several clips. Their frames stand one behind the other in the batch.",
            inputs=[
                io.Int.Input("width", default=128, min=8, max=8192, step=8, tooltip="Pixels of the clip."),
                io.Int.Input("height", default=72, min=8, max=8192, step=8, tooltip="Pixels of the clip."),
                io.Int.Input("frames", default=16, min=1, max=4096, tooltip="Length of a clip."),
                io.Int.Input("clips", default=1, min=1, max=64, tooltip="How many clips to make at once."),
                io.Model.Input(
                    "model", optional=True, tooltip="Connect it to be told when the size leaves what it was trained on."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="frames x clips empty latent frames."),
                io.String.Output(display_name="info", tooltip="What is unusual for the model, or nothing."),
            ],
        )

    @classmethod
    def execute(cls, width: int, height: int, frames: int, clips: int, model: Any = None) -> io.NodeOutput:
        config = host.config_of(model) if model is not None else None
        factor = config.autoencoder.downscale if config else 8
        channels = config.unet.in_channels if config else 4
        shape = (frames * clips, channels, height // factor, width // factor)
        samples = torch.zeros(shape, device=comfy.model_management.intermediate_device())
        info = host.unusual(config, frames, width, height) if config else ""
        return io.NodeOutput({"samples": samples, FRAMES: frames}, info)


def sampling_inputs() -> list[io.Input]:
    """The inputs of a sampler: those of KSampler, and the strengths of motion and Swap-Attention."""
    return [
        io.Model.Input("model", tooltip="The model of Load VideoFactory."),
        io.Conditioning.Input("positive", tooltip="What the clip shows."),
        io.Conditioning.Input("negative", tooltip="What to steer away from."),
        io.Latent.Input("latent", tooltip="Empty VideoFactory Latent, or VideoFactory Encode for video to video."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Number of the noise to start from.",
        ),
        io.Int.Input("steps", default=25, min=1, max=1000, tooltip="More steps, finer and slower."),
        io.Float.Input(
            "cfg",
            default=2.0,
            min=1.0,
            max=30.0,
            step=0.1,
            tooltip="How closely to follow the prompt: 2 suits the demo, 7 to 12 larger models.",
        ),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.SAMPLER_NAMES,
            default="euler",
            tooltip="Way from noise to clip.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.SCHEDULER_NAMES,
            default="simple",
            tooltip="Which noise levels the steps visit.",
        ),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Share of the way: below 1 the given latent shows through.",
        ),
        io.Float.Input(
            "motion_scale",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.01,
            tooltip="Strength of the temporal layers: 0 makes unrelated pictures.",
        ),
        io.Float.Input(
            "swap_strength",
            default=1.0,
            min=0.0,
            max=2.0,
            step=0.01,
            tooltip="Strength of Swap-Attention between space and time.",
        ),
        io.Boolean.Input(
            "free_noise",
            default=False,
            tooltip="Frames behind the 16th start from shuffled noise of the first 16: long clips keep together.",
        ),
    ]


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactorySampler",
            display_name="VideoFactory Sampler",
            category=CATEGORY,
            description="Turns noise into a clip's latent, with the strengths of motion and Swap-Attention at hand."
            " With both at 1 and no free noise it gives what KSampler gives.",
            inputs=sampling_inputs(),
            outputs=[io.Latent.Output(display_name="latent", tooltip="The clip, for VideoFactory Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        motion_scale: float,
        swap_strength: float,
        free_noise: bool,
    ) -> io.NodeOutput:
        model, samples, noise = begin(model, latent, seed, motion_scale, swap_strength, free_noise)
        num_frames = latent.get(FRAMES)
        if samples.ndim == 4 and num_frames:
            positive, negative = with_frames(positive, num_frames), with_frames(negative, num_frames)
        run = Run(model, steps, cfg, sampler_name, scheduler, denoise)
        callback = latent_preview.prepare_callback(model, steps)
        made = run(positive, negative, noise, samples, latent.get("noise_mask"), seed, callback)
        return io.NodeOutput({**latent, "samples": made})


def begin(
    model: Any, latent: dict[str, Any], seed: int, motion_scale: float, swap_strength: float, free_noise: bool
) -> tuple[Any, Tensor, Tensor]:
    """The model with these strengths, the samples of `latent` and their noise; ValueError for what it cannot sample."""
    config = host.config_of(model)
    if config is None:
        raise ValueError("this model is not a VideoFactory model: connect Load VideoFactory, or use KSampler")
    samples = latent["samples"]
    if samples.shape[1] != config.unet.in_channels:
        raise ValueError(
            f"this latent has {samples.shape[1]} channels and the model works on {config.unet.in_channels}:"
            " use Empty VideoFactory Latent or this model's VAE"
        )
    model = model.clone()
    model.model_options["transformer_options"][OPTIONS] = {
        "motion_scale": motion_scale,
        "swap_strength": swap_strength,
    }
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    if free_noise:
        noise = share_noise(noise, latent.get(FRAMES) or len(noise), config.frames, seed)
    return model, samples, noise


@dataclass(frozen=True)
class Run:
    """The host's sampling with settings that stay the same from one clip to the next."""

    model: Any
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    denoise: float

    def __call__(
        self,
        positive: Any,
        negative: Any,
        noise: Tensor,
        samples: Tensor,
        mask: Tensor | None,
        seed: int,
        callback: Callable[[int, Tensor, Tensor, int], None],
    ) -> Tensor:
        """Latents made of `noise`, in its shape; frames that the noise mask leaves alone are those of `samples`."""
        made: Tensor = comfy.sample.sample(
            self.model,
            noise,
            self.steps,
            self.cfg,
            self.sampler_name,
            self.scheduler,
            positive,
            negative,
            samples,
            denoise=self.denoise,
            noise_mask=mask,
            callback=callback,
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        if mask is None:
            return made
        # To the last bit, which the samplers' sums do not keep.
        given = host.left_alone(comfy.sampler_helpers.prepare_mask(mask, samples.shape, made.device))
        return torch.where(given, samples.to(made), made)


def with_frames(conditioning: Any, num_frames: int) -> Any:
    """Conditions that say how many frames a clip of the batch has."""
    return [[features, {**told, FRAMES: num_frames}] for features, told in conditioning]


def share_noise(noise: Tensor, num_frames: int, window: int, seed: int) -> Tensor:
    """FreeNoise (Qiu et al., arXiv 2310.15169): behind `window` frames, half a window at a time is the half that lies a
    whole window before it, shuffled.

    `noise [(B F), C, H, W]` with F = `num_frames`, or `[B, C, F, H, W]`.
    """
    in_batch = noise.ndim == 4
    clips = noise.clone().unflatten(0, (-1, num_frames)) if in_batch else noise.transpose(1, 2).clone()
    generator = torch.Generator().manual_seed(seed)
    stride = max(1, window // 2)
    for start in range(window, clips.shape[1], stride):
        count = min(stride, clips.shape[1] - start)
        chosen = torch.randperm(stride, generator=generator)[:count] + start - window
        clips[:, start : start + count] = clips[:, chosen]
    return clips.flatten(0, 1) if in_batch else clips.transpose(1, 2)


class ContextWindows(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VideoFactoryContextWindows",
            display_name="VideoFactory Context Windows",
            category=CATEGORY,
            description="Long clips: every step looks at overlapping windows of as many frames as the model knows.",
            inputs=[
                io.Model.Input("model", tooltip="The model of Load VideoFactory."),
                io.Int.Input("length", default=16, min=2, max=256, tooltip="Frames of a window, as trained."),
                io.Int.Input("overlap", default=8, min=0, max=255, tooltip="Frames that neighbouring windows share."),
                io.Boolean.Input(
                    "closed_loop", default=False, tooltip="The last frames lead back to the first: a seamless loop."
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model, working in windows.")],
        )

    @classmethod
    def execute(cls, model: Any, length: int, overlap: int, closed_loop: bool) -> io.NodeOutput:
        if overlap >= length:
            raise ValueError(f"windows of {length} frames cannot overlap by {overlap}: use fewer than {length}")
        schedules, fuse = comfy.context_windows.ContextSchedules, comfy.context_windows.ContextFuseMethods
        kind = schedules.UNIFORM_LOOPED if closed_loop else schedules.STATIC_STANDARD
        model = model.clone()
        model.model_options["context_handler"] = FrameWindows(
            context_schedule=comfy.context_windows.get_matching_context_schedule(kind),
            fuse_method=comfy.context_windows.get_matching_fuse_method(fuse.PYRAMID),
            context_length=length,
            context_overlap=overlap,
            closed_loop=closed_loop,
            dim=0,
        )
        # Memory is then estimated for a window instead of the whole clip.
        comfy.context_windows.create_prepare_sampling_wrapper(model)
        return io.NodeOutput(model)


class FrameWindows(comfy.context_windows.IndexListContextHandler):
    """The host's context windows over frames in the batch, where hosts before 0.4 fail and later ones mix prompts."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # The host computes the prompt and the negative prompt together only when they share one ControlNet object.
        self.controls: WeakValueDictionary[tuple[int, ...], Any] = WeakValueDictionary()

    def set_step(self, timestep: Tensor, model_options: dict[str, Any]) -> None:
        # Every row has a sigma; they are all the same.
        sigmas = model_options["transformer_options"]["sample_sigmas"]
        self._step = int((sigmas - timestep.flatten()[0]).abs().argmin())

    def get_context_windows(self, model: Any, x_in: Tensor, model_options: dict[str, Any]) -> Any:
        if x_in.ndim == 5:
            raise ValueError(
                "context windows work on one clip with its frames in the batch: use Empty VideoFactory Latent"
            )
        return super().get_context_windows(model, x_in, model_options)

    def get_resized_cond(self, cond_in: Any, x_in: Tensor, window: Any, device: Any = None, **_: Any) -> Any:
        if cond_in is None:
            return None
        length = x_in.shape[0]

        def cut(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == length:
                return window.get_tensor(value, device)
            return value

        resized = []
        for entry in cond_in:
            kept = {key: cut(value) for key, value in entry.items()}
            conditions = dict(kept.get("model_conds", {}))
            for key, value in conditions.items():
                if key == "num_video_frames":
                    if value.cond != length:
                        raise ValueError(
                            "context windows work on one clip at a time: set clips to 1, and the same frames in"
                            " VideoFactory Text Encode and Empty VideoFactory Latent"
                        )
                    conditions[key] = type(value)(len(window.index_list))
                elif isinstance(getattr(value, "cond", None), Tensor):
                    conditions[key] = value._copy_with(cut(value.cond))
            kept["model_conds"] = conditions
            if kept.get("control") is not None:
                kept["control"] = control_of(kept["control"], window.index_list, length, self.controls)
            resized.append(kept)
        return resized


def control_of(control: Any, rows: Sequence[int], length: int, found: MutableMapping[tuple[int, ...], Any]) -> Any:
    """The ControlNet with the pictures of these rows of `length`, where the host would take those of the clip's start.

    `found` keeps what was made, so that two conditions with one ControlNet have one again.
    """
    key = (id(control), *rows)
    made = found.get(key)
    if made is None:
        made = copy.copy(control)
        pictures = control.cond_hint_original
        if pictures is not None and len(pictures) == length:
            made.cond_hint_original, made.cond_hint = pictures[rows], None
        if control.previous_controlnet is not None:
            made.previous_controlnet = control_of(control.previous_controlnet, rows, length, found)
        found[key] = made
    return made


NODES = [EmptyLatent, Sampler, ContextWindows]
