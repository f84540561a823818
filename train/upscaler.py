"""Training the upscaler: drawings that the autoencoder has spoiled, and the same scenes drawn larger."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from videofactory_core.autoencoder import Autoencoder
from videofactory_core.objective import Process, seed_for
from videofactory_core.upscaler import Upscaler

from .data.moving_shapes import MovingShapes, draw


class ScenePairs(Dataset[tuple[Tensor, Tensor]]):
    """One frame of clip `i` at the clips' size and `scale` times as large, `[3, H, W]` in -1..1."""

    def __init__(self, clips: MovingShapes, scale: int) -> None:
        self.clips = clips
        self.scale = scale

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        clips, scene = self.clips, self.clips.scene(index)
        frame = index % clips.num_frames
        small = draw(scene, clips.num_frames, clips.height, clips.width)[:, frame]
        large = draw(scene, clips.num_frames, clips.height * self.scale, clips.width * self.scale)[:, frame]
        return small, large


def patch_batches(
    pairs: ScenePairs,
    autoencoder: Autoencoder,
    batch_size: int,
    patch: int,
    workers: int,
    seed: int,
    process: Process,
    first: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches from number `first` on: patches `[N, 3, P, P]` in 0..1, and their originals.

    They come from behind the autoencoder, and lie where the object's outline is, because the rest is flat.
    """
    order = process.items(batch_size, first, len(pairs))
    loader = DataLoader(pairs, batch_size, sampler=order, num_workers=workers, drop_last=True)
    for number, (small, large) in enumerate(loader, first):
        own = number * process.world + process.rank
        generator = torch.Generator().manual_seed(seed_for(seed, own))
        with torch.no_grad():
            latents = autoencoder.encode(rearrange(small, "B C H W -> B C 1 H W"))
            spoiled = rearrange(autoencoder.decode(latents), "B C 1 H W -> B C H W").clamp(-1, 1)
        yield _cut(spoiled / 2 + 0.5, large / 2 + 0.5, patch, pairs.scale, generator)


def _cut(small: Tensor, large: Tensor, patch: int, scale: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A patch of every picture around a random place of its outline, at both sizes."""
    height, width = small.shape[2:]
    edges = F.max_pool2d(large, scale).sub(-F.max_pool2d(-large, scale)).amax(1).flatten(1)
    places = torch.multinomial(edges + 1e-6, 1, generator=generator)[:, 0]
    cut = []
    for i, place in enumerate(places.tolist()):
        offset = torch.randint(patch, (2,), generator=generator).tolist()
        y = min(max(0, place // width - offset[0]), height - patch)
        x = min(max(0, place % width - offset[1]), width - patch)
        end = (y + patch) * scale, (x + patch) * scale
        cut.append((small[i, :, y : y + patch, x : x + patch], large[i, :, y * scale : end[0], x * scale : end[1]]))
    smalls, larges = zip(*cut, strict=True)
    return torch.stack(smalls), torch.stack(larges)


class UpscalerTraining(nn.Module):
    """The upscaler whose forward is its loss on a batch of `patch_batches`: mean absolute error, as in RCAN."""

    def __init__(self, upscaler: Upscaler) -> None:
        super().__init__()
        self.upscaler = upscaler

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        device = next(self.parameters()).device
        small, large = (x.to(device) for x in batch)
        return (self.upscaler(small).float() - large).abs().mean()
