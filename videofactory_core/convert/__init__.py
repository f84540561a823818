"""Public weights as VideoFactory models: Stable Diffusion, ModelScope, ZeroScope and AnimateDiff are special cases.

Nothing is trained or rounded: every tensor of the sources is found again in the result, under our names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import checkpoint
from ..checkpoint import CheckpointError, Metadata, listing
from ..config import (
    PRESETS,
    AutoencoderConfig,
    DiffusionConfig,
    ModelConfig,
    PredictionType,
    TextConfig,
    UNetConfig,
    from_dict,
)
from ..detect import PREFIXES, detect_autoencoder, detect_text, detect_unet, heads, identify
from . import animatediff, modelscope, stable_diffusion
from .conversion import Conversion, Piece
from .sources import Source, open_source, read_settings
from .stable_diffusion import Table

OPENRAIL_1, OPENRAIL_2 = "CreativeML OpenRAIL-M", "CreativeML OpenRAIL++-M"
MODELSCOPE_LICENCE, ANIMATEDIFF_LICENCE = "CC-BY-NC-4.0", "Apache-2.0"
# Where the parts of a model stand in single files; the first that is there counts.
PART_PREFIXES = {
    "unet": (PREFIXES["unet"], "diffusion_model."),
    "autoencoder": (PREFIXES["autoencoder"], "vae."),
    "text_encoder": (
        PREFIXES["text_encoder"],
        "cond_stage_model.model.",
        "cond_stage_model.clip_l.transformer.",
        "cond_stage_model.clip_h.transformer.",
        "text_encoder.",
    ),
}
PART_FOLDERS = {"unet": "unet", "autoencoder": "vae", "text_encoder": "text_encoder"}
# What only this part has, under its own names.
PART_MARKS = {
    "unet": ("input_blocks.0.0.weight", "conv_in.weight"),
    "autoencoder": ("encoder.conv_in.weight",),
    "text_encoder": (
        "text_model.embeddings.token_embedding.weight",
        # As transformers 5 writes it, and as open_clip does.
        "embeddings.token_embedding.weight",
        "token_embedding.weight",
    ),
}
OPTIONS = {"unet": "--base", "autoencoder": "--vae", "text_encoder": "--text-encoder"}
NAMES = {"unet": "U-Net", "autoencoder": "autoencoder", "text_encoder": "text encoder"}
OTHER_ARCHITECTURES = {"videocrafter", "svd", "hunyuanvideo", "flux", "sd3", "wan", "ltx", "sdxl"}


def convert(
    base: Path,
    motion: Path | None = None,
    text_encoder: Path | None = None,
    autoencoder: Path | None = None,
    *,
    temporal: bool = True,
    swap_attention: bool | None = None,
    prediction_type: PredictionType | None = None,
    frames: int = 16,
    size: tuple[int, int] | None = None,
) -> Conversion:
    """Find every tensor of a VideoFactory model in files of other programs, without reading them.

    base: an image model (Stable Diffusion 1.x, 2.x) or a video model (ModelScope, ZeroScope), one file or a folder.
    motion: an AnimateDiff motion module, or a ModelScope model whose video parts are taken; one file or a folder.
    text_encoder, autoencoder: parts that `base` lacks, or that shall take the place of its own.
    temporal: without any motion, give the network fresh temporal modules that change nothing until they are trained.
    swap_attention: end blocks with Swap-Attention, which starts at zero (None: where temporal modules are fresh).
    prediction_type: needed where nothing tells, which is so for files of Stable Diffusion 2.x.
    frames, size: what the weights were trained on, as width and height (None: what their architecture suggests).

    Raises CheckpointError, a ValueError, for files that do not fit, and ValueError for what has to be said.
    """
    sources = _parts(base)
    for part, path in (("text_encoder", text_encoder), ("autoencoder", autoencoder)):
        if path is not None:
            sources[part] = _part(part, open_source(path))
    for part, option in OPTIONS.items():
        if part not in sources:
            raise CheckpointError(f"{base} has no {NAMES[part]}: add one with {option} of videofactory convert")

    moving = sources["unet"] if motion is None else open_source(_network_in(motion))
    unet, tables, kind = _unet(base, sources["unet"], moving, motion, temporal, swap_attention)
    text, text_pieces = _text(sources["text_encoder"])
    vae, vae_pieces = _autoencoder(sources["autoencoder"])
    if text.width != unet.context_dim:
        raise CheckpointError(
            f"{base} is conditioned by text features of width {unet.context_dim}, {sources['text_encoder'].path} gives"
            f" {text.width}: choose its own text encoder"
        )
    diffusion = _diffusion(base, sources["unet"], kind, prediction_type)
    side = 256 if kind.video == "modelscope" else 768 if diffusion.prediction_type == "v_prediction" else 512
    width, height = size or (side, side)
    config = ModelConfig(unet, vae, text, diffusion, frames, width, height)
    skeleton = checkpoint.build(config, device="meta")
    positions = animatediff.positions(moving.shapes)
    pieces = {
        "unet": _find(tables, skeleton.unet.state_dict(), positions),
        "autoencoder": vae_pieces(skeleton.autoencoder.state_dict()),
        "text_encoder": text_pieces(skeleton.text_encoder.state_dict()),
    }
    for name in positions:
        try:
            animatediff.check_positions(name, moving.read(name))
        except ValueError as error:
            raise CheckpointError(f"{moving.path}: {error}") from error
    return Conversion(config, _metadata(base, sources["unet"], motion, kind), skeleton, pieces)


@dataclass(frozen=True)
class Kind:
    """What a U-Net was made of: "1.x" or "2.x", and whose video parts it has, if any."""

    family: str
    video: str


def _parts(base: Path) -> dict[str, Source]:
    """The parts of a model that a file or a folder holds."""
    if base.is_dir():
        if (base / "unet").is_dir():
            named = {part: base / name for part, name in PART_FOLDERS.items() if (base / name).is_dir()}
        elif (base / modelscope.FILES["unet"]).is_file():
            named = {part: base / name for part, name in modelscope.FILES.items() if (base / name).is_file()}
        else:
            named = {"unet": base}
        return {part: _part(part, open_source(path)) for part, path in named.items()}
    whole = open_source(base)
    _refuse(base, whole)
    found = {part: inside for part in PART_MARKS if (inside := _inside(part, whole)) is not None}
    return found if "unet" in found else {"unet": _part("unet", whole)}


def _network_in(path: Path) -> Path:
    """The U-Net of a folder that holds a whole model; anything else is a network itself."""
    names = (PART_FOLDERS["unet"], modelscope.FILES["unet"])
    return next((path / name for name in names if (path / name).exists()), path)


def _inside(part: str, source: Source) -> Source | None:
    """The part without a prefix, None when the file does not hold it."""
    for prefix in (*PART_PREFIXES[part], ""):
        if any(f"{prefix}{mark}" in source.shapes for mark in PART_MARKS[part]):
            return source.under(prefix) if prefix else source
    return None


def _part(part: str, source: Source) -> Source:
    """The part without a prefix; CheckpointError when the file holds something else."""
    found = _inside(part, source)
    if found is None:
        kind = identify(source.shapes)
        raise CheckpointError(f"{source.path} is {kind.description} and has no {NAMES[part]}: choose another file")
    return found


def _refuse(path: Path, source: Source) -> None:
    """CheckpointError for a model of another architecture, and for what is no model."""
    kind = identify(source.shapes)
    if kind.name in ("videofactory", "lora", "controlnet", "animatediff", "rcan"):
        raise CheckpointError(f"{path} is {kind.description}, not a model to start from; {kind.use}")
    if kind.name in OTHER_ARCHITECTURES:
        raise CheckpointError(
            f"{path} is {kind.description}; {kind.use}: choose Stable Diffusion 1.x or 2.x, or ModelScope"
        )


Tables = list[tuple[Source, Table]]


def _unet(
    base: Path, image: Source, moving: Source, motion: Path | None, temporal: bool, swap_attention: bool | None
) -> tuple[UNetConfig, Tables, Kind]:
    """The network's configuration, where its tensors stand, and what it was made of."""
    ldm = "input_blocks.0.0.weight" in image.shapes
    try:
        told = detect_unet(image.shapes) if ldm else stable_diffusion.detect_diffusers_unet(image.shapes)
        told = {key: told[key] for key in told if not key.startswith(("temporal", "fusion", "merge"))}
        plain = UNetConfig(**told, **heads(told))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{base} holds no U-Net of Stable Diffusion's kind ({error}); choose another") from error
    if plain.in_channels != plain.out_channels:
        raise CheckpointError(f"{base} takes {plain.in_channels} channels: choose one that is not made for inpainting")
    spatial: Table = {"": ""} if ldm else stable_diffusion.diffusers_unet(plain)
    family = "2.x" if plain.use_linear_in_transformer else "1.x"

    table: dict[str, str] = {}
    settings: dict[str, Any] = {}
    video = ""
    if animatediff.has_video_parts(moving.shapes):
        if animatediff.widths(moving.shapes) != tuple(plain.model_channels * m for m in plain.channel_mult):
            raise CheckpointError(
                f"{moving.path} is made for levels of {animatediff.widths(moving.shapes)} channels, which {base} does"
                " not have: choose a motion module for Stable Diffusion 1.5"
            )
        try:
            settings = animatediff.settings(moving.shapes)
        except ValueError as error:
            raise CheckpointError(f"{moving.path}: {error}") from error
        video, table = "animatediff", animatediff.table(plain, moving.shapes)
    elif modelscope.has_video_parts(moving.shapes):
        moving = _part("unet", moving)
        video, settings, table = "modelscope", modelscope.SETTINGS, modelscope.table(plain, moving.shapes)
    elif motion is not None:
        kind = identify(moving.shapes)
        raise CheckpointError(f"{motion} is {kind.description}, not a motion module: choose another file")
    elif not temporal:
        settings = {"temporal_conv": False, "temporal_attention": False, "fusion": "add"}
    fresh = temporal and not video
    swap = fresh if swap_attention is None else swap_attention
    config = replace(plain, **settings, merge="swap" if swap else "fuse" if fresh else "add")
    if motion is None:
        return config, [(image, {**spatial, **table})], Kind(family, video)
    if video == "modelscope":
        if family == "1.x":
            raise CheckpointError(f"{motion} was made for Stable Diffusion 2.x and {base} is 1.x: change one of them")
        # Only its video parts: the image model keeps its own.
        table = {ours: theirs for ours, theirs in table.items() if ".temporal" in ours or ours == "input_blocks.0.1"}
    return config, [(moving, table), (image, spatial)], Kind(family, video)


