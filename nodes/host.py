"""VideoFactory inside the host: a checkpoint becomes the host's own MODEL, CLIP and VAE.

In the graph the frames of a clip stand in the batch, `[(B F), C, H, W]`, which is what every image tool expects;
`network.py` folds and unfolds them. Latents `[B, C, F, H, W]` are understood too.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from ..videofactory_core import checkpoint
from ..videofactory_core.config import AutoencoderConfig, ModelConfig, TextConfig
from ..videofactory_core.convert import Conversion
from ..videofactory_core.text import END_TOKEN, START_TOKEN, pad_token
from .network import HostUNet

# In a CONDITIONING, and in a LATENT: how many frames a clip of the batch has.
FRAMES = "videofactory_frames"
# In a CONDITIONING: prompts for key frames.
SCHEDULE = "videofactory_schedule"
# Stable Diffusion's latents; previews of others come from the checkpoint.
SD_SCALE_FACTOR = 0.18215


def left_alone(mask: Tensor) -> Tensor:
    """Whether a noise mask `[(B F), C, H, W]` or `[B, C, F, H, W]` is 0 all over a frame, with 1 for C, H and W."""
    return mask.abs().amax((1, -2, -1), keepdim=True) == 0


class HostModel(comfy.model_base.BaseModel):
    """The host's view of the network: noise schedule, conditions, memory.

    Frames that the noise mask leaves alone are given. The host shows them as noisy as the rest; a model that learned
    what given frames are gets them clean, at timestep 0. They travel with the conditions, because these are what is
    cut for context windows and areas. A mask inside a frame means what it means to other models.
    """

    def __init__(self, model_config: HostConfig, model_type: Any, device: Any = None) -> None:
        super().__init__(model_config, model_type, device=device, unet_model=HostUNet)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        noise, changing = kwargs["noise"], kwargs.get(SCHEDULE)
        if noise.ndim == 4:
            num_frames = int(kwargs.get(FRAMES) or noise.shape[0])
            # The name under which the host's context windows shorten clips.
            out["num_video_frames"] = comfy.conds.CONDConstant(num_frames)
            if changing is not None:
                clips = -(-noise.shape[0] // num_frames)
                out["c_crossattn"] = comfy.conds.CONDCrossAttn(changing.spread(num_frames).repeat(clips, 1, 1))
        elif changing is not None:
            raise ValueError("prompts for frames need the frames in the batch: use Empty VideoFactory Latent")
        mask = kwargs.get("denoise_mask")
        if mask is not None and self.model_config.videofactory.given_frames:
            given = left_alone(mask)
            if given.any():
                # The timestep at which a frame is held; -1 for those that follow the sampler.
                out["held"] = comfy.conds.CONDRegular(given.int() - 1)
                out["shown"] = comfy.conds.CONDNoiseShape(kwargs["latent_image"])
                out["noise"] = comfy.conds.CONDNoiseShape(noise)
        return out

    def hide(self, conditions: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
        """Conditions in which pure noise stands for the frames that are given; None where none is."""
        hidden = []
        for condition in conditions:
            told = condition["model_conds"]
            if "held" not in told:
                return None
            held = told["held"].cond
            last = self.model_config.videofactory.diffusion.num_timesteps - 1
            changes = {"held": comfy.conds.CONDRegular(held.masked_fill(held == 0, last)), "shown": told["noise"]}
            hidden.append({**condition, "model_conds": {**told, **changes}})
        return hidden

    def apply_model(
        self,
        x: Tensor,
        t: Tensor,
        *args: Any,
        held: Tensor | None = None,
        shown: Tensor | None = None,
        noise: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`x` of sigma `t`, one a row; the frames that are `held` at a timestep are those of `shown`.

        `noise` waits among the conditions for `hide`.
        """
        if held is None:
            return super().apply_model(x, t, *args, **kwargs)
        if x.ndim == 5 and held.shape[2] != x.shape[2]:
            # Hosts before 0.4 cut only what has fewer dimensions than the latents.
            raise ValueError(
                "the context windows of this ComfyUI do not cut given frames:"
                " use Empty VideoFactory Latent with VideoFactory Context Windows, or update ComfyUI"
            )
        # The host is about to make its input smaller.
        shown = shown / self.model_sampling.calculate_input(t, torch.ones_like(x))
        return super().apply_model(torch.where(held >= 0, shown, x), t, *args, held=held, **kwargs)

    def process_timestep(self, timestep: Tensor, held: Tensor | None = None, **_: Any) -> Tensor:
        """Timesteps of rows, for clips with a dimension for time those of frames `[B, F]`; with those `held`."""
        if held is None:
            return timestep
        rows = held.flatten(1).to(timestep)
        by_frame = torch.where(rows >= 0, rows, timestep[:, None])
        return by_frame[:, 0] if held.ndim == 4 else by_frame


