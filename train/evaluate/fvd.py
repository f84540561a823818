"""FVD's features in the variants that papers report: whose network, and how clips are made to fit it.

No two variants can be compared: their networks, crops and ranges of values differ, and so do their distances.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from videofactory_core.checkpoint import CheckpointError
from videofactory_core.convert.sources import open_source

from ..data.content import checksum
from . import frechet, i3d, videomae
from .i3d import I3D, SIDE
from .metrics import SetMetric
from .videomae import GIANT, VideoViT, ViTConfig

Network = Callable[[Tensor], Tensor]

# SHA-256 of files that these were published as.
PUBLISHED = {
    "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2": "StyleGAN-V's i3d_torchscript.pt",
    "5a210a92f035dff30c53b46157b612e7a1a5d3c99700e1b2d71da5c399ca7e70": (
        "VideoMAE V2's vit_g_hybrid_pt_1200e_ssv2_ft.pth"
    ),
}
# What else is in VideoMAE's file, and how many classes its network was trained for at last.
HEAD = ("head.weight", "head.bias")
CLASSES = 174


# How clips are made to fit: frames [B, F, H, W, 3] (uint8) to what the network gets


def whole(frames: Tensor) -> Tensor:
    """`[B, 3, F, H, W]` as they are, in 0..255 (uint8): the network itself resizes."""
    return rearrange(frames, "B F H W C -> B C F H W").contiguous()


def squash(frames: Tensor) -> Tensor:
    """`[B, 3, F, 224, 224]` in 0..1, both sides resized bilinearly, whatever that does to their ratio."""
    return _each(frames, lambda pictures: _resize(pictures, SIDE, SIDE))


def squash_signed(frames: Tensor) -> Tensor:
    """`[B, 3, F, 224, 224]` in -1..1, as `squash`."""
    return squash(frames) * 2 - 1


def crop_half(frames: Tensor) -> Tensor:
    """`[B, 3, F, 224, 224]` in -0.5..0.5: the shorter side resized bilinearly to 224, the middle of the longer."""

    def fit(pictures: Tensor) -> Tensor:
        height, width = pictures.shape[-2:]
        # Rounded up as published, also where only the product's rounding makes a side 225.
        scale = SIDE / min(height, width)
        if height < width:
            pictures = _resize(pictures, SIDE, math.ceil(width * scale))
        else:
            pictures = _resize(pictures, math.ceil(height * scale), SIDE)
        top, left = ((side - SIDE) // 2 for side in pictures.shape[-2:])
        return pictures[..., top : top + SIDE, left : left + SIDE]

    return _each(frames, fit) - 0.5


def _each(frames: Tensor, fit: Callable[[Tensor], Tensor]) -> Tensor:
    """Fit the pictures `[F, 3, H, W]` of every clip, in 0..1: clip by clip, because they may be large."""
    fitted = [fit(clip.permute(0, 3, 1, 2).float() / 255) for clip in frames]
    return rearrange(torch.stack(fitted), "B F C H W -> B C F H W").contiguous()


def _resize(pictures: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(pictures, (height, width), mode="bilinear", align_corners=False)


# The variants


@dataclass(frozen=True)
class Variant:
    """What has to be the same for two values to be comparable."""

    name: str
    # Whose protocol it is, the name of its weights, and its features.
    protocol: str
    weights: str
    features: str
    # What becomes of pictures before the network, and what range of values it gets.
    crop: str
    values: str
    fit: Callable[[Tensor], Tensor]
    least_frames: int
    # Frames must be a multiple of this.
    multiple: int = 1
    # Covariances are divided by n minus this.
    ddof: int = 0


LOGITS = "400 logits of I3D, trained on Kinetics-400"
SQUASHED = "none, both sides are resized to 224 (bilinear, not antialiased)"
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            "fvd-styleganv",
            "StyleGAN-V",
            "i3d_torchscript.pt",
            LOGITS,
            "none, both sides are resized to 224 inside the network (resize=True)",
            "0..255, brought to -1..1 inside the network (rescale=True)",
            whole,
            i3d.LEAST_FRAMES,
        ),
        Variant(
            "fvd-videogpt",
            "VideoGPT",
            "i3d_pretrained_400.pt",
            LOGITS,
            "the middle 224x224 after the shorter side is resized to 224 (bilinear, not antialiased)",
            "-0.5..0.5",
            crop_half,
            i3d.LEAST_FRAMES,
            ddof=1,
        ),
        Variant(
            "fvd-i3d",
            "content-debiased FVD (cd-fvd), model i3d",
            "i3d_pretrained_400.pt",
            LOGITS,
            SQUASHED,
            "-1..1",
            squash_signed,
            i3d.LEAST_FRAMES,
        ),
        Variant(
            "fvd-videomae",
            "content-debiased FVD (cd-fvd), model videomae",
            "vit_g_hybrid_pt_1200e_ssv2_ft.pth",
            "1408 features of VideoMAE V2 ViT-g/14, the mean over all tubes, trained on Something-Something V2 at last",
            SQUASHED,
            "0..1, without the mean and deviation of the network's training",
            squash,
            videomae.TUBE,
            multiple=videomae.TUBE,
        ),
    )
}


class FVD:
    """Features `[B, D]` of clips `[B, F, H, W, 3]` (uint8), in float32 on the CPU, by one variant.

    ValueError for clips that are too short for the network.
    """

    def __init__(self, variant: Variant, network: Network, digest: str, device: torch.device) -> None:
        self.variant = variant.name
        self.least_frames = variant.least_frames
        self.ddof = variant.ddof
        self._variant, self._network, self._digest, self._device = variant, network, digest, device

    def describe(self) -> dict[str, str]:
        """What a value depends on besides the clips."""
        return {
            "protocol": self._variant.protocol,
            "features": self._variant.features,
            "crop": self._variant.crop,
            "values": self._variant.values,
            "covariance": "sum / (n - 1)" if self.ddof else "sum / n",
            "weights": self._digest,
            "weights are": PUBLISHED.get(self._digest, "of a hash that is not known here"),
        }

    @torch.inference_mode()
    def __call__(self, frames: Tensor) -> Tensor:
        assert frames.dim() == 5, frames.shape
        assert frames.dtype == torch.uint8, frames.dtype
        count = frames.shape[1]
        if count < self.least_frames:
            raise ValueError(f"{self.variant} needs {self.least_frames} frames or more, not {count}: 16 are usual")
        if count % self._variant.multiple:
            raise ValueError(f"{self.variant} takes frames by {self._variant.multiple}, and {count} are odd: use 16")
        features = self._network(self._variant.fit(frames.to(self._device)))
        return features.float().cpu()


def metric(name: str, weights: Path, device: torch.device, *, run_code: bool = False) -> SetMetric:
    """The Frechet distance of a variant's features; as `load`."""
    extractor = load(name, weights, device, run_code=run_code)
    ddof = extractor.ddof
    return SetMetric(
        name,
        extractor,
        lambda generated, real: {"": frechet.between(generated, real, ddof)},
        follow=lambda generated, real, seed: {"": frechet.extrapolate(generated, real, seed=seed, ddof=ddof).value},
    )


