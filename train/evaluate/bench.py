"""What the runs of a comparison share: their budget, their folder, the model that they begin with, and their clips."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

from videofactory_core import checkpoint
from videofactory_core.atomic import replacing, write_text
from videofactory_core.objective import Objective
from videofactory_core.text import Tokenizer, pad_token
from videofactory_core.video import write_video

from ..data.batches import Batch
from ..data.moving_shapes import HELD_OUT, MovingShapes, caption
from ..data.samples import DatasetConfig, decode
from ..data.shape_checker import check, of_frames, summarise
from ..denoiser import LatentBatches, Latents, encode_clips
from ..loop import Schedule
from ..recipe import AdapterRecipe, FinetuneRecipe, ModelRecipe, Recipe, TuningRecipe, Validation
from ..run import ModelRun
from ..tuning import Tuning
from ..workspace import Workspace
from .merges import file_name

# Clips of a dataset that are kept from training where the recipe keeps none.
KEPT = 8
# Drawn clips that are validated at once.
TOGETHER = 8
# Settings of a schedule that change no numbers.
NO_MATTER = ("schedule.log_every", "schedule.save_every", "schedule.keep")

# The recipes that train a U-Net.
UNetRecipe = ModelRecipe | TuningRecipe


@dataclass(frozen=True)
class Sampling:
    """How clips are sampled, as `pipeline.generate` has it."""

    steps: int = 25
    guidance_scale: float = 2.0
    sampler: str = "ddim"
    negative_prompt: str = ""


@dataclass(frozen=True)
class Budget:
    """What every run may spend, and what it is measured on."""

    schedule: Schedule
    objective: Objective
    # Names of the U-Net's weights that train, as in a recipe ("" is all), and whether the text encoder does.
    layers: str = ""
    text: bool = True
    # Clips for the validation loss, each in so many equal parts of the noise schedule.
    clips: int = 2 * len(HELD_OUT)
    quantiles: int = 4
    # Clips that are sampled of held-out captions.
    samples: int = len(HELD_OUT)
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ValueError(f"samples: {self.samples} is no number of clips; use 0 for none, or more")

    def differences(self, other: Budget) -> list[str]:
        """The settings that change numbers and are not alike, with both values."""
        mine, theirs = (dict(_flat(asdict(budget))) for budget in (self, other))
        return [
            f"{key} ({mine[key]}, not {theirs[key]})"
            for key in mine
            if key not in NO_MATTER and mine[key] != theirs[key]
        ]


@dataclass(frozen=True)
class Place:
    """The folder of a comparison: what its runs share, and a result of each."""

    folder: Path

    @property
    def start(self) -> Path:
        """The model that every run begins with, where the recipe has to make it."""
        return self.folder / "start.safetensors"

    @property
    def clips(self) -> Path:
        """Latents and tokens of drawn clips, to train on and to validate with."""
        return self.folder / "clips.safetensors"

    @property
    def costs(self) -> Path:
        return self.folder / "costs.json"

    @property
    def real(self) -> Path:
        """The held-out clips as videos with their captions, for metrics that compare with real ones."""
        return self.folder / "samples" / "real"

    def samples(self, name: str, seed: int) -> Path:
        """The clips that a run has sampled, as videos with their captions."""
        return self.folder / "samples" / f"{file_name(name)}-{seed}"

    def result(self, name: str, seed: int) -> Path:
        return self.folder / f"{file_name(name)}-{seed}.json"

    def work(self, budget: Budget) -> Path:
        """Unfinished runs, from which those with another budget must not go on."""
        text = json.dumps({key: value for key, value in _flat(asdict(budget)) if key not in NO_MATTER})
        return self.folder / "work" / hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def step(self, name: str, seed: int, budget: Budget) -> int:
        """How many steps an unfinished run has behind it in its last state."""
        stem = f"{self.result(name, seed).stem}-step"
        numbers = [folder.name.removeprefix(stem) for folder in (self.work(budget) / "states").glob(f"{stem}*")]
        return max((int(number) for number in numbers if number.isdigit()), default=0)


def settled(recipe: Recipe) -> UNetRecipe:
    """The recipe as it is compared with: some clips are kept from training, and its cache is that of its own run.

    Raises ValueError for a recipe in which there is nothing to compare.
    """
    if isinstance(recipe, ModelRecipe):
        return recipe
    if not isinstance(recipe, TuningRecipe):
        raise ValueError("this recipe trains no U-Net and so has no merges to compare: name one that does")
    return replace(
        recipe,
        cache_directory=recipe.cache_directory or str(Path(recipe.output).parent / "cache"),
        validation=recipe.validation or Validation(clips=KEPT),
    )


def stage_of(recipe: UNetRecipe) -> Any:
    """The first stage with Swap-CA, or else the last; a recipe for a LoRA is its own only stage."""
    if isinstance(recipe, (ModelRecipe, FinetuneRecipe)):
        return next((stage for stage in recipe.stages if stage.kind == "swap"), recipe.stages[-1])
    return recipe


def datasets_of(recipe: UNetRecipe) -> Sequence[DatasetConfig]:
    """The datasets of that stage; none where clips are drawn."""
    if isinstance(recipe, ModelRecipe):
        return ()
    return getattr(stage_of(recipe), "datasets", ()) or recipe.datasets


def budget_of(recipe: UNetRecipe, steps: int | None = None, samples: int | None = None) -> Budget:
    """What the recipe spends on its first stage with Swap-CA, in `steps` if given; `samples` clips are sampled.

    A recipe for a LoRA gives data, schedule and objective, and what trains are the merges.
    """
    stage = stage_of(recipe)
    schedule: Schedule = stage.schedule
    if steps is not None:
        schedule = replace(schedule, steps=steps, warmup_steps=min(schedule.warmup_steps, steps // 10))
    objective = Objective(**{setting.name: getattr(stage, setting.name) for setting in fields(Objective)})
    if isinstance(recipe, ModelRecipe):
        budget = Budget(schedule, objective, text=not stage.freeze_text)
    else:
        layers = "merge" if isinstance(recipe, AdapterRecipe) else stage.layers
        budget = Budget(schedule, objective, layers, text=False)
        if asked := recipe.samples:
            sampling = Sampling(asked.steps, asked.guidance_scale, asked.sampler, asked.negative_prompt)
            budget = replace(budget, sampling=sampling)
        if datasets_of(recipe):
            kept = recipe.validation or Validation(clips=KEPT)
            budget = replace(budget, clips=kept.clips, quantiles=kept.quantiles, samples=kept.clips)
    return budget if samples is None else replace(budget, samples=samples)


@dataclass(frozen=True)
class Bench:
    """What a run begins with, learns from and is measured on: the same for every row."""

    model: checkpoint.Model
    # The file of that model.
    start: Path
    # Batches from a number on.
    batches: Callable[[int], Iterator[Batch | Latents]]
    held_out: Sequence[Batch | Latents]
    # The empty prompt, as tokens or as features.
    empty: Tensor
    prompts: Sequence[str]
    # What is learned from, in words.
    data: str
    # Says of clips `[F, H, W, 3]` in 0..1 of the prompts in turn which shares of them are right; {} where none can.
    judge: Callable[[Sequence[Tensor]], dict[str, float]] = lambda clips: {}


def open_bench(recipe: UNetRecipe, place: Place, budget: Budget, seed: int, work: Workspace) -> Bench:
    """What `prepare` has made, with the batches of `seed`."""
    if not isinstance(recipe, ModelRecipe) and datasets_of(recipe):
        tuning = Tuning(recipe, work)
        data = tuning.data(datasets_of(recipe), budget.schedule, seed)
        if not data.held_out:
            raise ValueError("no clip is left to validate with: keep more from training (validation.clips)")
        prompts = list(dict.fromkeys(text for batch in data.held_out for text in batch.captions))
        start = Path(recipe.checkpoint)
        return Bench(tuning.model, start, data.batches, data.held_out, data.empty, prompts, data.fingerprint)
    start = place.start if isinstance(recipe, ModelRecipe) else Path(recipe.checkpoint)
    model = checkpoint.load(start)
    tensors = load_file(place.clips)
    training = Latents(tensors["training.latents"], tensors["training.tokens"])
    parts = (tensors[f"held_out.{name}"].split(TOGETHER) for name in ("latents", "tokens"))
    returns = _returns(recipe)
    return Bench(
        model,
        start,
        LatentBatches(training, budget.schedule.batch_size, None, 1, seed, work.process),
        [Latents(*part) for part in zip(*parts, strict=True)],
        Tokenizer(pad_token(model.config.text), model.config.text.max_tokens)(""),
        [caption(HELD_OUT[place]) for place in MIXED],
        f"{len(training.latents)} drawn clips, seed {recipe.seed}{', there and back' if returns else ''}",
        # The checker knows no directions of shapes that turn back.
        *(() if returns else (judge_shapes,)),
    )


# Held-out combinations of words in strides that meet every word.
MIXED = tuple(7 * i % len(HELD_OUT) for i in range(len(HELD_OUT)))


def judge_shapes(clips: Sequence[Tensor]) -> dict[str, float]:
    """What the checker says of clips `[F, H, W, 3]` in 0..1 of the held-out combinations in turn, as shares."""
    if not clips:
        return {}
    asked = [HELD_OUT[MIXED[i % len(MIXED)]] for i in range(len(clips))]
    verdicts = [check(of_frames(clip)) for clip in clips]
    return summarise(zip(asked, verdicts, strict=True))


def prepare(recipe: UNetRecipe, place: Place, budget: Budget) -> None:
    """Make or find what all runs share: the start, where it is the recipe's own, and clips that are encoded."""
    place.folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(recipe, ModelRecipe) and (datasets := datasets_of(recipe)):
        tuning = Tuning(recipe, Workspace(recipe, place.work(budget), resume=True))
        tuning.data(datasets, budget.schedule, recipe.seed)
        kept = tuning.hold_out([tuning.samples(dataset) for dataset in datasets])
        # As they are trained on: cut, scaled and resampled.
        clips = ((sample.clip.caption or "", decode(sample)) for sample in kept)
        write_clips(place.real, clips, tuning.config.fps)
        return
    made = isinstance(recipe, ModelRecipe)
    if place.clips.is_file() and (place.start.is_file() or not made):
        return
    work = Workspace(recipe, Path(recipe.output).parent if made else place.work(budget), resume=True)
    torch.manual_seed(recipe.seed)
    if isinstance(recipe, ModelRecipe):
        model, training = _train_start(recipe, work)
    else:
        model = checkpoint.load(recipe.checkpoint).to(work.device)
        drawn = _drawn(model, recipe.clips, recipe.seed + 3, returns=recipe.returns)
        training = encode_clips(model.autoencoder, drawn, model.config, recipe.workers, work.accelerator)
    shapes = _drawn(model, budget.clips, recipe.seed + 4, combinations=HELD_OUT, returns=_returns(recipe))
    held_out = encode_clips(model.autoencoder, shapes, model.config, 0, work.accelerator)
    videos = (shapes[i] for i in range(len(shapes)))
    clips = ((clip["caption"], rearrange(clip["video"], "C F H W -> F H W C") / 2 + 0.5) for clip in videos)
    write_clips(place.real, clips, model.config.fps)
    tensors = {
        f"{name}.{part}": getattr(data, part).contiguous()
        for name, data in (("training", training), ("held_out", held_out))
        for part in ("latents", "tokens")
    }
    with replacing(place.clips) as temporary:
        save_file(tensors, temporary)
    if made:
        checkpoint.save(place.start, model, model.metadata)


