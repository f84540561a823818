"""Training the U-Net, and with it its text encoder or a LoRA, on latents: eps or v prediction with caption dropout."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from videofactory_core.adapters import Adapter
from videofactory_core.autoencoder import Autoencoder
from videofactory_core.condition import Condition
from videofactory_core.config import ModelConfig, UNetConfig
from videofactory_core.diffusion import Schedule
from videofactory_core.objective import Objective, Process, seed_for
from videofactory_core.text import TextEncoder, Tokenizer, pad_token
from videofactory_core.unet.model import VideoUNet

from .data.batches import Batch
from .data.moving_shapes import MovingShapes


@dataclass(frozen=True)
class Latents:
    """Encoded clips: `latents [N, C, F, h, w]` (scaled) and the token ids `[N, 1, 77]` of their captions.

    condition: which of their frames are given, where that is not for the stage to say.
    """

    latents: Tensor
    tokens: Tensor
    condition: Condition | None = None


@torch.no_grad()
def encode_clips(
    autoencoder: Autoencoder, clips: MovingShapes, config: ModelConfig, workers: int, accelerator: Accelerator
) -> Latents:
    """Run the autoencoder once over every clip, since its latents never change while the U-Net trains."""
    tokenizer = Tokenizer(pad_token(config.text), config.text.max_tokens)
    latents, tokens = [], []
    loader = DataLoader(clips, batch_size=4, num_workers=workers)
    for batch in tqdm(loader, desc="encode clips", unit_scale=4, unit="clip", disable=None):
        with accelerator.autocast():
            encoded = autoencoder.encode(batch["video"].to(accelerator.device), chunk=64)
        latents.append(encoded.to(torch.float16).cpu())
        tokens.append(tokenizer.batch(batch["caption"]))
    return Latents(torch.cat(latents), torch.cat(tokens))


def spatial_only(config: UNetConfig) -> UNetConfig:
    """The image network inside a video network."""
    return replace(config, temporal_conv=False, temporal_attention=False, temporal_skips=False)


@dataclass(frozen=True)
class LatentBatches:
    """Random batches of `data` for all processes, of which each takes its rows.

    One of the first `opening` frames of each clip, or with None every `frame_stride`-th frame of it.
    """

    data: Latents
    batch_size: int
    opening: int | None
    frame_stride: int
    seed: int
    process: Process

    def __call__(self, first: int) -> Iterator[Latents]:
        """This process's part of batch number `first` and of those behind it."""
        whole = self.process.world * self.batch_size
        for number in itertools.count(first):
            generator = torch.Generator().manual_seed(seed_for(self.seed, number))
            chosen = self.process.rows(torch.randint(len(self.data.latents), (whole,), generator=generator))
            latents = self.data.latents[chosen]
            if self.opening is not None:
                frame = self.process.rows(torch.randint(self.opening, (whole,), generator=generator))
                latents = latents[torch.arange(self.batch_size), :, frame].unsqueeze(2)
            else:
                latents = latents[:, :, :: self.frame_stride]
            yield Latents(latents.float(), self.data.tokens[chosen])


