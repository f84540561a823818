"""Prompt to frames: the whole job in one readable function."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from .checkpoint import Model
from .config import ModelConfig
from .diffusion import Schedule, guide
from .memory import total_memory
from .sampling import SAMPLERS, sample


def check_request(
    config: ModelConfig, num_frames: int, width: int, height: int, guidance_scale: float, sampler: str, steps: int
) -> None:
    """Refuse with a ValueError what the model cannot make, and warn of what it was not trained for."""
    factor = config.autoencoder.downscale
    if num_frames < 1:
        raise ValueError(f"a clip needs at least 1 frame, not {num_frames}; the model was trained on {config.frames}")
    longest = config.unet.temporal_positions
    if longest and num_frames > longest:
        raise ValueError(f"this model knows {longest} frame positions, not {num_frames}; ask for fewer frames")
    if width < factor or height < factor or width % factor or height % factor:
        nearest = "x".join(str(max(1, round(side / factor)) * factor) for side in (width, height))
        raise ValueError(f"width and height must be multiples of {factor}, not {width}x{height}; try {nearest}")
    if not math.isfinite(guidance_scale) or guidance_scale < 1:
        raise ValueError(f"guidance scale {guidance_scale} is below 1, which switches guidance off; use 1 or more")
    if sampler not in SAMPLERS:
        raise ValueError(f"there is no sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    if not 1 <= steps <= config.diffusion.num_timesteps:
        raise ValueError(f"{steps} steps are not possible; ask for 1 to {config.diffusion.num_timesteps}")
    if (num_frames, width, height) != (config.frames, config.width, config.height):
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
    guidance_scale: float = 2.0,
    sampler: str = "ddim",
    seed: int = 0,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """A clip of a prompt: `[F, H, W, 3]` in 0..1, on the CPU.

    Sizes are pixels and default to those that the model was trained on. `on_step` receives the number of the step
    that is done and the latents expected at the end. Raises ValueError for what the model cannot make.
    """
    config = model.config
    num_frames = config.frames if num_frames is None else num_frames
    width, height = width or config.width, height or config.height
    check_request(config, num_frames, width, height, guidance_scale, sampler, steps)

    weight = next(model.unet.parameters())
    check_memory(config, num_frames, width, height, weight)
    guided = guidance_scale > 1
    prompts: Sequence[str] = [prompt, negative_prompt] if guided else [prompt]
    window = config.text.max_tokens - 2
    if any(len(model.text_encoder.tokenizer(text)) > 1 for text in prompts):
        warnings.warn(f"the prompt is over {window} tokens and is read in chunks of {window}", stacklevel=2)
    context = model.text_encoder.encode(prompts)

    factor = config.autoencoder.downscale
    shape = (config.autoencoder.latent_channels, num_frames, height // factor, width // factor)
    # Drawn on the CPU, so that a seed means the same clip on every device.
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, *shape, generator=generator)

    def predict(x: Tensor, timesteps: Tensor) -> Tensor:
        x = x.to(weight.dtype)
        if not guided:
            return model.unet(x, timesteps, context).float()
        both = model.unet(torch.cat([x, x]), torch.cat([timesteps, timesteps]), context).float()
        cond, uncond = both.chunk(2)
        return guide(cond, uncond, guidance_scale)

    latents = sample(
        predict,
        noise.to(weight.device),
        Schedule.from_config(config.diffusion),
        sampler=sampler,
        steps=steps,
        generator=generator,
        callback=on_step,
    )
    video = model.autoencoder.decode(latents.to(weight.dtype))
    return rearrange(video.float().cpu(), "1 C F H W -> F H W C") / 2 + 0.5
