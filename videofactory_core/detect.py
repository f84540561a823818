"""What keys and shapes tell: which model a file holds, and how a model of ours is built when nothing else says so."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .config import PRESETS, ModelConfig

Shapes = Mapping[str, tuple[int, ...]]

# The parts of a model and where their keys stand in a file.
PREFIXES = {
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
# Where our own metadata survives programs that drop metadata.
KEPT_HEADER = "videofactory.header"
# ComfyUI's Save Checkpoint puts the name of its text encoder in between,
HOST_TEXT_PREFIX = re.compile(r"cond_stage_model\.clip_[lh]\.transformer\.")
# and adds tensors that no part of ours has: two empty ones as flags, and what else its text encoder holds.
HOST_EXTRAS = re.compile(
    r"v_pred|ztsnr|videofactory\.header|cond_stage_model\.(.*\.)?(logit_scale|text_projection\.weight|position_ids)"
)


def keys_by_part(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each part of `PREFIXES` its state dict's names and their keys in the file; under "" what belongs to none."""
    found: dict[str, dict[str, str]] = {part: {} for part in (*PREFIXES, "")}
    for key in keys:
        plain = HOST_TEXT_PREFIX.sub(PREFIXES["text_encoder"], key, count=1)
        part = next((part for part, prefix in PREFIXES.items() if plain.startswith(prefix)), "")
        if not HOST_EXTRAS.fullmatch(key):
            found[part][plain.removeprefix(PREFIXES.get(part, ""))] = key
    return found


class Kind(NamedTuple):
    """A kind of file: what it is called, what one can do with it here, and the keys that give it away."""

    name: str
    description: str
    use: str
    # Searched in lines of "key AxBxC".
    pattern: str


_CONVERT = "turn it into one with `videofactory convert`"
_TRANSFORMER = "it cannot be used here, because it is a transformer and no U-Net"
_UPSCALER = "give it to ComfyUI's own Load Upscale Model and Upscale Image (using Model), or name an RCAN"
_PART = "give it to `videofactory convert` beside a model that lacks it"

# Cross-attention of a Stable Diffusion U-Net in either layout, up to the width of its text features.
_TEXT_WIDTH = r"\b(input_blocks|down_blocks)\.\S*\.attn2\.to_k\.weight \d+x"

# The first that matches wins, so what is built on top of another architecture comes before that architecture.
KINDS = (
    Kind(
        "lora",
        "a LoRA",
        "load it with a LoRA loader on top of a checkpoint",
        r"lora_(up|down|A|B)\b|[._]lora\.(up|down)\b|\bhada_w1_a|\blokr_w1",
    ),
    Kind(
        "videofactory",
        "a VideoFactory model",
        "load it as a checkpoint",
        r"^model\.diffusion_model\.(input_blocks|middle_block|output_blocks)\.[\d.]+\.temporal\.",
    ),
    Kind(
        "controlnet",
        "a ControlNet",
        "apply it with ControlNet nodes",
        r"^control_model\.|\bzero_convs\.0\.|^controlnet_(down_blocks|blocks|cond_embedding)\.",
    ),
    Kind("animatediff", "an AnimateDiff motion module", _CONVERT, r"\bmotion_modules\.\d+\."),
    Kind(
        "videocrafter",
        "a VideoCrafter video model",
        "it cannot be used here, because its layers also read a frame rate",
        r"\bfps_embedding\.|\binit_attn\.",
    ),
    Kind("modelscope", "a ModelScope or ZeroScope video model", _CONVERT, r"\btemopral_conv\.|\btemp_convs\.\d"),
    Kind(
        "svd",
        "a Stable Video Diffusion model",
        "it cannot be used here, because it starts from a picture",
        r"\btime_stack\.|\btemporal_transformer_blocks\.\d",
    ),
    Kind("hunyuanvideo", "a HunyuanVideo model", _TRANSFORMER, r"token_refiner\."),
    Kind(
        "flux", "a Flux image model", _TRANSFORMER, r"\bdouble_blocks\.0\.img_attn\.|\bsingle_transformer_blocks\.0\."
    ),
    Kind("sd3", "a Stable Diffusion 3 image model", _TRANSFORMER, r"\bjoint_blocks\.0\.|\battn\.add_k_proj\."),
    Kind(
        "wan",
        "a Wan video model",
        _TRANSFORMER,
        r"\bblocks\.0\.self_attn\.norm_q\.|\bcondition_embedder\.text_embedder",
    ),
    Kind("ltx", "an LTX video model", _TRANSFORMER, r"\bpatchify_proj\."),
    Kind(
        "sdxl",
        "a Stable Diffusion XL image model",
        "it cannot be used here, because it has two text encoders",
        _TEXT_WIDTH + r"(2048|1280)$",
    ),
    Kind("sd2", "a Stable Diffusion 2.x image model", _CONVERT, _TEXT_WIDTH + r"1024$"),
    Kind("sd1", "a Stable Diffusion 1.x image model", _CONVERT, _TEXT_WIDTH + r"768$"),
    Kind(
        "rcan",
        "an RCAN upscaler",
        "load it as the upscaler",
        r"\bbody\.0\.body\.0\.body\.3\.conv_du\.0\.weight",
    ),
    Kind("esrgan", "an ESRGAN upscaler", _UPSCALER, r"(?i)\brdb1\.conv1\."),
    Kind("hat", "a HAT upscaler", _UPSCALER, r"\blayers\.0\.residual_group\.overlap_attn\."),
    Kind("swinir", "a SwinIR upscaler", _UPSCALER, r"\blayers\.0\.residual_group\.blocks\.0\.attn\."),
    Kind("edsr", "an EDSR upscaler", _UPSCALER, r"^body\.0\.body\.0\.weight (\d+)x\1x3x3$"),
    Kind("compact", "a Real-ESRGAN Compact upscaler", _UPSCALER, r"^body\.1\.weight \d+$"),
    Kind("vae", "an autoencoder alone", _PART, r"\bdecoder\.(mid\.block_1|mid_block\.resnets\.0)\."),
    Kind("clip", "a CLIP text encoder alone", _PART, r"\btoken_embedding\.weight"),
)
UNKNOWN = Kind("unknown", "a file of unknown kind", "get a VideoFactory checkpoint", "")


