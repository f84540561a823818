"""Training the U-Net and its text encoder on cached latents: eps or v prediction with caption dropout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from videofactory_core.autoencoder import Autoencoder
from videofactory_core.config import ModelConfig, UNetConfig
from videofactory_core.diffusion import Schedule
from videofactory_core.text import TextEncoder, Tokenizer, pad_token
from videofactory_core.unet.model import VideoUNet

from .data.moving_shapes import MovingShapes


@dataclass(frozen=True)
class Latents:
    """Encoded clips: `latents [N, C, F, h, w]` (scaled) and the token ids `[N, 1, 77]` of their captions."""

    latents: Tensor
    tokens: Tensor


@torch.no_grad()
def encode_clips(
    autoencoder: Autoencoder, clips: MovingShapes, config: ModelConfig, workers: int, accelerator: Accelerator
) -> Latents:
    """Run the autoencoder once over every clip, since its latents never change while the U-Net trains."""
    tokenizer = Tokenizer(pad_token(config.text), config.text.max_tokens)
    latents, tokens = [], []
    loader = DataLoader(clips, batch_size=4, num_workers=workers)
    for batch in tqdm(loader, desc="encode clips", unit_scale=4, unit="clip"):
        with accelerator.autocast():
            encoded = autoencoder.encode(batch["video"].to(accelerator.device), chunk=64)
        latents.append(encoded.to(torch.float16).cpu())
        tokens.append(tokenizer.batch(batch["caption"]))
    return Latents(torch.cat(latents), torch.cat(tokens))


def spatial_only(config: UNetConfig) -> UNetConfig:
    """The image network inside a video network."""
    return replace(config, temporal_conv=False, temporal_attention=False, temporal_skips=False)


def latent_batches(
    data: Latents, batch_size: int, opening: int | None, frame_stride: int, seed: int, first: int
) -> Iterator[Latents]:
    """Random batches from number `first` on.

    One of the first `opening` frames of each clip, or with None every `frame_stride`-th frame of it.
    """
    for number in itertools.count(first):
        generator = torch.Generator().manual_seed((seed << 32) + number)
        chosen = torch.randint(len(data.latents), (batch_size,), generator=generator)
        latents = data.latents[chosen]
        if opening is not None:
            frame = torch.randint(opening, (batch_size,), generator=generator)
            latents = latents[torch.arange(batch_size), :, frame].unsqueeze(2)
        else:
            latents = latents[:, :, ::frame_stride]
        yield Latents(latents.float(), data.tokens[chosen])


class Denoiser(nn.Module):
    """The two networks that train together: `unet` and `text_encoder`."""

    def __init__(self, unet: VideoUNet, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def loss(
        self,
        batch: Latents,
        schedule: Schedule,
        caption_dropout: float,
        timestep_shift: float,
        timestep_range: tuple[float, float],
        empty: Tensor,
    ) -> Tensor:
        """Mean squared error of the network's prediction at a random time step of every clip.

        The share of the schedule `u`, uniform in 0..1, becomes `s u / (1 + (s - 1) u)`: a `timestep_shift` s above 1
        trains more on high noise, where a clip's many alike frames still show what is in it and its motion is decided.
        `timestep_range` is the part of the schedule that it then stands for.
        `empty [1, 77]` are the tokens of the empty prompt that a dropped caption becomes, which is what
        classifier-free guidance asks for later.
        """
        device = next(self.parameters()).device
        latents, tokens = batch.latents.to(device), batch.tokens.to(device)
        dropped = torch.rand(len(tokens), device=device) < caption_dropout
        tokens = torch.where(dropped[:, None, None], empty.to(device), tokens)
        share = torch.rand(len(latents), device=device)
        share = timestep_shift * share / (1 + (timestep_shift - 1) * share)
        share = timestep_range[0] + (timestep_range[1] - timestep_range[0]) * share
        timesteps = (share * schedule.num_timesteps).long().clamp_(max=schedule.num_timesteps - 1)
        noise = torch.randn_like(latents)
        noisy = schedule.add_noise(latents, noise, timesteps)
        prediction = self.unet(noisy, timesteps, self.text_encoder(tokens))
        return (prediction.float() - schedule.target(latents, noise, timesteps)).square().mean()