def _find(tables: Tables, names: Mapping[str, Tensor], known: list[str]) -> dict[str, Piece]:
    """The place of every tensor that a source has; CheckpointError for wrong shapes, for gaps and for leftovers."""
    pieces: dict[str, Piece] = {}
    for name, tensor in names.items():
        for source, table in tables:
            theirs = stable_diffusion.lookup(table, name)
            if theirs is not None:
                pieces[name] = _piece(source, theirs, tensor)
                break
    for source, _ in tables:
        used = {piece.name for piece in pieces.values() if piece.source is source}
        # A motion source may be a whole model.
        others = {name for name in source.shapes if source is not tables[-1][0] and ".motion_modules." not in name}
        left = tuple(sorted(source.shapes.keys() - used - set(known) - others))
        if left:
            raise CheckpointError(
                f"{source.path} has {listing(left)} that no part of the network takes; it is of another kind, or needs"
                " a newer version"
            )
    return pieces


def _piece(source: Source, name: str, ours: Tensor, third: int | None = None) -> Piece:
    """A piece whose tensor is there and fits."""
    shape = source.shapes.get(name)
    if shape is None:
        raise CheckpointError(f"{source.path} lacks {name}; it is damaged or a part of a model, get it again")
    if third is not None:
        shape = (shape[0] // 3, *shape[1:])
    if [n for n in shape if n != 1] != [n for n in ours.shape if n != 1]:
        raise CheckpointError(
            f"{source.path} does not fit: {name} is {list(shape)}, the network has {list(ours.shape)} there"
        )
    return Piece(source, name, tuple(ours.shape), third)


Pieces = Callable[[Mapping[str, Tensor]], dict[str, Piece]]


def _autoencoder(source: Source) -> tuple[AutoencoderConfig, Pieces]:
    ldm = "encoder.down.0.block.0.conv1.weight" in source.shapes
    try:
        detect = detect_autoencoder if ldm else stable_diffusion.detect_diffusers_autoencoder
        told = detect(source.shapes)
        config = AutoencoderConfig(**told, norm_groups=min(32, told["channels"]))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source.path} holds no autoencoder of Stable Diffusion's kind ({error})") from error
    table: Table = {"": ""} if ldm else stable_diffusion.diffusers_autoencoder(config, source.shapes)

    def pieces(names: Mapping[str, Tensor]) -> dict[str, Piece]:
        return {name: _piece(source, stable_diffusion.lookup(table, name) or name, t) for name, t in names.items()}

    return config, pieces


