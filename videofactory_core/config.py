"""What a model is: one frozen dataclass per part, presets, and the way to and from checkpoint metadata."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Merge = Literal["swap", "add", "fuse", "window_self", "mixture", "sparse_causal"]
Query = Literal["swapped", "spatial", "temporal"]
NormScope = Literal["clip", "frame"]
PositionPlace = Literal["attention", "input"]
TemporalPlace = Literal["transformers", "blocks"]
PredictionType = Literal["epsilon", "v_prediction"]
BetaSchedule = Literal["scaled_linear", "linear"]

# A size read from a file must not make us allocate the machine's whole memory before we notice.
MAX_DIMENSION = 1 << 17


# Counts that may be zero, where zero means that the thing is absent.
MAY_BE_ZERO = {
    "head_dim",
    "num_heads",
    "temporal_heads",
    "temporal_positions",
    "transformer_depth",
    "skip_last_layers",
    "chunk_frames",
}


def _check_sizes(config: Any) -> None:
    """Every integer of a configuration is a count, so it is bounded; no list of them is empty."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value == ():
            raise ValueError(f"{f.name}: the list is empty")
        least = 0 if f.name in MAY_BE_ZERO else 1
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not 0 < number < 1e6:
                raise ValueError(f"{f.name}: {number} is out of range")
            if isinstance(number, int) and not isinstance(number, bool) and not least <= number <= MAX_DIMENSION:
                raise ValueError(f"{f.name}: {number} is out of range ({least} to {MAX_DIMENSION})")


