"""Training the upscaler: on mean absolute error, and then against a discriminator too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from videofactory_core import checkpoint, upscaler
from videofactory_core.config import AutoencoderConfig, ModelConfig
from videofactory_core.objective import seed_for
from videofactory_core.upscaler import Upscaler

from . import discriminator
from .artefacts import Artefacts, Spoiler
from .data.batches import by_bucket
from .data.moving_shapes import HELD_OUT, MovingShapes
from .data.pairs import Decoded, DrawnShapes, PairReader, PatchBatches, Patches, Shown, Source, show
from .data.samples import DatasetConfig, Sample, hold_out, samples_of
from .data.sources import read_dataset, without_captions
from .discriminator import fake_loss, held, real_loss
from .loop import Event, Schedule
from .perceptual import Perceptual
from .recipe import Adversary, UpscalerRecipe, describe
from .upscaler_validation import Figures, HeldOut, UpscalerValidation
from .workspace import Workspace

STAGES = ("upscaler", "gan")
# Without a model every size will do that the upscaler can make.
NO_MODEL = ModelConfig(autoencoder=AutoencoderConfig(channel_mult=(1,)))


class UpscalerTraining(nn.Module):
    """The upscaler whose forward is its loss on a batch: mean absolute error, as in RCAN.

    Asked with pictures alone, it upscales them: FSDP has the upscaler in pieces otherwise.
    """

    def __init__(self, upscaler: Upscaler) -> None:
        super().__init__()
        self.upscaler = upscaler

    def forward(self, batch: Patches | Tensor) -> Tensor:
        if isinstance(batch, Tensor):
            return self.upscaler(batch)
        return (self.upscaler(batch.small).float() - batch.target).abs().mean()


class AdversarialTraining(nn.Module):
    """The upscaler and its discriminator, whose forward is the sum of both losses.

    The discriminator's weights are constants in the upscaler's loss, and the upscaled pictures in the discriminator's,
    so that each gets the gradient of its own loss alone, and one step of the optimizer is one of both by turns.
    """

    def __init__(self, upscaler: Upscaler, settings: Adversary) -> None:
        super().__init__()
        self.upscaler = upscaler
        self.settings = settings
        self.discriminator = discriminator.build(settings.discriminator)
        self.perceptual = Perceptual(Path(settings.vgg)) if settings.vgg else None
        # Sums of what the losses consist of, before their weights, since somebody looked.
        self.parts: dict[str, Tensor] = {}
        self.steps = 0

    def forward(self, batch: Patches | Tensor) -> Tensor:
        """The loss, a scalar, or pictures as in `UpscalerTraining`."""
        if isinstance(batch, Tensor):
            return self.upscaler(batch)
        settings = self.settings
        made = self.upscaler(batch.small).float()
        terms = {
            "l1": (settings.l1_weight, (made - batch.target).abs().mean()),
            "gan": (settings.weight, real_loss(held(self.discriminator, made))),
        }
        if self.perceptual is not None:
            terms["perceptual"] = settings.perceptual_weight, self.perceptual(made, batch.target)
        real, fake = self.discriminator(batch.original), self.discriminator(made.detach())
        terms["discriminator"] = 1.0, real_loss(real) + fake_loss(fake)
        for name, (_, value) in terms.items():
            self.parts[name] = self.parts.get(name, 0) + value.detach()
        self.steps += 1
        return torch.stack([weight * value for weight, value in terms.values()]).sum()


@dataclass(frozen=True)
class Parts:
    """Says what the losses of `training` consisted of since the last call, on average."""

    training: AdversarialTraining
    accelerator: Accelerator
    log: Callable[[str], None]

    def __call__(self, step: int) -> dict[str, float]:
        training = self.training
        if not training.steps:
            return {}
        sums = torch.stack(list(training.parts.values())) / training.steps
        found = dict(zip(training.parts, self.accelerator.reduce(sums, "mean").tolist(), strict=True))
        training.parts, training.steps = {}, 0
        self.log(f"step {step}  " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()))
        return {f"loss_{name}": value for name, value in found.items()}


Weights = dict[str, Tensor]


def train_upscaler(recipe: UpscalerRecipe, work: Workspace) -> Callable[[Path], None]:
    """An upscaler in one stage or two; returns what writes it."""
    run = UpscalerRun(recipe, work)
    model = run.begin()
    kept = run.train("upscaler", UpscalerTraining(model), recipe.schedule)
    if recipe.gan:
        # Whole again, where FSDP had left pieces.
        model = Upscaler(recipe.upscaler)
        model.load_state_dict(kept)
        torch.manual_seed(recipe.seed + 10)
        kept = run.train("gan", AdversarialTraining(model, recipe.gan), recipe.gan.schedule)
    model = Upscaler(recipe.upscaler)
    model.load_state_dict(kept)
    other = {"recipe": describe(recipe)}
    return lambda output: upscaler.save(output, model, recipe.title, recipe.licence, recipe.origin, other=other)


class UpscalerRun:
    """A recipe at work: where its pairs come from, what is held out of them, and how a stage is trained."""

    def __init__(self, recipe: UpscalerRecipe, work: Workspace) -> None:
        self.recipe = recipe
        self.work = work
        self.scale = recipe.upscaler.scale
        self.model = checkpoint.check(recipe.checkpoint)[0].config if recipe.checkpoint else None
        self.artefacts = recipe.artefacts
        if not recipe.datasets and self.artefacts is None:
            self.artefacts = Artefacts(autoencoder=1.0, latent_noise=0.0)
        frames = max((max(dataset.frames or (1,)) for dataset in recipe.datasets), default=1)
        self.spoiler: Spoiler | None = None
        if self.artefacts is not None:
            self.spoiler = Spoiler(self.artefacts, recipe.checkpoint, frames, work.accelerator)
        self.source, held_out = self.from_disk(large_frames(recipe, self.model)) if recipe.datasets else self.drawn()
        self.held_out = [] if work.dry else [self.small(number, *shown) for number, shown in enumerate(held_out)]

    def begin(self) -> Upscaler:
        """The upscaler with which training begins."""
        recipe = self.recipe
        if not recipe.start:
            return Upscaler(recipe.upscaler)
        model = upscaler.load(recipe.start)
        if model.config != recipe.upscaler:
            sizes = ", ".join(f"{name} = {value}".lower() for name, value in vars(model.config).items())
            raise ValueError(f"start: {recipe.start} has other sizes than the recipe; write into [upscaler]: {sizes}")
        return model

    def train(self, name: str, training: UpscalerTraining | AdversarialTraining, schedule: Schedule) -> Weights:
        """Carry out a stage, or find that it is done: the upscaler's weights."""
        recipe, work = self.recipe, self.work
        # Each stage has its own draws.
        seed = recipe.seed + STAGES.index(name)
        log = lambda line: work.log(f"{name}  {line}")  # noqa: E731
        batches = PatchBatches(
            self.reader(schedule, seed),
            self.spoiler,
            schedule.batch_size,
            recipe.workers,
            work.process,
            work.accelerator,
            log,
        )
        events = []
        if isinstance(training, AdversarialTraining):
            events.append(Event(schedule.log_every, Parts(training, work.accelerator, log)))
        if self.held_out and recipe.validation:
            validation = UpscalerValidation(
                training,
                self.held_out,
                Figures.of([shown.bicubic() for shown in self.held_out], self.held_out),
                work.accelerator,
                work.folder / f"{name}.validation.jsonl",
                work.folder / "samples" / name,
                log,
            )
            events.append(Event(recipe.validation.every, validation))
        part = training.upscaler
        training.to(work.device)
        return work.train(name, training, batches, schedule, seed, part=part, unit="patches", events=events)

    def reader(self, schedule: Schedule, seed: int) -> PairReader:
        """What makes pairs of what the source shows."""
        recipe = self.recipe
        return PairReader(
            self.source,
            self.scale,
            recipe.patch,
            recipe.patches_of(schedule),
            self.spoiler is not None,
            recipe.degradation,
            recipe.sharpen,
            seed,
        )

    def small(self, number: int, label: str, shown: Shown) -> HeldOut:
        """What validation asks, the same every time: whole frames, made small as those that are trained on."""
        small, large = self.reader(self.recipe.schedule, self.recipe.seed).whole_pair(shown, number)
        if self.spoiler is not None:
            generator = torch.Generator().manual_seed(seed_for(self.recipe.seed, number))
            clip = small[None].to(self.work.device)
            small = self.spoiler(clip, [shown.caption], [generator])[0].cpu()
        return HeldOut(label, small, large)

    def drawn(self) -> tuple[Source, list[tuple[str, Shown]]]:
        """Moving shapes of the model's size; those held out are of combinations that are never trained on."""
        recipe, model = self.recipe, self.model
        assert model is not None
        assert self.artefacts is not None
        size = model.frames, model.height, model.width
        # A U-Net has to see clips, an autoencoder takes frames one by one.
        whole_clips = self.artefacts.sdedit > 0
        self.check_size(model.width * self.scale, model.height * self.scale)
        count = recipe.validation.clips if recipe.validation else 0
        others = DrawnShapes(MovingShapes(count, *size, recipe.seed + 3, HELD_OUT), self.scale, whole_clips)
        held_out = [others.show(number) for number in range(count)]
        source = DrawnShapes(MovingShapes(1 << 30, *size, recipe.seed + 2), self.scale, whole_clips)
        return source, [(shown.caption, shown) for shown in held_out]

    def from_disk(self, datasets: Sequence[DatasetConfig]) -> tuple[Source, list[tuple[str, Shown]]]:
        """Samples of the datasets, and one of each clip that is held out."""
        recipe = self.recipe
        parts = [self.samples(dataset) for dataset in datasets]
        held_out: list[Sample] = []
        if recipe.validation and recipe.validation.path:
            held_out = self.samples(replace(datasets[0], path=recipe.validation.path))
        elif recipe.validation:
            parts, held_out = hold_out(parts, recipe.validation.clips, recipe.seed)
        groups = []
        for dataset, part in zip(datasets, parts, strict=True):
            if not part:
                raise ValueError(f"{dataset.path} has no clip that can be trained on; the log says why")
            groups += by_bucket(part, dataset.weight, dataset.num_repeats)
        found: dict[str, list[Sample]] = {}
        for sample in held_out:
            found.setdefault(sample.clip.name, []).append(sample)
        middles = {} if self.work.dry else {name: samples[len(samples) // 2] for name, samples in found.items()}
        return Decoded(groups, recipe.seed), [(name, show(sample)) for name, sample in middles.items()]

    def samples(self, dataset: DatasetConfig) -> list[Sample]:
        """What can be cut out of a dataset's clips, with or without captions; what cannot is logged with its reason."""
        for width, height in dataset.sizes:
            self.check_size(width, height)
        clips = without_captions(read_dataset(Path(dataset.path), dataset.caption_extension))
        return samples_of(clips, dataset, planning(self.model), self.recipe.workers, self.work.log)

    def check_size(self, width: int, height: int) -> None:
        """ValueError when large frames of a size cannot be made small, or are then too small for a patch."""
        cell = self.scale * (self.spoiler.downscale if self.spoiler is not None else 1)
        if width % cell or height % cell:
            fitting = f"{max(cell, width // cell * cell)}x{max(cell, height // cell * cell)}"
            raise ValueError(f"sizes: {width}x{height} does not divide into cells of {cell} pixels; use {fitting}")
        if min(width, height) < self.recipe.patch * self.scale:
            raise ValueError(
                f"patch: frames of {width}x{height} have no patches of {self.recipe.patch * self.scale} pixels; use "
                f"{min(width, height) // self.scale} or less"
            )


def large_frames(recipe: UpscalerRecipe, model: ModelConfig | None) -> tuple[DatasetConfig, ...]:
    """The recipe's datasets, where they do not say otherwise in single frames of the model's size enlarged."""
    scale = recipe.upscaler.scale
    sizes = ((model.width * scale, model.height * scale),) if model is not None else ()
    return tuple(
        replace(dataset, sizes=dataset.sizes or sizes, frames=dataset.frames or (1,)) for dataset in recipe.datasets
    )


def planning(model: ModelConfig | None) -> ModelConfig:
    """What the windows of large frames depend on: the model's rate, where there is one."""
    return NO_MODEL if model is None else replace(NO_MODEL, fps=model.fps)
