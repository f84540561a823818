"""The core's network with the host's calling convention: its layers, its attention, and its patches and ControlNets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.patcher_extension
import torch
from comfy.ldm.modules.attention import optimized_attention
from einops import rearrange
from torch import Tensor, nn

from ..videofactory_core import ops
from ..videofactory_core.config import UNetConfig
from ..videofactory_core.unet.attention import CrossAttention
from ..videofactory_core.unet.conditioning import Hooks
from ..videofactory_core.unet.model import NO_HOOKS, VideoUNet

# What our sampler tells the model for one run: `motion_scale`, `swap_strength`.
OPTIONS = "videofactory"


def precision(config: UNetConfig) -> torch.dtype | None:
    """The least type of attention scores: Stable Diffusion 2.x overflows in half precision."""
    return torch.float32 if config.context_dim == 1024 else None


def host_attention(least: torch.dtype | None) -> Callable[..., Tensor]:
    """The host's attention behind the core's interface."""

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        if q.device.type == "cpu":
            # The host's choice for CPUs is from before PyTorch had a fused one, slower, and cannot be compiled.
            return ops.attention(q, k, v, heads, mask)
        if mask is not None:
            # The host's backends agree on what is added to the scores, not on what a boolean mask means.
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.finfo(q.dtype).max)
        return optimized_attention(q, k, v, heads, mask=mask, attn_precision=least)

    return attention


class HostHooks(Hooks):
    """Hands the host's patches and ControlNet features to the core, under the names that the host's nodes use."""

    def __init__(self, config: UNetConfig, options: dict[str, Any], control: Mapping[str, list[Tensor | None]]) -> None:
        self.config = config
        self.options = options
        self.control = control
        self.patches: Mapping[str, list[Callable[..., Any]]] = options.get("patches", {})
        self.replacements: Mapping[str, dict[Any, Callable[..., Tensor]]] = options.get("patches_replace", {})

    def told(self, heads: int, channels: int) -> dict[str, Any]:
        """What the host's patches of an attention layer learn about the place they are at."""
        rest = {key: value for key, value in self.options.items() if key not in ("patches", "patches_replace")}
        return {**rest, "n_heads": heads, "dim_head": channels // heads, "attn_precision": precision(self.config)}

    def embedding(self, emb: Tensor) -> Tensor:
        for patch in self.patches.get("emb_patch", ()):
            emb = patch(emb, self.config.model_channels, self.options)
        return emb

    def enter(self, part: str, index: int) -> None:
        self.options["block"] = (part, index)

    def attend(self, name: str, depth: int, layer: CrossAttention, x: Tensor, context: Tensor | None) -> Tensor:
        self.options["block_index"] = depth
        place = self.options["block"]
        told = self.told(layer.heads, x.shape[-1]) if self.patches or self.replacements else {}
        context = x if context is None else context
        value: Tensor | None = context
        for patch in self.patches.get(f"{name}_patch", ()):
            x, context, value = patch(x, context, value, told)
        q, k, v = layer.to_q(x), layer.to_k(context), layer.to_v(context if value is None else value)
        replacements = self.replacements.get(name, {})
        replace = replacements.get((*place, depth)) or replacements.get(place)
        if replace is not None:
            out = replace(q, k, v, told)
        else:
            # Patches count on how the host's attention folds its rows, so here it is the host's on every device.
            out = optimized_attention(
                q, k, v, layer.heads, attn_precision=precision(self.config), transformer_options=self.options
            )
        out = layer.to_out[0](out)
        for patch in self.patches.get(f"{name}_output_patch", ()):
            out = patch(out, told)
        return out

    def between(self, x: Tensor) -> Tensor:
        for patch in self.patches.get("middle_patch", ()):
            x = patch(x, self.told(self.config.heads(x.shape[-1]), x.shape[-1]))
        return x

    def after_input(self, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.controlled("input", h)
        for patch in self.patches.get("input_block_patch", ()):
            h = patch(h, self.options)
        skip = h
        for patch in self.patches.get("input_block_patch_after_skip", ()):
            h = patch(h, self.options)
        return skip, h

    def after_middle(self, h: Tensor) -> Tensor:
        return self.controlled("middle", h)

    def before_output(self, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        skip = self.controlled("output", skip)
        for patch in self.patches.get("output_block_patch", ()):
            h, skip = patch(h, skip, self.options)
        return h, skip

    def controlled(self, part: str, h: Tensor) -> Tensor:
        """`h` with the ControlNet's next feature for this part of the network."""
        features = self.control.get(part)
        feature = features.pop() if features else None
        if feature is None:
            return h
        if feature.shape[1:] != h.shape[1:]:
            raise ValueError(
                f"this ControlNet makes features of {feature.shape[1]} channels where the model has {h.shape[1]}:"
                " choose one made for the same base model"
            )
        return h + feature

    def idle(self) -> bool:
        """Whether nobody in the graph wants to be asked."""
        override = self.options.get("optimized_attention_override")
        return not (self.patches or self.replacements or self.control or override)

    def sees_text_attention(self) -> bool:
        """Whether someone looks at attention on the text, and counts on one row a frame."""
        return bool(
            self.patches.get("attn2_patch")
            or self.patches.get("attn2_output_patch")
            or self.replacements.get("attn2")
            or self.options.get("optimized_attention_override")
        )


class HostUNet(VideoUNet):
    """The core's network with the host's calling convention; the weights keep their names."""

    def __init__(
        self,
        videofactory: UNetConfig,
        device: Any = None,
        dtype: torch.dtype | None = None,
        operations: Any = nn,
        **_: Any,
    ) -> None:
        super().__init__(videofactory, operations, host_attention(precision(videofactory)), device, dtype)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: None = None,
        control: Mapping[str, list[Tensor | None]] | None = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`x [(B F), C, H, W]` with `timesteps` and `context` for each frame, or `[B, C, F, H, W]` for each clip."""
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self.denoise, self, wrappers)
        return executor.execute(x, timesteps, context, y, control, options, **kwargs)

    def denoise(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: None,
        control: Mapping[str, list[Tensor | None]] | None,
        transformer_options: dict[str, Any],
        num_video_frames: int | None = None,
        **_: Any,
    ) -> Tensor:
        transformer_options["original_shape"] = list(x.shape)
        asked = HostHooks(self.config, transformer_options, control or {})
        hooks = NO_HOOKS if asked.idle() else asked
        ours = transformer_options.get(OPTIONS, {})
        strengths = {name: float(ours[name]) for name in ("motion_scale", "swap_strength") if name in ours}
        if x.ndim == 5:
            self.check_length(x.shape[2])
            return super().forward(x, timesteps, context, hooks=hooks, **strengths)

        num_frames = num_video_frames or x.shape[0]
        self.check_length(num_frames)
        check_clips(x.shape[0], num_frames)
        clips = rearrange(x, "(B F) C H W -> B C F H W", F=num_frames)
        timesteps = rearrange(timesteps, "(B F) -> B F", F=num_frames)
        context = rearrange(context, "(B F) L D -> B F L D", F=num_frames)
        if not asked.sees_text_attention() and torch.equal(context, context[:, :1].expand_as(context)):
            # The host repeats a prompt for every frame; its keys and values are needed once.
            context = context[:, 0]
        out = super().forward(clips, timesteps, context, hooks=hooks, **strengths)
        return rearrange(out, "B C F H W -> (B F) C H W")

    def check_length(self, num_frames: int) -> None:
        longest = self.config.temporal_positions
        if longest and num_frames > longest:
            raise ValueError(
                f"this model knows {longest} frame positions, not {num_frames}:"
                " ask for fewer frames, or put VideoFactory Context Windows before the sampler"
            )


def check_clips(count: int, num_frames: int) -> None:
    """Refuse with a ValueError so many latent frames as clips of `num_frames`, where they do not divide."""
    if count % num_frames:
        raise ValueError(
            f"{count} latent frames do not divide into clips of {num_frames}:"
            " use the frames of Empty VideoFactory Latent everywhere"
        )
