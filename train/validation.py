"""Loss on clips that are not trained on, asked the same question every time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from videofactory_core.diffusion import Schedule
from videofactory_core.objective import quantile_levels, seed_for

from .data.batches import Batch
from .denoiser import Answers


@dataclass(frozen=True)
class Validation:
    """The mean squared error of `unet` on `batches`, at the middles of `quantiles` equal parts of the noise schedule.

    A call writes a line of JSON to `file` and returns the mean as `validation_loss`, and each part's, low noise first.
    """

    unet: Answers
    batches: Sequence[Batch]
    schedule: Schedule
    quantiles: int
    seed: int
    accelerator: Accelerator
    file: Path
    log: Callable[[str], None]

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        device = self.accelerator.device
        errors = torch.zeros(self.quantiles, dtype=torch.float64)
        clips = 0
        for number, batch in enumerate(self.batches):
            latents, context = batch.latents.to(device), batch.context.to(device)
            levels = quantile_levels(latents, self.schedule, self.quantiles, seed_for(self.seed, number))
            for i, level in enumerate(levels):
                with self.accelerator.autocast():
                    prediction = self.unet(level.latents, level.timesteps, context)
                errors[i] += (prediction.float() - level.target).square().mean().item() * len(latents)
            clips += len(latents)
        parts = (errors / clips).tolist()
        loss = sum(parts) / len(parts)
        self.log(f"step {step}  validation loss {loss:.4f}  ({'  '.join(f'{part:.4f}' for part in parts)})")
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "loss": loss, "quantiles": parts}) + "\n")
        return {"validation_loss": loss, **{f"validation_loss_{i + 1}": part for i, part in enumerate(parts)}}
