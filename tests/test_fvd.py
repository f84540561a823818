"""FVD: the Frechet distance in cases that are known exactly, and features beside written-out networks and cd-fvd's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from videofactory_train.data.content import checksum
from videofactory_train.evaluate import frechet, fvd
from videofactory_train.evaluate.fvd import FVD, VARIANTS, load, load_videomae, metric
from videofactory_train.evaluate.i3d import I3D, MIXED
from videofactory_train.evaluate.videomae import GIANT, VideoViT, ViTConfig, sinusoids

Array = frechet.Array
pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
# Sixteen heads like the large one.
TINY = ViTConfig(width=64, depth=2, heads=16, hidden=96)


def rotation(dimensions: int, seed: int = 0) -> Array:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dimensions, dimensions)))[0]


def clips(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, beside how much the features of a clip differ."""
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=2e-5 * expected.std().item())


# The distance

# Two Gaussians and the square of how far they are apart.
FIVE = (np.zeros(5), np.diag([1.0, 4, 9, 16, 25]), np.arange(5.0), np.diag([4.0, 4, 1, 1, 0]))
TWO = (np.zeros(2), np.array([[2.0, 1], [1, 3]]), np.zeros(2), np.array([[1, -0.5], [-0.5, 2]]))
SHIFTED = (np.zeros(2), np.eye(2), np.ones(2), np.eye(2))
SAME = (np.arange(3.0), np.diag([7.0, 0, 2]), np.arange(3.0), np.diag([7.0, 0, 2]))


@pytest.mark.parametrize(
    ("gaussians", "expected"),
    # The first is also what torchmetrics 1.9 gives.
    [(FIVE, 69.0), (TWO, 0.8122104140), (SHIFTED, 2.0), (SAME, 0.0)],
)
def test_cases_that_are_known_exactly(gaussians: tuple[Array, ...], expected: float) -> None:
    mean1, covariance1, mean2, covariance2 = gaussians
    assert frechet.distance(*gaussians) == pytest.approx(expected, abs=1e-10)
    assert frechet.distance(mean2, covariance2, mean1, covariance1) == pytest.approx(expected, abs=1e-10)
    for seed in range(3):
        turn = rotation(len(mean1), seed)
        turned = (turn @ mean1, turn @ covariance1 @ turn.T, turn @ mean2, turn @ covariance2 @ turn.T)
        assert frechet.distance(*turned) == pytest.approx(expected, abs=1e-10)


def test_it_is_what_the_eigenvalues_of_the_product_give() -> None:
    random = np.random.default_rng(0)
    first, second = random.normal(size=(300, 24)) @ rotation(24), random.gamma(2, size=(200, 24)) * np.arange(1, 25)
    eigenvalues = np.linalg.eigvals(np.cov(first, rowvar=False) @ np.cov(second, rowvar=False))
    expected = np.square(first.mean(0) - second.mean(0)).sum() + first.var(0, ddof=1).sum()
    expected += second.var(0, ddof=1).sum() - 2 * np.sqrt(eigenvalues.real).sum()
    assert frechet.between(first, second, ddof=1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(2, 2), (7, 30), (30, 200)])
def test_fewer_videos_than_features(n: int, m: int) -> None:
    random = np.random.default_rng(1)
    first, second = random.normal(size=(n, 50)), random.normal(size=(m, 50)) + 0.3
    a, b = first - first.mean(0), second - second.mean(0)
    # With S = A^T A / n, the trace of the root is the sum of the singular values of A B^T / sqrt(n m).
    shared = np.linalg.svd(a @ b.T / math.sqrt(n * m), compute_uv=False).sum()
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.square(a).sum() / n + np.square(b).sum() / m
    assert frechet.between(first, second) == pytest.approx(expected - 2 * shared, rel=1e-9)
    assert frechet.between(first, first) == pytest.approx(0, abs=1e-9)
    # A shift of all is its square.
    assert frechet.between(first, first + 2) == pytest.approx(4 * 50, rel=1e-9)


def test_videos_that_are_all_the_same() -> None:
    random = np.random.default_rng(1)
    same, others = np.ones((5, 3)), random.normal(size=(40, 3))
    assert frechet.between(same, same + 1) == pytest.approx(3)
    expected = np.square(others.mean(0) - 1).sum() + others.var(0).sum()
    assert frechet.between(same, others) == pytest.approx(expected)