@dataclass(frozen=True)
class WindowBatches:
    """Random windows of the long clips in `data`, as random batches of them.

    By turns each has `batch_size` windows of `frames` frames, or half as many of twice the frames; and by turns every
    n-th frame, for each n of `strides`.
    """

    data: Latents
    condition: Condition
    batch_size: int
    frames: int
    strides: Sequence[int]
    seed: int
    process: Process

    def __call__(self, first: int) -> Iterator[Latents]:
        """This process's part of batch number `first` and of those behind it."""
        for number in itertools.count(first):
            generator = torch.Generator().manual_seed(seed_for(self.seed, number))
            times, stride = 1 + number % 2, self.strides[number // 2 % len(self.strides)]
            whole = self.process.world * -(-self.batch_size // times)
            frames = stride * torch.arange(times * self.frames)
            chosen = self.process.rows(torch.randint(len(self.data.latents), (whole,), generator=generator))
            starts = torch.randint(self.data.latents.shape[2] - int(frames[-1]), (whole,), generator=generator)
            where = self.process.rows(starts)[:, None] + frames
            # Indexed on both sides of the channels, frames come before them.
            windows = rearrange(self.data.latents[chosen[:, None], :, where], "B F C h w -> B C F h w")
            yield Latents(windows.float(), self.data.tokens[chosen], self.condition)


@dataclass(frozen=True)
class ByTurns:
    """Batches of `one`, then of `other`, and so on."""

    one: Callable[[int], Iterator[Latents]]
    other: Callable[[int], Iterator[Latents]]

    def __call__(self, first: int) -> Iterator[Latents]:
        """Batch number `first` and those behind it."""
        for number in itertools.count(first):
            half, of_other = divmod(number, 2)
            yield next((self.other if of_other else self.one)(half))


def frames_in(batch: Latents | Batch) -> int:
    """How many frames a batch of clips has."""
    return batch.latents.shape[0] * batch.latents.shape[2]


class Question(NamedTuple):
    """What is asked without a loss: noised `latents [B, C, F, h, w]` at `timesteps [B]`, and `context [B, L, D]`."""

    latents: Tensor
    timesteps: Tensor
    context: Tensor


class Denoiser(nn.Module):
    """What trains together: `unet`, perhaps the `text_encoder`, perhaps an `adapter` on the U-Net.

    The tokens of `Latents` go through the text encoder; a `Batch` brings its features. `empty` is what a dropped
    caption becomes: the tokens `[1, 77]` or the features `[77, D]` of the empty prompt.
    """

    def __init__(
        self,
        unet: VideoUNet,
        objective: Objective,
        schedule: Schedule,
        empty: Tensor,
        *,
        text_encoder: TextEncoder | None = None,
        adapter: Adapter | None = None,
        process: Process = Process(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.adapter = adapter
        self.objective = objective
        self.schedule = schedule
        self.empty = empty
        self.process = process

    def forward(self, batch: Latents | Batch | Question) -> Tensor:
        """The loss of a batch: a scalar; or the U-Net's answer to a question."""
        if isinstance(batch, Question):
            return self.unet(*batch)
        device = next(self.parameters()).device
        latents = batch.latents.to(device)
        empty = self.empty.to(device)
        objective = self.objective
        if isinstance(batch, Latents):
            assert self.text_encoder is not None
            if batch.condition is not None:
                objective = replace(objective, condition=batch.condition)
            dropped = objective.drops(latents, self.process)
            context = self.text_encoder(torch.where(dropped[:, None, None], empty, batch.tokens.to(device)))
        else:
            context = objective.drop_captions(batch.context.to(device), empty, self.process)
        noised = objective.noised(latents, self.schedule, self.process)
        return objective.loss(self.unet(noised.latents, noised.timesteps, context), noised)


class Answers(nn.Module):
    """The U-Net of a denoiser while that trains: asked through it, because FSDP has it in pieces otherwise."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        """As `VideoUNet.forward`."""
        return self.denoiser(Question(latents, timesteps, context))


def choose_layers(unet: VideoUNet, layers: str) -> None:
    """Let those weights of `unet` train whose names `layers`, a regular expression, finds, and no others.

    Raises ValueError when it finds none or is none.
    """
    try:
        pattern = re.compile(layers)
    except re.error as error:
        raise ValueError(f"layers: {layers!r} is no regular expression ({error})") from error
    for name, weight in unet.named_parameters():
        weight.requires_grad_(pattern.search(name) is not None)
    if not any(weight.requires_grad for weight in unet.parameters()):
        raise ValueError(f"layers: no weight of the U-Net has a name with {layers!r} in it")


def store_weights(unet: VideoUNet, dtype: torch.dtype | None) -> None:
    """What trains in float32; matrices and kernels that do not as `dtype`, in which they are multiplied anyway.

    Norms and biases stay in float32 too, because they are calculated in it.
    """
    for weight in unet.parameters():
        small = dtype is not None and not weight.requires_grad and weight.ndim > 1
        weight.data = weight.data.to(dtype if small else torch.float32)
