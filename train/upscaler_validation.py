"""How well the upscaler does on frames that it is not trained on, in figures and on a sheet, beside bicubic."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .contact_sheet import FRAME_HEIGHT, FRAME_WIDTH, contact_sheet
from .metrics import psnr, ssim


@dataclass(frozen=True)
class HeldOut:
    """Frames that the upscaler is not trained on, `small [F, 3, h, w]` and `large [F, 3, H, W]` in 0..1, on the CPU."""

    label: str
    small: Tensor
    large: Tensor

    def bicubic(self) -> Tensor:
        """What anybody could do: `[F, 3, H, W]`."""
        return F.interpolate(self.small, size=self.large.shape[2:], mode="bicubic").clamp(0, 1)


@dataclass(frozen=True)
class Figures:
    """Means over all frames."""

    psnr: float
    ssim: float

    @classmethod
    def of(cls, pictures: Sequence[Tensor], held_out: Sequence[HeldOut]) -> Figures:
        pairs = list(zip(pictures, held_out, strict=True))
        return cls(*(float(torch.cat([f(x, to.large) for x, to in pairs]).mean()) for f in (psnr, ssim)))


@dataclass(frozen=True)
class UpscalerValidation:
    """Upscales `held_out` with `upscale`, which maps `[N, 3, h, w]` to `[N, 3, H, W]`.

    A call writes a line of JSON to `file` and `folder/step-000250.png`, bicubic, upscaled and original frames side by
    side, and returns PSNR and SSIM.
    """

    upscale: nn.Module
    held_out: Sequence[HeldOut]
    bicubic: Figures
    accelerator: Accelerator
    file: Path
    folder: Path
    log: Callable[[str], None]

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        device = self.accelerator.device
        results = []
        for shown in self.held_out:
            with self.accelerator.autocast():
                frames = [self.upscale(frame.to(device)).float().clamp(0, 1).cpu() for frame in shown.small.split(1)]
            results.append(torch.cat(frames))
        found, bicubic = Figures.of(results, self.held_out), self.bicubic
        self.log(
            f"step {step}  PSNR {found.psnr:.2f} dB (bicubic {bicubic.psnr:.2f})"
            f"  SSIM {found.ssim:.4f} (bicubic {bicubic.ssim:.4f})"
        )
        if self.accelerator.is_main_process:
            line = {"step": step, **vars(found), "bicubic": vars(bicubic)}
            try:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                self.folder.mkdir(parents=True, exist_ok=True)
                sheet = contact_sheet(list(map(comparison, self.held_out, results)), columns=1, shown=3)
                sheet.save(self.folder / f"step-{step:06d}.png")
            except OSError as error:
                self.log(f"step {step}  the comparison could not be written: {error}")
        return {"validation_psnr": found.psnr, "validation_ssim": found.ssim}


def comparison(shown: HeldOut, upscaled: Tensor) -> tuple[str, Tensor]:
    """A label, and the first frame bicubic, upscaled and original: `[3, H, W, 3]`.

    They are cut at their own size to what a sheet has room for, where bicubic is farthest from the original.
    """
    rows = torch.stack([shown.bicubic()[0], upscaled[0], shown.large[0]])
    height, width = min(FRAME_HEIGHT, rows.shape[2]), min(FRAME_WIDTH, rows.shape[3])
    error = (rows[0] - rows[2]).abs().mean(0, keepdim=True)
    place = int(F.avg_pool2d(error, (height, width), stride=1).argmax())
    top, left = divmod(place, rows.shape[3] - width + 1)
    cut = rows[:, :, top : top + height, left : left + width]
    return f"{shown.label}\nbicubic, upscaled, original", rearrange(cut, "N C H W -> N H W C")
