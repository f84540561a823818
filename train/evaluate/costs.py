"""What networks cost beside each other: weights, time and peak memory of a forward pass and of a training step."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from accelerate import Accelerator

from videofactory_core.atomic import write_text
from videofactory_core.config import ModelConfig, UNetConfig
from videofactory_core.diffusion import Schedule as NoiseSchedule
from videofactory_core.memory import is_out_of_memory
from videofactory_core.objective import Objective
from videofactory_core.unet.model import VideoUNet

from ..data.batches import Batch
from ..denoiser import Denoiser, choose_layers, store_weights
from ..loop import Schedule, peak_gib, train
from ..processes import end_with_command
from ..state import States
from ..workspace import PRECISIONS

# Forward passes are repeated so often, or for so many seconds; training steps so often, behind one that warms up.
PASSES, SECONDS, STEPS = 3, 0.5, 3


@dataclass(frozen=True)
class Workload:
    """What networks are given: noise in the sizes of a training, as latents `[C, frames, height, width]`."""

    model: ModelConfig
    frames: int
    height: int
    width: int
    schedule: Schedule
    objective: Objective
    # Names of the weights that train, as in a recipe; "" is all.
    layers: str
    precision: str
    device: str
    gradient_checkpointing: bool = False

    def batch(self, clips: int) -> Batch:
        """Noise for a batch of `clips`."""
        device, text = torch.device(self.device), self.model.text
        latents = (clips, self.model.autoencoder.latent_channels, self.frames, self.height, self.width)
        context = torch.randn(clips, text.max_tokens, text.width, device=device)
        return Batch(("",) * clips, torch.randn(latents, device=device), context)


@dataclass(frozen=True)
class Cost:
    """Seconds and peak GiB, weights included, of a forward pass over one clip, and of a training step."""

    parameters: int
    forward_seconds: float
    forward_gib: float
    step_seconds: float
    step_gib: float


def measure(workload: Workload, unet: UNetConfig) -> Cost:
    """The cost of a network in this process, which should be a fresh one: on a CPU its peak counts from the start."""
    device = torch.device(workload.device)
    before = 0.0 if device.type == "cuda" else peak_gib(device)
    parameters, forward_seconds = _forward(workload, unet)
    forward_gib = peak_gib(device) - before
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step_seconds = _step(workload, unet)
    return Cost(parameters, forward_seconds, forward_gib, step_seconds, peak_gib(device) - before)


@torch.no_grad()
def _forward(workload: Workload, config: UNetConfig) -> tuple[int, float]:
    """How many weights, stored in the precision of the training, and the median time of a pass over one clip."""
    device, dtype = torch.device(workload.device), PRECISIONS[workload.precision] or torch.float32
    unet = VideoUNet(config, device=device, dtype=dtype).eval()
    for weight in unet.parameters():
        # Nothing may be skipped for being zero.
        weight.normal_(std=0.02)
    batch = workload.batch(1)
    latents, context = batch.latents.to(dtype), batch.context.to(dtype)
    timesteps = torch.full((1,), workload.model.diffusion.num_timesteps // 2, device=device)
    seconds: list[float] = []
    for number in itertools.count():
        start = time.perf_counter()
        unet(latents, timesteps, context)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            seconds.append(time.perf_counter() - start)
        if len(seconds) >= PASSES and sum(seconds) > SECONDS:
            break
    return sum(weight.numel() for weight in unet.parameters()), statistics.median(seconds)


def _step(workload: Workload, config: UNetConfig) -> float:
    """The median time of a step of the training loop."""
    device = torch.device(workload.device)
    dtype = PRECISIONS[workload.precision]
    accelerator = Accelerator(
        mixed_precision="no" if dtype is None else workload.precision,
        cpu=device.type == "cpu",
        gradient_accumulation_steps=workload.schedule.gradient_accumulation_steps,
    )
    unet = VideoUNet(config, device=device)
    choose_layers(unet, workload.layers)
    store_weights(unet, dtype)
    unet.gradient_checkpointing = workload.gradient_checkpointing
    batch = workload.batch(workload.schedule.batch_size)
    noise = NoiseSchedule.from_config(workload.model.diffusion)
    denoiser = Denoiser(unet, workload.objective, noise, batch.context[0])
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            denoiser,
            lambda _: itertools.repeat(batch),
            replace(workload.schedule, steps=1 + STEPS, log_every=1, save_every=1 + STEPS),
            accelerator,
            States(Path(folder), "cost", accelerator),
            lambda line: None,
            seed=0,
            note=lambda _, figures: seconds.append(figures["seconds_per_step"]),
        )
    return statistics.median(seconds[1:])


Round = dict[str, "Cost | None"]


def measure_all(
    workload: Workload, networks: Mapping[str, UNetConfig], rounds: int, file: Path, log: Callable[[str], None]
) -> list[Round]:
    """The costs of every network in turn, `rounds` times over, each in a process of its own; None: out of memory.

    In turn, so that a machine whose speed drifts does not favour one of them. Whole rounds that stand in `file` and
    have all of `networks` are not measured again if they are of the same workload on the same machine.
    """
    settings = _settings(workload)
    found = [done for done in read_rounds(file, settings) if done.keys() >= networks.keys()][:rounds]
    while len(found) < rounds:
        log(f"time and memory of {len(networks)} networks, round {len(found) + 1} of {rounds}")
        found.append({name: _measure_alone(workload, config) for name, config in networks.items()})
        costs = [{name: cost and asdict(cost) for name, cost in done.items()} for done in found]
        write_text(file, json.dumps({"settings": settings, "rounds": costs}, indent=1))
    return found


def read_rounds(file: Path, settings: str | None = None) -> list[Round]:
    """The rounds that stand in a file, if they have these settings; None takes any."""
    if not file.is_file():
        return []
    data = json.loads(file.read_text(encoding="utf-8"))
    if settings not in (None, data["settings"]):
        return []
    return [{name: cost and Cost(**cost) for name, cost in done.items()} for done in data["rounds"]]


def ratio(rounds: Sequence[Round], name: str, other: str, field: str) -> float:
    """How many times `field` of network `name` is that of `other`: the median over rounds; nan where there is none."""
    pairs = [(done.get(name), done.get(other)) for done in rounds]
    ratios = [getattr(one, field) / getattr(two, field) for one, two in pairs if one and two and getattr(two, field)]
    return statistics.median(ratios) if ratios else math.nan


def median(rounds: Sequence[Round], name: str, field: str) -> float:
    """The median of `field` over rounds; nan where there is none."""
    values = [getattr(cost, field) for done in rounds if (cost := done.get(name))]
    return statistics.median(values) if values else math.nan


def _settings(workload: Workload) -> str:
    """All that costs depend on besides the network's own settings, as text."""
    device = torch.device(workload.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    # Of the schedule, what costs do not depend on.
    schedule = replace(workload.schedule, steps=1, log_every=1, save_every=1, keep=1)
    return json.dumps({**asdict(replace(workload, schedule=schedule)), "torch": torch.__version__, "machine": name})


def _measure_alone(workload: Workload, unet: UNetConfig) -> Cost | None:
    """`measure` in a process of its own; None when memory runs out, for which a system may also end the process."""
    with ProcessPoolExecutor(1, get_context("spawn"), end_with_command) as pool:
        try:
            return pool.submit(measure, workload, unet).result()
        except RuntimeError as error:
            if is_out_of_memory(error) or isinstance(error, BrokenProcessPool):
                return None
            raise
