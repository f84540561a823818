"""What training minimises: the error of the network's prediction at random noise levels of every clip."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from .condition import Condition, Drawn
from .diffusion import Schedule


def seed_for(seed: int, *where: int) -> int:
    """A seed of 32 bits for a place in a run, all numbers 0 or more: the generator for CPUs keeps no more of any.

    Shifted together instead, `seed` would fall off the end.
    """
    return int(np.random.SeedSequence(seed, spawn_key=where).generate_state(1)[0])


def learning_rate_share(step: int, steps: int, warmup_steps: int, final_share: float) -> float:
    """Learning rate of a step as a share of the highest: a linear rise, then along a cosine to `final_share`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Process:
    """Number `rank` of `world` processes that train together: everything is drawn for all, and each takes its rows.

    So several processes learn from the same numbers as one process with a batch as large as theirs together.
    """

    rank: int = 0
    world: int = 1

    def rows(self, drawn: Tensor) -> Tensor:
        """This process's part of what all have drawn, `[world * B, ...]`."""
        return drawn.chunk(self.world)[self.rank]

    def items(self, batch_size: int, first: int, count: int) -> Iterator[int]:
        """Of `count` items in order, those in this process's part of whole batches, from batch `first` on."""
        for start in range((first * self.world + self.rank) * batch_size, count, self.world * batch_size):
            yield from range(start, min(start + batch_size, count))

    def uniform(self, like: Tensor, *shape: int) -> Tensor:
        """`[B, *shape]` in 0..1 for `like [B, ...]`."""
        return self.rows(torch.rand(self.world * len(like), *shape, device=like.device))

    def normal(self, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Standard normal numbers for `like [B, ...]`, in its shape or `[B, *shape]`."""
        shape = like.shape[1:] if shape is None else shape
        return self.rows(torch.randn(self.world * len(like), *shape, device=like.device, dtype=like.dtype))


class Noised(NamedTuple):
    """What the network is asked: `latents` at `timesteps`, the `target` that it should return, and its `weight` in the
    loss, None where all count alike; both `[B]`, or `[B, F]` where frames differ."""

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    weight: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Settings of the loss.

    A share u of the noise schedule, uniform in 0..1, becomes `s u / (1 + (s - 1) u)`: a `timestep_shift` s above 1
    trains more on high noise, where a clip's many alike frames still show what is in it and its motion is decided.
    """

    # Share of clips that are shown without their caption, which is what classifier-free guidance asks for later.
    caption_dropout: float = 0.1
    timestep_shift: float = 1.0
    # The part of the noise schedule that is trained, as shares of it.
    timestep_range: tuple[float, float] = (0.0, 1.0)
    # Hang et al. (arXiv 2303.09556): levels of a signal-to-noise ratio above this count less; 0 is off, 5 is usual.
    min_snr_gamma: float = 0.0
    # Standard deviation of an extra noise that is the same all over a clip, so that it may become dark or bright; 0.05
    # is usual.
    offset_noise: float = 0.0
    # Share of the noise's variance that all frames of a clip have in common (Ge et al., arXiv 2305.10474).
    shared_noise: float = 0.0
    # Which frames are given; without it the network learns from text alone.
    condition: Condition | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.timestep_range[0] < self.timestep_range[1] <= 1:
            raise ValueError(f"timestep_range: {list(self.timestep_range)} is no range of shares; use [0.0, 1.0]")
        if not self.timestep_shift > 0:
            raise ValueError(f"timestep_shift: {self.timestep_shift} is no factor; use 1.0 or more")
        for name in ("caption_dropout", "shared_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not a share; use a number from 0 to 1")
        for name in ("min_snr_gamma", "offset_noise"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is below 0; use 0 to switch it off")

    @property
    def gives_frames(self) -> bool:
        """Whether what is trained so learns what given frames are."""
        return self.condition is not None and self.condition.gives_frames

    def drops(self, like: Tensor, process: Process) -> Tensor:
        """Which of the clips of `like [B, ...]` lose their caption: `[B]`, bool."""
        return process.uniform(like) < self.caption_dropout

    def drop_captions(self, context: Tensor, empty: Tensor, process: Process) -> Tensor:
        """Text features `[B, L, D]`, some of them replaced by those of the empty prompt, `empty [77, D]`.

        Long captions come in chunks of 77, and the empty prompt fills as many.
        """
        dropped = self.drops(context, process)
        return torch.where(dropped[:, None, None], empty.repeat(context.shape[1] // len(empty), 1), context)

    def noised(self, latents: Tensor, schedule: Schedule, process: Process) -> Noised:
        """Clean `latents [B, C, F, H, W]` at a random level each, or with a `condition` at levels of their frames."""
        share = process.uniform(latents)
        drawn = self.condition.draw(latents, process.uniform) if self.condition else None
        if drawn is not None:
            share = torch.where(drawn.level.isnan(), share[:, None], drawn.level)
        share = self.timestep_shift * share / (1 + (self.timestep_shift - 1) * share)
        share = self.timestep_range[0] + (self.timestep_range[1] - self.timestep_range[0]) * share
        timesteps = (share * schedule.num_timesteps).long().clamp_(max=schedule.num_timesteps - 1)
        _, channels, _, height, width = latents.shape
        noise = process.normal(latents)
        if self.shared_noise:
            common = process.normal(latents, (channels, 1, height, width))
            noise = self.shared_noise**0.5 * common + (1 - self.shared_noise) ** 0.5 * noise
        if self.offset_noise:
            noise = noise + self.offset_noise * process.normal(latents, (channels, 1, 1, 1))
        noised = Noised(
            schedule.add_noise(latents, noise, timesteps),
            timesteps,
            schedule.target(latents, noise, timesteps),
            self.weight(timesteps, schedule),
        )
        return noised if drawn is None else _shown(noised, drawn, latents, noise, schedule)

    def weight(self, timesteps: Tensor, schedule: Schedule) -> Tensor | None:
        """min(SNR, gamma) / SNR for epsilon, min(SNR, gamma) / (SNR + 1) for v: float32 in the shape of `timesteps`,
        None when it is off."""
        if not self.min_snr_gamma:
            return None
        snr = schedule.sigma(timesteps).float() ** -2
        return snr.clamp(max=self.min_snr_gamma) / (snr if schedule.prediction_type == "epsilon" else snr + 1)

    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Mean squared error, weighted, over everything: a scalar in float32."""
        error = (prediction.float() - noised.target).square()
        if noised.weight is not None:
            error = (
                rearrange(noised.weight, "B -> B 1 1 1 1" if noised.weight.ndim == 1 else "B F -> B 1 F 1 1") * error
            )
        return error.mean()


def _shown(noised: Noised, drawn: Drawn, latents: Tensor, noise: Tensor, schedule: Schedule) -> Noised:
    """Given frames clean at level 0, or pure noise at the last; they do not count, the clip's others so much more."""
    given, hidden = (rearrange(which, "B F -> B 1 F 1 1") for which in (drawn.given, drawn.hidden))
    shown = torch.where(hidden, noise, torch.where(given, latents, noised.latents))
    timesteps = noised.timesteps.masked_fill(drawn.given, 0).masked_fill(drawn.hidden, schedule.num_timesteps - 1)
    learned = (~drawn.given).float()
    # Of each clip by itself, so that it does not matter which others stand in the batch.
    weight = learned / learned.mean(dim=1, keepdim=True)
    return Noised(shown, timesteps, noised.target, weight if noised.weight is None else weight * noised.weight)


@torch.no_grad()
def quantile_levels(latents: Tensor, schedule: Schedule, quantiles: int, seed: int) -> list[Noised]:
    """`latents [B, C, F, H, W]` at the middles of `quantiles` equal parts of the schedule, noise from `seed` alone.

    The same question every time that it is asked, for losses that can be compared; all count alike.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(quantiles):
        timestep = int((i + 0.5) / quantiles * schedule.num_timesteps)
        timesteps = torch.full((len(latents),), timestep, device=latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        found.append(
            Noised(
                schedule.add_noise(latents, noise, timesteps),
                timesteps,
                schedule.target(latents, noise, timesteps),
                None,
            )
        )
    return found
