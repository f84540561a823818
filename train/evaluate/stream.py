"""STREAM (Kim et al., arXiv 2403.09669): how clips change in time, and how true and how varied what they show is.

Every frame is embedded alone. The amplitudes of an embedding's frequencies in time follow a power law; what it looks
like is compared for STREAM-T, and the means over time for STREAM-S. STREAM-T of clips of one kind grows with their
number, on synthetic ones from 0.25 of 64 to 0.99 of 8192: values of equally many compare, beside what real clips get.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from videofactory_core.checkpoint import CheckpointError
from videofactory_core.convert.sources import open_source
from videofactory_core.pretrained import lacking, load, load_model

from ..data.content import checksum
from ..perceptual import DEVIATION, MEAN
from .clipsim import weights_in
from .metrics import Array, SetMetric

# Of a line through the amplitudes of two frequencies there is no deviation yet, but through one there is no line.
LEAST_FRAMES = 4
# What is added to amplitudes, so that the logarithm of none is endless.
EPSILON = 1e-6
BINS = 50
# A set covers what is nearer to one of its points than that point's neighbour of this number is.
NEIGHBOURS = 5
# Of the picture that is embedded, in pixels.
SHORT_SIDE = 224
# Memory: pictures that are embedded at a time, and rows of distances.
PICTURES_AT_A_TIME = 64
ROWS_AT_A_TIME = 1024
# Where SwAV's ResNet-50 is published; what else is in that file, and in torchvision's.
SWAV = "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"
SWAV_HEADS, CLASSIFIER = ("projection_head.", "prototypes."), "fc."


@dataclass(frozen=True)
class Encoder:
    """A network that embeds pictures, and what it is."""

    name: str
    # SHA-256.
    weights: str
    # Embeddings `[N, D]` in words.
    embedding: str
    # Maps pictures `[N, 3, H, W]`, of ImageNet's mean and deviation, to their embeddings.
    network: Callable[[Tensor], Tensor]
    # What the pictures' sides are multiples of.
    multiple: int = 1


class Stream:
    """Skewness and mean of embeddings over time, as `signals` has them, of clips `[B, F, H, W, 3]` (uint8).

    ValueError for fewer than 4 frames.
    """

    least_frames = LEAST_FRAMES

    def __init__(self, encoder: Encoder, device: torch.device) -> None:
        self.variant = f"stream-{encoder.name}"
        self._encoder, self._device = encoder, device

    def describe(self) -> dict[str, str]:
        multiple = self._encoder.multiple
        cut = f", cut to multiples of {multiple} around the middle" if multiple > 1 else ""
        return {
            "weights": self._encoder.weights,
            "features": self._encoder.embedding,
            "preprocessing": f"short side {SHORT_SIDE} (bilinear, antialiased){cut}, ImageNet's mean and deviation",
            "neighbours": str(NEIGHBOURS),
            "bins": str(BINS),
        }

    @torch.inference_mode()
    def __call__(self, frames: Tensor) -> Tensor:
        """`[B, 2, D]`, float32 on the CPU."""
        assert frames.dim() == 5, frames.shape
        assert frames.dtype == torch.uint8, frames.dtype
        pictures = rearrange(frames, "B F H W C -> (B F) C H W")
        embeddings = torch.cat(
            [
                self._encoder.network(fit(some.to(self._device), self._encoder.multiple)).float().cpu()
                for some in pictures.split(PICTURES_AT_A_TIME)
            ]
        )
        return signals(embeddings.unflatten(0, frames.shape[:2]))


def fit(pictures: Tensor, multiple: int = 1) -> Tensor:
    """`[N, 3, H, W]` in 0..255 with a shorter side of 224 and ImageNet's mean and deviation.

    What the sides have beyond a `multiple` is cut off on both ends.
    """
    height, width = pictures.shape[-2:]
    short = min(height, width)
    x = pictures.float()
    if short != SHORT_SIDE:
        # The longer side is rounded down, as by torchvision.
        size = int(SHORT_SIDE * height / short), int(SHORT_SIDE * width / short)
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
    height, width = (side // multiple * multiple for side in x.shape[-2:])
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    x = x[..., top : top + height, left : left + width] / 255
    mean, deviation = (x.new_tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (x - mean) / deviation


# The metric


def signals(embeddings: Tensor) -> Tensor:
    """Skewness and mean over time `[B, 2, D]`, float32, of `embeddings [B, F, D]`; ValueError for F < 4.

    Of K = F // 2 frequencies the amplitudes are a_k = 2 |DFT_k| / (1 + K). The mean is a_0. With beta the slope of the
    line through (ln k, ln a_k), k = 1..K, the skewness is sum k^(beta + 3) (sum k^beta / sum k^(beta + 2))^(1/2).
    """
    count = embeddings.shape[1]
    if count < LEAST_FRAMES:
        raise ValueError(f"STREAM needs {LEAST_FRAMES} frames or more, not {count}: 16 are usual")
    # The logarithm of an amplitude near 0 would show what float32 rounds.
    amplitudes = 2 * torch.fft.rfft(embeddings.double(), dim=1).abs() / (1 + count // 2)
    frequencies = torch.arange(1, count // 2 + 1, dtype=torch.float64)[:, None]
    x, y = frequencies.log(), (amplitudes[:, 1:] + EPSILON).log()
    x = x - x.mean()
    beta = (x * y).sum(1, keepdim=True) / x.square().sum()
    zeroth, second, third = ((frequencies ** (beta + power)).sum(1) for power in (0, 2, 3))
    return torch.stack([third * (zeroth / second).sqrt(), amplitudes[:, 0]], 1).float()


def temporal(generated: Tensor, real: Tensor) -> float:
    """STREAM-T of skewness `[N, D]` and `[M, D]`: the mean over D of r^2, the correlation of histograms of 50 bins."""
    low = torch.minimum(generated.amin(0), real.amin(0)).double().trunc() - 1
    high = torch.maximum(generated.amax(0), real.amax(0)).double().trunc() + 1
    edges = low[:, None] + (high - low)[:, None] * torch.arange(BINS + 1, dtype=torch.float64) / BINS
    x, y = (_histograms(values, edges) - 1 / BINS for values in (generated, real))
    correlation = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-12)
    return float(correlation.square().mean())


def _histograms(values: Tensor, edges: Tensor) -> Tensor:
    """Shares `[D, 50]` of `values [N, D]` between `edges [D, 51]`."""
    values = values.double().T.contiguous()
    bins = (torch.searchsorted(edges, values, right=True) - 1).clamp(0, BINS - 1)
    shares = values.new_zeros(len(edges), BINS)
    return shares.scatter_add_(1, bins, torch.full_like(values, 1 / values.shape[1]))


def covered(points: Tensor, others: Tensor) -> Tensor:
    """Which of `points [N, D]` are nearer to one of the `others [M, D]` than that one's fifth neighbour among them.

    The share of them is STREAM-S: fidelity of generated points among real ones, diversity of real among generated
    (precision and recall by Kynkaanniemi et al., arXiv 1904.06991).
    """
    assert len(others) > NEIGHBOURS, len(others)
    points, others = points.double(), others.double()
    # The nearest is the point itself.
    radii = torch.cat(
        [torch.cdist(rows, others).kthvalue(NEIGHBOURS + 1).values for rows in others.split(ROWS_AT_A_TIME)]
    )
    return torch.cat([(torch.cdist(rows, others) < radii).any(1) for rows in points.split(ROWS_AT_A_TIME)])


def compare(generated: Array, real: Array) -> Mapping[str, float]:
    """STREAM-T, and STREAM-S's two parts, of `signals [N, 2, D]`."""
    (skewness, mean), (real_skewness, real_mean) = (torch.from_numpy(rows).unbind(1) for rows in (generated, real))
    return {
        "temporal": temporal(skewness, real_skewness),
        "fidelity": float(covered(mean, real_mean).double().mean()),
        "diversity": float(covered(real_mean, mean).double().mean()),
    }