class HostConfig(comfy.supported_models_base.BASE):
    """How the host builds the network, and what Save Checkpoint writes."""

    # The base class would add settings that the network does not know.
    unet_extra_config: ClassVar[dict[str, Any]] = {}
    memory_usage_factor = 2.0

    def __init__(self, config: ModelConfig, metadata: checkpoint.Metadata) -> None:
        unet = config.unet
        per_block = [depth for depth in unet.transformer_depth for _ in range(unet.num_res_blocks)]
        per_output = [depth for depth in unet.transformer_depth for _ in range(unet.num_res_blocks + 1)]
        levels = len(unet.channel_mult)
        super().__init__(
            {
                "videofactory": unet,
                # Read by the host's LoRA names and patches.
                "in_channels": unet.in_channels,
                "out_channels": unet.out_channels,
                "model_channels": unet.model_channels,
                "context_dim": unet.context_dim,
                "channel_mult": list(unet.channel_mult),
                "num_res_blocks": [unet.num_res_blocks] * levels,
                "transformer_depth": per_block,
                "transformer_depth_output": per_output,
                "transformer_depth_middle": max(1, *unet.transformer_depth),
            }
        )
        self.videofactory = config
        self.metadata = metadata
        self.latent_format = latent_format(config, metadata)
        diffusion = config.diffusion
        self.sampling_settings = {
            # The host calls the scaled schedule "linear".
            "beta_schedule": "linear" if diffusion.beta_schedule == "scaled_linear" else "sqrt_linear",
            "linear_start": diffusion.beta_start,
            "linear_end": diffusion.beta_end,
            "timesteps": diffusion.num_timesteps,
            "zsnr": diffusion.zero_terminal_snr,
        }

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        velocity = self.videofactory.diffusion.prediction_type == "v_prediction"
        return comfy.model_base.ModelType.V_PREDICTION if velocity else comfy.model_base.ModelType.EPS

    def inpaint_model(self) -> bool:
        return False

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> HostModel:
        return HostModel(self, self.model_type(state_dict, prefix), device=device)

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        saved = super().process_unet_state_dict_for_saving(state_dict)
        # The host drops a file's metadata, without which nobody knows how the network is built.
        return {**saved, checkpoint.KEPT_HEADER: checkpoint.pack_header(self.videofactory, self.metadata)}


def latent_format(config: ModelConfig, metadata: checkpoint.Metadata) -> Any:
    """The latents' scale, and the colours of their previews."""
    if config.autoencoder.scale_factor == SD_SCALE_FACTOR:
        return comfy.latent_formats.SD15()
    latents = comfy.latent_formats.LatentFormat()
    latents.scale_factor = config.autoencoder.scale_factor
    latents.latent_channels = config.autoencoder.latent_channels
    colours = checkpoint.preview_colours(metadata)
    if colours is not None:
        latents.latent_rgb_factors, latents.latent_rgb_factors_bias = colours
    return latents


# A checkpoint, or public weights that read like one.
ModelFile: TypeAlias = checkpoint.Checkpoint | Conversion


