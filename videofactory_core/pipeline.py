"""Prompt to frames: the whole job in one readable function."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from einops import rearrange
from torch import Tensor

from .checkpoint import Model
from .config import ModelConfig
from .diffusion import Schedule, guide, guide_frames
from .memory import total_memory
from .prompts import PromptSchedule, parse
from .sampling import SAMPLERS, Known, sample

# What to know of given frames where a model has never seen any.
UNTRAINED = (
    "this model was never trained on given frames, so they are blended in as noise and may not be followed:"
    " train it with train/recipes/image-to-video-16gb.toml"
)


def check_request(
    config: ModelConfig,
    num_frames: int,
    width: int,
    height: int,
    guidance_scale: float,
    sampler: str,
    steps: int,
    frame_guidance_scale: float = 1.0,
) -> None:
    """Refuse with a ValueError what the model cannot make, and warn of what it was not trained for."""
    factor = config.autoencoder.downscale
    if num_frames < 1:
        raise ValueError(f"a clip needs at least 1 frame, not {num_frames}; the model was trained on {config.frames}")
    longest = config.unet.temporal_positions
    if longest and num_frames > longest:
        raise ValueError(
            f"this model knows {longest} frame positions, not {num_frames}; ask for fewer frames, or for chunks"
        )
    if width < factor or height < factor or width % factor or height % factor:
        nearest = "x".join(str(max(1, round(side / factor)) * factor) for side in (width, height))
        raise ValueError(f"width and height must be multiples of {factor}, not {width}x{height}; try {nearest}")
    if not math.isfinite(guidance_scale) or guidance_scale < 1:
        raise ValueError(f"guidance scale {guidance_scale} is below 1, which switches guidance off; use 1 or more")
    if not math.isfinite(frame_guidance_scale) or frame_guidance_scale < 1:
        raise ValueError(
            f"frame guidance scale {frame_guidance_scale} is below 1, which switches it off; use 1 or more"
        )
    if sampler not in SAMPLERS:
        raise ValueError(f"there is no sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if not 1 <= steps <= config.diffusion.num_timesteps:
        raise ValueError(f"{steps} steps are not possible; ask for 1 to {config.diffusion.num_timesteps}")
    if not config.knows(num_frames, width, height):
        warnings.warn(
            f"the model was trained on {config.frames} frames of {config.width}x{config.height};"
            f" {num_frames} frames of {width}x{height} may look worse",
            stacklevel=3,
        )


def check_memory(config: ModelConfig, num_frames: int, width: int, height: int, like: Tensor) -> None:
    """Refuse with a ValueError a clip that cannot fit into the memory of the device and dtype of `like`.

    What is counted surely stands in memory at once, so a clip that passes may still be too large: the float32 frames
    twice, or the features of the U-Net's first level that wait for the decoder, for prompt and negative prompt.
    """
    frames = 2 * num_frames * height * width * config.autoencoder.in_channels * 4
    cells = num_frames * height * width // config.autoencoder.downscale**2
    waiting = config.unet.num_res_blocks + 1
    features = 2 * cells * config.unet.model_channels * waiting * like.element_size()
    total = total_memory(like.device)
    if total is not None and max(frames, features) > total:
        raise ValueError(
            f"{num_frames} frames of {width}x{height} need more than the {total / 2**30:.0f} GiB of memory that there"
            " are; ask for a smaller size or fewer frames"
        )


def check_given(given: Mapping[int, Tensor], num_frames: int, width: int, height: int) -> None:
    """Refuse with a ValueError frames that do not belong to a clip of this length and size."""
    for index, frame in given.items():
        if not 0 <= index < num_frames:
            raise ValueError(f"frame {index} is given and the clip has frames 0 to {num_frames - 1}; name one of these")
        if frame.shape != (height, width, 3):
            size = f"{frame.shape[1]}x{frame.shape[0]}" if frame.ndim == 3 else str(list(frame.shape))
            raise ValueError(
                f"the frame given as number {index} is {size} and the clip {width}x{height}; scale it first"
            )
    if len(given) == num_frames > 0:
        raise ValueError(f"all {num_frames} frames are given, and none is left to make")


def warn_of_given(config: ModelConfig) -> None:
    """Warn of a model that never learned what given frames are."""
    if not config.given_frames:
        warnings.warn(UNTRAINED, stacklevel=3)


def usual_guidance(
    config: ModelConfig, num_given: int, scale: float | None = None, frame_scale: float | None = None
) -> tuple[float, float]:
    """Scales of guidance over the text and over given frames; None is what is usual.

    One frame leaves the motion to the prompt. Two show it, and following the prompt harder then only makes it faster.
    """
    usual = (1.0, 2.0) if config.given_frames and num_given > 1 else (2.0, 1.0)
    return usual[0] if scale is None else scale, usual[1] if frame_scale is None else frame_scale


def encode_prompts(model: Model, prompt: str, negative_prompt: str, guidance_scale: float) -> list[PromptSchedule]:
    """Text features of a prompt, with guidance those of the negative prompt behind it; each may be a schedule."""
    keys = [parse(text) or {0: text} for text in ([prompt, negative_prompt] if guidance_scale > 1 else [prompt])]
    texts = [text for by_frame in keys for text in by_frame.values()]
    window = model.config.text.max_tokens - 2
    if any(len(model.text_encoder.tokenizer(text)) > 1 for text in texts):
        warnings.warn(f"the prompt is over {window} tokens and is read in chunks of {window}", stacklevel=3)
    features = model.text_encoder.encode(texts).split([len(by_frame) for by_frame in keys])
    return [PromptSchedule(tuple(by_frame), part) for by_frame, part in zip(keys, features, strict=True)]


def context_of(prompts: Sequence[PromptSchedule], frames: Sequence[int]) -> Tensor:
    """Text features `[B, L, D]` of B prompts, or `[B, F, L, D]` of these frames where one of them changes."""
    if all(len(prompt.frames) == 1 for prompt in prompts):
        return torch.cat([prompt.features for prompt in prompts])
    return torch.stack([prompt.at(frames) for prompt in prompts])


@torch.no_grad()
def encode_frames(model: Model, frames: Tensor) -> Tensor:
    """Frames `[F, H, W, 3]` in 0..1 to latents `[1, C, F, h, w]` (float32), on the model's device."""
    weight = next(model.autoencoder.parameters())
    video = rearrange(frames * 2 - 1, "F H W C -> 1 C F H W").to(weight)
    return model.autoencoder.encode(video).float()


