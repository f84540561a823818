"""Real-ESRGAN's degradation (Wang et al., arXiv 2107.10833): what lenses, cameras and websites do to pictures.

Two rounds of blur, resize, noise and JPEG: `draw` says with which parameters, `apply` carries it out.
Clips are `[F, 3, H, W]` in 0..1.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Range = tuple[float, float]
Mode = Literal["area", "bilinear", "bicubic"]
# In the order of `kernel_prob`.
Family = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]

MODES: tuple[Mode, ...] = get_args(Mode)
FAMILIES: tuple[Family, ...] = get_args(Family)
KERNEL_SIZES = range(7, 22, 2)
# Smaller windows cannot hold the longer waves of a sinc.
WIDE_KERNEL = 13
# Parts in which a picture is filtered, side by side as if they were channels: several times as fast as whole.
BANDS = 4
# Of red, green and blue in grey (ITU-R BT.601).
GREY = (0.299, 0.587, 0.114)

# Between which numbers a range may lie.
LIMITS: Mapping[str, Range] = {
    "blur_sigma": (0.05, 50),
    "betag_range": (0.1, 20),
    "betap_range": (0.1, 20),
    "resize_range": (0.02, 4),
    "noise_range": (0, 255),
    "poisson_scale_range": (0, 100),
    "jpeg_range": (1, 100),
}


@dataclass(frozen=True, kw_only=True)
class Round:
    """What is drawn in a round: probabilities, and ranges in which numbers are uniform."""

    blur_prob: float = 1.0
    # Share of the blurs that are a sinc, which rings; the others are of these kinds, against each other: Gaussian,
    # generalised Gaussian and plateau, each first round, then elongated and turned.
    sinc_prob: float = 0.1
    kernel_prob: tuple[float, float, float, float, float, float] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    # Standard deviation in pixels.
    blur_sigma: Range = (0.2, 3.0)
    # Exponent of generalised and of plateau kernels: half of them below 1 and half above.
    betag_range: Range = (0.5, 4.0)
    betap_range: Range = (1.0, 2.0)
    # Larger, smaller and as it is, against each other, and by how much: the first round of its own size, the second of
    # the result's.
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)
    resize_range: Range = (0.15, 1.5)
    # Noise is Gaussian, or else Poisson's.
    gaussian_noise_prob: float = 0.5
    # Standard deviation in 1/255.
    noise_range: Range = (1.0, 30.0)
    # Times the noise of a camera that counts as many photons as there are levels.
    poisson_scale_range: Range = (0.05, 3.0)
    # The same noise in all three channels.
    gray_noise_prob: float = 0.4
    # Quality, whole numbers.
    jpeg_range: tuple[int, int] = (30, 95)

    def __post_init__(self) -> None:
        for key in ("blur_prob", "sinc_prob", "gaussian_noise_prob", "gray_noise_prob"):
            _check_probability(key, getattr(self, key))
        for key in ("kernel_prob", "resize_prob"):
            shares = getattr(self, key)
            if not (min(shares) >= 0 and 0 < sum(shares) < math.inf):
                raise ValueError(f"{key}: {list(shares)} are no shares; use numbers from 0, one of them above 0")
        for key, (least, most) in LIMITS.items():
            low, high = getattr(self, key)
            if not least <= low <= high <= most:
                raise ValueError(f"{key}: {low} to {high} is no range; use two numbers in order from {least} to {most}")
        for key in ("betag_range", "betap_range", "resize_range"):
            low, high = getattr(self, key)
            if not low <= 1 <= high:
                raise ValueError(f"{key}: {low} to {high} leaves out 1; use a number up to 1 and one from 1")


@dataclass(frozen=True, kw_only=True)
class SecondRound(Round):
    """A weaker round, in which not every picture is blurred."""

    blur_prob: float = 0.8
    blur_sigma: Range = (0.2, 1.5)
    resize_prob: tuple[float, float, float] = (0.3, 0.4, 0.3)
    resize_range: Range = (0.3, 1.2)
    noise_range: Range = (1.0, 25.0)
    poisson_scale_range: Range = (0.05, 2.5)


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """The `[degradation]` table of a recipe; names and numbers are those of Real-ESRGAN's x4plus."""

    first: Round = field(default_factory=Round)
    second: SecondRound = field(default_factory=SecondRound)
    # Share of the pictures that ring in the end as if they had been sharpened.
    final_sinc_prob: float = 0.8
    # Share of the clips whose frames all get one draw, except for the grains of noise; else each frame has its own.
    shared: float = 0.5

    def __post_init__(self) -> None:
        for key in ("final_sinc_prob", "shared"):
            _check_probability(key, getattr(self, key))