def load(file: ModelFile) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE; raises CheckpointError when the file breaks meanwhile."""
    return load_model(file), load_text_encoder(file), load_autoencoder(file)


def load_model(file: ModelFile) -> Any:
    weights = file.read("unet")
    config = HostConfig(file.config, file.metadata)
    parameters = comfy.utils.calculate_parameters(weights)
    stored = comfy.utils.weight_dtype(weights)
    management = comfy.model_management
    supported = config.supported_inference_dtypes
    dtype = management.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    device = management.get_torch_device()
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    model = config.get_model(weights, device=management.unet_inital_load_device(parameters, dtype))
    model.load_model_weights(weights, "")
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return patcher(model, load_device=device, offload_device=management.unet_offload_device())


class HostTarget:
    """The pair of classes that the host builds a text encoder from."""

    def __init__(self, tokenizer: type, clip: type) -> None:
        self.tokenizer = tokenizer
        self.clip = clip
        self.params: dict[str, Any] = {}


def text_target(config: TextConfig) -> HostTarget:
    """The host's CLIP text encoder and tokenizer at the sizes of `config`."""
    # The host's short names for OpenAI's and OpenCLIP's encoders; saved keys and LoRA names carry them.
    name = "l" if config.activation == "quick_gelu" else "h"
    pad = pad_token(config)
    settings = {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": 4 * config.width,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_tokens,
        "vocab_size": config.vocab_size,
        "eos_token_id": END_TOKEN,
    }
    skipped = {"layer": "hidden", "layer_idx": -1 - config.skip_last_layers} if config.skip_last_layers else {}

    class Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(
                device=device,
                dtype=dtype,
                max_length=config.max_tokens,
                textmodel_json_config=dict(settings),
                special_tokens={"start": START_TOKEN, "end": END_TOKEN, "pad": pad},
                return_projected_pooled=False,
                model_options=model_options or {},
                **skipped,
            )

    class Model(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            options = model_options or {}
            super().__init__(device=device, dtype=dtype, model_options=options, clip_name=name, clip_model=Encoder)

    class Words(comfy.sd1_clip.SDTokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(
                max_length=config.max_tokens,
                pad_with_end=pad == END_TOKEN,
                embedding_directory=embedding_directory,
                embedding_size=config.width,
                embedding_key=f"clip_{name}",
                tokenizer_data=tokenizer_data or {},
            )

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(self, embedding_directory: Any = None, tokenizer_data: Any = None) -> None:
            super().__init__(embedding_directory, tokenizer_data or {}, clip_name=name, tokenizer=Words)

    return HostTarget(Tokenizer, Model)


def load_text_encoder(file: ModelFile) -> Any:
    weights = file.read("text_encoder")
    clip = comfy.sd.CLIP(
        text_target(file.config.text),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(weights),
    )
    missing, unexpected = clip.cond_stage_model.load_sd(weights)
    lacking = [key for key in missing if "text_projection" not in key]
    assert not lacking, lacking
    assert not unexpected, unexpected
    return clip


def load_autoencoder(file: ModelFile) -> Any:
    config: AutoencoderConfig = file.config.autoencoder
    sizes = {
        "double_z": True,
        "z_channels": config.latent_channels,
        "resolution": 256,
        "in_channels": config.in_channels,
        "out_ch": config.in_channels,
        "ch": config.channels,
        "ch_mult": list(config.channel_mult),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    vae = comfy.sd.VAE(
        sd=file.read("autoencoder"), config={"params": {"ddconfig": sizes, "embed_dim": config.latent_channels}}
    )
    vae.latent_channels = config.latent_channels
    vae.downscale_ratio = vae.upscale_ratio = config.downscale
    for module in vae.first_stage_model.modules():
        if isinstance(module, nn.GroupNorm):
            # The host's class is written for 32 groups.
            module.num_groups = config.norm_groups
    return vae


def unusual(config: ModelConfig, frames: int, width: int, height: int) -> str:
    """In a sentence how a clip differs from those that a model was trained on, "" where it does not."""
    if config.knows(frames, width, height):
        return ""
    return (
        f"The model was trained on {config.frames} frames of {config.width} x {config.height};"
        f" {frames} frames of {width} x {height} may look worse."
    )


def config_of(model: Any) -> ModelConfig | None:
    """The configuration of a MODEL that this pack loaded, None for any other."""
    return getattr(model.model.model_config, "videofactory", None)
