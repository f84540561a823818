"""The paper's claim in small: what the merge at block ends brings, everything else being the same.

Every run starts from the demo model as it stands before its first stage with Swap-CA, trains the same batches with the
same noise, and is measured on combinations of words that no training saw. The window variants of Swap-CA have the same
weights at the start and differ only in who asks whom; without Swap-CA there is the 1x1x1 fusion, which is smaller.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from accelerate import Accelerator
from einops import rearrange
from safetensors.torch import load_file, save_file
from videofactory_train.data.moving_shapes import HELD_OUT, MovingShapes, caption
from videofactory_train.data.shape_checker import check, summarise
from videofactory_train.denoiser import Denoiser, LatentBatches, Latents, encode_clips, frames_in
from videofactory_train.loop import Schedule, train
from videofactory_train.processes import end_with_command
from videofactory_train.recipe import ModelRecipe, read_recipe
from videofactory_train.run import ModelRun
from videofactory_train.state import States
from videofactory_train.workspace import Workspace

from videofactory_core import checkpoint
from videofactory_core.atomic import replacing, write_text
from videofactory_core.diffusion import Schedule as NoiseSchedule
from videofactory_core.objective import Objective, Process, quantile_levels
from videofactory_core.pipeline import generate
from videofactory_core.text import Tokenizer, pad_token
from videofactory_core.unet.model import VideoUNet

RECIPE = Path("train/recipes/demo.toml")
FOLDER = Path("runs/merges")
# A variable, because how many runs fit beside each other depends on the machine alone.
WORKERS = "MERGES_WORKERS"

# What differs from the preset's U-Net; "none" is the paper's row without Swap-CA.
MERGES: dict[str, dict[str, Any]] = {
    "none": {"merge": "fuse"},
    "temporal queries": {"merge": "swap", "swap_query": "temporal"},
    "spatial queries": {"merge": "swap", "swap_query": "spatial"},
    "swapped": {"merge": "swap", "swap_query": "swapped"},
}
SEEDS = (0, 1, 2)
SCHEDULE = Schedule(
    steps=1000, batch_size=8, learning_rate=5e-4, warmup_steps=50, ema_decay=0.99, log_every=50, save_every=250
)
SCORES = ("colour", "shape", "direction", "background", "steady", "all")


@dataclass(frozen=True)
class Budget:
    """What every run may spend, and what it is measured on."""

    schedule: Schedule = SCHEDULE
    objective: Objective = Objective(timestep_shift=4.0)  # noqa: RUF009 (frozen)
    # Clips of held-out combinations for the validation loss, each in so many equal parts of the noise schedule.
    clips: int = 2 * len(HELD_OUT)
    quantiles: int = 4
    # How many held-out combinations are sampled.
    samples: int = len(HELD_OUT)


@dataclass(frozen=True)
class Place:
    """The folder of the comparison: what its runs share, and a result of each."""

    folder: Path

    @property
    def start(self) -> Path:
        """The model that every run starts from."""
        return self.folder / "start.safetensors"

    @property
    def clips(self) -> Path:
        """Latents and tokens to train on and to validate with."""
        return self.folder / "clips.safetensors"

    def result(self, name: str, seed: int) -> Path:
        return self.folder / f"{name.replace(' ', '-')}-{seed}.json"

    def read(self, name: str, seed: int, budget: Budget) -> dict[str, Any] | None:
        """The result of a finished run; None where there is none, or one of another budget."""
        path = self.result(name, seed)
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result if result["budget"] == json.loads(json.dumps(asdict(budget))) else None


def prepare(recipe: ModelRecipe, place: Place, budget: Budget) -> None:
    """Train or find the stages up to the last without Swap-CA, and write what the runs share."""
    if place.start.is_file() and place.clips.is_file():
        return
    place.folder.mkdir(parents=True, exist_ok=True)
    first_swap = next(i for i, stage in enumerate(recipe.stages) if stage.kind == "swap")
    work = Workspace(recipe, Path(recipe.output).parent, resume=True)
    torch.manual_seed(recipe.seed)
    run = ModelRun(recipe, work)
    autoencoder = run.train_autoencoder()
    training = run.latents(autoencoder)
    denoiser = run.train_denoiser(training, first_swap)
    assert denoiser.text_encoder is not None
    config = replace(run.config, unet=denoiser.unet.config)
    shapes = MovingShapes(budget.clips, config.frames, config.height, config.width, recipe.seed + 4, HELD_OUT)
    held_out = encode_clips(autoencoder, shapes, config, 0, work.accelerator)
    tensors = {
        f"{name}.{field}": getattr(data, field).contiguous()
        for name, data in (("training", training), ("held_out", held_out))
        for field in ("latents", "tokens")
    }
    with replacing(place.clips) as temporary:
        save_file(tensors, temporary)
    metadata = checkpoint.Metadata(title="before Swap-CA", licence=recipe.licence, origin=recipe.origin)
    model = checkpoint.Model(config, denoiser.unet, autoencoder, denoiser.text_encoder, metadata)
    checkpoint.save(place.start, model, metadata)


def read_clips(place: Place, name: str) -> Latents:
    """Clips that `prepare` wrote: "training" or "held_out"."""
    tensors = load_file(place.clips)
    return Latents(tensors[f"{name}.latents"], tensors[f"{name}.tokens"])


def begin(place: Place, name: str, seed: int) -> checkpoint.Model:
    """The shared start under the merge `name`, which has fresh weights and changes nothing yet."""
    model = checkpoint.load(place.start)
    unet = replace(model.config.unet, **MERGES[name])
    torch.manual_seed(seed)
    fresh = VideoUNet(unet)
    unknown = fresh.load_state_dict(model.unet.state_dict(), strict=False).unexpected_keys
    assert not unknown, unknown
    return replace(model, config=replace(model.config, unet=unet), unet=fresh)


@torch.no_grad()
def validate(model: checkpoint.Model, data: Latents, quantiles: int) -> list[float]:
    """The loss on `data` in each of `quantiles` equal parts of the noise schedule, always with the same noise."""
    model.unet.eval()
    schedule = NoiseSchedule.from_config(model.config.diffusion)
    device = next(model.unet.parameters()).device
    losses: list[list[float]] = [[] for _ in range(quantiles)]
    for first in range(0, len(data.latents), 8):
        latents = data.latents[first : first + 8].float().to(device)
        context = model.text_encoder(data.tokens[first : first + 8].to(device))
        for found, level in zip(losses, quantile_levels(latents, schedule, quantiles, first), strict=True):
            error = (model.unet(level.latents, level.timesteps, context).float() - level.target).square()
            found.extend(error.mean(dim=(1, 2, 3, 4)).tolist())
    return [mean(found) for found in losses]


def sample(model: checkpoint.Model, samples: int, seed: int) -> dict[str, float]:
    """What the shape checker says of one clip of each of `samples` held-out combinations, as shares."""
    chosen = [HELD_OUT[7 * i % len(HELD_OUT)] for i in range(samples)]
    frames = [generate(model, caption(combination), seed=seed) for combination in chosen]
    verdicts = [check(rearrange(clip, "F H W C -> C F H W") * 2 - 1) for clip in frames]
    return summarise(zip(chosen, verdicts, strict=True))


def compare_one(recipe: ModelRecipe, place: Place, name: str, seed: int, budget: Budget) -> None:
    """One run, from the shared start to its result on disk."""

    def log(line: str) -> None:
        print(f"{name}, seed {seed}: {line}", flush=True)

    accelerator = Accelerator(mixed_precision=recipe.precision, cpu=not torch.cuda.is_available())
    model = begin(place, name, seed).to(accelerator.device)
    held_out = read_clips(place, "held_out")
    before = validate(model, held_out, budget.quantiles)
    log(f"validation loss {mean(before):.5f} before training")
    text = model.config.text
    denoiser = Denoiser(
        model.unet,
        budget.objective,
        NoiseSchedule.from_config(model.config.diffusion),
        Tokenizer(pad_token(text), text.max_tokens)(""),
        text_encoder=model.text_encoder,
    )
    states = States(place.folder / "states", place.result(name, seed).stem, accelerator, 1)
    clips = read_clips(place, "training")
    batches = LatentBatches(clips, budget.schedule.batch_size, None, 1, seed, Process())
    losses = train(denoiser, batches, budget.schedule, accelerator, states, log, seed=seed, frames_in=frames_in)
    after = validate(model, held_out, budget.quantiles)
    log(f"validation loss {mean(after):.5f}")
    scores = sample(model, budget.samples, seed)
    result = {
        "merge": name,
        "seed": seed,
        "budget": asdict(budget),
        "parameters": sum(p.numel() for p in model.unet.parameters()),
        "before": before,
        "after": after,
        "scores": scores,
        "losses": losses,
        "torch": torch.__version__,
        "device": accelerator.device.type,
    }
    write_text(place.result(name, seed), json.dumps(result))
    states.clear()
    log("  ".join(f"{key} {share:.0%}" for key, share in scores.items()))


def start_worker() -> None:
    """One thread for each; and a worker ends with the command, also a killed one, and takes up no other run."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_command()


