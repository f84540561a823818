"""Memory of a GPU that every recipe for tuning takes: computed from its sizes, or measured where there is a GPU."""

from __future__ import annotations

import gc
import itertools
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from videofactory_train.data.batches import Batch
from videofactory_train.denoiser import Denoiser, choose_layers, store_weights
from videofactory_train.loop import Schedule, train
from videofactory_train.recipe import AdapterRecipe, FinetuneRecipe, TuningRecipe, TuningStage, read_recipe
from videofactory_train.state import States
from videofactory_train.tuning import with_merge
from videofactory_train.workspace import PRECISIONS

from videofactory_core.adapters import Adapter
from videofactory_core.autoencoder import Autoencoder
from videofactory_core.config import PRESETS, ModelConfig
from videofactory_core.diffusion import Schedule as NoiseSchedule
from videofactory_core.text import TextEncoder
from videofactory_core.unet.model import VideoUNet

from .memory import Device, Held, pass_memory

RECIPES = Path(__file__).parent.parent / "train" / "recipes"
# Share of a card that is left to the driver, to kernels, and to gaps between tensors.
SPARE = 0.1
# GiB of the cards of the paper's recipe, each with all weights, and with its part of them.
WHOLE, SHARDED = 80, 32
# As many weights as one piece of FSDP has at least, in the paper's recipe.
PIECE = 20_000_000
GIB = 2**30


@dataclass(frozen=True)
class Job:
    """One stage of a recipe on one of `world` GPUs of `card` GiB; `sharded` is FSDP."""

    name: str
    recipe: TuningRecipe
    objective: AdapterRecipe | TuningStage
    config: ModelConfig
    card: float
    world: int = 1
    sharded: bool = False

    @property
    def schedule(self) -> Schedule:
        return self.objective.schedule

    @property
    def dtype(self) -> torch.dtype | None:
        return PRECISIONS[self.recipe.precision]

    @property
    def size(self) -> tuple[int, int, int]:
        """Frames, height and width of the largest clips, in latents."""
        config, datasets = self.config, self.recipe.datasets
        if isinstance(self.objective, TuningStage):
            datasets = self.objective.datasets or datasets
        sizes = [size for dataset in datasets for size in dataset.sizes] or [(config.width, config.height)]
        frames = [count for dataset in datasets for count in dataset.frames] or [config.frames]
        width, height = max(sizes, key=lambda size: size[0] * size[1])
        factor = config.autoencoder.downscale
        return max(frames), height // factor, width // factor

    def denoiser(self, device: torch.device) -> Denoiser:
        """What trains, as `videofactory_train.tuning` makes it, with fresh weights."""
        objective = self.objective
        adapter: Adapter | None = None
        if isinstance(objective, AdapterRecipe):
            unet = VideoUNet(self.config.unet, device=device).requires_grad_(False)
            chosen = objective.adapter
            with device:
                adapter = Adapter(unet, chosen.layers, chosen.rank, chosen.alpha)
        else:
            unet = VideoUNet(with_merge(self.config.unet, objective.kind), device=device)
            choose_layers(unet, objective.layers)
        store_weights(unet, self.dtype)
        unet.gradient_checkpointing = self.recipe.gradient_checkpointing
        schedule = NoiseSchedule.from_config(self.config.diffusion)
        return Denoiser(unet, objective, schedule, self.context(1, device)[0], adapter=adapter)

    def context(self, count: int, device: torch.device) -> Tensor:
        """Text features of noise."""
        return torch.randn(count, self.config.text.max_tokens, self.config.text.width, device=device)

    def batch(self, device: torch.device) -> Batch:
        """A batch of noise."""
        count = self.schedule.batch_size
        latents = torch.randn(count, self.config.unet.in_channels, *self.size, device=device)
        return Batch(("",) * count, latents, self.context(count, device))


