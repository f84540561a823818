"""The KL autoencoder of latent diffusion, frame by frame, under the key names of Stable Diffusion's checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import ops
from .config import AutoencoderConfig
from .ops import Attention, Operations

LOGVAR_RANGE = (-30.0, 20.0)
# Where the system does not say how much memory is free.
ASSUMED_FREE_BYTES = 1 << 31
# The rest stays with whoever shares the machine, and covers what the estimate of a frame leaves out.
MEMORY_SHARE = 0.5
# Several kernels index a tensor with 32 bits.
MAX_TENSOR_ELEMENTS = (1 << 31) - 1


class Autoencoder(nn.Module):
    """Pictures to a Gaussian over latents and back; a video is its frames, each on its own.

    Sides are multiples of `config.downscale`; anything else raises ValueError. `h = H / downscale`, likewise `w`.
    Inputs have the dtype and the device of the weights, unless `operations` casts weights to the inputs.
    """

    def __init__(
        self, config: AutoencoderConfig, operations: Operations = nn, attention: Attention = ops.attention
    ) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config, operations, attention)
        self.decoder = Decoder(config, operations, attention)
        self.quant_conv = operations.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = operations.Conv2d(latent, latent, 1)

    def encode_moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (clamped to -30..20) of `frames [N, 3, H, W]` in -1..1; both `[N, 4, h, w]`, unscaled.

        Differentiable, all frames at once.
        """
        height, width = frames.shape[-2:]
        factor = self.config.downscale
        if height % factor or width % factor:
            raise ValueError(
                f"frames of {width}x{height} do not fit the autoencoder: resize or crop them so that width and height "
                f"are multiples of {factor}"
            )
        mean, logvar = self.quant_conv(self.encoder(frames)).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode_frames(self, latents: Tensor) -> Tensor:
        """Frames `[N, 3, H, W]`, near -1..1 but not clamped, of unscaled `latents [N, 4, h, w]`.

        Differentiable, all frames at once.
        """
        return self.decoder(self.post_quant_conv(latents))

    @torch.no_grad()
    def encode(
        self,
        video: Tensor,
        chunk: int | None = None,
        generator: torch.Generator | None = None,
        sample: bool = False,
    ) -> Tensor:
        """Latents `[B, 4, F, h, w]`, multiplied by `config.scale_factor`, of `video [B, 3, F, H, W]` in -1..1.

        They are the mean, or with `sample` a draw `mean + exp(logvar / 2) * noise` whose noise comes from `generator`.
        `chunk` frames go through at a time (None: what the free memory allows), which changes nothing but rounding.
        """
        batch = video.shape[0]
        frames = rearrange(video, "B C F H W -> (B F) C H W")
        if chunk is None:
            chunk = self._frames_that_fit(frames, *frames.shape[-2:])
        mean, logvar = _in_chunks(lambda part: torch.cat(self.encode_moments(part), dim=1), frames, chunk).chunk(2, 1)
        if sample:
            device = generator.device if generator is not None else mean.device
            noise = torch.randn(mean.shape, generator=generator, device=device, dtype=mean.dtype)
            mean = mean + (0.5 * logvar).exp() * noise.to(mean.device)
        return rearrange(mean * self.config.scale_factor, "(B F) C h w -> B C F h w", B=batch).contiguous()

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """Video `[B, 3, F, H, W]` in -1..1 of `latents [B, 4, F, h, w]` as `encode` returns them.

        `chunk` frames go through at a time (None: what the free memory allows), which changes nothing but rounding.
        """
        batch = latents.shape[0]
        frames = rearrange(latents, "B C F h w -> (B F) C h w") / self.config.scale_factor
        if chunk is None:
            height, width = (side * self.config.downscale for side in frames.shape[-2:])
            chunk = self._frames_that_fit(frames, height, width)
        video = _in_chunks(lambda part: self.decode_frames(part).clamp(-1, 1), frames, chunk)
        return rearrange(video, "(B F) C H W -> B C F H W", B=batch).contiguous()

    def _frames_that_fit(self, like: Tensor, height: int, width: int) -> int:
        """How many frames of `height` x `width` pixels, in the dtype and on the device of `like`, fit into memory.

        A ResBlock holds four tensors at once: its input, that normalized, that activated, and the convolution's output.
        The largest stand where the decoder has just doubled the resolution and not yet reduced the channels. In the
        middle, attention may hold every pair of latent cells twice, before and after the softmax.
        """
        mult = self.config.channel_mult
        widest = max(max(mult[i : i + 2]) / 4**i for i in range(len(mult)))
        tensor = int(self.config.channels * widest * height * width)
        cells = height * width // self.config.downscale**2
        frame_bytes = max(4 * tensor, 2 * cells**2) * like.element_size()
        by_memory = int(MEMORY_SHARE * _free_bytes(like.device)) // frame_bytes
        return max(1, min(by_memory, MAX_TENSOR_ELEMENTS // tensor))


class Encoder(nn.Module):
    """Frames `[N, 3, H, W]` to `[N, 8, h, w]`: the levels from fine to coarse, then the middle."""

    def __init__(self, config: AutoencoderConfig, operations: Operations, attention: Attention) -> None:
        super().__init__()
        groups = config.norm_groups
        widths = [config.channels * mult for mult in config.channel_mult]
        self.conv_in = operations.Conv2d(config.in_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.channels
        for level, width in enumerate(widths):
            last = level == len(widths) - 1
            self.down.append(DownLevel(channels, width, config.num_res_blocks, groups, last, operations))
            channels = width
        self.mid = Middle(channels, groups, operations, attention)
        self.norm_out = _norm(channels, groups, operations)
        self.conv_out = operations.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents `[N, 4, h, w]` to frames `[N, 3, H, W]`: the middle, then the levels from coarse to fine."""

    def __init__(self, config: AutoencoderConfig, operations: Operations, attention: Attention) -> None:
        super().__init__()
        groups = config.norm_groups
        widths = [config.channels * mult for mult in config.channel_mult]
        channels = widths[-1]
        self.conv_in = operations.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = Middle(channels, groups, operations, attention)
        # Checkpoints number the levels from the finest, the opposite of the order in which they run.
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            self.up.insert(
                0, UpLevel(channels, widths[level], config.num_res_blocks + 1, groups, level == 0, operations)
            )
            channels = widths[level]
        self.norm_out = _norm(channels, groups, operations)
        self.conv_out = operations.Conv2d(channels, config.in_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class DownLevel(nn.Module):
    """ResBlocks of one resolution, then half of it unless `last`."""

    def __init__(
        self, channels: int, out_channels: int, num_blocks: int, groups: int, last: bool, operations: Operations
    ) -> None:
        super().__init__()
        self.block = _blocks(channels, out_channels, num_blocks, groups, operations)
        self.downsample = nn.Identity() if last else Downsample(out_channels, operations)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.block(x))


class UpLevel(nn.Module):
    """ResBlocks of one resolution, then twice of it unless `last`."""

    def __init__(
        self, channels: int, out_channels: int, num_blocks: int, groups: int, last: bool, operations: Operations
    ) -> None:
        super().__init__()
        self.block = _blocks(channels, out_channels, num_blocks, groups, operations)
        self.upsample = nn.Identity() if last else Upsample(out_channels, operations)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.block(x))


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the latent's resolution."""

    def __init__(self, channels: int, groups: int, operations: Operations, attention: Attention) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, groups, operations)
        self.attn_1 = AttentionBlock(channels, groups, operations, attention)
        self.block_2 = ResBlock(channels, channels, groups, operations)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`, with a 1x1 convolution on `x` where the width changes."""

    def __init__(self, channels: int, out_channels: int, groups: int, operations: Operations) -> None:
        super().__init__()
        self.norm1 = _norm(channels, groups, operations)
        self.conv1 = operations.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups, operations)
        self.conv2 = operations.Conv2d(out_channels, out_channels, 3, padding=1)
        same = channels == out_channels
        self.nin_shortcut = nn.Identity() if same else operations.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttentionBlock(nn.Module):
    """Single-head self-attention over the cells of each frame, with a skip."""

    def __init__(self, channels: int, groups: int, operations: Operations, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.norm = _norm(channels, groups, operations)
        self.q = operations.Conv2d(channels, channels, 1)
        self.k = operations.Conv2d(channels, channels, 1)
        self.v = operations.Conv2d(channels, channels, 1)
        self.proj_out = operations.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "N C H W -> N (H W) C") for layer in (self.q, self.k, self.v))
        h = self.attention(q, k, v, heads=1)
        return x + self.proj_out(rearrange(h, "N (H W) C -> N C H W", H=x.shape[2]))


class Downsample(nn.Module):
    """Half the resolution by a convolution of stride 2."""

    def __init__(self, channels: int, operations: Operations) -> None:
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        # Right and bottom only: the weights were trained with this padding.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution, nearest neighbour and a convolution."""

    def __init__(self, channels: int, operations: Operations) -> None:
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _blocks(channels: int, out_channels: int, num_blocks: int, groups: int, operations: Operations) -> nn.Sequential:
    widths = [channels] + [out_channels] * num_blocks
    return nn.Sequential(*(ResBlock(widths[i], widths[i + 1], groups, operations) for i in range(num_blocks)))


def _norm(channels: int, groups: int, operations: Operations) -> nn.GroupNorm:
    return operations.GroupNorm(groups, channels, eps=1e-6)


def _in_chunks(function: Callable[[Tensor], Tensor], frames: Tensor, chunk: int) -> Tensor:
    if frames.device.type == "cpu":
        # A tenth faster at small widths. Not in training, where bf16 GroupNorm's backward is slow in this layout.
        frames = frames.contiguous(memory_format=torch.channels_last)
    return torch.cat([function(part) for part in frames.split(chunk)])


def _free_bytes(device: torch.device) -> int:
    """Memory that new tensors on `device` may take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return ASSUMED_FREE_BYTES
