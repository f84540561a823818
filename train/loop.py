"""The training loop: the same few lines for every part of the model."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from videofactory_core.objective import learning_rate_share, seed_for

from . import optimizer as optimizers
from .processes import peak_memory
from .state import States

# So many steps in a row without a finite loss are no accident.
MAX_BAD_STEPS = 5


@dataclass(frozen=True)
class Schedule:
    """How long a stage trains and how fast it learns."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    # The learning rate falls along a cosine to this share of itself, or stays.
    lr_scheduler: Literal["cosine", "constant"] = "cosine"
    final_share: float = 0.05
    optimizer: optimizers.Name = "adamw"
    weight_decay: float = 0.01
    # Each step learns from so many batches, one after the other.
    gradient_accumulation_steps: int = 1
    # 0 is no average: the result is the weights of the last step.
    ema_decay: float = 0.999
    # The average lies in the memory of the CPU, and the optimiser steps there, save those of 8 bits.
    offload: bool = False
    clip_norm: float = 1.0
    log_every: int = 1
    # An interrupted run goes on from the last multiple of this many steps, or from where Ctrl-C stopped it.
    save_every: int = 250
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} is too few; use 1 or more")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: {self.learning_rate} teaches nothing; use a number above 0 such as 1e-4")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: {self.ema_decay} is no share; use 0 (off) or a number below 1 such as 0.999")
        if not self.clip_norm > 0:
            raise ValueError(f"clip_norm: {self.clip_norm} would stop all learning; use 1.0, or 1e9 for no limit")

    def share_at(self, step: int) -> float:
        """Learning rate of a step as a share of the highest."""
        final_share = 1.0 if self.lr_scheduler == "constant" else self.final_share
        return learning_rate_share(step, self.steps, self.warmup_steps, final_share)


