"""Real-ESRGAN's chain: every stage against a reference written in another way, what is drawn, and the whole of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, special, stats
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from videofactory_train import degradation
from videofactory_train.degradation import (
    FAMILIES,
    MODES,
    Bell,
    Degradation,
    Draw,
    DrawnRound,
    Noise,
    Round,
    SecondRound,
    Sinc,
    degrade,
    downscale,
    draw,
    sharpen,
)

from videofactory_core.config import SettingError, from_dict

# Bounds that a right result leaves once in a million times.
RARE = 1e-6
ERRORS = stats.norm.isf(RARE / 2)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def scene(height: int, width: int, frames: int = 1) -> Tensor:
    """Smooth colours with an edge, a little other in every frame: `[F, 3, H, W]` in 0..1."""
    t, y, x = np.meshgrid(np.arange(frames), np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    waves = [0.5 + 0.3 * np.sin(4 * x + 3 * channel + 0.2 * t) * np.cos(5 * y) for channel in range(3)]
    return torch.tensor(np.stack(waves, 1) + 0.15 * (x + y > 1)[:, None], dtype=torch.float32)


def on_levels(clip: Tensor) -> bool:
    return bool(((clip * 255 - (clip * 255).round()).abs() < 1e-4).all() and clip.min() >= 0 and clip.max() <= 1)


def quadratic(size: int, sigma: tuple[float, float], angle: float) -> np.ndarray:
    """x' S^-1 x from the covariance matrix S itself."""
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.diag(np.square(sigma)) @ turn.T)
    steps = np.arange(size) - size // 2
    places = np.stack(np.meshgrid(steps, steps), -1).astype(float)
    return np.einsum("yxi,ij,yxj->yx", places, inverse, places)


FORMULAS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "gaussian": lambda q, beta: np.exp(-q / 2),
    "generalized": lambda q, beta: np.exp(-(q**beta) / 2),
    "plateau": lambda q, beta: 1 / (q**beta + 1),
}


@pytest.mark.parametrize("size", [7, 13, 21])
@pytest.mark.parametrize("angle", [0.0, 0.7, -2.5])
@pytest.mark.parametrize("sigma", [(0.2, 0.2), (1.3, 1.3), (3.0, 0.8)])
@pytest.mark.parametrize("name", FORMULAS)
def test_bells_follow_their_formulas(name: str, sigma: tuple[float, float], angle: float, size: int) -> None:
    for beta in (0.5, 1.0, 1.9, 4.0):
        extra = () if name == "gaussian" else (beta,)
        kernel = getattr(degradation, f"{name}_kernel")(size, sigma, angle, *extra)
        expected = FORMULAS[name](quadratic(size, sigma, angle), beta)
        assert kernel.dtype == torch.float32
        np.testing.assert_allclose(kernel, expected / expected.sum(), rtol=0, atol=1e-7)
        assert kernel.double().sum().item() == pytest.approx(1, abs=1e-6)
        assert torch.allclose(kernel, kernel.flip(0, 1), rtol=0, atol=1e-8)
        if sigma[0] == sigma[1]:
            assert torch.allclose(kernel, kernel.rot90(), rtol=0, atol=1e-7)
        assert kernel.argmax() == size * size // 2


@pytest.mark.parametrize("name", FORMULAS)
def test_bells_are_turned_by_their_angle(name: str) -> None:
    def kernel(angle: float) -> Tensor:
        extra = () if name == "gaussian" else (1.0,)
        return getattr(degradation, f"{name}_kernel")(21, (2.5, 0.9), angle, *extra)

    flat = kernel(0.0)
    assert flat[10, 14] > flat[14, 10]
    assert torch.allclose(kernel(math.pi / 2), flat.T, rtol=0, atol=1e-7)
    assert torch.allclose(kernel(0.6).flip(0), kernel(-0.6), rtol=0, atol=1e-7)
    steps = torch.arange(21.0) - 10
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    near = (x**2 + y**2 <= 100).float()
    for angle in (0.3, 1.2, -0.8):
        weights = kernel(angle) * near
        covariance = [(weights * product).sum().item() for product in (x * x, x * y, y * y)]
        axis = math.atan2(2 * covariance[1], covariance[0] - covariance[2]) / 2
        assert axis == pytest.approx(angle, abs=0.02)