def test_features_of_float32_far_from_zero_are_exact() -> None:
    features = (np.random.default_rng(2).normal(size=(100, 8)) + 1000).astype(np.float32)
    covariance = frechet.Moments.of(features, ddof=1).covariance
    assert covariance == pytest.approx(np.cov(features.astype(np.float64), rowvar=False), rel=1e-9)
    assert frechet.Moments.of(features).covariance == pytest.approx(0.99 * covariance, rel=1e-12)


def test_features_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 2 videos or more on each side, not 1: add videos"):
        frechet.between(np.ones((1, 3)), np.ones((4, 3)))
    with pytest.raises(ValueError, match="not finite"):
        frechet.between(np.full((4, 3), np.nan), np.ones((4, 3)))


def test_a_line_in_1_over_n() -> None:
    line = frechet.fit([100, 200, 400], [5 + 300 / n for n in (100, 200, 400)])
    assert (line.value, line.slope) == pytest.approx((5, 300))
    # y = a + b x through (1, 0), (1/2, 1), (1/4, 0), by the normal equations.
    line = frechet.fit([1, 2, 4], [0, 1, 0])
    assert (line.value, line.slope) == pytest.approx((0.5, -2 / 7))


def test_extrapolation_takes_away_what_few_videos_add() -> None:
    random = np.random.default_rng(3)
    first, second = random.normal(size=(600, 30)), random.normal(size=(900, 30))
    second[:, 0] += 1
    at_all = frechet.between(first, second)
    line = frechet.extrapolate(first, second)
    assert line.sizes[0] == 600
    assert line.sizes[-1] == 150
    assert line.distances[0] == pytest.approx(at_all)
    assert at_all > 1.5
    assert abs(line.value - 1) < (at_all - 1) / 2
    assert frechet.extrapolate(first, second) == line
    assert frechet.extrapolate(first, second, seed=1) != line
    with pytest.raises(ValueError, match="16 videos or more on each side, not 15"):
        frechet.extrapolate(first, second[:15])


# I3D


@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights as VideoGPT's file has them, with a normalisation that matters."""
    torch.manual_seed(0)
    network = I3D()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.8, 2)
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.Conv3d):
            # Or the features would hardly depend on the clip.
            nn.init.kaiming_normal_(module.weight)
    path = tmp_path_factory.mktemp("i3d") / "i3d_pretrained_400.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def i3d(i3d_file: Path) -> FVD:
    return load("fvd-i3d", i3d_file, CPU)


def test_i3d_has_the_layout_of_the_published_file() -> None:
    weights = I3D().state_dict()
    assert (
        sum(weight.numel() for key, weight in weights.items() if "running" not in key and "num" not in key) == 12697264
    )
    # 57 convolutions with a normalisation of 5, and the logits with a bias.
    assert len(weights) == 57 * 6 + 2
    assert weights["Conv3d_1a_7x7.conv3d.weight"].shape == (64, 3, 7, 7, 7)
    assert weights["Mixed_4f.b2b.conv3d.weight"].shape == (128, 32, 3, 3, 3)
    assert weights["Mixed_5c.b3b.bn.running_var"].shape == (128,)
    assert weights["logits.conv3d.weight"].shape == (400, 1024, 1, 1, 1)