class Average:
    """Exponential moving average of a module's trained weights, in float32, on their device or on `device`."""

    def __init__(self, module: nn.Module, decay: float, device: torch.device | None = None) -> None:
        self.decay = decay
        self.weights: list[Tensor] = [p for p in module.parameters() if p.requires_grad] if decay else []
        self.average = [p.detach().to(device, torch.float32, copy=True) for p in self.weights]
        self.step = 0

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        # Early averages would otherwise remember the random start.
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        if self.average:
            torch._foreach_lerp_(self.average, self._weights_there(), 1 - decay)

    def _weights_there(self) -> list[Tensor]:
        return [weight.detach().to(average) for weight, average in zip(self.weights, self.average, strict=True)]

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Replace the trained weights by their average."""
        for weight, average in zip(self.weights, self.average, strict=True):
            weight.copy_(average)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module with its averages, as long as this lasts; its own weights wait where those were."""
        pairs = zip(self.weights, self.average, strict=True)
        kept = [weight.detach().to(average.device, copy=True) for weight, average in pairs]
        self.copy_to_module()
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, before in zip(self.weights, kept, strict=True):
                    weight.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, **{str(i): average for i, average in enumerate(self.average)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        for i, average in enumerate(self.average):
            average.copy_(state[str(i)])


@dataclass(frozen=True)
class Event:
    """What is done before the first step, every `every` steps and after the last: `run(step)` returns what to note.

    It sees the averaged weights, and may draw random numbers and change the module's mode.
    """

    every: int
    run: Callable[[int], dict[str, float]]


class Interrupts:
    """Whether Ctrl-C was pressed: the first waits for the end of the step, the second stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Interrupts:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGINT, self.before)


class Meter:
    """Time and memory of a run, as the line that a step prints."""

    def __init__(self, schedule: Schedule, world: int, unit: str, device: torch.device) -> None:
        self.schedule, self.world, self.unit, self.device = schedule, world, unit, device
        self.restart()

    def restart(self) -> None:
        """Begin again behind a line, or behind what does not belong to a step."""
        self.since, self.waited, self.steps, self.frames = time.perf_counter(), 0.0, 0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For the time that the loop waits for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def figures(self, step: int, loss: float, learning_rate: float) -> dict[str, float]:
        """The numbers of the steps since the last line."""
        seconds = time.perf_counter() - self.since
        items = self.steps * self.schedule.batch_size * self.schedule.gradient_accumulation_steps * self.world
        figures = {
            "loss": loss,
            "learning_rate": learning_rate,
            f"{self.unit}_per_second": items / seconds,
            "peak_gib": peak_gib(self.device),
            "data_wait": self.waited / seconds,
            "seconds_per_step": seconds / self.steps,
            "seconds_left": seconds / self.steps * (self.schedule.steps - step),
        }
        if self.frames:
            figures["frames_per_second"] = self.frames * self.world / seconds
        return figures

    def line(self, step: int, figures: Mapping[str, float]) -> str:
        frames = f"  {figures['frames_per_second']:.1f} frames/s" if self.frames else ""
        return (
            f"step {step}/{self.schedule.steps}  loss {figures['loss']:.4f}  lr {figures['learning_rate']:.2e}"
            f"  {figures[f'{self.unit}_per_second']:.2f} {self.unit}/s{frames}  peak {figures['peak_gib']:.2f} GiB"
            f"  data wait {figures['data_wait']:.1%}  ETA {timedelta(seconds=round(figures['seconds_left']))}"
        )


def peak_gib(device: torch.device) -> float:
    """The most memory that was in use: of the GPU by PyTorch, or, on a CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_memory() / 2**30


def train(
    module: nn.Module,
    batches: Callable[[int], Iterator[Any]],
    schedule: Schedule,
    accelerator: Accelerator,
    states: States,
    log: Callable[[str], None],
    *,
    seed: int,
    unit: str = "clips",
    frames_in: Callable[[Any], int] = lambda batch: 0,
    events: Sequence[Event] = (),
    note: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
) -> list[float]:
    """Train `module`, whose forward maps a batch to a scalar loss, and leave the averaged weights in it.

    `batches(n)` yields this process's part of batch number n and of those behind it. What forward draws depends on
    `seed` and the number of the batch alone, so that a run that goes on from one of `states` gives the numbers of one
    that was never interrupted. Returns the loss of every step, the mean over batches and processes. Raises ValueError
    when the loss stays infinite, KeyboardInterrupt, with the state saved, on Ctrl-C.
    """
    device = accelerator.device
    optimizer = optimizers.build(
        schedule.optimizer,
        module,
        schedule.learning_rate,
        schedule.weight_decay,
        offload=schedule.offload and not schedule.optimizer.endswith("8bit"),
        sharded=accelerator.distributed_type == DistributedType.FSDP,
    )
    model, optimizer = accelerator.prepare(module, optimizer)
    # FSDP has put other weights into the module.
    trained = accelerator.unwrap_model(model)
    average = Average(trained, schedule.ema_decay, torch.device("cpu") if schedule.offload else None)
    accelerator.register_for_checkpointing(average)
    losses: list[float] = []
    if (progress := states.load()) is not None:
        losses = progress["losses"]
        log(f"going on from step {len(losses)}")
    parts = schedule.gradient_accumulation_steps
    # On a CPU the backward pass of fused attention over short sequences takes twice the time of plain products.
    plain_attention = device.type == "cpu"
    meter = Meter(schedule, accelerator.num_processes, unit, device)

    def happen(step: int, due: Sequence[Event]) -> None:
        for event in due:
            with average.applied():
                note(step, event.run(step))
            model.train()
        if due:
            meter.restart()

    model.train()
    if not losses:
        happen(0, events)
    items = batches(len(losses) * parts)
    bad = 0
    logged = len(losses)
    save_at = len(losses) + schedule.save_every - len(losses) % schedule.save_every
    meter.restart()
    with Interrupts() as interrupts:
        while len(losses) < schedule.steps:
            step = len(losses)
            learning_rate = schedule.learning_rate * schedule.share_at(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            total = torch.zeros((), device=device)
            for number in range(step * parts, (step + 1) * parts):
                with meter.waiting():
                    batch = next(items)
                meter.frames += frames_in(batch)
                # Behind the batch, because a loader draws a number when it starts.
                torch.manual_seed(seed_for(seed, number))
                with accelerator.accumulate(model):
                    with sdpa_kernel(SDPBackend.MATH) if plain_attention else nullcontext():
                        # Under FSDP the prepared module does not do so by itself.
                        with accelerator.autocast():
                            loss = model(batch)
                        accelerator.backward(loss)
                    total += loss.detach() / parts
                    if not accelerator.sync_gradients:
                        continue
                    norm = accelerator.clip_grad_norm_(model.parameters(), schedule.clip_norm)
                    noted = accelerator.reduce(torch.stack([total, total.new_tensor(interrupts.asked)]), "mean")
                    value, stop = noted.tolist()
                    # A scaler leaves out steps with infinite gradients by itself.
                    scaled = accelerator.scaler is not None
                    good = math.isfinite(value) and (scaled or norm is None or math.isfinite(float(norm)))
                    if good or scaled:
                        optimizer.step()
                    optimizer.zero_grad()
            losses.append(value)
            meter.steps += 1
            bad = 0 if good else bad + 1
            if good:
                average.update()
            elif bad == MAX_BAD_STEPS:
                raise ValueError(
                    f"the loss was no finite number in {bad} steps up to {step + 1}; lower learning_rate in the "
                    "recipe, or set precision to bf16 or fp32"
                )
            done = step + 1
            last = done == schedule.steps
            if done % schedule.log_every == 0 or last:
                recent = [loss for loss in losses[logged:] if math.isfinite(loss)]
                figures = meter.figures(done, sum(recent) / len(recent) if recent else math.nan, learning_rate)
                log(meter.line(done, figures))
                note(done, figures)
                logged = done
                meter.restart()
            happen(done, [event for event in events if done % event.every == 0 or last])
            if not bad and not last and (stop or done >= save_at):
                if states.save(done, {"losses": losses}):
                    save_at = done + schedule.save_every - done % schedule.save_every
                else:
                    save_at = done + max(1, schedule.save_every // 10)
                    log(f"the state of step {done} could not be written; the next try is at step {save_at}")
            if stop and not last:
                raise KeyboardInterrupt
    average.copy_to_module()
    module.eval()
    accelerator.free_memory()
    return losses