@torch.no_grad()
def decode_latents(model: Model, latents: Tensor) -> Tensor:
    """Latents `[1, C, F, h, w]` to frames `[F, H, W, 3]`, about 0..1, on the CPU."""
    video = model.autoencoder.decode(latents.to(next(model.unet.parameters()).dtype))
    return rearrange(video.float().cpu(), "1 C F H W -> F H W C") / 2 + 0.5


def denoise(
    model: Model,
    context: Tensor,
    noise: Tensor,
    *,
    steps: int,
    guidance_scale: float = 1.0,
    sampler: str = "ddim",
    known: Known | None = None,
    frame_guidance_scale: float = 1.0,
    stagger: float = 0.0,
    generator: torch.Generator | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Latents of a clip from unit noise `[1, C, F, h, w]`; `context` as `context_of` gives it.

    With frames that are `known`, a `frame_guidance_scale` above 1 follows them harder, at the cost of another pass of
    the network: what it is measured against is the clip in which they are hidden behind pure noise.
    """
    weight = next(model.unet.parameters())
    schedule = Schedule.from_config(model.config.diffusion)
    guided = guidance_scale > 1
    noise = noise.to(weight.device)
    hides = known is not None and known.clean and frame_guidance_scale != 1
    if hides:
        assert known is not None
        given = known.given.to(weight.device)
        # The prompt stays where it is all that guides; else it has gone before the frames do.
        context = torch.cat([context, context[-1:]])

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        rows, levels = [x] * len(context), [timesteps] * len(context)
        if hides:
            rows[-1] = torch.where(rearrange(given, "F -> F 1 1"), noise.to(x), x)
            levels[-1] = timesteps.masked_fill(given, schedule.num_timesteps - 1)
        out = model.unet(torch.cat(rows).to(weight.dtype), torch.cat(levels), context).float()
        answers = out.chunk(len(context))
        if hides and guided:
            both, frames, neither = answers
            return guide_frames(both, frames, neither, guidance_scale, frame_guidance_scale)
        if hides or guided:
            cond, uncond = answers
            return guide(cond, uncond, frame_guidance_scale if hides else guidance_scale)
        return out

    return sample(
        predict,
        noise,
        schedule,
        sampler=sampler,
        steps=steps,
        known=known,
        stagger=stagger,
        generator=generator,
        callback=on_step,
    )


@torch.no_grad()
def generate(
    model: Model,
    prompt: str,
    *,
    negative_prompt: str = "",
    num_frames: int | None = None,
    width: int | None = None,
    height: int | None = None,
    steps: int = 25,
    guidance_scale: float | None = None,
    sampler: str = "ddim",
    seed: int = 0,
    given: Mapping[int, Tensor] | None = None,
    frame_guidance_scale: float | None = None,
    stagger: float = 0.0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """A clip of a prompt: `[F, H, W, 3]` in 0..1, on the CPU.

    A prompt may be a schedule, as `prompts.parse` reads it. Sizes are pixels and default to those that the model was
    trained on. `given` are frames `[H, W, 3]` in 0..1 by their number: they come back as the autoencoder has them, and
    the others are made to fit. Scales of guidance: see `denoise`, by default `usual_guidance`; `stagger`: see
    `sampling.noise_levels`. `on_step` receives the number of the step that is done and the latents expected at the end.
    Raises ValueError for what the model cannot make.
    """
    config = model.config
    num_frames = config.frames if num_frames is None else num_frames
    width, height = width or config.width, height or config.height
    given = given or {}
    guidance_scale, frame_guidance_scale = usual_guidance(config, len(given), guidance_scale, frame_guidance_scale)
    check_request(config, num_frames, width, height, guidance_scale, sampler, steps, frame_guidance_scale)
    check_given(given, num_frames, width, height)
    if given:
        warn_of_given(config)

    weight = next(model.unet.parameters())
    check_memory(config, num_frames, width, height, weight)
    context = context_of(encode_prompts(model, prompt, negative_prompt, guidance_scale), range(num_frames))
    # Drawn on the CPU, so that a seed means the same clip on every device.
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, *latent_shape(config, num_frames, width, height), generator=generator)
    latents = denoise(
        model,
        context,
        noise,
        steps=steps,
        guidance_scale=guidance_scale,
        sampler=sampler,
        known=know(noise, {index: encode_frames(model, frame[None]) for index, frame in given.items()}, config),
        frame_guidance_scale=frame_guidance_scale,
        stagger=stagger,
        generator=generator,
        on_step=on_step,
    )
    return decode_latents(model, latents)


def latent_shape(config: ModelConfig, num_frames: int, width: int, height: int) -> tuple[int, int, int, int]:
    """`(C, F, h, w)` of a clip in pixels."""
    factor = config.autoencoder.downscale
    return config.autoencoder.latent_channels, num_frames, height // factor, width // factor


def know(noise: Tensor, latents: Mapping[int, Tensor], config: ModelConfig) -> Known | None:
    """Latents `[1, C, 1, h, w]` by their frame as conditions of a clip like `noise`; None where there are none."""
    if not latents:
        return None
    given = torch.zeros(noise.shape[2], dtype=torch.bool)
    values = torch.zeros_like(noise)
    for index, value in latents.items():
        given[index] = True
        values[:, :, index] = value[:, :, 0].to(values)
    return Known(values, given, clean=config.given_frames)
