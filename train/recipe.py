"""A training run as a TOML file: read, check, build, train, save."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from videofactory_core import adapters, checkpoint, upscaler
from videofactory_core.config import PRESETS, ModelConfig, from_dict
from videofactory_core.diffusion import Schedule as NoiseSchedule
from videofactory_core.text import TextEncoder, Tokenizer, pad_token
from videofactory_core.unet.model import VideoUNet
from videofactory_core.upscaler import UpscalerConfig

from . import autoencoder as autoencoder_training
from . import denoiser as denoiser_training
from . import upscaler as upscaler_training
from .data.moving_shapes import MovingShapes
from .loop import Schedule, train


@dataclass(frozen=True)
class AutoencoderStage:
    """First stage: `frames_per_clip` frames of each clip, `schedule.batch_size` frames a step."""

    schedule: Schedule
    frames_per_clip: int = 2
    loss: autoencoder_training.AutoencoderLoss = field(default_factory=autoencoder_training.AutoencoderLoss)


@dataclass(frozen=True)
class DenoiserStage:
    """One stage of the U-Net: single frames, clips with addition (the paper's stage 1), or clips with Swap-CA."""

    kind: Literal["images", "addition", "swap"]
    schedule: Schedule
    caption_dropout: float = 0.1
    timestep_shift: float = 1.0
    # The part of the noise schedule that is trained, as shares of it.
    timestep_range: tuple[float, float] = (0.0, 1.0)
    # The text encoder keeps the features that it has.
    freeze_text: bool = False
    # Single frames come from this first share of a clip.
    opening: float = 1.0
    # Clips are shortened to every n-th frame.
    frame_stride: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.timestep_range[0] < self.timestep_range[1] <= 1:
            raise ValueError(f"timestep_range: {list(self.timestep_range)} is no range of shares; use [0.0, 1.0]")
        if self.frame_stride < 1:
            raise ValueError(f"frame_stride: {self.frame_stride} is not a number of frames; use 1 or more")
        if not 0 < self.opening <= 1:
            raise ValueError(f"opening: {self.opening} is not a share of a clip; use a number above 0 and at most 1")


@dataclass(frozen=True)
class Recipe:
    """A whole run; see `train/recipes/demo.toml` for the meaning of every key."""

    title: str
    licence: str
    origin: str
    preset: str
    output: str
    clips: int
    autoencoder: AutoencoderStage
    stages: tuple[DenoiserStage, ...]
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    workers: int = 1


@dataclass(frozen=True)
class UpscalerRecipe:
    """The run that makes an upscaler; see `train/recipes/demo-x4.toml`."""

    title: str
    licence: str
    origin: str
    output: str
    checkpoint: str
    upscaler: UpscalerConfig
    schedule: Schedule
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    workers: int = 1
    patch: int = 32


@dataclass(frozen=True)
class Layers:
    """Which linear layers of the U-Net a LoRA changes, by a regular expression over their names, and how much."""

    layers: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class AdapterRecipe:
    """The run that makes a LoRA; see `train/recipes/demo-boomerang.toml`."""

    title: str
    licence: str
    origin: str
    output: str
    checkpoint: str
    clips: int
    adapter: Layers
    schedule: Schedule
    caption_dropout: float = 0.1
    timestep_shift: float = 1.0
    # The drawn shapes turn back halfway.
    returns: bool = False
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    workers: int = 1


def read_recipe(path: Path) -> Recipe | UpscalerRecipe | AdapterRecipe:
    """Read and check a recipe; ValueError or OSError with one sentence when it cannot be used."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    if not path.is_file():
        raise ValueError(f"there is no recipe {path}; name a .toml file")
    try:
        data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    kinds: dict[str, type[UpscalerRecipe | AdapterRecipe]] = {"upscaler": UpscalerRecipe, "adapter": AdapterRecipe}
    kind: type[Recipe | UpscalerRecipe | AdapterRecipe] = next((kinds[key] for key in kinds if key in data), Recipe)
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    missing = needed - set(data)
    if missing:
        raise ValueError(f"{path} lacks the setting {sorted(missing)[0]!r}")
    recipe = from_dict(kind, data, path.name)
    if isinstance(recipe, Recipe) and recipe.preset not in PRESETS:
        raise ValueError(f"{path}: preset {recipe.preset!r} is not one of {', '.join(PRESETS)}")
    if isinstance(recipe, Recipe) and (not recipe.stages or recipe.stages[-1].kind != "swap"):
        raise ValueError(f"{path}: the last of the stages must be of kind 'swap'")
    return recipe


class Folder:
    """Where a run works: every finished stage is a file there, and a second start goes on behind it."""

    def __init__(self, folder: Path, precision: str) -> None:
        self.folder = folder
        self.accelerator = Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())
        folder.mkdir(parents=True, exist_ok=True)

    def log(self, line: str) -> None:
        """Print a line and keep it in the run's log."""
        print(line, flush=True)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def restore(self, name: str, module: nn.Module) -> bool:
        """Load a finished stage into `module`, if there is one."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return False
        with safe_open(path, "pt") as file:
            module.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        self.log(f"{name}: found {path.name}, going on behind it")
        return True

    def keep(self, name: str, tensors: dict[str, torch.Tensor], losses: list[float]) -> None:
        """Write a finished stage."""
        path = self.folder / f"{name}.safetensors"
        temporary = path.with_suffix(".tmp")
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary)
        temporary.replace(path)
        (self.folder / f"{name}.losses.json").write_text(json.dumps(losses), encoding="utf-8")
        self.state_path(name).unlink(missing_ok=True)

    def state_path(self, name: str) -> Path:
        """Where a stage under way keeps its state."""
        return self.folder / f"{name}.state.safetensors"

    def train(
        self,
        name: str,
        module: nn.Module,
        batches: Callable[[int], Iterator[Any]],
        loss: Callable[[Any], torch.Tensor],
        schedule: Schedule,
        seed: int,
    ) -> None:
        """Train `module` and keep it, or restore it when an earlier start has finished this stage."""
        if self.restore(name, module):
            return
        losses = train(
            module,
            batches,
            loss,
            schedule,
            self.accelerator,
            lambda line: self.log(f"{name}  {line}"),
            seed=seed,
            state_path=self.state_path(name),
        )
        self.keep(name, module.state_dict(), losses)


class Run(Folder):
    """A recipe for a whole model at work."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(Path(recipe.output).parent, recipe.precision)
        self.recipe = recipe
        self.config: ModelConfig = PRESETS[recipe.preset]

    def clips(self, num_clips: int, num_frames: int, seed: int) -> MovingShapes:
        return MovingShapes(num_clips, num_frames, self.config.height, self.config.width, seed)

    def frames(self, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What the autoencoder is trained on, from batch `first` on."""
        stage = self.recipe.autoencoder
        clips = self.clips(1 << 30, stage.frames_per_clip, self.recipe.seed + 1)
        return autoencoder_training.frame_batches(
            clips, stage.schedule.batch_size, stage.frames_per_clip, self.recipe.workers, first
        )

    def train_autoencoder(self) -> autoencoder_training.Autoencoder:
        """The autoencoder, trained or restored, with the latent scale measured from it in `self.config`."""
        stage = self.recipe.autoencoder
        model = autoencoder_training.Autoencoder(self.config.autoencoder).to(self.accelerator.device)
        device = self.accelerator.device
        self.train(
            "autoencoder",
            model,
            self.frames,
            lambda batch: stage.loss(model, batch[0].to(device), batch[1].to(device)),
            stage.schedule,
            self.recipe.seed,
        )
        model.eval()
        scale = round(autoencoder_training.measure_scale(model, self.frames(0), self.accelerator), 4)
        self.config = replace(self.config, autoencoder=replace(self.config.autoencoder, scale_factor=scale))
        model.config = self.config.autoencoder
        self.log(f"latent scale {scale}")
        return model

    def preview_colours(self, autoencoder: autoencoder_training.Autoencoder) -> str:
        """The colours of latents, as a checkpoint's metadata hold them."""
        return json.dumps(autoencoder_training.preview_colours(autoencoder, self.frames(0), self.accelerator))

    def latents(self, autoencoder: autoencoder_training.Autoencoder) -> denoiser_training.Latents:
        """The recipe's clips in latent space, from the run's folder when they are there."""
        path = self.folder / "latents.safetensors"
        if path.is_file():
            with safe_open(path, "pt") as file:
                return denoiser_training.Latents(file.get_tensor("latents"), file.get_tensor("tokens"))
        clips = self.clips(self.recipe.clips, self.config.frames, self.recipe.seed)
        data = denoiser_training.encode_clips(autoencoder, clips, self.config, self.recipe.workers, self.accelerator)
        self.keep("latents", {"latents": data.latents, "tokens": data.tokens}, [])
        return data

    def train_denoiser(self, data: denoiser_training.Latents) -> denoiser_training.Denoiser:
        """All stages of the U-Net, each starting from the one before; what is new in a stage starts as the identity."""
        schedule = NoiseSchedule.from_config(self.config.diffusion)
        empty = Tokenizer(pad_token(self.config.text), self.config.text.max_tokens)("")
        full = self.config.unet
        kinds = {
            "images": denoiser_training.spatial_only(full),
            "addition": replace(full, merge="add"),
            "swap": full,
        }
        before: denoiser_training.Denoiser | None = None
        for number, stage in enumerate(self.recipe.stages):
            name = f"{number + 1}-{stage.kind}"
            torch.manual_seed(self.recipe.seed + 10 * (number + 1))
            model = denoiser_training.Denoiser(VideoUNet(kinds[stage.kind]), TextEncoder(self.config.text))
            if before is not None:
                unknown = model.load_state_dict(before.state_dict(), strict=False).unexpected_keys
                if unknown:
                    raise ValueError(f"stage {name} cannot follow the one before it: it lacks {unknown[0]!r}")
            model.to(self.accelerator.device)
            model.text_encoder.requires_grad_(not stage.freeze_text)
            self.train(
                name,
                model,
                partial(
                    denoiser_training.latent_batches,
                    data,
                    stage.schedule.batch_size,
                    max(1, round(stage.opening * data.latents.shape[2])) if stage.kind == "images" else None,
                    stage.frame_stride,
                    self.recipe.seed + 1000 + number,
                ),
                partial(
                    model.loss,
                    schedule=schedule,
                    caption_dropout=stage.caption_dropout,
                    timestep_shift=stage.timestep_shift,
                    timestep_range=stage.timestep_range,
                    empty=empty,
                ),
                stage.schedule,
                self.recipe.seed + number,
            )
            before = model
        assert before is not None
        return before


def run_recipe(path: Path) -> Path:
    """Train what the recipe says and write one file; returns its path.

    Raises ValueError for a recipe that cannot be used.
    """
    recipe = read_recipe(path)
    torch.manual_seed(recipe.seed)
    if isinstance(recipe, UpscalerRecipe):
        return train_upscaler(recipe)
    return train_adapter(recipe) if isinstance(recipe, AdapterRecipe) else train_model(recipe)


def train_model(recipe: Recipe) -> Path:
    """A whole model: autoencoder, then text encoder and U-Net together."""
    output = Path(recipe.output)
    run = Run(recipe)
    autoencoder = run.train_autoencoder()
    denoiser = run.train_denoiser(run.latents(autoencoder))
    model = checkpoint.Model(
        config=run.config,
        unet=denoiser.unet,
        autoencoder=autoencoder,
        text_encoder=denoiser.text_encoder,
        metadata=checkpoint.Metadata(
            title=recipe.title,
            licence=recipe.licence,
            origin=recipe.origin,
            other={checkpoint.PREVIEW: run.preview_colours(autoencoder)},
        ),
    )
    checkpoint.save(output, model, model.metadata, dtype=torch.float16)
    run.log(f"wrote {output}")
    return output


def train_upscaler(recipe: UpscalerRecipe) -> Path:
    """An upscaler for the frames of one model."""
    output = Path(recipe.output)
    source = checkpoint.load(recipe.checkpoint)
    config = source.config
    run = Folder(output.parent, recipe.precision)
    model = upscaler.Upscaler(recipe.upscaler).to(run.accelerator.device)
    clips = MovingShapes(1 << 30, config.frames, config.height, config.width, recipe.seed + 2)
    pairs = upscaler_training.ScenePairs(clips, recipe.upscaler.scale)
    run.train(
        "upscaler",
        model,
        partial(
            upscaler_training.patch_batches,
            pairs,
            source.autoencoder,
            recipe.schedule.batch_size,
            recipe.patch,
            recipe.workers,
            recipe.seed,
        ),
        partial(upscaler_training.loss, model),
        recipe.schedule,
        recipe.seed,
    )
    upscaler.save(output, model, recipe.title, recipe.licence, recipe.origin)
    run.log(f"wrote {output}")
    return output


def train_adapter(recipe: AdapterRecipe) -> Path:
    """A LoRA on the U-Net of a whole model, whose own weights stay as they are."""
    output = Path(recipe.output)
    model = checkpoint.load(recipe.checkpoint)
    config = model.config
    run = Folder(output.parent, recipe.precision)
    model.to(run.accelerator.device)
    denoiser = denoiser_training.Denoiser(model.unet, model.text_encoder).requires_grad_(False)
    adapter = adapters.Adapter(model.unet, recipe.adapter.layers, recipe.adapter.rank, recipe.adapter.alpha)
    adapter.to(run.accelerator.device)
    clips = MovingShapes(
        recipe.clips, config.frames, config.height, config.width, recipe.seed + 3, returns=recipe.returns
    )

    def batches(first: int) -> Iterator[denoiser_training.Latents]:
        data = denoiser_training.encode_clips(model.autoencoder, clips, config, recipe.workers, run.accelerator)
        return denoiser_training.latent_batches(data, recipe.schedule.batch_size, None, 1, recipe.seed, first)

    run.train(
        "adapter",
        adapter,
        batches,
        partial(
            denoiser.loss,
            schedule=NoiseSchedule.from_config(config.diffusion),
            caption_dropout=recipe.caption_dropout,
            timestep_shift=recipe.timestep_shift,
            timestep_range=(0.0, 1.0),
            empty=Tokenizer(pad_token(config.text), config.text.max_tokens)(""),
        ),
        recipe.schedule,
        recipe.seed,
    )
    adapters.save(output, adapter, recipe.title, recipe.licence, recipe.origin)
    run.log(f"wrote {output}")
    return output