def jobs(path: Path, config: ModelConfig = PRESETS["sd21"]) -> Iterator[Job]:
    """The stages of a recipe for tuning a model like `config`, on the card that its name names."""
    recipe = read_recipe(path)
    stages: Sequence[AdapterRecipe | TuningStage] = ()
    if isinstance(recipe, AdapterRecipe):
        stages = [recipe]
    elif isinstance(recipe, FinetuneRecipe):
        stages = recipe.stages
    card, world = (re.search(rf"(\d+){unit}", path.stem) for unit in ("gb", "gpu"))
    for number, stage in enumerate(stages, 1):
        assert isinstance(recipe, TuningRecipe)
        name = f"{path.stem}, stage {number}" if len(stages) > 1 else path.stem
        if card:
            yield Job(name, recipe, stage, config, float(card[1]))
        elif world:
            yield Job(f"{name}, DDP", recipe, stage, config, WHOLE, int(world[1]))
            yield Job(f"{name}, FSDP", recipe, stage, config, SHARDED, int(world[1]), sharded=True)


@dataclass(frozen=True)
class Need:
    """Bytes that a job takes: of the GPU in a step, part by part, and while it samples; and of the computer's memory.

    `encoders` are autoencoder and text encoder, which stay where there is no cache.
    """

    job: Job
    trained: int
    step: Held
    moments: float
    average: float
    encoders: float
    sampling: float
    host: float

    @property
    def training(self) -> float:
        return self.step.total + self.moments + self.average + self.encoders

    @property
    def fits(self) -> bool:
        return max(self.training, self.sampling) <= self.job.card * (1 - SPARE) * GIB


def compute(job: Job) -> Need:
    """What a job needs of a GPU, without one."""
    schedule, parts = job.schedule, job.world if job.sharded else 1
    denoiser = job.denoiser(torch.device("meta"))
    trained, moments = remembered(denoiser, schedule)
    average = 4.0 * trained if schedule.ema_decay else 0.0
    host = 0.0
    if schedule.offload:
        host, average = average, 0.0
        if not schedule.optimizer.endswith("8bit"):
            # With the moments go a copy of the weights and one of the gradients.
            host, moments = host + moments + 8.0 * trained, 0.0
    with torch.device("meta"):
        encoders = 4.0 * count(Autoencoder(job.config.autoencoder), TextEncoder(job.config.text))
    step, samples = passes(replace(job, name="", card=0, world=1, sharded=False))
    if job.sharded:
        step, samples = sharded(step, denoiser, job.world), sharded(samples, denoiser, job.world)
    elif job.world > 1:
        # DDP sends gradients from buckets of its own.
        step = replace(step, gradients=step.gradients + 4 * trained)
    # While the average is in the place of the weights, these are kept beside it.
    kept = 4.0 * trained if schedule.ema_decay else 0.0
    if schedule.offload:
        host, kept = host + kept, 0.0
    return Need(
        job,
        trained,
        step,
        moments / parts,
        average / parts,
        encoders=0.0 if job.recipe.cache_latents else encoders,
        sampling=samples.total + (moments + average + kept) / parts + encoders,
        host=host,
    )


