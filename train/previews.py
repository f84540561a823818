"""Clips of fixed prompts and seeds while the training runs, as files and on one sheet."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from videofactory_core.checkpoint import Model
from videofactory_core.pipeline import generate
from videofactory_core.video import write_video

from .contact_sheet import contact_sheet
from .recipe import Samples


@dataclass(frozen=True)
class Previews:
    """Samples every prompt from `model` as it is now: `folder/step-000250/1.mp4`, ... and a `sheet.jpg` beside them."""

    model: Model
    samples: Samples
    folder: Path
    accelerator: Accelerator
    log: Callable[[str], None]

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        samples, model = self.samples, self.model
        others: tuple[nn.Module, ...] = (model.autoencoder, model.text_encoder)
        places = [next(part.parameters()).device for part in others]
        for part in others:
            part.to(self.accelerator.device)
        clips = []
        for number, prompt in enumerate(samples.prompts, 1):
            with self.accelerator.autocast(), warnings.catch_warnings():
                # Of sizes and long prompts the user has heard when the run began.
                warnings.simplefilter("ignore")
                frames = generate(
                    model,
                    prompt,
                    negative_prompt=samples.negative_prompt,
                    steps=samples.steps,
                    guidance_scale=samples.guidance_scale,
                    sampler=samples.sampler,
                    seed=samples.seed,
                )
            clips.append((f"{number}. {prompt}", frames))
        for part, place in zip(others, places, strict=True):
            part.to(place)
        if self.accelerator.is_main_process:
            try:
                self._write(step, clips)
            except OSError as error:
                self.log(f"step {step}  samples could not be written: {error}")
        return {}

    def _write(self, step: int, clips: list[tuple[str, torch.Tensor]]) -> None:
        folder = self.folder / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps({**asdict(self.samples), "training_step": step}, ensure_ascii=False)
        for number, (_, frames) in enumerate(clips, 1):
            write_video(folder / f"{number}.mp4", frames, self.model.config.fps, {"videofactory": settings})
        contact_sheet(clips).save(folder / "sheet.jpg", quality=90)
        self.log(f"step {step}  samples in {folder}")
