"""CLIPSIM (Wu et al., GODIVA, arXiv 2104.14806): how near a clip's frames are to its caption, as CLIP sees them.

Values are cosines, not times 100 as CLIPScore's; each CLIP has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videofactory_core.pretrained import WEIGHTS, lacking, load, load_model

from ..data.content import checksum
from .metrics import ClipMetric

# The CLIP by which others publish their values.
USUAL = "openai/clip-vit-base-patch32"
# Memory: frames that are embedded at a time.
FRAMES_AT_A_TIME = 64


class ClipSim:
    """The mean over frames of cos(caption, frame), of CLIP's embeddings, in -1..1.

    `folder` holds any CLIP as transformers keeps it; ValueError when it holds something else. A caption of more tokens
    than CLIP takes is cut, and the first of these is told to `log`.
    """

    variant = "clipsim"

    def __init__(self, folder: str, device: torch.device, log: Callable[[str], None] = print) -> None:
        from transformers import AutoConfig, AutoTokenizer, CLIPImageProcessor, CLIPModel

        if reason := lacking(folder):
            raise ValueError(f"clipsim: {reason}; name a local copy of {USUAL}, or of another CLIP")
        kind = load("clipsim", AutoConfig, folder).model_type
        if kind != "clip":
            raise ValueError(
                f"clipsim: {folder} holds a {kind!r} model, not CLIP with both its encoders: name a copy of {USUAL}"
            )
        self._processor: Any = load("clipsim", CLIPImageProcessor, folder)
        self._tokenizer: Any = load("clipsim", AutoTokenizer, folder)
        self._model = load_model("clipsim", CLIPModel, folder, device, torch.float32)
        self._folder, self._device, self._log = folder, device, log
        self.most_tokens: int = self._model.config.text_config.max_position_embeddings
        # The captions that were cut.
        self.cut: set[str] = set()

    def describe(self) -> dict[str, str]:
        vision = self._model.config.vision_config
        return {
            "variant": self.variant,
            "clip": f"{self._model.config.projection_dim} of ViT, {vision.num_hidden_layers} layers of "
            f"{vision.hidden_size}, patches of {vision.patch_size}",
            "weights": weights_in(self._folder),
            "preprocessing": f"the CLIP's own, to {vision.image_size}x{vision.image_size}",
            "captions": f"their first {self.most_tokens} tokens",
        }

    @torch.inference_mode()
    def __call__(self, frames: Tensor, caption: str) -> float:
        """Of `frames [F, H, W, 3]`, uint8."""
        assert frames.dtype == torch.uint8, frames.dtype
        tokens = self._tokens(caption)
        cosines = []
        for some in frames.split(FRAMES_AT_A_TIME):
            pictures = self._processor(
                list(some.cpu().numpy()), return_tensors="pt", input_data_format="channels_last"
            )["pixel_values"]
            found = self._model(input_ids=tokens, pixel_values=pictures.to(self._device))
            cosines.append(found.image_embeds.double() @ found.text_embeds[0].double())
        return float(torch.cat(cosines).mean())

    def _tokens(self, caption: str) -> Tensor:
        """`[1, L]`, begin and end included."""
        whole = len(self._tokenizer(caption, verbose=False)["input_ids"])
        if whole > self.most_tokens and caption not in self.cut:
            if not self.cut:
                self._log(f"clipsim compares the first {self.most_tokens} of {whole} tokens of: {caption}")
            self.cut.add(caption)
        found = self._tokenizer(caption, truncation=True, max_length=self.most_tokens, return_tensors="pt")
        tokens: Tensor = found["input_ids"].to(self._device)
        return tokens


def metric(folder: Path, device: torch.device, log: Callable[[str], None] = print) -> ClipMetric:
    """CLIPSIM by the CLIP in a folder."""
    similarity = ClipSim(str(folder), device, log)
    return ClipMetric(
        similarity.variant,
        lambda frames, caption: {"": similarity(frames, caption)},
        settings=similarity.describe(),
        needs_caption=True,
        less=False,
    )


def weights_in(folder: str) -> str:
    """SHA-256 of a model's weights, of each file if they are in several; of those that transformers reads."""
    files = next(found for pattern in WEIGHTS if (found := sorted(Path(folder).glob(pattern))))
    return ", ".join(checksum(file) for file in files)