def _train_start(recipe: ModelRecipe, work: Workspace) -> tuple[checkpoint.Model, Latents]:
    """The stages up to the last without Swap-CA, trained or found in the recipe's folder, and the recipe's clips."""
    run = ModelRun(recipe, work)
    autoencoder = run.train_autoencoder()
    training = run.latents(autoencoder)
    first_swap = next(i for i, stage in enumerate(recipe.stages) if stage.kind == "swap")
    denoiser = run.train_denoiser(training, first_swap)
    assert denoiser.text_encoder is not None
    config = replace(run.config, unet=denoiser.unet.config)
    metadata = checkpoint.Metadata(title="before Swap-CA", licence=recipe.licence, origin=recipe.origin)
    return checkpoint.Model(config, denoiser.unet, autoencoder, denoiser.text_encoder, metadata), training


def _drawn(model: checkpoint.Model, clips: int, seed: int, **settings: Any) -> MovingShapes:
    """Moving shapes in the size of a model."""
    config = model.config
    return MovingShapes(clips, config.frames, config.height, config.width, seed, **settings)


def _returns(recipe: UNetRecipe) -> bool:
    return isinstance(recipe, TuningRecipe) and recipe.returns


def write_clips(folder: Path, clips: Iterable[tuple[str, Tensor]], fps: float) -> None:
    """Captions and frames `[F, H, W, 3]` as videos with their captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (text, frames) in enumerate(clips):
        write_text(folder / f"{number:05d}.txt", text, "replace")
        write_video(folder / f"{number:05d}.mp4", frames, fps)


def _flat(settings: Mapping[str, Any], under: str = "") -> Iterator[tuple[str, Any]]:
    """A nest of settings as pairs of dotted names and values, as JSON has them."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{under}{name}.")
        else:
            yield f"{under}{name}", list(value) if isinstance(value, tuple) else value