def compare(
    recipe: ModelRecipe, folder: Path, budget: Budget, seeds: Sequence[int], workers: int
) -> dict[str, list[dict[str, Any]]]:
    """The results of every merge, one a seed; those that are not in `folder` yet are made side by side."""
    place = Place(folder)
    # Seed by seed, so that an unfinished comparison compares all merges.
    missing = [(name, seed) for seed in seeds for name in MERGES if place.read(name, seed, budget) is None]
    if missing:
        prepare(recipe, place, budget)
    if workers == 1:
        for name, seed in missing:
            compare_one(recipe, place, name, seed, budget)
    elif missing:
        # A run is too small to profit from several threads, but many runs fit beside each other.
        with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
            for done in as_completed([pool.submit(compare_one, recipe, place, *run, budget) for run in missing]):
                done.result()
    found = {name: [place.read(name, seed, budget) for seed in seeds] for name in MERGES}
    return {name: [result for result in results if result is not None] for name, results in found.items()}


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(results: dict[str, list[dict[str, Any]]], budget: Budget) -> str:
    """The comparison in Markdown: the mean over the seeds, their standard deviation, and each seed."""
    first = next(iter(results.values()))
    seeds = [f"seed {result['seed']}" for result in first]
    quantiles = [f"at {(i + 0.5) / budget.quantiles:g}" for i in range(budget.quantiles)]
    lines = [row(["validation loss", "mean", "deviation", *seeds, *quantiles, "U-Net weights"])]
    lines.append(row(["---"] * (4 + len(seeds) + len(quantiles))))
    start = first[0]["before"]
    lines.append(row(["(start)", f"{mean(start):.5f}", "", *[""] * len(seeds), *(f"{x:.5f}" for x in start), ""]))
    for name, found in results.items():
        losses = [mean(result["after"]) for result in found]
        by_quantile = [mean(at) for at in zip(*(result["after"] for result in found), strict=True)]
        numbers = [mean(losses), spread(losses), *losses, *by_quantile]
        lines.append(row([name, *(f"{x:.5f}" for x in numbers), f"{found[0]['parameters'] / 1e6:.2f} M"]))
    lines += ["", row(["checker, mean (each seed)", *SCORES]), row(["---"] * (1 + len(SCORES)))]
    for name, found in results.items():
        shares = [[result["scores"][score] for result in found] for score in SCORES]
        cells = [f"{mean(each):.0%} ({', '.join(f'{share:.0%}' for share in each)})" for each in shares]
        lines.append(row([name, *cells]))
    return "\n".join(lines)


def spread(values: Sequence[float]) -> float:
    """Standard deviation, 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def report() -> None:
    """Make what is missing of the comparison in `runs/merges`, then print its tables."""
    budget = Budget()
    recipe = read_recipe(RECIPE)
    assert isinstance(recipe, ModelRecipe)
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    try:
        workers = max(1, int(os.environ.get(WORKERS, cores)))
    except ValueError:
        sys.exit(f"{WORKERS}={os.environ[WORKERS]!r} is not a number of processes")
    results = compare(recipe, FOLDER, budget, SEEDS, workers)
    device, steps = results["none"][0]["device"], budget.schedule.steps
    print(f"{steps} steps of {budget.schedule.batch_size} clips on {device}, torch {torch.__version__};", end=" ")
    print(f"{budget.clips} held-out clips for the loss, {budget.samples} samples a run for the checker")
    print(table(results, budget))
