"""The training loop: the same few lines for every part of the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass(frozen=True)
class Schedule:
    """How long a stage trains and how fast it learns."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    # The learning rate falls along a cosine to this share of itself.
    final_share: float = 0.05
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    clip_norm: float = 1.0
    log_every: int = 50
    # An interrupted run goes on from the last multiple of this many steps.
    save_every: int = 250

    def share_at(self, step: int) -> float:
        """Learning rate of a step as a share of the highest."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_share + (1 - self.final_share) * 0.5 * (1 + math.cos(math.pi * done))


class Average:
    """Exponential moving average of a module's trained weights, in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        self.average = [p.detach().clone() for p in self.weights]
        self.step = 0

    @torch.no_grad()
    def update(self) -> None:
        self.step += 1
        # Early averages would otherwise remember the random start.
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, self.weights, 1 - decay)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        """Replace the trained weights by their average."""
        for weight, average in zip(self.weights, self.average, strict=True):
            weight.copy_(average)


class State:
    """What a stage needs to go on after an interruption with the same numbers, in one safetensors file."""

    def __init__(self, path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: Average) -> None:
        self.path = path
        self.module = module
        self.optimizer = optimizer
        self.average = average

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the run by name, the optimizer's moments created where they do not exist yet."""
        found = {f"module.{key}": value for key, value in self.module.state_dict().items()}
        found |= {f"average.{i}": value for i, value in enumerate(self.average.average)}
        for i, weight in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            moments = self.optimizer.state[weight]
            for name in ("exp_avg", "exp_avg_sq"):
                found[f"optimizer.{i}.{name}"] = moments.setdefault(name, torch.zeros_like(weight))
            found[f"optimizer.{i}.step"] = moments.setdefault("step", torch.zeros(()))
        return found

    def save(self, losses: list[float]) -> None:
        """Write the state after `len(losses)` steps."""
        temporary = self.path.with_suffix(".tmp")
        tensors = {key: value.contiguous() for key, value in self.tensors().items()}
        tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
        save_file(tensors, temporary)
        temporary.replace(self.path)

    @torch.no_grad()
    def load(self) -> list[float]:
        """Fill the run from the file, if there is one; returns the losses of the steps done."""
        if not self.path.is_file():
            return []
        with safe_open(self.path, "pt") as file:
            for key, value in self.tensors().items():
                value.copy_(file.get_tensor(key))
            losses: list[float] = file.get_tensor("losses").tolist()
        self.average.step = len(losses)
        return losses


def train(
    module: nn.Module,
    batches: Callable[[int], Iterator[Any]],
    loss: Callable[[Any], Tensor],
    schedule: Schedule,
    accelerator: Accelerator,
    log: Callable[[str], None],
    *,
    seed: int,
    state_path: Path,
) -> list[float]:
    """Train `module` for `schedule.steps` steps and leave the averaged weights in it.

    `batches(step)` yields the batches from that step on and `loss` maps a batch to a scalar; what `loss` draws depends
    on `seed` and the step alone, so that a run that goes on from `state_path` gives the numbers of one that was never
    interrupted. Returns the loss of every step. A line every `log_every` steps says step, loss, items a second and,
    on CUDA, peak memory.
    """
    decay = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    other = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": schedule.weight_decay}, {"params": other, "weight_decay": 0.0}],
        lr=schedule.learning_rate,
        betas=(0.9, 0.99),
        fused=True,
    )
    average = Average(module, schedule.ema_decay)
    state = State(state_path, module, optimizer, average)
    stepper = accelerator.prepare_optimizer(optimizer)
    losses = state.load()
    if losses:
        log(f"going on from step {len(losses)}")
    # On a CPU the backward pass of fused attention over short sequences takes twice the time of plain products.
    plain_attention = accelerator.device.type == "cpu"
    since, logged = time.perf_counter(), len(losses)
    module.train()
    items = batches(len(losses))
    for step in range(len(losses), schedule.steps):
        batch = next(items)
        # Behind the batch, because a loader draws a number when it starts.
        torch.manual_seed((seed << 32) + step)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * schedule.share_at(step)
        with accelerator.autocast(), sdpa_kernel(SDPBackend.MATH) if plain_attention else nullcontext():
            value = loss(batch)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(module.parameters(), schedule.clip_norm)
        stepper.step()
        stepper.zero_grad(set_to_none=True)
        average.update()
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss became {losses[-1]} at step {step + 1}; lower learning_rate in the recipe")
        last = step + 1 == schedule.steps
        if (step + 1) % schedule.log_every == 0 or last:
            recent = losses[logged:]
            now = time.perf_counter()
            line = (
                f"step {step + 1}/{schedule.steps}  loss {sum(recent) / len(recent):.4f}"
                f"  {len(recent) * schedule.batch_size / (now - since):.1f} items/s"
            )
            if torch.cuda.is_available():
                line += f"  peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
            log(line)
            since, logged = now, len(losses)
        if (step + 1) % schedule.save_every == 0 and not last:
            state.save(losses)
    average.copy_to_module()
    module.eval()
    return losses
