"""The training loop: the same few lines for every part of the model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn


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


def train(
    module: nn.Module,
    batches: Iterator[Any],
    loss: Callable[[Any], Tensor],
    schedule: Schedule,
    accelerator: Accelerator,
    log: Callable[[str], None],
) -> list[float]:
    """Train `module` for `schedule.steps` steps and leave the averaged weights in it.

    `loss` maps a batch to a scalar. Returns the loss of every step. A line every `log_every` steps says step, loss,
    items a second and, on CUDA, peak memory.
    """
    decay = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    other = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = accelerator.prepare_optimizer(
        torch.optim.AdamW(
            [{"params": decay, "weight_decay": schedule.weight_decay}, {"params": other, "weight_decay": 0.0}],
            lr=schedule.learning_rate,
            betas=(0.9, 0.99),
            fused=True,
        )
    )
    average = Average(module, schedule.ema_decay)
    losses: list[float] = []
    since = time.perf_counter()
    module.train()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * schedule.share_at(step)
        batch = next(batches)
        with accelerator.autocast():
            value = loss(batch)
        accelerator.backward(value)
        accelerator.clip_grad_norm_(module.parameters(), schedule.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        losses.append(value.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss became {losses[-1]} at step {step + 1}; lower learning_rate in the recipe")
        if (step + 1) % schedule.log_every == 0 or step + 1 == schedule.steps:
            recent = losses[-schedule.log_every :]
            now = time.perf_counter()
            line = (
                f"step {step + 1}/{schedule.steps}  loss {sum(recent) / len(recent):.4f}"
                f"  {len(recent) * schedule.batch_size / (now - since):.1f} items/s"
            )
            if torch.cuda.is_available():
                line += f"  peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
            log(line)
            since = now
    average.copy_to_module()
    module.eval()
    return losses
