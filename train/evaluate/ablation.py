"""The paper's claim on data of your own: what the merge at block ends brings, everything else being the same.

Every run begins with one model, whose own merges at block ends are left out: with fresh ones each row says s + t at
first. All see the same batches with the same noise, and are measured on the same clips, which no training saw. The
rows of Swap-CA have the same weights at the start and differ only in who asks whom, and how far.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
from accelerate import Accelerator
from torch import Tensor

from videofactory_core import checkpoint
from videofactory_core.atomic import write_text
from videofactory_core.config import PRESETS, from_dict
from videofactory_core.diffusion import Schedule as NoiseSchedule
from videofactory_core.memory import is_out_of_memory, pick_device
from videofactory_core.objective import quantile_levels
from videofactory_core.pipeline import generate
from videofactory_core.unet.model import VideoUNet

from ..data.batches import Batch
from ..data.content import checksum
from ..denoiser import Denoiser, Latents, choose_layers, frames_in, store_weights
from ..processes import end_with_command
from ..recipe import ModelRecipe, read_recipe
from ..workspace import Workspace
from .bench import Bench, Budget, Place, UNetRecipe, budget_of, datasets_of, open_bench, prepare, settled, write_clips
from .costs import Round, Workload, measure_all, read_rounds
from .merges import ROWS, choose
from .result import RESULTS, Scores, check_comparable, read_results, write_results

# How often the costs of all rows are measured.
ROUNDS = 3
# How far, as a share, losses before training may lie apart by rounding alone.
ALIKE = 0.01

Run = tuple[str, int]
# Scores sampled videos beside real ones, both in folders.
Score = Callable[[Path, Path], Scores]


@dataclass(frozen=True)
class Outcome:
    """What became of a run: its validation loss in each part of the noise schedule, before and after, and scores."""

    merge: str
    seed: int
    budget: Budget
    parameters: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    # Shares of sampled clips in which the checker of moving shapes finds what was asked for; {} for other data.
    scores: Mapping[str, float]
    losses: tuple[float, ...]
    torch: str
    device: str
    # The checksum of the model that it began with, and what it learned from; "" in files that do not say.
    start: str = ""
    data: str = ""

    @property
    def loss(self) -> float:
        """The validation loss behind the training."""
        return mean(self.after)


@dataclass(frozen=True)
class Comparison:
    """The outcomes of every row, by seed; what is missing, and why; and what the networks cost, in rounds."""

    place: Place
    budget: Budget
    seeds: Sequence[int]
    outcomes: Mapping[str, Sequence[Outcome]]
    missing: Mapping[Run, str]
    costs: Sequence[Round] = ()

    def scores(self, outcome: Outcome) -> Scores | None:
        """What a metric of videos says of a run's samples, if they have been scored."""
        folder = self.place.samples(outcome.merge, outcome.seed)
        return read_results(folder) if (folder / RESULTS).is_file() else None


