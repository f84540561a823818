"""Training the autoencoder on clips of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader

from videofactory_core.autoencoder import Autoencoder
from videofactory_core.objective import Process

from .data.moving_shapes import MovingShapes


@dataclass(frozen=True)
class AutoencoderLoss:
    """Weights of the reconstruction's terms."""

    # How much more a pixel of the object counts than one of the flat background; at 1 objects turn into brown blobs.
    object_weight: float = 9.0
    kl_weight: float = 1e-6

    def __call__(self, autoencoder: Autoencoder, frames: Tensor, mask: Tensor, process: Process) -> Tensor:
        """Weighted L1 and L2 on `frames [N, 3, H, W]` in -1..1 plus KL; `mask [N, 1, H, W]` marks the object."""
        mean, logvar = autoencoder.encode_moments(frames)
        mean, logvar = mean.float(), logvar.float()
        latents = mean + (0.5 * logvar).exp() * process.normal(mean)
        error = autoencoder.decode_frames(latents).float() - frames
        weight = 1 + (self.object_weight - 1) * mask
        reconstruction = (weight * (error.abs() + error.square())).mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        return reconstruction + self.kl_weight * kl


class AutoencoderTraining(nn.Module):
    """The autoencoder whose forward is its loss on a batch of `frame_batches`."""

    def __init__(self, autoencoder: Autoencoder, loss: AutoencoderLoss, process: Process) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.loss = loss
        self.process = process

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        device = next(self.parameters()).device
        return self.loss(self.autoencoder, batch[0].to(device), batch[1].to(device), self.process)


def frame_batches(
    clips: MovingShapes, batch_size: int, frames_per_clip: int, workers: int, first: int, process: Process
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches from number `first` on: `batch_size` frames `[N, 3, H, W]`, their masks `[N, 1, H, W]`."""
    clips_a_batch = max(1, batch_size // frames_per_clip)
    order = process.items(clips_a_batch, first, len(clips))
    loader = DataLoader(clips, batch_size=clips_a_batch, sampler=order, num_workers=workers, drop_last=True)
    for clip in loader:
        video = rearrange(clip["video"], "B C F H W -> (B F) C H W")
        # The neighbourhood of the edge counts as the object, or its outline blurs.
        mask = rearrange(clip["mask"], "B F H W -> (B F) 1 H W")
        mask = torch.nn.functional.max_pool2d(mask, 5, stride=1, padding=2)
        yield video, mask


@torch.no_grad()
def measure_scale(
    autoencoder: Autoencoder, batches: Iterator[tuple[Tensor, Tensor]], accelerator: Accelerator
) -> float:
    """1 / standard deviation of the latents over a few batches."""
    latents = [autoencoder.encode_moments(next(batches)[0].to(accelerator.device))[0] for _ in range(16)]
    return 1.0 / float(torch.cat(latents).std())


@torch.no_grad()
def preview_colours(
    autoencoder: Autoencoder, batches: Iterator[tuple[Tensor, Tensor]], accelerator: Accelerator
) -> list[list[float]]:
    """The matrix `[C + 1][3]` from a latent cell, and 1, to the mean colour in -1..1 of the pixels that it covers.

    Hosts preview latents with it while they sample. Least squares over one batch of frames.
    """
    frames = next(batches)[0].to(accelerator.device)
    latents = rearrange(autoencoder.encode(rearrange(frames, "B C H W -> B C 1 H W")), "B C 1 H W -> (B H W) C").float()
    colours = rearrange(torch.nn.functional.avg_pool2d(frames, autoencoder.config.downscale), "B C H W -> (B H W) C")
    ones = torch.ones_like(latents[:, :1])
    solution = torch.linalg.lstsq(torch.cat([latents, ones], dim=1).cpu(), colours.cpu()).solution
    return [[round(value, 4) for value in row] for row in solution.tolist()]