def identify(shapes: Shapes) -> Kind:
    """The first of `KINDS` that keys and shapes match, else `UNKNOWN`."""
    lines = "\n".join(f"{key} {'x'.join(map(str, shape))}" for key, shape in shapes.items())
    return next((kind for kind in KINDS if re.search(kind.pattern, lines, re.MULTILINE)), UNKNOWN)


def infer_config(shapes: Shapes, metadata: Mapping[str, str]) -> tuple[ModelConfig, str]:
    """The configuration that keys and shapes tell, and a sentence that lists what they do not tell.

    What they do not tell comes from the preset whose sizes are the same, else from the nearest one. The prediction type
    comes from the marks of ComfyUI's Save Checkpoint where there are any. Raises ValueError when a part is absent.
    """
    parts = {part: {name: shapes[key] for name, key in names.items()} for part, names in keys_by_part(shapes).items()}
    absent = [f"{part} ({prefix}*)" for part, prefix in PREFIXES.items() if not parts[part]]
    if absent:
        raise ValueError(f"there is no {' and no '.join(absent)} in this file; get the whole checkpoint")
    try:
        told = {
            "unet": detect_unet(parts["unet"]),
            "autoencoder": detect_autoencoder(parts["autoencoder"]),
            "text": detect_text(parts["text_encoder"]),
        }
        config, source = _complete(told)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"its tensors do not add up to a model ({error}); get the file again") from error

    told["diffusion"] = _host_marks(shapes, metadata)
    config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, **told["diffusion"]))
    return config, f"The file does not say how it was made; {source} suggest {_assumptions(config, told)}."