def load(name: str, weights: Path, device: torch.device, *, run_code: bool = False) -> FVD:
    """The variant called `name` with its published weights from a local file.

    StyleGAN-V's is TorchScript, a program: it is opened with `run_code` alone. Of the others only tensors are read.
    ValueError when the file is not there, not allowed, damaged or another network's.
    """
    if name not in VARIANTS:
        raise ValueError(f"{name!r} is no variant of FVD: use {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    if not weights.is_file():
        raise ValueError(f"{name}: there is no file {weights}; give a local copy of {variant.weights}")
    digest = checksum(weights)
    if name == "fvd-styleganv":
        network: Network = _load_script(weights, digest, device, run_code)
    elif name == "fvd-videomae":
        network = load_videomae(weights).to(device)
    else:
        network = load_i3d(weights).to(device)
        if device.type == "cpu":
            # A sixth faster there.
            network.to(memory_format=torch.channels_last_3d)
    return FVD(variant, network, digest, device)


def load_i3d(path: Path) -> I3D:
    """VideoGPT's I3D, ready for use alone; ValueError for another file."""
    with torch.device("meta"):
        network = I3D()
    _fill(network, path, "VideoGPT's i3d_pretrained_400.pt")
    network.fold()
    return network


def load_videomae(path: Path, config: ViTConfig = GIANT) -> VideoViT:
    """VideoMAE's encoder, ready for use alone; ValueError for another file."""
    with torch.device("meta"):
        network = VideoViT(config)
    shapes = _fill(network, path, "VideoMAE V2's vit_g_hybrid_pt_1200e_ssv2_ft.pth", HEAD)
    classes = shapes.get(HEAD[0], (CLASSES,))[0]
    if classes != CLASSES:
        raise ValueError(
            f"{path} was trained for {classes} classes at last, not for the {CLASSES} of Something-Something V2: "
            "get vit_g_hybrid_pt_1200e_ssv2_ft.pth"
        )
    return network


def _fill(network: nn.Module, path: Path, what: str, beside: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Give an empty network its weights, in float32, without running code; returns the shapes in the file.

    ValueError when the file holds others, those `beside` excepted.
    """
    try:
        source = open_source(path)
    except CheckpointError as error:
        raise ValueError(f"{path} holds more than weights or is damaged ({error}): get {what} again") from error
    expected = network.state_dict()
    wrong = sorted({key for key, shape in source.shapes.items() if key not in beside and key not in expected})
    wrong += [key for key, weight in expected.items() if source.shapes.get(key) != tuple(weight.shape)]
    if wrong:
        raise ValueError(f"{path} is not {what}: {wrong[0]} and {len(wrong) - 1} more do not fit; choose another file")
    tensors = {key: source.read(key) for key in expected}
    # A copy, because those of a pickle are windows onto the file.
    network.load_state_dict(
        {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}, assign=True
    )
    network.eval().requires_grad_(False)
    return dict(source.shapes)


def _load_script(path: Path, digest: str, device: torch.device, run_code: bool) -> Network:
    """StyleGAN-V's detector: 400 logits of clips in 0..255 of any size."""
    if not run_code:
        known = PUBLISHED.get(digest)
        told = f"its SHA-256 is that of {known}" if known else f"its SHA-256 {digest} is not known here"
        raise ValueError(
            f"{path} is a program that would run on this machine, and {told}: allow it only if you trust who made it"
        )
    try:
        script: Any = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not TorchScript or damaged: give StyleGAN-V's i3d_torchscript.pt") from error

    def network(clips: Tensor) -> Tensor:
        features: Tensor = script(clips, rescale=True, resize=True, return_features=True)
        return features

    return network
