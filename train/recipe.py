"""A training run as a TOML file: what can stand in it, and how it is read."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from videofactory_core.condition import Condition
from videofactory_core.config import PRESETS, SettingError, from_dict
from videofactory_core.objective import Objective
from videofactory_core.upscaler import UpscalerConfig

from . import discriminator
from .artefacts import Artefacts
from .autoencoder import AutoencoderLoss
from .data.samples import DatasetConfig
from .degradation import Degradation
from .loop import Schedule


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every recipe says."""

    title: str
    licence: str
    # What it was made from, for those who get the result.
    origin: str
    # The file to write; the run's other files lie beside it.
    output: str
    seed: int = 0
    precision: Literal["no", "fp32", "bf16", "fp16"] = "bf16"
    # Processes that prepare data.
    workers: int = 1
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    # A project at Weights & Biases to report to; TensorBoard's files are written in any case.
    wandb: str = ""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is below 0; use 0 or more")
        if self.workers < 0:
            raise ValueError(f"workers: {self.workers} is no number of processes; use 0 or more")
        if not self.output.endswith(".safetensors"):
            raise ValueError(f"output: {self.output!r} would be a file of another kind; end it with .safetensors")


@dataclass(frozen=True)
class AutoencoderStage:
    """First stage: `frames_per_clip` frames of each clip, `schedule.batch_size` frames a step."""

    schedule: Schedule
    frames_per_clip: int = 2
    loss: AutoencoderLoss = field(default_factory=AutoencoderLoss)


