"""Training from a model of ours on clips from disk: weights themselves in stages, or a LoRA."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from videofactory_core import adapters, checkpoint
from videofactory_core.config import ModelConfig, UNetConfig
from videofactory_core.diffusion import Schedule as NoiseSchedule
from videofactory_core.text import Tokenizer, pad_token
from videofactory_core.unet.model import VideoUNet

from .data.batches import Batch, Group, RawBatch, by_bucket, loader
from .data.cache import Cache, Filled, encode_frames
from .data.content import checksum
from .data.moving_shapes import MovingShapes
from .data.samples import DatasetConfig, Sample, hold_out, samples_of
from .data.sources import read_dataset
from .denoiser import (
    Answers,
    ByTurns,
    Denoiser,
    LatentBatches,
    Latents,
    WindowBatches,
    choose_layers,
    encode_clips,
    frames_in,
    store_weights,
)
from .loop import Event, Schedule
from .previews import Previews
from .recipe import AdapterRecipe, FinetuneRecipe, TuningRecipe, TuningStage, Windows, describe
from .validation import Validation
from .workspace import DRY_STEPS, Workspace

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Data:
    """What a stage trains on: its batches, the clips that are held out, and a fingerprint of all of it."""

    batches: Callable[[int], Iterator[Batch | Latents]]
    held_out: tuple[Batch, ...]
    empty: Tensor
    fingerprint: str


def tune(recipe: TuningRecipe, work: Workspace) -> Callable[[Path], None]:
    """Train what the recipe says; returns what writes the result."""
    run = Tuning(recipe, work)
    if isinstance(recipe, AdapterRecipe):
        return run.train_adapter(recipe)
    assert isinstance(recipe, FinetuneRecipe)
    return run.train_stages(recipe)


class Tuning:
    """A recipe at work on `model`, whose autoencoder and text encoder stay as they are, on the CPU when not in use."""

    def __init__(self, recipe: TuningRecipe, work: Workspace) -> None:
        self.recipe = recipe
        self.work = work
        self.model = checkpoint.load(recipe.checkpoint, dtype=None)
        self.config: ModelConfig = self.model.config
        self.schedule = NoiseSchedule.from_config(self.config.diffusion)
        for part in (self.model.autoencoder, self.model.text_encoder):
            part.float().requires_grad_(False)
        # Stages share datasets, and every file of one has to be looked into.
        self.found: dict[DatasetConfig, list[Sample]] = {}

    def train_adapter(self, recipe: AdapterRecipe) -> Callable[[Path], None]:
        """A LoRA on the U-Net, whose own weights stay as they are."""
        if recipe.gives_frames and not self.config.given_frames:
            raise ValueError(
                "condition: a LoRA file cannot say that it knows given frames; begin with a checkpoint that does, which"
                " recipes/image-to-video-16gb.toml makes"
            )
        unet = self.model.unet.requires_grad_(False)
        adapter = adapters.Adapter(unet, recipe.adapter.layers, recipe.adapter.rank, recipe.adapter.alpha)
        store_weights(unet, self.work.dtype)
        unet.gradient_checkpointing = recipe.gradient_checkpointing
        data = self.data(recipe.datasets, recipe.schedule, recipe.seed)
        module = self.denoiser(recipe, unet, data, adapter)
        kept = self.work.train(
            "adapter",
            module.to(self.work.device),
            data.batches,
            recipe.schedule,
            recipe.seed,
            part=adapter,
            frames_in=frames_in,
            events=self.events("adapter", module, data),
        )
        # Whole and on the CPU, where FSDP had left pieces.
        adapter.load_state_dict(kept, assign=True)
        other = self.provenance(data)
        return lambda output: adapters.save(output, adapter, recipe.title, recipe.licence, recipe.origin, other)

    def train_stages(self, recipe: FinetuneRecipe) -> Callable[[Path], None]:
        """The weights themselves, each stage from the one before; what is new in a stage starts as the identity."""
        for stage in recipe.stages:
            check_windows(stage.windows, self.config)
        trained: dict[str, Tensor] = {}
        data_of_stages = []
        for number, stage in enumerate(recipe.stages):
            name = f"{number + 1}-{stage.kind}"
            torch.manual_seed(recipe.seed + 10 * (number + 1))
            if number:
                # From the file again, because training has rounded what was frozen, and FSDP taken it to pieces.
                self.model.unet = read_unet(recipe.checkpoint)
            unet = rebuilt(self.model.unet, with_merge(self.config.unet, stage.kind))
            unet.load_state_dict(trained, strict=False)
            choose_layers(unet, stage.layers)
            store_weights(unet, self.work.dtype)
            unet.gradient_checkpointing = recipe.gradient_checkpointing
            data = self.data(stage.datasets or recipe.datasets, stage.schedule, recipe.seed + number, stage.windows)
            module = self.denoiser(stage, unet, data)
            trained |= self.work.train(
                name,
                module.to(self.work.device),
                data.batches,
                stage.schedule,
                recipe.seed + number,
                part=unet,
                only_trained=True,
                frames_in=frames_in,
                events=self.events(name, module, data),
            )
            data_of_stages.append(data)
        other = self.provenance(*data_of_stages)
        parent = self.model.metadata
        licence = recipe.licence
        if parent.licence != licence:
            licence = f"{licence}; trained from {parent.title}: {parent.licence}"
        metadata = replace(parent, title=recipe.title, licence=licence, origin=recipe.origin, date=None)
        metadata = replace(metadata, other={**parent.other, **other})
        # The longer half of the windows, see `WindowBatches`.
        longer = 2 * self.config.frames if any(stage.windows for stage in recipe.stages) else 0
        config = replace(
            self.config,
            unet=with_merge(self.config.unet, recipe.stages[-1].kind),
            given_frames=self.config.given_frames or any(stage.gives_frames for stage in recipe.stages),
            chunk_frames=longer or self.config.chunk_frames,
        )
        return partial(
            self.save,
            config,
            trained,
            metadata,
            DTYPES[recipe.output_dtype],
        )

    def save(
        self,
        config: ModelConfig,
        trained: dict[str, Tensor],
        metadata: checkpoint.Metadata,
        dtype: torch.dtype,
        output: Path,
    ) -> None:
        """The model of the file with `trained` in its place: what was frozen is taken from there, not from the run,
        which may have rounded it."""
        model = checkpoint.load(self.recipe.checkpoint, dtype=None)
        unet = rebuilt(model.unet, config.unet)
        unet.load_state_dict(trained, strict=False)
        model = replace(model, config=config, unet=unet)
        checkpoint.save(output, model, metadata, dtype=dtype)

    def denoiser(
        self,
        objective: AdapterRecipe | TuningStage,
        unet: VideoUNet,
        data: Data,
        adapter: adapters.Adapter | None = None,
    ) -> Denoiser:
        """What trains. Drawn clips come with tokens, for which it has the text encoder."""
        return Denoiser(
            unet,
            objective,
            self.schedule,
            data.empty,
            text_encoder=None if self.recipe.datasets else self.model.text_encoder,
            adapter=adapter,
            process=self.work.process,
        )

    def events(self, name: str, module: Denoiser, data: Data) -> list[Event]:
        """Validation and samples, as the recipe asks for them."""
        recipe, work = self.recipe, self.work
        log = lambda line: work.log(f"{name}  {line}")  # noqa: E731
        unet = Answers(module)
        found = []
        if recipe.validation and data.held_out:
            file = work.folder / f"{name}.validation.jsonl"
            validation = Validation(
                unet,
                data.held_out,
                self.schedule,
                recipe.validation.quantiles,
                recipe.seed,
                work.accelerator,
                file,
                log,
            )
            found.append(Event(recipe.validation.every, validation))
        if recipe.samples:
            # All that sampling does with a U-Net is to ask it.
            model = replace(self.model, unet=cast(VideoUNet, unet))
            previews = Previews(model, recipe.samples, work.folder / "samples" / name, work.accelerator, log)
            found.append(Event(recipe.samples.every, previews))
        return found

    def data(
        self, datasets: Sequence[DatasetConfig], schedule: Schedule, seed: int, windows: Windows | None = None
    ) -> Data:
        """Batches for a stage, drawn or from disk."""
        return self.from_disk(datasets, schedule, seed) if datasets else self.drawn(schedule, seed, windows)

    def drawn(self, schedule: Schedule, seed: int, windows: Windows | None) -> Data:
        """Clips of moving shapes, and by turns windows of longer ones."""
        recipe, config, process = self.recipe, self.config, self.work.process
        size, drawn = (config.height, config.width), recipe.seed + 3
        count = self.few(recipe.clips)
        clips = MovingShapes(count, config.frames, *size, drawn, returns=recipe.returns)
        batches: Callable[[int], Iterator[Latents]]
        batches = LatentBatches(self.latents(clips), schedule.batch_size, None, 1, seed, process)
        fingerprint = f"{count} drawn clips, seed {drawn}"
        if windows is not None:
            count = self.few(windows.clips)
            long = MovingShapes(count, windows.frames, *size, drawn + 1)
            other = WindowBatches(
                self.latents(long),
                windows.condition,
                schedule.batch_size,
                config.frames,
                windows.strides,
                seed,
                process,
            )
            batches, fingerprint = ByTurns(batches, other), f"{fingerprint}; {count} long ones"
        empty = Tokenizer(pad_token(config.text), config.text.max_tokens)("")
        return Data(batches, (), empty, fingerprint)

    def few(self, clips: int) -> int:
        """How many of so many drawn clips a run needs."""
        return min(clips, 2 * DRY_STEPS) if self.work.dry else clips

    def latents(self, clips: MovingShapes) -> Latents:
        """Drawn clips, encoded."""
        autoencoder = self.model.autoencoder.to(self.work.device)
        latents = encode_clips(autoencoder, clips, self.config, self.recipe.workers, self.work.accelerator)
        autoencoder.cpu()
        return latents

    def from_disk(self, datasets: Sequence[DatasetConfig], schedule: Schedule, seed: int) -> Data:
        """Samples of the datasets, through the cache or decoded at every step."""
        recipe, work = self.recipe, self.work
        parts = [self.samples(dataset) for dataset in datasets]
        held_out = self.hold_out(parts)
        if work.dry:
            few = schedule.batch_size * schedule.gradient_accumulation_steps * DRY_STEPS * work.process.world
            parts = [part[:few] for part in parts]
        folder = Path(recipe.cache_directory) if recipe.cache_directory else Path(recipe.output).parent / "cache"
        wanted = [sample for part in parts for sample in part] if recipe.cache_latents else []
        model = self.model
        filled: Filled | None = None
        (empty,) = model.text_encoder.encode([""])
        if wanted or held_out:
            filled = Cache(folder).fill(
                [*wanted, *held_out],
                (),
                model.autoencoder,
                model.text_encoder,
                work.accelerator,
                recipe.workers,
                work.log,
            )
            held_out = [sample for sample in held_out if sample in filled.latents]
        validation = tuple(_batch(filled, sample) for sample in held_out) if filled else ()
        if recipe.cache_latents:
            assert filled is not None
            there = filled.latents
            parts = [[sample for sample in part if sample in there] for part in parts]
            lines = sorted(f"{there[sample]} {sample.clip.caption}" for part in parts for sample in part)
        else:
            lines = sorted(
                f"{sample.clip.name} {sample.times} {sample.clip.caption}" for part in parts for sample in part
            )
        groups: list[Group] = []
        for dataset, part in zip(datasets, parts, strict=True):
            if not part:
                raise ValueError(f"{dataset.path} has no clip that can be trained on; see `videofactory data check`")
            groups += by_bucket(part, dataset.weight, dataset.num_repeats)
        batches = loader(
            groups,
            filled if recipe.cache_latents else None,
            schedule.batch_size,
            seed,
            recipe.workers,
            work.accelerator,
        )
        digest = hashlib.blake2b("\n".join(lines).encode(errors="surrogatepass"), digest_size=16).hexdigest()
        return Data(partial(self.ready, batches), validation, empty, f"{len(lines)} samples, {digest}")

    def samples(self, dataset: DatasetConfig) -> list[Sample]:
        """What can be cut out of a dataset's clips; what cannot is logged with its reason."""
        if dataset in self.found:
            return self.found[dataset]
        clips = read_dataset(Path(dataset.path), dataset.caption_extension)
        found = self.found[dataset] = samples_of(clips, dataset, self.config, self.recipe.workers, self.work.log)
        return found

    def hold_out(self, parts: list[list[Sample]]) -> list[Sample]:
        """The samples of validation, taken out of `parts` where they do not have a dataset of their own."""
        validation = self.recipe.validation
        if validation is None:
            return []
        if validation.path:
            return self.samples(DatasetConfig(path=validation.path))
        parts[:], held_out = hold_out(parts, validation.clips, self.recipe.seed)
        return held_out

    def ready(self, batches: Callable[[int], Iterator[Batch | RawBatch]], first: int) -> Iterator[Batch]:
        """Batches with latents and text features, those of frames through the encoders; says once what was broken."""
        named = set()
        for batch in batches(first):
            for broken in batch.broken:
                if broken not in named:
                    named.add(broken)
                    self.work.log(f"left out {broken.name}: {broken.reason}")
            yield batch if isinstance(batch, Batch) else self.encode(batch)

    @torch.no_grad()
    def encode(self, batch: RawBatch) -> Batch:
        """Frames and captions to latents and text features."""
        device = self.work.device
        with self.work.accelerator.autocast():
            latents = encode_frames(self.model.autoencoder.to(device), batch.video.to(device))
            context = self.model.text_encoder.to(device).encode(batch.captions).float()
        return Batch(batch.captions, latents, context, batch.broken)

    def provenance(self, *data: Data) -> dict[str, str]:
        """Metadata of the result: the recipe, what it was trained on, and the files that it was made from."""
        path = Path(self.recipe.checkpoint)
        parent = {"file": path.name, "title": self.model.metadata.title, "sha256": checksum(path)}
        return {
            "recipe": describe(self.recipe),
            "dataset": "; ".join(dict.fromkeys(part.fingerprint for part in data)),
            "parents": json.dumps([parent], ensure_ascii=False),
        }