def _text(source: Source) -> tuple[TextConfig, Pieces]:
    """A text encoder: OpenAI's as transformers names it, or open_clip's, whose last layer 2.x does not use."""
    joined = "positional_embedding" in source.shapes
    bare = "embeddings.token_embedding.weight" in source.shapes
    try:
        if joined:
            told = stable_diffusion.detect_open_clip(source.shapes)
        else:
            told = detect_text({f"text_model.{k}": v for k, v in source.shapes.items()} if bare else source.shapes)
        settings = read_settings(source.path.parent, "config.json")
        preset = PRESETS["sd21" if joined or told["width"] == PRESETS["sd21"].text.width else "sd15"].text
        activation = settings.get("hidden_act", preset.activation)
        whole = joined or told["layers"] == preset.layers
        config = TextConfig(
            **told,
            heads=settings.get("num_attention_heads", max(1, told["width"] // 64)),
            activation=activation,
            # diffusers' folders of 2.x leave the unused layer out.
            skip_last_layers=preset.skip_last_layers if whole else 0,
        )
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source.path} holds no CLIP text encoder ({error}); choose another") from error

    def pieces(names: Mapping[str, Tensor]) -> dict[str, Piece]:
        if not joined:
            table: Table = {"text_model": "" if bare else "text_model"}
            return {name: _piece(source, stable_diffusion.lookup(table, name) or name, t) for name, t in names.items()}
        found = {name: stable_diffusion.open_clip(name) for name in names}
        return {name: _piece(source, theirs, names[name], third) for name, (theirs, third) in found.items()}

    return config, pieces


def _diffusion(base: Path, image: Source, kind: Kind, prediction_type: PredictionType | None) -> DiffusionConfig:
    settings: dict[str, Any] = read_settings(base, "scheduler", "scheduler_config.json") if base.is_dir() else {}
    names = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}
    metadata = image.metadata
    told = (
        prediction_type
        or settings.get("prediction_type")
        or metadata.get("modelspec.predict_key")
        or metadata.get("modelspec.prediction_type")
        or ("epsilon" if kind.family == "1.x" or kind.video == "modelscope" else None)
    )
    if told not in names:
        raise ValueError(
            f"{base} does not say what it predicts: set the prediction type, epsilon for 2.1-base and most fine-tunes"
            " of it, v_prediction for 2.1 at 768 pixels"
        )
    # AnimateDiff was trained with another schedule than the image model under it.
    schedule = "linear" if kind.video == "animatediff" else settings.get("beta_schedule", "scaled_linear")
    found: dict[str, Any] = {
        "beta_schedule": schedule,
        **{key: settings[key] for key in ("beta_start", "beta_end") if key in settings},
        "prediction_type": names[told],
        "zero_terminal_snr": settings.get("rescale_betas_zero_snr", False),
    }
    try:
        return from_dict(DiffusionConfig, found, ("scheduler",))
    except ValueError as error:
        raise CheckpointError(f"{base} has a noise schedule of another kind ({error}); choose another") from error


def _metadata(base: Path, image: Source, motion: Path | None, kind: Kind) -> Metadata:
    own = image.metadata.get("modelspec.license") or image.metadata.get("license")
    licences = [own or (OPENRAIL_1 if kind.family == "1.x" else OPENRAIL_2)]
    if kind.video == "modelscope":
        licences = [MODELSCOPE_LICENCE] if motion is None else [*licences, MODELSCOPE_LICENCE]
    elif kind.video == "animatediff":
        licences.append(ANIMATEDIFF_LICENCE)
    names = [path.name if path.is_dir() else path.stem for path in (base, motion) if path is not None]
    what = {"": "", "modelscope": " with ModelScope's video parts", "animatediff": " with AnimateDiff motion modules"}
    return Metadata(
        title=" with ".join(names),
        licence=" and ".join(dict.fromkeys(licences)),
        origin=f"converted from {' and '.join(names)}: Stable Diffusion {kind.family}{what[kind.video]}",
    )