def read_outcome(place: Place, name: str, seed: int, budget: Budget) -> Outcome | None:
    """What a finished run has written, None where there is none; ValueError where it had another budget."""
    path = place.result(name, seed)
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        numbers = {key: tuple(data[key]) for key in ("before", "after", "losses")}
        outcome = Outcome(**{**data, **numbers, "budget": from_dict(Budget, data["budget"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of an ablation ({error}): delete it to have it made again") from error
    if different := outcome.budget.differences(budget):
        raise ValueError(f"{path} has another budget: {', '.join(different)}; ask for the same, or name another folder")
    return outcome


def begin(model: checkpoint.Model, name: str, seed: int) -> checkpoint.Model:
    """`model` under the merge of row `name`, which has fresh weights and changes nothing yet: s + t at block ends."""
    config = ROWS[name].config(model.config.unet)
    torch.manual_seed(seed)
    fresh = VideoUNet(config)
    shared = VideoUNet(replace(config, merge="add"), device="meta").state_dict().keys()
    weights = {key: weight for key, weight in model.unet.state_dict().items() if key in shared}
    assert weights.keys() == shared
    assert not fresh.load_state_dict(weights, strict=False).unexpected_keys
    return replace(model, config=replace(model.config, unet=config), unet=fresh)


def computing(unet: VideoUNet, accelerator: Accelerator) -> AbstractContextManager[None]:
    """In float32 where all weights are, else in the precision of the training."""
    whole = all(weight.dtype == torch.float32 for weight in unet.parameters())
    return nullcontext() if whole else accelerator.autocast()


@torch.no_grad()
def validate(
    model: checkpoint.Model, held_out: Sequence[Batch | Latents], quantiles: int, accelerator: Accelerator
) -> tuple[float, ...]:
    """The loss on clips in each of `quantiles` equal parts of the noise schedule, always with the same noise."""
    model.unet.eval()
    device = accelerator.device
    schedule = NoiseSchedule.from_config(model.config.diffusion)
    losses: list[list[float]] = [[] for _ in range(quantiles)]
    with computing(model.unet, accelerator):
        for batch in held_out:
            latents = batch.latents.float().to(device)
            if isinstance(batch, Latents):
                context = model.text_encoder(batch.tokens.to(device))
            else:
                context = batch.context.to(device)
            levels = quantile_levels(latents, schedule, quantiles, len(losses[0]))
            for found, level in zip(losses, levels, strict=True):
                error = (model.unet(level.latents, level.timesteps, context).float() - level.target).square()
                found.extend(error.mean(dim=(1, 2, 3, 4)).tolist())
    return tuple(mean(found) for found in losses)


def sample(
    bench: Bench, model: checkpoint.Model, budget: Budget, seed: int, accelerator: Accelerator
) -> list[tuple[str, Tensor]]:
    """Prompts in turn with clips `[F, H, W, 3]` of them; when all had one, again with other seeds."""
    found = []
    with computing(model.unet, accelerator):
        for number in range(budget.samples):
            lap, place = divmod(number, len(bench.prompts))
            prompt = bench.prompts[place]
            found.append((prompt, generate(model, prompt, seed=seed + 1000 * lap, **asdict(budget.sampling))))
    return found


def carry_out(recipe: UNetRecipe, place: Place, name: str, seed: int, budget: Budget) -> None:
    """One run, from the start that all share to its result on disk; goes on where it was interrupted."""
    work = Workspace(recipe, place.work(budget), resume=True)
    stem = place.result(name, seed).stem
    bench = open_bench(recipe, place, budget, seed, work)
    model = begin(bench.model, name, seed)
    choose_layers(model.unet, budget.layers)
    store_weights(model.unet, work.dtype)
    model.autoencoder.float().requires_grad_(False)
    model.text_encoder.float().requires_grad_(budget.text)
    if not isinstance(recipe, ModelRecipe):
        model.unet.gradient_checkpointing = recipe.gradient_checkpointing
    module = Denoiser(
        model.unet,
        budget.objective,
        NoiseSchedule.from_config(model.config.diffusion),
        bench.empty,
        text_encoder=model.text_encoder if isinstance(bench.held_out[0], Latents) else None,
    ).to(work.device)
    before = validate(model, bench.held_out, budget.quantiles, work.accelerator)
    work.log(f"{stem}  validation loss {mean(before):.5f} before training")
    work.train(stem, module, bench.batches, budget.schedule, seed, only_trained=True, frames_in=frames_in)
    after = validate(model, bench.held_out, budget.quantiles, work.accelerator)
    work.log(f"{stem}  validation loss {mean(after):.5f}")
    clips = sample(bench, model.to(work.device), budget, seed, work.accelerator)
    if clips:
        write_clips(place.samples(name, seed), clips, model.config.fps)
    trained, losses = (work.folder / f"{stem}.{end}" for end in ("safetensors", "losses.json"))
    outcome = Outcome(
        merge=name,
        seed=seed,
        budget=budget,
        parameters=sum(weight.numel() for weight in model.unet.parameters()),
        before=before,
        after=after,
        scores=bench.judge([frames for _, frames in clips]),
        losses=tuple(json.loads(losses.read_text(encoding="utf-8"))),
        torch=torch.__version__,
        device=work.device.type,
        start=checksum(bench.start),
        data=bench.data,
    )
    write_text(place.result(name, seed), json.dumps(asdict(outcome)))
    trained.unlink()
    losses.unlink()
    work.log("  ".join([stem, "done", *(f"{key} {share:.0%}" for key, share in outcome.scores.items())]))


def attempt(recipe: UNetRecipe, place: Place, name: str, seed: int, budget: Budget) -> str:
    """`carry_out`; returns "", or why it could not be: a network too large for the machine does not stop the others."""
    try:
        carry_out(recipe, place, name, seed, budget)
    except RuntimeError as error:
        if is_out_of_memory(error):
            return "out of memory"
        raise
    return ""


def start_worker() -> None:
    """One thread for each; and a worker ends with the command, also a killed one, and takes up no other run."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_command()


def compare(
    recipe: UNetRecipe,
    folder: Path,
    rows: Sequence[str],
    seeds: Sequence[int],
    budget: Budget,
    workers: int,
    *,
    train: bool = True,
) -> Comparison:
    """The outcomes of every row, one a seed; those that are not in `folder` yet are made, `workers` side by side.

    Without `train` none is made. Raises ValueError where they do not compare: with another budget, from another start,
    or on other data.
    """
    place = Place(folder)
    # Seed by seed, so that an unfinished comparison compares all rows.
    runs = [(name, seed) for seed in seeds for name in rows]
    todo = [run for run in runs if read_outcome(place, *run, budget) is None]
    problems: dict[Run, str] = {}
    if todo and train:
        print(f"{len(todo)} of {len(runs)} runs to do, {min(workers, len(todo))} at a time, in {folder}", flush=True)
        prepare(recipe, place, budget)
        problems = _carry_out_all(recipe, place, todo, budget, workers)
    found = {run: read_outcome(place, *run, budget) for run in runs}
    outcomes = {name: [outcome for seed in seeds if (outcome := found[name, seed])] for name in rows}
    check_alike([outcome for of_row in outcomes.values() for outcome in of_row], folder)
    missing = {
        run: problems.get(run) or f"{place.step(*run, budget)} of {budget.schedule.steps} steps"
        for run in runs
        if found[run] is None
    }
    return Comparison(place, budget, seeds, outcomes, missing)


def check_alike(outcomes: Sequence[Outcome], folder: Path) -> None:
    """ValueError when runs began with other models, or learned from or were measured on other data."""
    for what in ("start", "data"):
        if len(values := {getattr(outcome, what) for outcome in outcomes} - {""}) > 1:
            raise ValueError(
                f"results in {folder} do not compare, for their {what} is {' or '.join(sorted(values))}: name another"
                " folder, or delete the results of one of them"
            )
    for outcome in outcomes:
        # All begin as s + t, so that this tells another start or other clips also where neither was noted.
        if any(abs(one - two) > ALIKE * one for one, two in zip(outcomes[0].before, outcome.before, strict=True)):
            raise ValueError(
                f"results in {folder} do not compare: before training {outcome.merge}, seed {outcome.seed}, had another"
                f" loss than {outcomes[0].merge}, seed {outcomes[0].seed}; delete the results of one start"
            )


def _carry_out_all(
    recipe: UNetRecipe, place: Place, runs: Sequence[Run], budget: Budget, workers: int
) -> dict[Run, str]:
    """Carry out runs; returns those that could not be, and why."""
    if workers == 1:
        return {run: problem for run in runs if (problem := attempt(recipe, place, *run, budget))}
    # A small run does not profit from several threads, but many fit beside each other.
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker) as pool:
        futures = {pool.submit(attempt, recipe, place, *run, budget): run for run in runs}
        try:
            return {futures[done]: problem for done in as_completed(futures) if (problem := done.result())}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def workload_of(recipe: UNetRecipe, budget: Budget) -> Workload:
    """What a run's network is given, in the largest of the recipe's sizes."""
    if isinstance(recipe, ModelRecipe):
        config = PRESETS[recipe.preset]
    else:
        config = checkpoint.check(recipe.checkpoint)[0].config
    datasets = datasets_of(recipe)
    sizes = [size for dataset in datasets for size in dataset.sizes] or [(config.width, config.height)]
    frames = [count for dataset in datasets for count in dataset.frames] or [config.frames]
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    cell = config.autoencoder.downscale
    return Workload(
        config,
        max(frames),
        height // cell,
        width // cell,
        budget.schedule,
        budget.objective,
        budget.layers,
        recipe.precision,
        device_of(recipe),
        not isinstance(recipe, ModelRecipe) and recipe.gradient_checkpointing,
    )


def device_of(recipe: UNetRecipe) -> str:
    """Where the recipe computes: what it asks for, or the best there is."""
    return pick_device().type if recipe.device == "auto" else recipe.device


def ablation(
    path: Path,
    *,
    changes: Sequence[str] = (),
    out: Path | None = None,
    rows: Sequence[str] = (),
    seeds: int = 3,
    steps: int | None = None,
    samples: int | None = None,
    workers: int | None = None,
    train: bool = True,
    rounds: int = ROUNDS,
    score: Score | None = None,
) -> Comparison:
    """Make what is missing of the paper's rows on a recipe's data, and print the paper's tables with these beside them.

    path, changes: the recipe, as in `read_recipe`. out: the folder of the comparison, by default `ablation` beside the
    recipe's output. rows: by name, by default all. seeds: so many, from 0 on. steps: of each run, by default those of
    the recipe's first stage with Swap-CA. samples: clips that each run samples. workers: runs side by side, by default
    one, or one a core for drawn clips without a GPU. train: without it nothing is made, and what is there is shown.
    rounds: how often time and memory of every row are measured. score: what else to say of sampled videos; done once
    for each run, and kept beside them.

    Raises ValueError for what cannot be compared; started again it goes on where it was interrupted.
    """
    from .ablation_table import tables

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("an ablation is one process: start it without accelerate launch")
    if seeds < 1 or (workers is not None and workers < 1):
        raise ValueError("seeds and workers are counts: use 1 or more")
    chosen = choose(rows)
    recipe = settled(read_recipe(path, changes))
    budget = budget_of(recipe, steps, samples)
    folder = out or Path(recipe.output).parent / "ablation"
    small = not datasets_of(recipe) and device_of(recipe) == "cpu"
    workers = workers or ((os.cpu_count() or 1) if small else 1)
    found = compare(recipe, folder, chosen, range(seeds), budget, workers, train=train)
    costs = found.place.costs
    if train:
        workload = workload_of(recipe, budget)
        networks = {name: ROWS[name].config(workload.model.unet) for name in chosen}
        found = replace(
            found, costs=measure_all(workload, networks, rounds, costs, lambda line: print(line, flush=True))
        )
    else:
        found = replace(found, costs=read_rounds(costs))
    if score is not None:
        score_all(found, score)
    text = tables(found)
    write_text(folder / "tables.md", text + "\n")
    print(text)
    return found


def score_all(comparison: Comparison, score: Score) -> None:
    """Score the samples of runs that have none yet; ValueError where scores do not compare."""
    place = comparison.place
    sets = {}
    for outcome in (outcome for of_row in comparison.outcomes.values() for outcome in of_row):
        folder = place.samples(outcome.merge, outcome.seed)
        if not folder.is_dir():
            continue
        if not (folder / RESULTS).is_file():
            write_results(score(folder, place.real), folder)
        sets[folder.name] = read_results(folder)
    check_comparable(sets)