@pytest.mark.parametrize("size", [7, 13, 21])
@pytest.mark.parametrize("cutoff", [math.pi / 5, math.pi / 3, 2.0, math.pi])
def test_sinc_is_the_transform_of_a_disc(cutoff: float, size: int) -> None:
    kernel = degradation.sinc_kernel(size, cutoff)
    radius = np.hypot(*np.meshgrid(np.arange(size) - size // 2, np.arange(size) - size // 2))
    with np.errstate(invalid="ignore"):
        expected = cutoff * special.j1(cutoff * radius) / (2 * np.pi * radius)
    expected[size // 2, size // 2] = cutoff**2 / (4 * np.pi)
    np.testing.assert_allclose(kernel, expected / expected.sum(), rtol=0, atol=1e-6)
    assert kernel.double().sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(kernel, kernel.rot90(), rtol=0, atol=1e-7)
    assert kernel.min() < 0 or cutoff * size < 8


@pytest.mark.parametrize(("height", "width"), [(37, 52), (64, 48), (9, 5), (2, 30), (1, 1)])
def test_blur_is_a_convolution_over_mirrored_pictures(height: int, width: int) -> None:
    clip = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    for kernel in (
        degradation.gaussian_kernel(7, (2.0, 0.7), 0.5),
        degradation.plateau_kernel(21, (1.5, 3.0), -1.1, 1.4),
        degradation.sinc_kernel(13, 1.3),
    ):
        expected = [[ndimage.convolve(channel, kernel.numpy(), mode="mirror") for channel in frame] for frame in clip]
        np.testing.assert_allclose(degradation.blur(clip, kernel), expected, rtol=0, atol=2e-6)
    lopsided = torch.rand(3, 9, generator=torch.Generator().manual_seed(1))
    expected = [[ndimage.correlate(channel, lopsided.numpy(), mode="mirror") for channel in frame] for frame in clip]
    np.testing.assert_allclose(degradation.blur(clip, lopsided), expected, rtol=0, atol=1e-5)


def cubic(x: float, a: float) -> float:
    """Keys' kernel."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resampling(before: int, after: int, mode: str) -> np.ndarray:
    """The matrix `[after, before]` of a resize in one direction."""
    matrix = np.zeros((after, before))
    for i in range(after):
        if mode == "area":
            first, last = i * before // after, -(-(i + 1) * before // after)
            matrix[i, first:last] = 1 / (last - first)
            continue
        middle = (i + 0.5) * before / after - 0.5
        if mode == "bilinear":
            middle = max(middle, 0.0)
        for j in range(math.floor(middle) - 1, math.floor(middle) + 3):
            weight = max(0.0, 1 - abs(middle - j)) if mode == "bilinear" else cubic(middle - j, -0.75)
            matrix[i, min(max(j, 0), before - 1)] += weight
    return matrix


@pytest.mark.parametrize("size", [(11, 17), (40, 61), (1, 3), (33, 24), (80, 9)])
@pytest.mark.parametrize("mode", MODES)
def test_resize_follows_its_formula_without_antialiasing(mode: Any, size: tuple[int, int]) -> None:
    clip = torch.rand(2, 3, 33, 24, generator=torch.Generator().manual_seed(0))
    down, across = resampling(33, size[0], mode), resampling(24, size[1], mode)
    expected = np.einsum("hy,fcyx,wx->fchw", down, clip.numpy(), across)
    np.testing.assert_allclose(degradation.resize(clip, size, mode), expected, rtol=0, atol=3e-5)


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
@pytest.mark.parametrize("quality", [5, 30, 60, 95])
@pytest.mark.parametrize(("height", "width"), [(64, 48), (37, 51)])
def test_jpeg_is_libjpegs(height: int, width: int, quality: int) -> None:
    # Here, so that the processes that the tests start need not import it.
    from torchvision.io import decode_jpeg, encode_jpeg

    grain = 0.1 * torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    clip = scene(height, width, frames=3) + grain
    assert clip.min() < 0
    assert clip.max() > 1
    result = degradation.jpeg(clip, quality)
    assert on_levels(result)
    for frame, given in zip(result, clip, strict=True):
        picture = (given.clamp(0, 1) * 255).round().byte()
        expected = decode_jpeg(encode_jpeg(picture, quality)).float() / 255
        error = (frame - expected).square().mean().item()
        assert error == 0 or -10 * math.log10(error) > 38
        other = decode_jpeg(encode_jpeg(picture, 15)).float() / 255
        assert -10 * math.log10((frame - other).square().mean().item()) < 38


def test_gaussian_noise_has_its_deviation() -> None:
    clip = torch.full((2, 3, 480, 480), 0.5)
    for sigma in (1.0, 12.0):
        noise = (degradation.gaussian_noise(clip, sigma, False, rng()) - clip).double() * 255
        rows = noise.transpose(0, 1).flatten(1)
        count = noise.numel()
        assert abs(noise.mean()) < ERRORS * sigma / math.sqrt(count)
        assert abs(noise.std() - sigma) < ERRORS * sigma / math.sqrt(2 * count)
        assert (torch.corrcoef(rows) - torch.eye(3)).abs().max() < ERRORS / math.sqrt(rows.shape[1])
        assert not torch.equal(noise[0], noise[1])
        grey = (degradation.gaussian_noise(clip, sigma, True, rng()) - clip).double() * 255
        assert torch.equal(grey[:, :1].expand_as(grey), grey)
        assert abs(grey[:, 0].std() - sigma) < ERRORS * sigma / math.sqrt(2 * count / 3)
        assert not torch.equal(grey[0], grey[1])


def test_noise_stays_within_the_range() -> None:
    clip = scene(40, 40).round()
    for noise in (Noise("gaussian", 30.0, False), Noise("poisson", 3.0, False), Noise("poisson", 3.0, True)):
        noisy = noise.add(clip, rng())
        assert noisy.min() >= 0
        assert noisy.max() <= 1


@pytest.mark.parametrize(("levels", "photons", "scale"), [(3, 4, 0.05), (5, 8, 0.1), (200, 256, 0.5)])
@pytest.mark.parametrize("grey", [False, True])
def test_poisson_noise_grows_with_the_level(grey: bool, levels: int, photons: int, scale: float) -> None:
    values = (torch.linspace(60, 190, levels).round() if levels < 100 else torch.arange(30, 30 + levels)) / 255
    assert len(values.unique()) == levels
    columns = values.repeat_interleave(2).expand(4, 3, 600, -1).clone()
    noise = (degradation.poisson_noise(columns, scale, grey, rng()) - columns).double()
    if grey:
        assert torch.allclose(noise[:, :1].expand_as(noise), noise, rtol=0, atol=1e-6)
        noise = noise[:, :1]
    for i in (0, levels // 2, levels - 1):
        some = noise[..., 2 * i : 2 * i + 2]
        level, count = values[i].item(), some.numel()
        rate = level * photons
        unit = scale / photons
        assert abs(some.mean()) < ERRORS * unit * math.sqrt(rate / count)
        # The fourth central moment of Poisson's distribution is rate + 3 rate^2.
        error = unit**2 * math.sqrt((rate + 2 * rate**2) / count)
        assert abs(some.var() - scale**2 * level / photons) < ERRORS * error


def test_poisson_noise_in_colours_comes_from_each_channel_or_from_grey() -> None:
    clip = torch.zeros(1, 3, 60, 60)
    clip[:, 1] = 1 / 2
    noise = degradation.poisson_noise(clip, 0.1, False, rng()) - clip
    assert not noise[:, 0].any()
    assert noise[:, 1].any()
    # One level of grey: 1 photon, and brightness by ITU-R BT.601.
    grey = (degradation.poisson_noise(clip + 0.2, 0.05, True, rng()) - clip - 0.2).double()
    assert torch.allclose(grey[:, 0], grey[:, 1], rtol=0, atol=1e-6)
    level = round(255 * (0.2 + 0.587 / 2)) / 255
    error = 0.05**2 * math.sqrt((level + 2 * level**2) / 3600)
    assert abs(grey[:, 0].var() - 0.05**2 * level) < ERRORS * error


def test_sharpening_is_an_unsharp_mask_where_the_difference_is_large() -> None:
    clip = scene(70, 90, frames=2)
    taps = np.exp(-(np.arange(-25, 26) ** 2) / 128)

    def soften(x: np.ndarray) -> np.ndarray:
        for axis in (2, 3):
            x = ndimage.convolve1d(x, taps / taps.sum(), axis, mode="mirror")
        return x

    x = clip.double().numpy()
    detail = x - soften(x)
    mask = soften((np.abs(detail) > 10 / 255).astype(float))
    expected = mask * np.clip(x + 0.5 * detail, 0, 1) + (1 - mask) * x
    np.testing.assert_allclose(sharpen(clip), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - x).max() > 0.05
    assert torch.allclose(sharpen(torch.full((1, 3, 8, 8), 0.4)), torch.tensor(0.4), atol=1e-6)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_downscale_is_antialiased_bicubic(scale: int) -> None:
    clip = torch.rand(2, 3, 24, 36, generator=torch.Generator().manual_seed(0))
    small = downscale(clip, scale)
    assert on_levels(small)
    size = (36 // scale, 24 // scale)
    for frame, given in zip(small, clip, strict=True):
        for channel, picture in zip(frame.numpy(), given.numpy(), strict=True):
            expected = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
            np.testing.assert_allclose(channel, expected.clip(0, 1), rtol=0, atol=0.5 / 255 + 1e-5)


@pytest.fixture(scope="module")
def draws() -> list[Draw]:
    generator = rng(7)
    return [draw(Degradation(), generator) for _ in range(6000)]


def agree(seen: Sequence[Any], shares: dict[Any, float]) -> None:
    """Pearson's test that `seen` has these shares."""
    counts = Counter(seen)
    assert set(counts) <= set(shares)
    total = sum(shares.values())
    expected = [len(seen) * share / total for share in shares.values()]
    assert min(expected) > 5
    statistic = sum((counts[key] - e) ** 2 / e for key, e in zip(shares, expected, strict=True))
    assert statistic < stats.chi2.isf(RARE, len(shares) - 1), (counts, shares)


def uniform(seen: Sequence[float], low: float, high: float) -> None:
    """Kolmogorov and Smirnov's test that `seen` is uniform from `low` to `high`, and nowhere outside."""
    assert low <= min(seen)
    assert max(seen) <= high
    assert stats.kstest(seen, stats.uniform(low, high - low).cdf).pvalue > RARE


@pytest.mark.parametrize(
    ("name", "blurred", "ways"), [("first", 1.0, (0.2, 0.7, 0.1)), ("second", 0.8, (0.3, 0.4, 0.3))]
)
def test_rounds_are_drawn_with_their_probabilities(
    name: str, blurred: float, ways: tuple[float, ...], draws: list[Draw]
) -> None:
    rounds: list[DrawnRound] = [getattr(drawn, name) for drawn in draws]
    kinds = [type(r.blur).__name__ if not isinstance(r.blur, Bell) else r.blur.family for r in rounds]
    families = dict(zip(FAMILIES, (0.45, 0.25, 0.12, 0.03, 0.12, 0.03), strict=True))
    shares: dict[Any, float] = {family: 0.9 * blurred * share for family, share in families.items()}
    shares["Sinc"] = 0.1 * blurred
    if blurred < 1:
        shares["NoneType"] = 1 - blurred
    agree(kinds, shares)
    agree([r.blur.size for r in rounds if r.blur], dict.fromkeys(range(7, 22, 2), 1))
    agree([np.sign(r.factor - 1) for r in rounds], dict(zip((1, -1, 0), ways, strict=True)))
    agree([r.mode for r in rounds], dict.fromkeys(MODES, 1))
    kinds_of_noise = {
        ("gaussian", True): 0.2,
        ("gaussian", False): 0.3,
        ("poisson", True): 0.2,
        ("poisson", False): 0.3,
    }
    agree([(r.noise.kind, r.noise.grey) for r in rounds], kinds_of_noise)
    agree([r.quality for r in rounds], dict.fromkeys(range(30, 96), 1))


@pytest.mark.parametrize(
    ("name", "sigma", "factor", "noise", "photons"),
    [
        ("first", (0.2, 3.0), (0.15, 1.5), (1, 30), (0.05, 3.0)),
        ("second", (0.2, 1.5), (0.3, 1.2), (1, 25), (0.05, 2.5)),
    ],
)
def test_rounds_are_drawn_evenly_from_their_ranges(
    name: str,
    sigma: tuple[float, float],
    factor: tuple[float, float],
    noise: tuple[float, float],
    photons: tuple[float, float],
    draws: list[Draw],
) -> None:
    rounds: list[DrawnRound] = [getattr(drawn, name) for drawn in draws]
    bells = [r.blur for r in rounds if isinstance(r.blur, Bell)]
    turned = [bell for bell in bells if bell.family.endswith("aniso")]
    uniform([bell.sigma[0] for bell in bells], *sigma)
    uniform([bell.sigma[1] for bell in turned], *sigma)
    uniform([bell.angle for bell in turned], -math.pi, math.pi)
    assert abs(np.corrcoef(np.array([bell.sigma for bell in turned]).T)[0, 1]) < ERRORS / math.sqrt(len(turned))
    for bell in bells:
        if not bell.family.endswith("aniso"):
            assert bell.sigma[0] == bell.sigma[1]
            assert bell.angle == 0
    generalized = [bell.beta for bell in bells if bell.family.startswith("generalized")]
    uniform([beta for beta in generalized if beta < 1], 0.5, 1)
    uniform([beta for beta in generalized if beta >= 1], 1, 4)
    plateau = [bell.beta for bell in bells if bell.family.startswith("plateau")]
    uniform([beta for beta in plateau if beta > 1], 1, 2)
    for betas, flat in ((generalized, [beta < 1 for beta in generalized]), (plateau, [beta == 1 for beta in plateau])):
        assert len(betas) > 100
        agree(flat, {True: 0.5, False: 0.5})
    assert {bell.beta for bell in bells if bell.family in ("iso", "aniso")} == {1.0}
    sincs = [r.blur for r in rounds if isinstance(r.blur, Sinc)]
    uniform([sinc.cutoff for sinc in sincs if sinc.size < 13], math.pi / 3, math.pi)
    uniform([sinc.cutoff for sinc in sincs if sinc.size >= 13], math.pi / 5, math.pi)
    assert min(sinc.cutoff for sinc in sincs if sinc.size == 13) < math.pi / 3
    uniform([r.factor for r in rounds if r.factor < 1], factor[0], 1)
    uniform([r.factor for r in rounds if r.factor > 1], 1, factor[1])
    uniform([r.noise.strength for r in rounds if r.noise.kind == "gaussian"], *noise)
    uniform([r.noise.strength for r in rounds if r.noise.kind == "poisson"], *photons)


def test_both_last_orders_occur_and_most_pictures_end_with_a_sinc(draws: list[Draw]) -> None:
    orders = {(True, True): 0.4, (True, False): 0.1, (False, True): 0.4, (False, False): 0.1}
    agree([(drawn.jpeg_last, drawn.sinc is not None) for drawn in draws], orders)
    agree([drawn.mode for drawn in draws], dict.fromkeys(MODES, 1))
    sincs = [drawn.sinc for drawn in draws if drawn.sinc]
    agree([sinc.size for sinc in sincs], dict.fromkeys(range(7, 22, 2), 1))
    uniform([sinc.cutoff for sinc in sincs], math.pi / 3, math.pi)


FIRST = DrawnRound(Bell("aniso", 9, (2.0, 0.6), 0.4), 0.6, "bilinear", Noise("gaussian", 9.0, True), 60)
SECOND = DrawnRound(None, 1.19, "bicubic", Noise("poisson", 1.5, False), 45)


@pytest.mark.parametrize("jpeg_last", [False, True])
def test_stages_follow_each_other_in_the_drawn_order(jpeg_last: bool) -> None:
    clip, generator = scene(42, 60, frames=2), rng(3)
    result = degradation.apply(clip, 3, Draw(FIRST, SECOND, jpeg_last, "area", Sinc(7, 2.0)), rng(3))
    x = degradation.blur(clip, degradation.gaussian_kernel(9, (2.0, 0.6), 0.4))
    x = degradation.resize(x, (25, 36), "bilinear")
    x = degradation.jpeg(degradation.gaussian_noise(x, 9.0, True, generator), 60)
    x = degradation.resize(x, (16, 23), "bicubic")
    x = degradation.poisson_noise(x, 1.5, False, generator)
    if jpeg_last:
        x = degradation.blur(degradation.resize(x, (14, 20), "area"), degradation.sinc_kernel(7, 2.0))
        x = degradation.jpeg(x, 45)
    else:
        x = degradation.resize(degradation.jpeg(x, 45), (14, 20), "area")
        x = degradation.blur(x, degradation.sinc_kernel(7, 2.0))
        x = (x.clamp(0, 1) * 255).round() / 255
    assert torch.equal(result, x)


@pytest.mark.parametrize(
    ("scale", "height", "width"),
    [(4, 64, 96), (4, 36, 20), (3, 33, 51), (2, 26, 34), (1, 15, 18), (4, 4, 4), (8, 8, 24)],
)
def test_results_have_the_size_and_the_levels_of_a_file(scale: int, height: int, width: int) -> None:
    clip = scene(height, width, frames=2)
    before = clip.clone()
    for seed in range(12):
        result = degrade(clip, scale, Degradation(), rng(seed))
        assert result.shape == (2, 3, height // scale, width // scale)
        assert result.dtype == torch.float32
        assert on_levels(result)
    assert torch.equal(clip, before)


def test_sides_must_be_multiples_of_the_scale() -> None:
    with pytest.raises(AssertionError, match="30x32 does not divide by 4"):
        degrade(scene(32, 30), 4, Degradation(), rng())


class Spoiled(Dataset[Tensor]):
    """Item `i` is spoiled with seed `i`."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return degrade(scene(48, 64, frames=2), 4, Degradation(), rng(index))


@pytest.mark.usefixtures("one_thread")
def test_the_seed_alone_decides_in_any_number_of_processes() -> None:
    items = Spoiled()
    here = [items[i] for i in range(len(items))]
    torch.manual_seed(5)
    np.random.seed(5)
    for i, item in enumerate(here):
        assert torch.equal(items[i], item)
        assert not any(torch.equal(item, other) for other in here[:i])
    for workers in (0, 1, 2):
        context = "spawn" if workers else None
        loader = DataLoader(items, batch_size=None, num_workers=workers, multiprocessing_context=context)
        assert all(torch.equal(item, expected) for item, expected in zip(loader, here, strict=True))


def test_frames_share_a_draw_as_often_as_it_is_asked() -> None:
    clip = scene(32, 32).expand(3, -1, -1, -1).contiguous()
    silent = {"gaussian_noise_prob": 1.0, "noise_range": (0.0, 0.0)}

    def alike(shared: float, seed: int) -> bool:
        config = Degradation(first=Round(**silent), second=SecondRound(**silent), shared=shared)
        first, *others = degrade(clip, 4, config, rng(seed))
        return all(torch.equal(first, other) for other in others)

    assert all(alike(1.0, seed) for seed in range(10))
    assert not any(alike(0.0, seed) for seed in range(10))
    agree([alike(0.5, seed) for seed in range(200)], {True: 0.5, False: 0.5})
    # What differs between the frames of one draw is the noise.
    noisy = degrade(clip, 4, Degradation(shared=1.0), rng())
    assert not torch.equal(noisy[0], noisy[1])


def test_a_recipe_changes_what_it_names() -> None:
    data = {
        "shared": 1,
        "first": {"blur_sigma": [0.5, 2], "jpeg_range": [50, 60]},
        "second": {"blur_prob": 0, "resize_prob": [0, 0, 1]},
    }
    config = from_dict(Degradation, data)
    assert config == Degradation(
        shared=1.0,
        first=Round(blur_sigma=(0.5, 2.0), jpeg_range=(50, 60)),
        second=SecondRound(blur_prob=0.0, resize_prob=(0.0, 0.0, 1.0)),
    )
    assert config.second.resize_range == (0.3, 1.2)
    drawn = [draw(config, rng(seed)) for seed in range(200)]
    assert all(d.second.blur is None and d.second.factor == 1 and 50 <= d.first.quality <= 60 for d in drawn)
    assert from_dict(Degradation, {}) == Degradation()


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("blur_prob", 1.2, "blur_prob: 1.2 is no probability; use a number from 0 to 1"),
        ("gray_noise_prob", math.nan, "nan is no probability"),
        ("kernel_prob", [1, 0, 0, 0, 0], "expected 6 values, got 5"),
        ("kernel_prob", [0, 0, 0, 0, 0, 0], "are no shares; use numbers from 0, one of them above 0"),
        ("resize_prob", [0.5, -0.5, 1], "are no shares"),
        ("resize_prob", [0.5, math.inf, 1], "are no shares"),
        ("blur_sigma", [3, 0.2], "3.0 to 0.2 is no range; use two numbers in order from 0.05 to 50"),
        ("blur_sigma", [0, 1], "is no range"),
        ("noise_range", [1, math.inf], "is no range; use two numbers in order from 0 to 255"),
        ("poisson_scale_range", [math.nan, 1], "is no range"),
        ("jpeg_range", [0, 95], "is no range; use two numbers in order from 1 to 100"),
        ("jpeg_range", [30.5, 95], "expected int"),
        ("betap_range", [1.5, 2], "1.5 to 2.0 leaves out 1; use a number up to 1 and one from 1"),
        ("resize_range", [0.2, 0.9], "leaves out 1"),
        ("blur_sigmas", [1, 2], "did you mean 'blur_sigma'?"),
    ],
)
def test_settings_that_cannot_be_used_are_named(key: str, value: Any, problem: str) -> None:
    with pytest.raises(SettingError) as caught:
        from_dict(Degradation, {"second": {key: value}}, ("degradation",))
    assert problem in str(caught.value)
    assert caught.value.keys[:3] == ("degradation", "second", key)


@pytest.mark.parametrize("key", ["shared", "final_sinc_prob"])
def test_probabilities_of_the_whole_are_checked_too(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: -0.1 is no probability"):
        Degradation(**{key: -0.1})