def metric(weights: Path, device: torch.device) -> SetMetric:
    """STREAM by the encoder in a file or folder, as `load_encoder` reads it."""
    stream = Stream(load_encoder(weights, device), device)
    # Points that are drawn twice would be each other's neighbours.
    return SetMetric(
        stream.variant, stream, compare, least=NEIGHBOURS + 1, repeats=False, bounds=(0.0, 1.0), less=False
    )


# Encoders


def load_encoder(path: Path, device: torch.device) -> Encoder:
    """DINOv2 or another encoder of pictures from a folder of transformers; SwAV's ResNet-50 from a file.

    ValueError when it is not there, damaged or another network's.
    """
    if path.is_file():
        return _load_resnet(path, device)
    return _load_folder(str(path), device)


def _load_folder(folder: str, device: torch.device) -> Encoder:
    from transformers import AutoConfig, AutoModel

    if reason := lacking(folder):
        raise ValueError(f"stream: {reason}; name a folder with DINOv2-S as transformers keeps it, or SwAV's file")
    config = load("stream", AutoConfig, folder)
    model: Any = load_model("stream", AutoModel, folder, device, torch.float32)
    options = {}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        options["interpolate_pos_encoding"] = True

    def network(pictures: Tensor) -> Tensor:
        pooled: Tensor = model(pixel_values=pictures, **options).pooler_output
        return pooled.flatten(1)

    patch = getattr(config, "patch_size", 1)
    multiple = patch if isinstance(patch, int) else 1
    try:
        with torch.inference_mode():
            size = network(torch.zeros(1, 3, *(2 * [SHORT_SIDE // multiple * multiple]), device=device)).shape[1]
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"stream: {folder} holds a {config.model_type!r} model, which gives no embedding for a picture alone: "
            "name a folder with DINOv2-S or another encoder of pictures"
        ) from error
    return Encoder(config.model_type, weights_in(folder), f"{size} of {config.model_type}", network, multiple)


def _load_resnet(path: Path, device: torch.device) -> Encoder:
    from torchvision.models import resnet50

    try:
        source = open_source(path)
    except CheckpointError as error:
        raise ValueError(f"stream: {path} holds more than weights or is damaged ({error}): get {SWAV} again") from error
    with torch.device("meta"):
        model = resnet50(weights=None)
    model.fc = torch.nn.Identity()
    # Counts of batches, which old files lack, serve only training.
    expected = {key: weight for key, weight in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    beside = (*SWAV_HEADS, CLASSIFIER)
    wrong = [key for key, weight in expected.items() if source.shapes.get(key) != tuple(weight.shape)]
    wrong += [key for key in source.shapes if key not in model.state_dict() and not key.startswith(beside)]
    if wrong:
        raise ValueError(f"stream: {path} is no ResNet-50, {wrong[0]} does not fit: get {SWAV}")
    model.to_empty(device=device)
    # Copies, because the tensors of a pickle are windows onto the file.
    model.load_state_dict({key: source.read(key).float() for key in expected}, strict=False)
    model.eval().requires_grad_(False)
    swav = any(key.startswith(SWAV_HEADS) for key in source.shapes)
    return Encoder("swav" if swav else "resnet50", checksum(path), "2048 of ResNet-50, pooled", model)