@dataclass(frozen=True)
class UNetConfig:
    """The video U-Net: Stable Diffusion's U-Net per frame, with temporal modules and merges in between."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    # One entry a level: how many transformer blocks stand behind each of its ResBlocks; 0 is no attention.
    transformer_depth: tuple[int, ...] = (1, 1, 1, 0)
    context_dim: int = 1024
    # Channels of one attention head; 0 means a fixed number of heads instead.
    head_dim: int = 64
    num_heads: int = 0
    # Linear (SD 2.x) or 1x1 convolution (SD 1.x) around the spatial transformer; same numbers, other weight shape.
    use_linear_in_transformer: bool = True
    norm_groups: int = 32

    temporal_conv: bool = True
    temporal_attention: bool = True
    # A temporal transformer behind the very first convolution, as in ModelScope.
    temporal_attention_in: bool = False
    # Temporal transformers stand behind the spatial ones; in AnimateDiff also behind ResBlocks that have none behind.
    temporal_attention_behind: TemporalPlace = "transformers"
    # Whether there are temporal modules in the middle; AnimateDiff's versions 1 and 3 have none there.
    temporal_middle: bool = True
    # Heads of the temporal transformers; 0 is as many as the spatial ones have.
    temporal_heads: int = 0
    # Longest clip with sinusoidal frame positions in the temporal transformers; 0 is none.
    temporal_positions: int = 0
    # Added for each attention (AnimateDiff), or once to what enters: then the feed-forward sees the time too, without
    # which directions of motion are learned late.
    position_place: PositionPlace = "attention"
    # What the temporal transformer's first GroupNorm averages over.
    temporal_norm: NormScope = "clip"
    temporal_skips: bool = True
    # Inside a block: learned 1x1x1 fusion of [s, t], or plain s + t.
    fusion: Literal["fuse", "add"] = "fuse"
    # At the end of each encoder and decoder block (eq. 3, Table 3).
    merge: Merge = "swap"
    # Frames, height, width of a Swap-CA window; None is the global variant of Table 2.
    swap_window: tuple[int, int, int] | None = (8, 3, 6)
    swap_query: Query = "swapped"

    def __post_init__(self) -> None:
        _check_sizes(self)
        if len(self.transformer_depth) != len(self.channel_mult):
            raise ValueError("transformer_depth and channel_mult need one entry a level each")
        if (self.head_dim > 0) == (self.num_heads > 0):
            raise ValueError("set either head_dim or num_heads, and the other to 0")
        if self.model_channels % self.norm_groups:
            raise ValueError("model_channels must be a multiple of norm_groups")
        for channels in (self.model_channels * m for m in self.channel_mult):
            for heads in (self.heads(channels), self.temporal_heads or 1):
                if channels % heads:
                    raise ValueError(f"{channels} channels do not divide into {heads} attention heads")
        if self.temporal_conv and self.temporal_attention_behind == "blocks":
            raise ValueError("behind a ResBlock stands a temporal convolution or temporal attention, not both")

    @property
    def positions(self) -> PositionPlace | None:
        """Where frame positions enter the temporal transformers, None where they do not."""
        return self.position_place if self.temporal_positions else None

    def heads(self, channels: int) -> int:
        """Number of attention heads in a layer of `channels`."""
        return self.num_heads or max(1, channels // self.head_dim)


@dataclass(frozen=True)
class AutoencoderConfig:
    """The KL autoencoder of latent diffusion; `channels` times `channel_mult` are the widths down to the latent."""

    in_channels: int = 3
    latent_channels: int = 4
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    # Latents are multiplied by this before diffusion, so that their standard deviation is near 1.
    scale_factor: float = 0.18215

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.channels % self.norm_groups:
            raise ValueError("channels must be a multiple of norm_groups")

    @property
    def downscale(self) -> int:
        """Pixels a latent cell covers along each axis."""
        return 1 << (len(self.channel_mult) - 1)


CLIP_VOCABULARY = 49408


@dataclass(frozen=True)
class TextConfig:
    """A CLIP text transformer."""

    width: int = 1024
    layers: int = 24
    heads: int = 16
    max_tokens: int = 77
    vocab_size: int = CLIP_VOCABULARY
    activation: Literal["quick_gelu", "gelu"] = "gelu"
    # Which hidden state conditions the U-Net: 0 the last layer's, 1 the one before it; the final norm always follows.
    skip_last_layers: int = 1

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} attention heads")
        if self.skip_last_layers >= self.layers:
            raise ValueError("skip_last_layers must leave at least one layer")
        if self.max_tokens < 3:
            raise ValueError(f"max_tokens {self.max_tokens} has no room for a word between the start and end tokens")
        if self.vocab_size < CLIP_VOCABULARY:
            raise ValueError(f"vocab_size {self.vocab_size} is below the {CLIP_VOCABULARY} tokens of CLIP's vocabulary")


@dataclass(frozen=True)
class DiffusionConfig:
    """Noise schedule and what the U-Net predicts."""

    num_timesteps: int = 1000
    beta_schedule: BetaSchedule = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction_type: PredictionType = "epsilon"
    # Rescales the betas so that the last step is pure noise; without it the mean of a picture leaks through.
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError("betas must satisfy 0 < beta_start <= beta_end < 1")


@dataclass(frozen=True)
class ModelConfig:
    """A whole model and the clips that it was trained on (`frames` at `width` x `height` pixels, `fps` a second)."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    frames: int = 16
    width: int = 344
    height: int = 192
    fps: float = 8.0
    # It has learned what frames at noise level 0 are: conditions, see `condition.py`.
    given_frames: bool = False
    # Long clips are made of chunks of so many frames, where it has learned longer clips too; 0 is `frames`.
    chunk_frames: int = 0

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.unet.context_dim != self.text.width:
            raise ValueError(
                f"the U-Net expects text features of width {self.unet.context_dim}, the encoder gives {self.text.width}"
            )
        if 0 < self.chunk_frames < self.frames:
            raise ValueError(f"chunk_frames {self.chunk_frames} are fewer than the {self.frames} frames of a clip")

    @property
    def chunk(self) -> int:
        """Frames of a chunk of long clips."""
        return self.chunk_frames or self.frames

    def knows(self, frames: int, width: int, height: int) -> bool:
        """Whether it was trained on clips of this length and size."""
        return self.frames <= frames <= self.chunk and (width, height) == (self.width, self.height)