def _host_marks(shapes: Shapes, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What ComfyUI's Save Checkpoint says about the prediction type."""
    if "v_pred" in shapes or metadata.get("modelspec.predict_key") == "v":
        return {"prediction_type": "v_prediction", "zero_terminal_snr": "ztsnr" in shapes}
    if metadata.get("modelspec.predict_key") == "epsilon":
        return {"prediction_type": "epsilon", "zero_terminal_snr": False}
    return {}


def _complete(told: dict[str, dict[str, Any]]) -> tuple[ModelConfig, str]:
    """A whole configuration from the settings that shapes tell, and where the others come from."""
    for name, preset in PRESETS.items():
        if all(getattr(getattr(preset, part), key) == told[part][key] for part in told for key in told[part]):
            return preset, f"its sizes, those of the preset {name},"
    unet, autoencoder, text = told["unet"], told["autoencoder"], told["text"]
    base = PRESETS["sd21" if unet["use_linear_in_transformer"] else "sd15"]
    config = dataclasses.replace(
        base,
        unet=dataclasses.replace(base.unet, **unet, **heads(unet)),
        autoencoder=dataclasses.replace(
            base.autoencoder, **autoencoder, norm_groups=math.gcd(autoencoder["channels"], 32)
        ),
        text=dataclasses.replace(
            base.text,
            **text,
            heads=max(1, text["width"] // math.gcd(text["width"], 64)),
            skip_last_layers=min(base.text.skip_last_layers, text["layers"] - 1),
        ),
    )
    return config, "sizes that no preset has"


def heads(told: Mapping[str, Any]) -> dict[str, Any]:
    """Heads and norm groups, which shapes do not tell: 1.x has eight heads, 2.x heads of 64 channels."""
    width = told["model_channels"]
    linear = told["use_linear_in_transformer"]
    return {
        "head_dim": math.gcd(width, 64) if linear else 0,
        "num_heads": 0 if linear else math.gcd(width, 8),
        "norm_groups": math.gcd(width, 32),
    }


def _assumptions(config: ModelConfig, told: dict[str, dict[str, Any]]) -> str:
    """Every setting that shapes did not tell, as `name=value`."""
    settings = []
    for part in ("unet", "autoencoder", "text", "diffusion"):
        values = dataclasses.asdict(getattr(config, part))
        settings += [f"{part}.{key}={value}" for key, value in values.items() if key not in told.get(part, {})]
    return ", ".join(
        [*settings, f"{config.frames} frames of {config.width}x{config.height} at {config.fps:g} a second"]
    )


def count(shapes: Mapping[str, Any], pattern: str) -> int:
    """How many keys `pattern.format(0)`, `pattern.format(1)` and so on there are."""
    return next(i for i in itertools.count() if pattern.format(i) not in shapes)


def detect_unet(shapes: Shapes) -> dict[str, Any]:
    """The sizes and the video parts of a U-Net in our names; LookupError when it is none."""
    model_channels = shapes["time_embed.0.weight"][1]
    # Of each level: width, depth of its transformers, number of ResBlocks, name of its last layer.
    levels: list[tuple[int, int, int, str]] = []
    width = depth = blocks = 0
    last = ""
    for n in itertools.count(1):
        block = f"input_blocks.{n}"
        if f"{block}.0.out_layers.3.weight" in shapes:
            width = shapes[f"{block}.0.out_layers.3.weight"][0]
            depth = count(shapes, block + ".1.transformer_blocks.{}.norm1.weight")
            blocks += 1
            last = f"{block}.{1 if depth else 0}"
            continue
        levels.append((width, depth, blocks, last))
        blocks = 0
        # ModelScope's files have no number there.
        if not {f"{block}.0.op.weight", f"{block}.op.weight"} & shapes.keys():
            break
    told: dict[str, Any] = {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "model_channels": model_channels,
        "channel_mult": tuple(level[0] // model_channels for level in levels),
        "num_res_blocks": levels[0][2],
        "transformer_depth": tuple(level[1] for level in levels),
        "context_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_in_transformer": len(shapes["middle_block.1.proj_in.weight"]) == 2,
        "temporal_conv": "input_blocks.1.0.temporal.convs.0.weight" in shapes,
        "temporal_attention": any(name.endswith(".temporal.proj_in.weight") for name in shapes),
        "temporal_attention_in": "input_blocks.0.1.proj_in.weight" in shapes,
    }
    if told["temporal_attention"]:
        behind_blocks = any(name.endswith(".0.temporal.proj_in.weight") for name in shapes)
        told["temporal_attention_behind"] = "blocks" if behind_blocks else "transformers"
    if told["temporal_conv"] or told["temporal_attention"]:
        told["temporal_middle"] = any(name.startswith("middle_block.") and ".temporal." in name for name in shapes)
        # Neither the middle nor the first decoder block is the end of a level, where another merge may stand.
        inside = re.compile(r"(middle_block|output_blocks\.0)\.[\d.]+\.merge\.conv\.weight")
        told["fusion"] = "fuse" if any(map(inside.fullmatch, shapes)) else "add"
    if told["temporal_conv"] and len(levels) > 1:
        told["temporal_skips"] = any(".temporal_skip." in name for name in shapes)
    # Which attention it is leaves no trace in shapes: the paper's own is assumed.
    kinds = {"to_q": "swap", "share": "mixture", "conv": "fuse"}
    ends = [end for *_, end in levels if any(name.startswith(f"{end}.temporal.") for name in shapes)]
    if ends:
        told["merge"] = next((kind for w, kind in kinds.items() if f"{ends[0]}.merge.{w}.weight" in shapes), "add")
    return told


def detect_autoencoder(shapes: Shapes) -> dict[str, Any]:
    """The sizes of an autoencoder in our names; LookupError when it is none."""
    channels, in_channels = shapes["encoder.conv_in.weight"][:2]
    levels = count(shapes, "encoder.down.{}.block.0.conv1.weight")
    return {
        "in_channels": in_channels,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "channels": channels,
        "channel_mult": tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // channels for i in range(levels)),
        "num_res_blocks": count(shapes, "encoder.down.0.block.{}.conv1.weight"),
    }


def detect_text(shapes: Shapes) -> dict[str, Any]:
    """The sizes of a CLIP text encoder in our names; LookupError when it is none."""
    vocab_size, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "width": width,
        "layers": count(shapes, "text_model.encoder.layers.{}.layer_norm1.weight"),
        "max_tokens": shapes["text_model.embeddings.position_embedding.weight"][0],
        "vocab_size": vocab_size,
    }