def check_windows(windows: Windows | None, config: ModelConfig) -> None:
    """Refuse with a ValueError windows that do not fit into their clips, or that the model has no positions for."""
    if windows is None:
        return
    longest = 2 * config.frames * max(windows.strides)
    if windows.frames < longest:
        raise ValueError(f"windows.frames: {windows.frames} are too few; use {longest} or more")
    positions = config.unet.temporal_positions
    if positions and positions < 2 * config.frames:
        raise ValueError(f"the model knows {positions} frame positions; windows need {2 * config.frames}")


def read_unet(path: str) -> VideoUNet:
    """The U-Net of a checkpoint alone, as it is stored."""
    file, model = checkpoint.check(path)
    model.unet.load_state_dict(file.read("unet"), assign=True)
    return model.unet


def with_merge(config: UNetConfig, kind: str) -> UNetConfig:
    """The network of a stage: Swap-CA skipped, or on."""
    return replace(config, merge="add" if kind == "addition" else "swap")


def rebuilt(unet: VideoUNet, config: UNetConfig) -> VideoUNet:
    """`unet` as `config` says, with the weights that both have; others are fresh."""
    if unet.config == config:
        return unet
    changed = VideoUNet(config)
    weights = {key: value.float() for key, value in unet.state_dict().items() if key in changed.state_dict()}
    changed.load_state_dict(weights, strict=False)
    return changed


def _batch(filled: Filled, sample: Sample) -> Batch:
    """One sample of the cache."""
    caption = sample.clip.caption or ""
    return Batch((caption,), filled.read_latents(sample)[None], filled.read_context(caption)[None])