PRESETS: dict[str, ModelConfig] = {
    # Stable Diffusion 2.1's sizes with everything of the paper: 1.601 G in the U-Net.
    "sd21": ModelConfig(),
    # Stable Diffusion 1.5's sizes: eight heads, convolutions around the transformer, CLIP ViT-L/14.
    "sd15": ModelConfig(
        unet=UNetConfig(context_dim=768, head_dim=0, num_heads=8, use_linear_in_transformer=False),
        text=TextConfig(width=768, layers=12, heads=12, activation="quick_gelu", skip_last_layers=0),
    ),
    # The small model that is trained by `train/recipes/demo.toml` and shipped with the package.
    "demo": ModelConfig(
        unet=UNetConfig(
            model_channels=32,
            channel_mult=(1, 2, 4),
            num_res_blocks=1,
            transformer_depth=(1, 1, 1),
            context_dim=48,
            head_dim=32,
            norm_groups=8,
            temporal_positions=32,
            position_place="input",
            swap_window=(8, 3, 4),
        ),
        autoencoder=AutoencoderConfig(channels=32, channel_mult=(1, 2, 2, 2), num_res_blocks=1, norm_groups=8),
        text=TextConfig(width=48, layers=2, heads=2, activation="quick_gelu", skip_last_layers=0),
        diffusion=DiffusionConfig(prediction_type="v_prediction", zero_terminal_snr=True),
        width=128,
        height=72,
    ),
    # The smallest model with every part, for tests.
    "debug": ModelConfig(
        unet=UNetConfig(
            model_channels=8,
            channel_mult=(1, 2),
            num_res_blocks=1,
            transformer_depth=(1, 1),
            context_dim=16,
            head_dim=8,
            norm_groups=4,
            temporal_positions=32,
            swap_window=(2, 2, 3),
        ),
        autoencoder=AutoencoderConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4),
        text=TextConfig(width=16, layers=1, heads=2, activation="quick_gelu", skip_last_layers=0),
        diffusion=DiffusionConfig(prediction_type="v_prediction"),
        frames=4,
        width=16,
        height=8,
    ),
}


def to_json(config: ModelConfig) -> str:
    """The whole configuration as one line of JSON, for a checkpoint's metadata."""
    return json.dumps(dataclasses.asdict(config), separators=(",", ":"))


def from_json(text: str) -> ModelConfig:
    """Read what `to_json` wrote; the text is untrusted.

    Unknown keys, wrong types and sizes out of bounds raise ValueError before anything is allocated.
    """
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError("the model configuration is not valid JSON") from error
    return from_dict(ModelConfig, data)


T = TypeVar("T")


class SettingError(ValueError):
    """A setting that cannot be used: `keys` lead to it from the top, numbers into lists."""

    def __init__(self, keys: tuple[str | int, ...], problem: str) -> None:
        self.keys = keys
        self.problem = problem
        super().__init__(f"{'.'.join(map(str, keys))}: {problem}")


def from_dict(kind: type[T], data: Any, keys: tuple[str | int, ...] = ()) -> T:
    """Build the dataclass `kind` from plain data, found under `keys`; settings that are absent keep their defaults.

    Raises SettingError for anything that does not fit.
    """
    if not isinstance(data, dict):
        raise SettingError(keys or (kind.__name__,), f"expected a table of settings, got {type(data).__name__}")
    hints = get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name in data:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(sorted(known))}"
            raise SettingError((*keys, name), f"unknown setting {name!r}; {meant}")
    values = {name: _fit(value, hints[name], (*keys, name)) for name, value in data.items()}
    for name, f in known.items():
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise SettingError(keys or (kind.__name__,), f"the setting {name!r} is missing")
    try:
        return kind(**values)
    except SettingError:
        raise
    except ValueError as error:
        # What a dataclass finds wrong begins with the name of the field.
        name, _, problem = str(error).partition(": ")
        if name in known and problem:
            raise SettingError((*keys, name), problem) from error
        raise SettingError(keys or (kind.__name__,), str(error)) from error


def _fit(value: Any, hint: Any, keys: tuple[str | int, ...]) -> Any:
    """`value` as the type `hint`, or SettingError."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, keys)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value in args and type(value) is type(args[0]):
            return value
        raise SettingError(keys, f"{value!r} is not one of {', '.join(map(str, args))}")
    if type(None) in args:
        inner = next(a for a in args if a is not type(None))
        return None if value is None else _fit(value, inner, keys)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) > 64:
            raise SettingError(keys, f"expected a short list, got {value!r:.40}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise SettingError(keys, f"expected {len(args)} values, got {len(value)}")
        return tuple(_fit(v, args[0], (*keys, i)) for i, v in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise SettingError(keys, f"expected {getattr(hint, '__name__', hint)}, got {value!r:.40}")
    return value
