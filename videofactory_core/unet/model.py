"""The video U-Net, read top to bottom."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops as default_ops
from ..config import UNetConfig
from ..ops import Attention, Operations, bind
from .conditioning import Conditioning, Hooks
from .spatial import Downsample, ResBlock, SpatialTransformer, Upsample
from .temporal import TemporalTransformer


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """Sinusoids of the diffusion time step, cosines first: `[N]` to `[N, C]` in float32."""
    half = channels // 2
    rates = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10000.0) / half))
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


NO_HOOKS = Hooks()


class Block(nn.Sequential):
    """Layers under one number of latent diffusion's `input_blocks` and `output_blocks`."""

    def forward(  # type: ignore[override]
        self, h: Tensor, t: Tensor | None, cond: Conditioning, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        for layer in self:
            if isinstance(layer, (ResBlock, SpatialTransformer)):
                h, t = layer(h, t, cond)
            elif isinstance(layer, Upsample):
                h = layer(h, size)
            elif isinstance(layer, TemporalTransformer):
                h = h + cond.motion(layer(h, cond.num_frames))
            else:
                h = layer(h)
        return h, t


class VideoUNet(nn.Module):
    """Predicts noise or velocity of a latent clip from its text: `x [B, C, F, H, W]` to the same shape."""

    def __init__(
        self,
        config: UNetConfig,
        operations: Operations = nn,  # type: ignore[assignment]
        attention: Attention = default_ops.attention,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        # Recompute activations in the backward pass instead of keeping them.
        self.gradient_checkpointing = False
        ops = bind(operations, device, dtype)
        widths = [config.model_channels * m for m in config.channel_mult]
        levels = len(widths)
        emb_dim = config.model_channels * 4

        self.time_embed = nn.Sequential(
            ops.Linear(config.model_channels, emb_dim), nn.SiLU(), ops.Linear(emb_dim, emb_dim)
        )

        first: list[nn.Module] = [ops.Conv2d(config.in_channels, widths[0], 3, padding=1)]
        if config.temporal_attention_in:
            inner = 8 * (config.head_dim or widths[0] // 8)
            first.append(TemporalTransformer(widths[0], inner, 8, config, ops, attention))
        self.input_blocks = nn.ModuleList([Block(*first)])
        skips, channels = [widths[0]], widths[0]
        for level, width in enumerate(widths):
            depth = config.transformer_depth[level]
            for i in range(config.num_res_blocks):
                last = i == config.num_res_blocks - 1
                end = level if last else None
                skip_from = channels if level and i == 0 else 0
                layers: list[nn.Module] = [
                    ResBlock(channels, width, config, ops, attention, not depth, skip_from, None if depth else end)
                ]
                if depth:
                    layers.append(SpatialTransformer(width, depth, config, ops, attention, end))
                channels = width
                self.input_blocks.append(Block(*layers))
                skips.append(channels)
            if level < levels - 1:
                self.input_blocks.append(Block(Downsample(channels, ops)))
                skips.append(channels)

        middle = config if config.temporal_middle else replace(config, temporal_conv=False, temporal_attention=False)
        self.middle_block = Block(
            ResBlock(channels, channels, middle, ops, attention),
            SpatialTransformer(channels, max(1, max(config.transformer_depth)), middle, ops, attention),
            ResBlock(channels, channels, middle, ops, attention),
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            depth = config.transformer_depth[level]
            for i in range(config.num_res_blocks + 1):
                last = i == config.num_res_blocks
                end = levels + (levels - 1 - level) if last else None
                skip_from = channels if level < levels - 1 and i == 0 else 0
                channels += skips.pop()
                layers = [
                    ResBlock(channels, width, config, ops, attention, not depth, skip_from, None if depth else end)
                ]
                if depth:
                    layers.append(SpatialTransformer(width, depth, config, ops, attention, end))
                if last and level:
                    layers.append(Upsample(width, ops))
                channels = width
                self.output_blocks.append(Block(*layers))

        self.out = nn.Sequential(
            ops.GroupNorm(config.norm_groups, channels),
            nn.SiLU(),
            ops.Conv2d(channels, config.out_channels, 3, padding=1),
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type that the weights are stored in."""
        return next(self.out.parameters()).dtype

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        *,
        motion_scale: float = 1.0,
        swap_strength: float = 1.0,
        hooks: Hooks = NO_HOOKS,
    ) -> Tensor:
        """One denoising step.

        x: latents `[B, C, F, H, W]`; any H and W.
        timesteps: `[B]`, or `[B, F]` when frames have noise levels of their own; 0 is clean.
        context: text features `[B, L, D]`, or `[B, F, L, D]` when frames have prompts of their own.
        motion_scale, swap_strength, hooks: see `Conditioning` and `Hooks`.
        """
        num_frames = x.shape[2]
        if timesteps.ndim == 1:
            timesteps = repeat(timesteps, "B -> B F", F=num_frames)
        emb = self.time_embed(timestep_embedding(timesteps.flatten(), self.config.model_channels).to(x.dtype))
        cond = Conditioning(
            hooks.embedding(emb), context.flatten(0, -3), num_frames, hooks, motion_scale, swap_strength
        )

        h = rearrange(x, "B C F H W -> (B F) C H W")
        if h.device.type == "cpu":
            # Turns every change between pixels, tokens and frames into a view; other devices' norms would undo it.
            h = h.contiguous(memory_format=torch.channels_last)
        t: Tensor | None = None
        skips = []
        for i, block in enumerate(self.input_blocks):
            hooks.enter("input", i)
            h, t = self._run(block, h, t, cond)
            skip, h = hooks.after_input(h)
            skips.append(skip)
        hooks.enter("middle", 0)
        h, t = self._run(self.middle_block, h, t, cond)
        h = hooks.after_middle(h)
        for i, block in enumerate(self.output_blocks):
            hooks.enter("output", i)
            h = torch.cat(hooks.before_output(h, skips.pop()), dim=1)
            size = (skips[-1].shape[2], skips[-1].shape[3]) if skips else None
            h, t = self._run(block, h, t, cond, size)
        return rearrange(self.out(h), "(B F) C H W -> B C F H W", F=num_frames)

    def _run(
        self, block: nn.Module, h: Tensor, t: Tensor | None, cond: Conditioning, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, t, cond, size, use_reentrant=False)
        return block(h, t, cond, size)