@dataclass(frozen=True, kw_only=True)
class DenoiserStage(Objective):
    """One stage of the U-Net: single frames, clips with addition (the paper's stage 1), or clips with Swap-CA."""

    kind: Literal["images", "addition", "swap"]
    schedule: Schedule
    # The text encoder keeps the features that it has.
    freeze_text: bool = False
    # Single frames come from this first share of a clip.
    opening: float = 1.0
    # Clips are shortened to every n-th frame.
    frame_stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frame_stride < 1:
            raise ValueError(f"frame_stride: {self.frame_stride} is not a number of frames; use 1 or more")
        if not 0 < self.opening <= 1:
            raise ValueError(f"opening: {self.opening} is not a share of a clip; use a number above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class ModelRecipe(Recipe):
    """A whole model from random weights on drawn clips; see `train/recipes/demo.toml`."""

    preset: str
    clips: int
    autoencoder: AutoencoderStage
    stages: tuple[DenoiserStage, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in PRESETS:
            raise ValueError(f"preset: {self.preset!r} is not one of {', '.join(PRESETS)}")
        if not self.stages or self.stages[-1].kind != "swap":
            raise ValueError("stages: the last must be of kind 'swap'")


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """Second stage of an upscaler: it is also to deceive a discriminator, which learns to see through it."""

    schedule: Schedule
    # A logit for every pixel (Real-ESRGAN), or for every patch of 70 pixels.
    discriminator: discriminator.Kind = "unet"
    # Weights of the terms: how real it looks, the mean absolute error, and how alike VGG19 finds it.
    weight: float = 0.1
    l1_weight: float = 1.0
    perceptual_weight: float = 1.0
    # torchvision's VGG19, .pth or .safetensors; without it there is no perceptual loss.
    vgg: str = ""

    def __post_init__(self) -> None:
        for name in ("weight", "l1_weight", "perceptual_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is below 0; use 0 to switch the term off")


@dataclass(frozen=True)
class UpscalerValidation:
    """PSNR and SSIM on frames that are not trained on, and a sheet of them."""

    # So many clips of the datasets are held out, or those of a dataset of their own are taken, and of each one sample;
    # of drawn shapes they show what the others never do.
    clips: int = 4
    path: str = ""
    every: int = 500

    def __post_init__(self) -> None:
        if min(self.clips, self.every) < 1:
            raise ValueError("clips and every of the validation must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class UpscalerRecipe(Recipe):
    """The run that makes an upscaler; see `train/recipes/demo-x4.toml` and `rcan-x4.toml`."""

    upscaler: UpscalerConfig
    schedule: Schedule
    # The model for whose frames it is: its size and rate count where datasets name none, and its artefacts.
    checkpoint: str = ""
    # Frames from disk, with the sizes of results (by default the model's, enlarged) and buckets of one frame by
    # default; without datasets, shapes are drawn at the model's size and larger.
    datasets: tuple[DatasetConfig, ...] = ()
    # An upscaler of the same sizes to begin with; "" is random weights.
    start: str = ""
    # Side of what is learned from, in pixels before they are enlarged; and how many are cut from a sample at once.
    patch: int = 32
    patches: int = 1
    # Frames are made small as cameras and websites do, or without it by antialiased bicubic.
    degradation: Degradation | None = None
    # Behind that, what the model does to them; drawn shapes go through its autoencoder in any case.
    artefacts: Artefacts | None = None
    # It is to sharpen too.
    sharpen: bool = False
    gan: Adversary | None = None
    validation: UpscalerValidation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.checkpoint and (self.artefacts or not self.datasets):
            what = "artefacts are those of a model" if self.artefacts else "shapes are drawn in the size of a model"
            raise ValueError(f"checkpoint: {what}, and the recipe names none; add one, or name datasets alone")
        if not self.checkpoint and not all(dataset.sizes for dataset in self.datasets):
            raise ValueError("datasets: without a checkpoint each needs sizes, such as [[1376, 768]]")
        for name in ("patch", "patches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is too few; use 1 or more")
        for schedule in (self.schedule, *((self.gan.schedule,) if self.gan else ())):
            if schedule.batch_size % self.patches_of(schedule):
                raise ValueError(f"patches: {self.patches} do not divide a batch of {schedule.batch_size}")
        if self.gan:
            step, least = (of[self.gan.discriminator] for of in (discriminator.STEP, discriminator.LEAST))
            side = self.patch * self.upscaler.scale
            if side % step or side < least:
                raise ValueError(
                    f"patch: the discriminator sees {side} pixels and needs {least} or more, in steps of {step}; use"
                    f" {max(least, -(-side // step) * step) // self.upscaler.scale}"
                )

    def patches_of(self, schedule: Schedule) -> int:
        """How many patches a stage cuts from a sample: no more than a batch has."""
        return min(self.patches, schedule.batch_size)


@dataclass(frozen=True)
class Layers:
    """Which linear layers of the U-Net a LoRA changes, by a regular expression over their names, and how much."""

    layers: str
    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: {self.rank} changes nothing; use 1 or more, such as 16")


@dataclass(frozen=True)
class Samples:
    """Clips of fixed prompts and seeds that show how far the training is."""

    prompts: tuple[str, ...]
    # They are made before the first step, every so many steps, and at the end.
    every: int = 250
    negative_prompt: str = ""
    steps: int = 25
    guidance_scale: float = 7.5
    sampler: str = "ddim"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or self.every < 1:
            raise ValueError("prompts: name one or more, and every so many steps (1 or more) they are sampled")


@dataclass(frozen=True)
class Validation:
    """Loss on clips that are not trained on, at fixed noise levels with fixed noise."""

    # So many clips of the datasets are held out, or those of a dataset of their own are taken.
    clips: int = 1
    path: str = ""
    every: int = 100
    quantiles: int = 4

    def __post_init__(self) -> None:
        if min(self.clips, self.every, self.quantiles) < 1:
            raise ValueError("clips, every and quantiles of the validation must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class TuningRecipe(Recipe):
    """What recipes have in common that start from a model of ours."""

    # A model file of ours: converted public weights, an earlier result, or the demo.
    checkpoint: str
    datasets: tuple[DatasetConfig, ...] = ()
    # Instead of datasets, so many drawn clips; with `returns` their shapes turn back halfway.
    clips: int = 0
    returns: bool = False
    # Latents and text features are calculated once and kept here; "" is a folder beside the output.
    cache_directory: str = ""
    # Without the cache every step decodes and encodes its clips: for data too large for the disk.
    cache_latents: bool = True
    # Recompute activations in the backward pass: less than half the memory, a third more time.
    gradient_checkpointing: bool = False
    samples: Samples | None = None
    validation: Validation | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clips < 0 or bool(self.datasets) == bool(self.clips):
            raise ValueError("datasets: name one or more folders of clips, or set clips to train on drawn shapes")


@dataclass(frozen=True, kw_only=True)
class AdapterRecipe(TuningRecipe, Objective):
    """The run that makes a LoRA; see `train/recipes/lora-12gb.toml`."""

    adapter: Layers
    schedule: Schedule

    def __post_init__(self) -> None:
        TuningRecipe.__post_init__(self)
        Objective.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Every second batch is cut out of longer drawn clips, in which shapes go as far and so are slower.

    By turns it has the model's frames or twice as many, and by turns every n-th of them for each n of `strides`.
    """

    condition: Condition
    clips: int
    # How long they are.
    frames: int = 64
    strides: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        for name in ("clips", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} are none; use 1 or more")
        if not self.strides or min(self.strides) < 1:
            raise ValueError(f"strides: {list(self.strides)} are none; use numbers from 1 on")


@dataclass(frozen=True, kw_only=True)
class TuningStage(Objective):
    """One stage of training weights themselves: with Swap-CA skipped (the paper's stage 1), or on (stages 2 and 3)."""

    schedule: Schedule
    # Only where clips are drawn.
    windows: Windows | None = None
    kind: Literal["addition", "swap"] = "swap"
    # Weights of the U-Net that train, by a regular expression over their names; "" is all.
    layers: str = ""
    # Other data than the recipe's, such as the better part of it.
    datasets: tuple[DatasetConfig, ...] = ()

    @property
    def gives_frames(self) -> bool:
        return super().gives_frames or (self.windows is not None and self.windows.condition.gives_frames)


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(TuningRecipe):
    """The run that trains the weights of a model further; see `train/recipes/full-24gb.toml`."""

    stages: tuple[TuningStage, ...]
    # Of the numbers in the file that is written.
    output_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise ValueError("stages: name one or more")
        if any(stage.windows and (stage.datasets or self.datasets) for stage in self.stages):
            raise ValueError("stages: windows are those of drawn clips; leave them out where there are datasets")


# Which kind of recipe a file is, by what only that kind has, in this order.
KINDS: dict[str, type[Recipe]] = {
    "upscaler": UpscalerRecipe,
    "adapter": AdapterRecipe,
    "checkpoint": FinetuneRecipe,
}


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe, with `changes` such as "schedule.steps=500" to what is in the file.

    ValueError with file, line and one sentence when it cannot be used.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    if not path.is_file():
        raise ValueError(f"there is no recipe {path}; name a .toml file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        data: dict[str, Any] = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    for change in changes:
        _change(data, change, tomllib.loads)
    kind = next((KINDS[key] for key in KINDS if key in data), ModelRecipe)
    try:
        return from_dict(kind, data)
    except SettingError as error:
        where = ".".join(str(key) for key in error.keys if isinstance(key, str))
        raise ValueError(f"{path}, line {line_of(text, error.keys)}: {where}: {error.problem}") from error


def _change(data: dict[str, Any], change: str, parse: Callable[[str], dict[str, Any]]) -> None:
    """Carry out `key.key=value`; of several tables `key.1.key` is the second, and without a number all are meant."""
    keys, sign, text = change.partition("=")
    if not sign or not all(part.strip() for part in keys.split(".")):
        raise ValueError(f"--set {change!r} changes nothing; write it as schedule.steps=500")
    try:
        value = parse(f"value = {text}")["value"]
    except ValueError:
        # Text needs no quotes here.
        value = text
    *tables, last = (part.strip() for part in keys.split("."))
    places: list[Any] = [data]
    for name in tables:
        if name.isdigit():
            places = [place[int(name)] for place in places if isinstance(place, list) and int(name) < len(place)]
        else:
            # Datasets are a list, of which a recipe that has none gets its first.
            places = [place.setdefault(name, [{}] if name == "datasets" else {}) for place in _tables(places)]
    found = _tables(places)
    for place in found:
        place[last] = value
    if not found:
        raise ValueError(f"--set {change!r} leads nowhere: the recipe has no such table")


def _tables(places: Sequence[Any]) -> list[dict[str, Any]]:
    """The tables among `places`, and those in lists of them."""
    flat = [part for place in places for part in (place if isinstance(place, list) else [place])]
    return [place for place in flat if isinstance(place, dict)]


HEADER = re.compile(r"\s*\[\[?\s*([^\]]+?)\s*\]\]?\s*(?:#.*)?")
KEY = re.compile(r"\s*([\w.\-\"']+)\s*=")


def line_of(text: str, keys: tuple[str | int, ...]) -> int:
    """The line of a TOML file where what `keys` lead to is set, or else the nearest table above it, or 1."""
    counts: Counter[tuple[str | int, ...]] = Counter()
    table: tuple[str | int, ...] = ()
    nearest, length = 1, 0
    for number, line in enumerate(text.splitlines(), 1):
        if header := HEADER.fullmatch(line):
            names = _names(header[1])
            table = ()
            for i, name in enumerate(names):
                table = (*table, name)
                if line.lstrip().startswith("[[") and i == len(names) - 1:
                    counts[table] += 1
                if counts[table]:
                    table = (*table, counts[table] - 1)
            here = table
        elif key := KEY.match(line):
            here = (*table, *_names(key[1]))
        else:
            continue
        if len(here) > length and keys[: len(here)] == here:
            nearest, length = number, len(here)
    return nearest


def _names(dotted: str) -> tuple[str, ...]:
    return tuple(name.strip().strip("\"'") for name in dotted.split("."))


PATHS = {"output", "checkpoint", "path", "cache_directory", "start", "vgg"}


def describe(recipe: Recipe) -> str:
    """The whole recipe as JSON, for a result's metadata; of paths the last part, since folders tell whose they are."""

    def shorten(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: shorten(item, name) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [shorten(item, key) for item in value]
        return Path(value).name if key in PATHS and value else value

    return json.dumps(shorten(dataclasses.asdict(recipe)), ensure_ascii=False)
