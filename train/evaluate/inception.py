"""Inception Score and FID of single frames, by the library that others report them with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from videofactory_core.checkpoint import CheckpointError
from videofactory_core.convert.sources import open_source

from ..data.content import checksum
from . import frechet
from .metrics import Array, SetMetric

LAYERS = ("2048", "logits_unbiased")
POOLED = 2048
# Parts of the frames whose Inception Scores are averaged; where there are fewer frames, it is one.
SPLITS = 10
WEIGHTS = "https://github.com/toshas/torch-fidelity/releases (weights-inception-2015-12-05-6726825d.pth)"


class Inception:
    """Pooled features and logits `[B, F, 2048 + 1008]` of every frame, by torch-fidelity's Inception v3.

    `weights` is a local copy of the library's own. ValueError when it is not, or the library is not installed.
    """

    variant = "torch-fidelity Inception v3 on frames"
    least_frames = 1

    def __init__(self, weights: Path, device: torch.device) -> None:
        if find_spec("torch_fidelity") is None:
            raise ValueError("IS and FID need torch-fidelity: run pip install torch-fidelity")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            # The library would run what is in the file.
            open_source(weights)
            self.network = FeatureExtractorInceptionV3("inception", list(LAYERS), str(weights)).to(device)
        except OSError as error:
            raise ValueError(f"{weights} cannot be read ({error.strerror}): give a copy of {WEIGHTS}") from error
        except (CheckpointError, RuntimeError) as error:
            raise ValueError(f"{weights} is not torch-fidelity's Inception v3: give a copy of {WEIGHTS}") from error
        self.device = device
        self.hash = checksum(weights)

    def describe(self) -> dict[str, str]:
        return {"weights": self.hash, "crop": "none, resized to 299x299 as TensorFlow 1 does"}

    @torch.inference_mode()
    def __call__(self, frames: Tensor) -> Tensor:
        features = [torch.cat(self.network(clip.permute(0, 3, 1, 2).to(self.device)), 1) for clip in frames]
        return torch.stack(features).float().cpu()


def fid(generated: Array, real: Array) -> Mapping[str, float]:
    """The Frechet distance of all frames, `[N, F, ...]`."""
    frames = [rows[..., :POOLED].reshape(-1, POOLED) for rows in (generated, real)]
    return {"": frechet.between(frames[0], frames[1], ddof=1)}


def inception_score(generated: Array) -> Mapping[str, float]:
    """exp of the mean KL of a frame's classes from those of all frames, of `[N, F, ...]`."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    logits = torch.from_numpy(generated[..., POOLED:].reshape(-1, generated.shape[-1] - POOLED))
    return {"": isc_features_to_metric(logits, SPLITS if len(logits) >= SPLITS else 1)[KEY_METRIC_ISC_MEAN]}


def metrics(weights: Path, device: torch.device) -> list[SetMetric]:
    """Both, by the network in a file."""
    extractor = Inception(weights, device)
    return [
        SetMetric("fid", extractor, fid),
        SetMetric("is", extractor, inception_score, needs_real=False, bounds=(1.0, math.inf), less=False),
    ]