def _check_probability(key: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{key}: {value} is no probability; use a number from 0 to 1")


@dataclass(frozen=True)
class Bell:
    """A kernel that falls off from its middle, `sigma` pixels wide (along, across) and turned by `angle`."""

    family: Family
    size: int
    sigma: Range
    angle: float = 0.0
    beta: float = 1.0

    def kernel(self) -> Tensor:
        formula = plateau_kernel if self.family.startswith("plateau") else generalized_kernel
        return formula(self.size, self.sigma, self.angle, self.beta)


@dataclass(frozen=True)
class Sinc:
    """A kernel that lets waves pass up to `cutoff` in radians a pixel."""

    size: int
    cutoff: float

    def kernel(self) -> Tensor:
        return sinc_kernel(self.size, self.cutoff)


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of standard deviation `strength` / 255, or `strength` times Poisson's."""

    kind: Literal["gaussian", "poisson"]
    strength: float
    grey: bool

    def add(self, clip: Tensor, generator: np.random.Generator) -> Tensor:
        add = gaussian_noise if self.kind == "gaussian" else poisson_noise
        return add(clip, self.strength, self.grey, generator)


@dataclass(frozen=True)
class DrawnRound:
    """What a round does."""

    blur: Bell | Sinc | None
    factor: float
    mode: Mode
    noise: Noise
    quality: int


@dataclass(frozen=True)
class Draw:
    """Everything that happens to a picture, but for the grains of noise."""

    first: DrawnRound
    second: DrawnRound
    # The last resize and sinc come before the second JPEG or after it.
    jpeg_last: bool
    mode: Mode
    sinc: Sinc | None


def degrade(clip: Tensor, scale: int, config: Degradation, generator: np.random.Generator) -> Tensor:
    """Spoil a clip `[F, 3, H, W]` into `[F, 3, H / scale, W / scale]`, in 0..1 on the 256 levels of a file."""
    if generator.random() < config.shared:
        return apply(clip, scale, draw(config, generator), generator)
    return torch.cat([apply(frame, scale, draw(config, generator), generator) for frame in clip.split(1)])


def downscale(clip: Tensor, scale: int) -> Tensor:
    """The same without damage: bicubic with antialiasing."""
    return _levels(F.interpolate(clip, size=_divided(clip, scale), mode="bicubic", antialias=True))


def sharpen(clip: Tensor) -> Tensor:
    """Unsharp masking as Real-ESRGAN does to what `degrade` gets and to the target of all losses but the adversarial.

    With G a Gaussian blur of sigma 8: x + 0.5 (x - Gx), faded in around pixels where |x - Gx| is over 10/255.
    """
    row = gaussian_kernel(51, (8.0, 8.0)).sum(0, keepdim=True)

    def soften(x: Tensor) -> Tensor:
        return blur(blur(x, row), row.T)

    detail = clip - soften(clip)
    mask = soften((detail.abs() * 255 > 10).to(clip.dtype))
    return torch.lerp(clip, (clip + 0.5 * detail).clamp(0, 1), mask)


def draw(config: Degradation, generator: np.random.Generator) -> Draw:
    """What happens to a picture, or to all frames of a clip."""
    return Draw(
        first=_draw_round(config.first, generator),
        second=_draw_round(config.second, generator),
        jpeg_last=generator.random() < 0.5,
        mode=_draw_mode(generator),
        sinc=_draw_sinc(generator, math.pi / 3) if generator.random() < config.final_sinc_prob else None,
    )


def _draw_round(config: Round, generator: np.random.Generator) -> DrawnRound:
    low, high = config.resize_range
    factors = ((1.0, high), (low, 1.0), (1.0, 1.0))
    return DrawnRound(
        blur=_draw_blur(config, generator) if generator.random() < config.blur_prob else None,
        factor=generator.uniform(*factors[_pick(config.resize_prob, generator)]),
        mode=_draw_mode(generator),
        noise=_draw_noise(config, generator),
        quality=int(generator.integers(*config.jpeg_range, endpoint=True)),
    )


def _draw_blur(config: Round, generator: np.random.Generator) -> Bell | Sinc:
    if generator.random() < config.sinc_prob:
        return _draw_sinc(generator)
    family = FAMILIES[_pick(config.kernel_prob, generator)]
    size, sigma, angle, beta = _draw_size(generator), generator.uniform(*config.blur_sigma), 0.0, 1.0
    across = sigma
    if family.endswith("aniso"):
        across, angle = generator.uniform(*config.blur_sigma), generator.uniform(-math.pi, math.pi)
    if family.startswith(("generalized", "plateau")):
        low, high = config.betag_range if family.startswith("generalized") else config.betap_range
        beta = generator.uniform(low, 1) if generator.random() < 0.5 else generator.uniform(1, high)
    return Bell(family, size, (sigma, across), angle, beta)


def _draw_sinc(generator: np.random.Generator, lowest: float | None = None) -> Sinc:
    size = _draw_size(generator)
    lowest = lowest or (math.pi / 3 if size < WIDE_KERNEL else math.pi / 5)
    return Sinc(size, generator.uniform(lowest, math.pi))


def _draw_size(generator: np.random.Generator) -> int:
    return KERNEL_SIZES[int(generator.integers(len(KERNEL_SIZES)))]


def _draw_mode(generator: np.random.Generator) -> Mode:
    return MODES[int(generator.integers(len(MODES)))]


def _draw_noise(config: Round, generator: np.random.Generator) -> Noise:
    grey = bool(generator.random() < config.gray_noise_prob)
    if generator.random() < config.gaussian_noise_prob:
        return Noise("gaussian", generator.uniform(*config.noise_range), grey)
    return Noise("poisson", generator.uniform(*config.poisson_scale_range), grey)


def _pick(shares: Sequence[float], generator: np.random.Generator) -> int:
    return int(generator.choice(len(shares), p=np.divide(shares, sum(shares))))


def apply(clip: Tensor, scale: int, drawn: Draw, generator: np.random.Generator) -> Tensor:
    """Do what is drawn to a clip `[F, 3, H, W]`; `generator` gives the grains of noise."""
    size = _divided(clip, scale)
    clip = jpeg(_apply_round(clip, clip.shape[2:], drawn.first, generator), drawn.first.quality)
    clip = _apply_round(clip, size, drawn.second, generator)
    if not drawn.jpeg_last:
        clip = jpeg(clip, drawn.second.quality)
    clip = _filter(resize(clip, size, drawn.mode), drawn.sinc)
    return jpeg(clip, drawn.second.quality) if drawn.jpeg_last else _levels(clip)


def _apply_round(clip: Tensor, size: Sequence[int], drawn: DrawnRound, generator: np.random.Generator) -> Tensor:
    """Blur, resize and noise; the factor is of `size`."""
    height, width = (max(1, int(side * drawn.factor)) for side in size)
    return drawn.noise.add(resize(_filter(clip, drawn.blur), (height, width), drawn.mode), generator)


def _filter(clip: Tensor, drawn: Bell | Sinc | None) -> Tensor:
    return clip if drawn is None else blur(clip, drawn.kernel())


def gaussian_kernel(size: int, sigma: Range, angle: float = 0.0) -> Tensor:
    """exp(-x' S^-1 x / 2) as `[size, size]` with sum 1.

    S has the standard deviations `sigma` in pixels, the first of them along (cos, sin) of `angle`, from x towards y.
    """
    return generalized_kernel(size, sigma, angle, 1.0)


def generalized_kernel(size: int, sigma: Range, angle: float, beta: float) -> Tensor:
    """exp(-(x' S^-1 x)^beta / 2) in the same way: a flat top above beta 1, a peak below."""
    return _normalized(torch.exp(-0.5 * _distance(size, sigma, angle) ** beta))


def plateau_kernel(size: int, sigma: Range, angle: float, beta: float) -> Tensor:
    """1 / (1 + (x' S^-1 x)^beta) in the same way: a flat top and long tails."""
    return _normalized(1 / (1 + _distance(size, sigma, angle) ** beta))


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """w J1(w r) / (2 pi r) with sum 1: an ideal low-pass of all directions at w = `cutoff`, cut off at a window."""
    radius = _distance(size, (1.0, 1.0), 0.0).sqrt()
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return _normalized(kernel)


def _distance(size: int, sigma: Range, angle: float) -> Tensor:
    """Squared Mahalanobis distance of each pixel from the middle."""
    steps = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    return (along / sigma[0]) ** 2 + (across / sigma[1]) ** 2


def _normalized(kernel: Tensor) -> Tensor:
    return (kernel / kernel.sum()).float()


def blur(clip: Tensor, kernel: Tensor) -> Tensor:
    """Correlate each channel with a kernel of odd sides; the picture goes on mirrored at its edges, however small."""
    frames, _, height, width = clip.shape
    down, across = (side // 2 for side in kernel.shape)
    band = math.ceil(height / BANDS)
    rows = torch.arange(-down, band + down) + band * torch.arange(BANDS)[:, None]
    columns = torch.arange(-across, width + across)
    clip = clip.index_select(2, _mirrored(rows, height).flatten()).index_select(3, _mirrored(columns, width))
    clip = clip.view(1, frames * 3 * BANDS, -1, len(columns))
    clip = F.conv2d(clip, kernel.expand(clip.shape[1], 1, *kernel.shape), groups=clip.shape[1])
    return clip.view(frames, 3, -1, width)[:, :, :height]


def _mirrored(places: Tensor, side: int) -> Tensor:
    """Indices 0 to side - 1 for any whole numbers, turning back at the first and the last pixel."""
    places = places.abs() % max(1, 2 * side - 2)
    return torch.minimum(places, 2 * side - 2 - places)


def resize(clip: Tensor, size: tuple[int, int], mode: Mode) -> Tensor:
    """To (height, width) without antialiasing."""
    return F.interpolate(clip, size=size, mode=mode)


def gaussian_noise(clip: Tensor, sigma: float, grey: bool, generator: np.random.Generator) -> Tensor:
    """Add noise of standard deviation `sigma` / 255, the same in all channels if `grey`."""
    shape = (len(clip), 1 if grey else 3, *clip.shape[2:])
    noise = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    return (clip + noise * (sigma / 255)).clamp(0, 1)


def poisson_noise(clip: Tensor, scale: float, grey: bool, generator: np.random.Generator) -> Tensor:
    """Add `scale` times the noise of a camera in which white is n photons, that of the grey picture if `grey`.

    n is the number of 8-bit levels in the clip, rounded up to a power of two; the variance is scale^2 level / n.
    """
    levels = _levels((clip * torch.tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True) if grey else clip)
    used = np.count_nonzero(np.bincount((levels * 255).round().byte().numpy().ravel()))
    photons = 2 ** math.ceil(math.log2(used))
    counted = torch.from_numpy(generator.poisson(levels.numpy() * photons).astype(np.float32))
    return (clip + scale * (counted / photons - levels)).clamp(0, 1)


def jpeg(clip: Tensor, quality: int) -> Tensor:
    """Each frame as libjpeg gives it back at a quality of 1 to 100, with colour at half the resolution."""
    pictures = (clip.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    back = np.empty_like(pictures)
    for i, picture in enumerate(pictures):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        back[i] = np.asarray(Image.open(file, formats=["JPEG"]))
    return torch.from_numpy(back).permute(0, 3, 1, 2).contiguous().float() / 255


def _divided(clip: Tensor, scale: int) -> tuple[int, int]:
    height, width = clip.shape[2:]
    assert height % scale == width % scale == 0, f"{width}x{height} does not divide by {scale}"
    return height // scale, width // scale


def _levels(clip: Tensor) -> Tensor:
    """Rounded to 8 bits."""
    return (clip.clamp(0, 1) * 255).round() / 255