def written_out_i3d(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network in float64, layer by layer, with TensorFlow's "SAME" padding."""
    w = {key: weight.double() for key, weight in weights.items()}

    def same(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
        pads: list[int] = []
        for size, k, s in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
            total = max((math.ceil(size / s) - 1) * s + k - size, 0)
            pads += [total // 2, total - total // 2]
        return F.pad(x, pads)

    def unit(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = w[f"{name}.conv3d.weight"]
        size = weight.shape[2]
        x = F.conv3d(same(x, (size,) * 3, (stride,) * 3), weight, stride=stride)
        mean, var, gain, bias = (
            w[f"{name}.bn.{part}"].view(-1, 1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return ((x - mean) / (var + 1e-5).sqrt() * gain + bias).clamp_min(0)

    def pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
        return F.max_pool3d(same(x, kernel, stride), kernel, stride)

    x = unit(x.double(), "Conv3d_1a_7x7", 2)
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
    for name in MIXED:
        if name == "3b":
            x = pool(x, (1, 3, 3), (1, 2, 2))
        if name == "4b":
            x = pool(x, (3, 3, 3), (2, 2, 2))
        if name == "5b":
            x = pool(x, (2, 2, 2), (2, 2, 2))
        m = f"Mixed_{name}"
        b1, b2 = (unit(unit(x, f"{m}.b{i}a"), f"{m}.b{i}b") for i in (1, 2))
        x = torch.cat([unit(x, f"{m}.b0"), b1, b2, unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{m}.b3b")], 1)
    x = x.mean((3, 4))
    # Of every two neighbours in time, each of which has its logits.
    x = (x[..., 1:] + x[..., :-1]) / 2
    logits = torch.einsum("oc,bct->bto", w["logits.conv3d.weight"][..., 0, 0, 0], x) + w["logits.conv3d.bias"]
    return logits.mean(1)


# At last there are 2 and 3 in time.
@pytest.mark.parametrize("frames", [10, 17])
def test_i3d_is_what_its_layers_give(i3d: FVD, i3d_file: Path, frames: int) -> None:
    pictures = clips(1, frames, 224, 224, 3)
    x = rearrange(pictures, "B F H W C -> B C F H W").double() / 127.5 - 1
    expected = written_out_i3d(torch.load(i3d_file), x)
    found = i3d(pictures)
    assert found.shape == (1, 400)
    assert found.dtype == torch.float32
    assert_near(found, expected)


def test_a_clip_has_the_same_features_in_a_batch_and_however_it_lies_in_memory(i3d: FVD) -> None:
    pictures = clips(2, 9, 40, 64, 3)
    together = i3d(pictures)
    assert (together[0] - together[1]).std() > together.std() / 100
    other = pictures.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0)
    assert_near(torch.cat([i3d(other[:1]), i3d(other[1:])]), together)


def test_i3d_refuses_eight_frames(i3d: FVD) -> None:
    assert i3d.least_frames == 9
    with pytest.raises(ValueError, match="fvd-i3d needs 9 frames or more, not 8: 16 are usual"):
        i3d(clips(1, 8, 32, 32, 3))


# How clips are made to fit


def bilinear(side: int, out: int) -> Array:
    """`[out, side]`: what each of `side` samples weighs in each of `out`, by the places of their middles."""
    weights = np.zeros((out, side))
    for i in range(out):
        place = max((i + 0.5) * side / out - 0.5, 0)
        below = min(int(place), side - 1)
        weights[i, below] += 1 - (place - below)
        weights[i, min(below + 1, side - 1)] += place - below
    return weights


def resized(pictures: Tensor, height: int, width: int) -> Array:
    """`[B, 3, F, height, width]` in 0..1 of pictures `[B, F, H, W, 3]`."""
    rows, columns = bilinear(pictures.shape[2], height), bilinear(pictures.shape[3], width)
    return rows @ (pictures.permute(0, 4, 1, 2, 3).numpy() / 255) @ columns.T


@pytest.mark.parametrize(("height", "width"), [(36, 64), (300, 20), (224, 224), (50, 50)])
def test_squashed_clips(height: int, width: int) -> None:
    pictures = clips(2, 2, height, width, 3)
    expected = resized(pictures, 224, 224)
    for name, values in (("fvd-videomae", expected), ("fvd-i3d", expected * 2 - 1)):
        np.testing.assert_allclose(VARIANTS[name].fit(pictures), values, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("height", "width", "sides"),
    [
        (36, 64, (224, 399)),  # 398.2 is rounded up
        (64, 36, (399, 224)),
        (90, 120, (224, 299)),
        (57, 57, (224, 224)),
        # By rounding, 50 * (224 / 50) is more than 224.
        (50, 50, (225, 224)),
    ],
)
def test_cropped_clips(height: int, width: int, sides: tuple[int, int]) -> None:
    pictures = clips(2, 2, height, width, 3)
    top, left = ((side - 224) // 2 for side in sides)
    expected = resized(pictures, *sides)[..., top : top + 224, left : left + 224] - 0.5
    np.testing.assert_allclose(VARIANTS["fvd-videogpt"].fit(pictures), expected, rtol=0, atol=5e-5)


def test_variants_on_the_same_weights_differ(i3d: FVD, i3d_file: Path) -> None:
    cropped = load("fvd-videogpt", i3d_file, CPU)
    pictures = clips(1, 9, 36, 64, 3)
    found = i3d(pictures)
    assert (cropped(pictures) - found).std() > found.std() / 10
    assert cropped.describe() != i3d.describe()
    assert cropped.describe()["weights"] == i3d.describe()["weights"] == checksum(i3d_file)
    assert "hash that is not known" in i3d.describe()["weights are"]


# VideoMAE


def tiny_vit() -> VideoViT:
    torch.manual_seed(1)
    network = VideoViT(TINY)
    for name, weight in network.named_parameters():
        nn.init.normal_(weight, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    # Or the features would hardly depend on the clip.
    nn.init.normal_(network.patch_embed["proj"].weight, std=1)
    return network.eval()


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as the published file has them: in half precision, with a head, below "module"."""
    weights = {**tiny_vit().state_dict(), "head.weight": torch.zeros(174, 64), "head.bias": torch.zeros(174)}
    path = tmp_path_factory.mktemp("vit") / "vit.pth"
    torch.save({"module": {key: weight.half() for key, weight in weights.items()}}, path)
    return path


@pytest.fixture
def vit(vit_file: Path) -> FVD:
    return FVD(VARIANTS["fvd-videomae"], load_videomae(vit_file, TINY), "", CPU)


def test_the_giant_has_the_layout_of_the_published_file() -> None:
    with torch.device("meta"):
        weights = VideoViT(GIANT).state_dict()
    # With the head of 174 classes they are the 2.02 GB of the file, in half precision.
    assert sum(weight.numel() for weight in weights.values()) == 1011610752
    # 13 in a block; patches and the last normalisation.
    assert len(weights) == 40 * 13 + 4
    assert weights["patch_embed.proj.weight"].shape == (1408, 3, 2, 14, 14)
    assert weights["blocks.39.attn.qkv.weight"].shape == (3 * 1408, 1408)
    assert weights["blocks.0.attn.v_bias"].shape == (1408,)
    assert weights["blocks.0.mlp.fc1.weight"].shape == (6144, 1408)
    assert "blocks.0.attn.qkv.bias" not in weights


def test_positions_are_sines_and_cosines() -> None:
    table = sinusoids(9, 6)
    for position in range(9):
        for channel in range(6):
            angle = position / 10000 ** (2 * (channel // 2) / 6)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert table[position, channel] == pytest.approx(expected, abs=1e-6)


def positions(tubes: int) -> Array:
    """`[tubes * 256, width]`, between those of 8 tubes where there are more or fewer."""
    table = sinusoids(8 * 256, TINY.width).double().view(8, 256, -1).numpy()
    if tubes == 8:
        return table.reshape(-1, TINY.width)
    found = []
    for tube in range(tubes):
        place = min(max((tube + 0.5) * 8 / (tubes + 0.1) - 0.5, 0), 7)
        below = min(int(place), 6)
        found.append(table[below] + (place - below) * (table[below + 1] - table[below]))
    return np.concatenate(found)


def written_out_vit(weights: dict[str, Tensor], x: Array) -> Array:
    """The features in float64 of clips `[B, 3, F, 224, 224]`, step by step."""
    w = {key: weight.double().numpy() for key, weight in weights.items()}

    def normalise(x: Array, name: str) -> Array:
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    tubes = rearrange(x, "b c (f t) (h y) (w x) -> b (f h w) (c t y x)", t=2, y=14, x=14)
    x = tubes @ w["patch_embed.proj.weight"].reshape(TINY.width, -1).T + w["patch_embed.proj.bias"]
    x = x + positions(x.shape[1] // 256)
    for i in range(TINY.depth):
        name = f"blocks.{i}"
        qkv = np.split(normalise(x, f"{name}.norm1") @ w[f"{name}.attn.qkv.weight"].T, 3, -1)
        q, k, v = qkv[0] + w[f"{name}.attn.q_bias"], qkv[1], qkv[2] + w[f"{name}.attn.v_bias"]
        heads = []
        for head in range(16):
            part = slice(4 * head, 4 * head + 4)
            scores = q[..., part] @ k[..., part].swapaxes(1, 2) / 2
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[..., part])
        x = x + np.concatenate(heads, -1) @ w[f"{name}.attn.proj.weight"].T + w[f"{name}.attn.proj.bias"]
        inside = normalise(x, f"{name}.norm2") @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
        inside = inside * 0.5 * (1 + torch.erf(torch.from_numpy(inside) / math.sqrt(2)).numpy())
        x = x + inside @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]
    return normalise(x.mean(1), "fc_norm")


@pytest.mark.parametrize("frames", [16, 4, 20])
def test_videomae_is_what_its_layers_give(vit: FVD, vit_file: Path, frames: int) -> None:
    pictures = clips(1, frames, 60, 80, 3)
    weights = {key: weight.float() for key, weight in torch.load(vit_file)["module"].items()}
    expected = written_out_vit(weights, resized(pictures, 224, 224))
    found = vit(pictures)
    assert found.shape == (1, TINY.width)
    assert_near(found, torch.from_numpy(expected))


def test_videomae_takes_frames_in_twos(vit: FVD) -> None:
    with pytest.raises(ValueError, match="needs 2 frames or more, not 1"):
        vit(clips(1, 1, 32, 32, 3))
    with pytest.raises(ValueError, match="takes frames by 2, and 9 are odd: use 16"):
        vit(clips(1, 9, 32, 32, 3))


# Files


def test_files_of_other_networks_are_refused(tmp_path: Path, i3d_file: Path, vit_file: Path) -> None:
    with pytest.raises(ValueError, match="'fvd' is no variant of FVD: use fvd-styleganv, fvd-videogpt"):
        load("fvd", i3d_file, CPU)
    with pytest.raises(ValueError, match=r"there is no file .* a local copy of i3d_pretrained_400.pt"):
        load("fvd-videogpt", tmp_path / "none.pt", CPU)
    with pytest.raises(ValueError, match=r"vit.pth is not VideoGPT's i3d_pretrained_400.pt: .* do not fit"):
        load("fvd-i3d", vit_file, CPU)
    with pytest.raises(ValueError, match="is not VideoMAE V2's"):
        load("fvd-videomae", vit_file, CPU)
    weights = torch.load(i3d_file)
    del weights["Mixed_4b.b0.bn.bias"]
    torch.save(weights, tmp_path / "lacks.pt")
    with pytest.raises(ValueError, match=r"Mixed_4b.b0.bn.bias and 0 more"):
        load("fvd-i3d", tmp_path / "lacks.pt", CPU)
    (tmp_path / "half.pt").write_bytes(i3d_file.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"damaged .* again"):
        load("fvd-i3d", tmp_path / "half.pt", CPU)


def test_videomae_of_another_training_is_refused(tmp_path: Path) -> None:
    weights = {**tiny_vit().state_dict(), "head.weight": torch.zeros(400, 64), "head.bias": torch.zeros(400)}
    save_file(weights, tmp_path / "k400.safetensors")
    with pytest.raises(ValueError, match="trained for 400 classes at last, not for the 174"):
        load_videomae(tmp_path / "k400.safetensors", TINY)


class Detector(nn.Module):
    """Says what it was given, in the manner of StyleGAN-V's file."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if x.dtype != torch.uint8:
            raise RuntimeError("not 0..255")
        flags = torch.tensor([float(rescale), float(resize), float(return_features)]).expand(x.shape[0], 3)
        means = x.float().mean((3, 4)).flatten(1)
        return torch.cat([flags, torch.tensor(x.shape[1:]).expand(x.shape[0], 4), means], 1)


@pytest.fixture(scope="module")
def script_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("script") / "i3d_torchscript.pt"
    torch.jit.script(Detector()).save(str(path))
    return path


def test_torchscript_runs_only_when_allowed(script_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = checksum(script_file)
    with pytest.raises(ValueError, match=f"is a program that would run .* SHA-256 {digest} is not known here"):
        load("fvd-styleganv", script_file, CPU)
    monkeypatch.setitem(fvd.PUBLISHED, digest, "a test's")
    with pytest.raises(ValueError, match="its SHA-256 is that of a test's: allow it only if"):
        load("fvd-styleganv", script_file, CPU)
    extractor = load("fvd-styleganv", script_file, CPU, run_code=True)
    assert extractor.describe()["weights are"] == "a test's"
    pictures = clips(2, 9, 20, 30, 3)
    found = extractor(pictures)
    assert found[:, :7].tolist() == [[1, 1, 1, 3, 9, 20, 30]] * 2
    expected = rearrange(pictures.double().mean((2, 3)), "B F C -> B (C F)").float()
    torch.testing.assert_close(found[:, 7:], expected)
    with pytest.raises(ValueError, match="needs 9 frames or more, not 8"):
        extractor(pictures[:, :8])


def test_what_is_no_torchscript_is_refused(i3d_file: Path, script_file: Path) -> None:
    with pytest.raises(ValueError, match="is not TorchScript or damaged"):
        load("fvd-styleganv", i3d_file, CPU, run_code=True)
    with pytest.raises(ValueError, match="holds more than weights or is damaged"):
        load("fvd-i3d", script_file, CPU)


def test_the_metric_is_the_distance_of_the_variants_features(i3d_file: Path) -> None:
    random = np.random.default_rng(4)
    first, second = random.normal(size=(20, 6)), random.normal(size=(30, 6))
    for name, ddof in (("fvd-videogpt", 1), ("fvd-i3d", 0)):
        made = metric(name, i3d_file, CPU)
        assert made.name == made.extractor.variant == name
        assert made.compare(first, second) == {"": frechet.between(first, second, ddof)}
        assert made.follow is not None
        expected = frechet.extrapolate(first, second, seed=5, ddof=ddof).value
        assert made.follow(first, second, seed=5) == {"": expected}
        assert f"n{' - 1' if ddof else ''}" in made.extractor.describe()["covariance"]


# Beside cd-fvd


@pytest.mark.parametrize("shape", [(1, 16, 36, 64, 3), (2, 9, 240, 250, 3)])
def test_i3d_equals_that_of_cd_fvd(i3d: FVD, i3d_file: Path, shape: tuple[int, ...]) -> None:
    theirs = pytest.importorskip("cdfvd.fvd")
    pictures = clips(*shape)
    evaluator: Any = theirs.cdfvd("i3d", ckpt_path=str(i3d_file), device="cpu", compute_feats=True)
    evaluator.add_real_stats(pictures.numpy())
    assert_near(i3d(pictures), evaluator.real_stats.get_all_torch())


@pytest.mark.parametrize("frames", [16, 4, 20])
def test_videomae_equals_that_of_cd_fvd(vit: FVD, vit_file: Path, frames: int) -> None:
    theirs: Any = pytest.importorskip("cdfvd.third_party.VideoMAEv2.videomaev2_finetune")
    utils: Any = pytest.importorskip("cdfvd.third_party.VideoMAEv2.utils")
    network = theirs.VisionTransformer(
        img_size=224,
        patch_size=14,
        embed_dim=TINY.width,
        depth=TINY.depth,
        num_heads=TINY.heads,
        mlp_ratio=TINY.hidden / TINY.width,
        qkv_bias=True,
        norm_layer=lambda width: nn.LayerNorm(width, 1e-6),
        num_classes=174,
    ).eval()
    network.load_state_dict(torch.load(vit_file)["module"])
    pictures = clips(2, frames, 36, 64, 3)
    with torch.no_grad():
        expected = network.forward_features(utils.preprocess_videomae(pictures.numpy()))
    assert_near(vit(pictures), expected)


def test_the_distance_equals_that_of_cd_fvd() -> None:
    theirs: Any = pytest.importorskip("cdfvd.utils.metric_utils")
    random = np.random.default_rng(6)
    first, second = random.normal(size=(90, 20)), random.normal(size=(70, 20)) * np.arange(20)
    moments = []
    for features in (first, second):
        stats = theirs.FeatureStats(capture_mean_cov=True)
        stats.append(features)
        moments += stats.get_mean_cov()
    assert frechet.between(first, second) == pytest.approx(frechet.distance(*moments), rel=1e-5)
