"""What a latent video model gets wrong, done to good frames: its autoencoder's round trip, and its own SDEdit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, nn

from videofactory_core import checkpoint
from videofactory_core.diffusion import Schedule

# How often the U-Net is asked on the way back.
STEPS = 4

Part = TypeVar("Part", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Artefacts:
    """The `[artefacts]` table of a recipe: what is done to small clips before the upscaler sees them."""

    # Share of the clips that go through the model's autoencoder, and how much noise their latents get: of a standard
    # deviation up to this share of theirs.
    autoencoder: float = 0.5
    latent_noise: float = 0.1
    # Share of the clips that are noised and brought back by the model's U-Net (SDEdit, arXiv 2108.01073), and how far
    # they are noised: up to this share of the schedule.
    sdedit: float = 0.0
    strength: float = 0.2

    def __post_init__(self) -> None:
        for name in ("autoencoder", "sdedit", "strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a share; use a number from 0 to 1")
        if not 0 <= self.latent_noise < 10:
            raise ValueError(f"latent_noise: {self.latent_noise} is no noise level; use 0 to switch it off, or 0.1")


class Spoiler:
    """Does `settings` to clips with the model of a file, on the accelerator's device.

    Raises ValueError when there is no such model, or no clip of `frames` frames for it.
    """

    def __init__(self, settings: Artefacts, path: str, frames: int, accelerator: Accelerator) -> None:
        self.settings = settings
        self.accelerator = accelerator
        file, model = checkpoint.check(path)
        config = file.config
        longest = config.unet.temporal_positions
        if settings.sdedit and longest and frames > longest:
            raise ValueError(f"sdedit: the model knows {longest} frame positions, not {frames}; use shorter clips")

        def ready(name: str, part: Part) -> Part:
            part.load_state_dict(file.read(name, dtype=torch.float32), assign=True)
            return part.to(accelerator.device).eval().requires_grad_(False)

        self.downscale = config.autoencoder.downscale
        self.autoencoder = ready("autoencoder", model.autoencoder)
        if settings.sdedit:
            self.schedule = Schedule.from_config(config.diffusion)
            self.unet, self.text_encoder = ready("unet", model.unet), ready("text_encoder", model.text_encoder)

    @torch.no_grad()
    def __call__(self, clips: Tensor, captions: Sequence[str], generators: Sequence[torch.Generator]) -> Tensor:
        """Clips `[N, F, 3, H, W]` in 0..1 as the model would show them, with one draw for all frames of a clip.

        What is drawn for a clip comes from its own generator, on the CPU.
        """
        settings = self.settings
        drawn = torch.stack([torch.rand(4, generator=generator) for generator in generators])
        trips, edits = drawn[:, 0] < settings.autoencoder, drawn[:, 1] < settings.sdedit
        if not (trips | edits).any():
            return clips
        (chosen,) = (trips | edits).nonzero(as_tuple=True)
        trips, edits, drawn = trips[chosen], edits[chosen], drawn[chosen]
        with self.accelerator.autocast():
            latents = self.autoencoder.encode(rearrange(clips[chosen], "N F C H W -> N C F H W") * 2 - 1).float()
            # By the autoencoder's scale, the standard deviation of latents is 1.
            noise = [torch.randn(2, *latents.shape[1:], generator=generators[i]) for i in chosen.tolist()]
            for_edits, for_trips = torch.stack(noise, 1).to(latents)
            if edits.any():
                told = [captions[i] for i in chosen[edits].tolist()]
                edited = self._edit(latents[edits], for_edits[edits], told, settings.strength * drawn[edits, 2])
                latents[edits] = edited
            sigma = (settings.latent_noise * drawn[:, 3] * trips).to(latents)
            latents = latents + sigma[:, None, None, None, None] * for_trips
            spoiled = self.autoencoder.decode(latents).float() / 2 + 0.5
        clips = clips.clone()
        clips[chosen] = rearrange(spoiled, "N C F H W -> N F C H W").clamp(0, 1)
        return clips

    def _edit(self, latents: Tensor, noise: Tensor, captions: Sequence[str], shares: Tensor) -> Tensor:
        """Noise clips to `shares [N]` of the schedule and walk back by DDIM (arXiv 2010.02502, eq. 12, eta = 0)."""
        context = self.text_encoder.encode(captions)
        highest = (shares * (self.schedule.num_timesteps - 1)).to(latents.device)
        x0, eps = latents, noise
        for step in range(STEPS):
            level = highest * (1 - step / STEPS)
            x = self.schedule.add_noise(x0, eps, level)
            x0, eps = self.schedule.to_x0_eps(self.unet(x, level, context).float(), x, level)
        return x0