@lru_cache
def passes(job: Job) -> tuple[Held, Held]:
    """What the passes of a step hold, and a pass of sampling."""

    def sampling(place: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
        denoiser, config = job.denoiser(place), job.config
        factor = config.autoencoder.downscale
        # Two, because guidance needs a prediction for the negative prompt.
        size = (2, config.unet.in_channels, config.frames, config.height // factor, config.width // factor)
        x, context = torch.randn(size, device=place), job.context(2, place)
        return denoiser, lambda: denoiser.unet(x, torch.zeros(2, device=place), context)

    return step_passes(job, "cuda"), pass_memory(sampling, "cuda", job.dtype, backward=False)


def step_passes(job: Job, device: Device) -> Held:
    """What forward and backward pass of a step hold on a device, which need not be there."""

    def training(place: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
        denoiser, batch = job.denoiser(place), job.batch(place)
        return denoiser, lambda: denoiser(batch)

    accumulate = job.schedule.gradient_accumulation_steps > 1
    return pass_memory(training, device, job.dtype, accumulate=accumulate)


def remembered(module: nn.Module, schedule: Schedule) -> tuple[int, float]:
    """How many weights are trained, and the bytes of an optimizer's moments."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    moments = [moment_bytes(weight, schedule.optimizer) for weight in weights]
    return sum(weight.numel() for weight in weights), sum(moments)


def count(*modules: nn.Module) -> int:
    """Number of weights."""
    return sum(weight.numel() for module in modules for weight in module.parameters())


def moment_bytes(weight: Tensor, optimizer: str) -> float:
    """What an optimizer remembers of a weight on the GPU."""
    size = weight.numel()
    if optimizer == "paged_adamw8bit":
        return 0.0
    if optimizer == "adamw8bit" and size >= 4096:
        # Two numbers of 8 bits, and their scales in each block of 256.
        return 2 * (size + 4 * size / 256)
    if optimizer == "adafactor" and weight.ndim > 1:
        return 4 * (size / weight.shape[-1] + size / weight.shape[-2])
    return 4 * size * {"adafactor": 1, "prodigy": 4}.get(optimizer, 2)


def sharded(held: Held, module: nn.Module, world: int) -> Held:
    """The same pass under FSDP: the piece at work and the next are whole, in half precision, and gradients of one."""
    pieces = sorted(piece_sizes(module))
    return replace(
        held,
        weights=held.weights // world,
        gradients=held.gradients // world + 2 * pieces[-1] * bool(held.gradients),
        copies=2 * (pieces[-1] + pieces[-2]),
        transient=held.activations - held.saved,
    )


def piece_sizes(module: nn.Module) -> list[int]:
    """Weights in each piece of FSDP: modules of more than PIECE, without what is in smaller pieces inside."""
    inside = [size for child in module.children() for size in piece_sizes(child)]
    total = count(module)
    return [*inside, total - sum(inside)] if total > PIECE else inside


def take_steps(job: Job, device: torch.device, steps: int = 2) -> dict[str, float]:
    """The first steps of a job, in the real loop, on noise; returns the figures of the last."""
    # Else another precision than the last job's would be refused.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=job.recipe.precision if job.dtype else "no",
        cpu=device.type == "cpu",
        gradient_accumulation_steps=job.schedule.gradient_accumulation_steps,
    )
    denoiser, batch = job.denoiser(device), job.batch(device)
    schedule = replace(job.schedule, steps=steps, log_every=1)
    last: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        train(
            denoiser,
            lambda _: itertools.repeat(batch),
            schedule,
            accelerator,
            States(Path(folder), "steps", accelerator, schedule.keep),
            lambda line: None,
            seed=0,
            note=lambda _, figures: last.update(figures),
        )
    return last


def measure(job: Job, device: torch.device) -> str:
    """Peak memory and speed of the real loop on a GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        seconds = take_steps(job, device, 4)["seconds_per_step"]
    except (torch.cuda.OutOfMemoryError, ValueError) as error:
        return f"not measured: {error}"
    return f"measured {torch.cuda.max_memory_allocated(device) / GIB:.2f} GiB, {1 / seconds:.2f} steps/s"


HEADER = (
    f"{'recipe':<28}{'trained':>9}{'weights':>9}{'grads':>7}{'copies':>8}{'moments':>9}{'average':>9}{'encoders':>10}"
    f"{'saved':>7}{'passing':>9}{'step':>7}{'samples':>9}{'card':>6}{'':>6}{'host':>6}"
)


def row(need: Need) -> str:
    """A line of the table, in GiB."""
    step = need.step
    cells = (
        (step.weights, 9),
        (step.gradients, 7),
        (step.copies, 8),
        (need.moments, 9),
        (need.average, 9),
        (need.encoders, 10),
        (step.saved, 7),
        (step.transient, 9),
        (need.training, 7),
        (need.sampling, 9),
    )
    numbers = "".join(f"{value / GIB:>{width}.2f}" for value, width in cells)
    verdict = "fits" if need.fits else "NO"
    return (
        f"{need.job.name:<28}{need.trained / 1e6:>7.1f} M{numbers}{need.job.card:>6.0f}{verdict:>6}"
        f"{need.host / GIB:>6.1f}"
    )


def report() -> None:
    """Print what every recipe takes; exit with 1 when one does not fit its card with a tenth of it to spare."""
    device = torch.device("cuda") if torch.cuda.is_available() else None
    print(f"GiB of one GPU, computed; torch {torch.__version__}")
    if device is not None:
        print(f"measured on {torch.cuda.get_device_name(device)}, {date.today()}")
    print(HEADER)
    failed = []
    for job in (job for path in sorted(RECIPES.glob("*.toml")) for job in jobs(path)):
        need = compute(job)
        print(row(need), flush=True)
        if device is not None and job.world == 1:
            print(f"    {measure(job, device)}", flush=True)
        if not need.fits:
            failed.append(job.name)
    if failed:
        sys.exit(f"too large for the card: {', '.join(failed)}")
