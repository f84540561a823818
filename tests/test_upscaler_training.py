"""Training the upscaler: pairs, artefacts, both stages, what is measured, and that nothing depends on who works."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers
from videofactory_train import discriminator, metrics, perceptual
from videofactory_train.artefacts import STEPS, Artefacts, Spoiler
from videofactory_train.cli import main
from videofactory_train.data.batches import by_bucket
from videofactory_train.data.moving_shapes import MovingShapes
from videofactory_train.data.pairs import Decoded, DrawnShapes, PairReader, PatchBatches, Patches, Source
from videofactory_train.data.samples import DatasetConfig, hold_out, plan
from videofactory_train.data.sources import read_dataset
from videofactory_train.degradation import Degradation, downscale
from videofactory_train.loop import Schedule
from videofactory_train.recipe import Adversary, UpscalerRecipe, read_recipe
from videofactory_train.run import run_recipe
from videofactory_train.state import States
from videofactory_train.upscaler import NO_MODEL, AdversarialTraining

from videofactory_core import checkpoint, upscaler
from videofactory_core.diffusion import Schedule as NoiseSchedule
from videofactory_core.objective import Process
from videofactory_core.sampling import euler
from videofactory_core.upscaler import Upscaler, UpscalerConfig
from videofactory_core.video import write_video

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = UpscalerConfig(groups=1, blocks=1, features=8, reduction=4)


def texture(frames: int, height: int, width: int, seed: int) -> Tensor:
    """Something with edges and detail that moves: `[F, H, W, 3]` in 0..1."""
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    picture = F.interpolate(coarse, size=(height, width + frames), mode="nearest")[0]
    return torch.stack([picture[:, :, f : f + width] for f in range(frames)]).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four clips and two pictures of 96 x 64, of which one has a caption."""
    folder = tmp_path_factory.mktemp("data") / "videos"
    folder.mkdir()
    for i in range(4):
        write_video(folder / f"clip{i}.mp4", texture(6, 64, 96, i), 8)
    (folder / "clip0.txt").write_text("blocks moving left", encoding="utf-8")
    for i in range(2):
        pixels = (texture(1, 64, 96, 9 + i)[0] * 255).byte().numpy()
        Image.fromarray(pixels).save(folder / f"picture{i}.png")
    return folder


# Figures


def test_psnr_is_the_mean_squared_error_in_decibels() -> None:
    pictures = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    others = pictures.clone()
    others[0] += 0.1
    others[1, :, 0, 0] += 0.5
    found = metrics.psnr(others, pictures)
    assert found.tolist() == pytest.approx([20.0, -10 * np.log10(0.25 / 35), 100.0], abs=1e-3)


def test_ssim_is_that_of_a_written_out_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(2, 3, 13, 12, generator=generator)
    y = (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    for n in range(2):
        values = []
        for channel in range(3):
            a, b = (z[n, channel].double().numpy() for z in (x, y))
            for top in range(3):
                for left in range(2):
                    p, q = (z[top : top + 11, left : left + 11] for z in (a, b))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4)))
        assert float(metrics.ssim(x, y)[n]) == pytest.approx(np.mean(values), abs=1e-9)
    assert metrics.ssim(x, x).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="11x11"):
        metrics.ssim(x[..., :10], y[..., :10])


# Discriminators and the perceptual loss


def test_the_u_net_discriminator_is_real_esrgans() -> None:
    model = discriminator.build("unet")
    assert sum(weight.numel() for weight in model.parameters()) == 4_376_897
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    normed = {name for name, m in convolutions.items() if nn.utils.parametrize.is_parametrized(m)}
    assert set(convolutions) - normed == {"first", "last"}
    assert model(torch.rand(2, 3, 16, 24)).shape == (2, 1, 16, 24)


def test_the_patch_discriminator_sees_70_pixels_and_no_other_picture() -> None:
    torch.manual_seed(0)
    model = discriminator.build("patch").eval()
    pictures = torch.rand(2, 3, 128, 128, requires_grad=True)
    logits = model(pictures)
    assert logits.shape == (2, 1, 14, 14)
    (seen,) = torch.autograd.grad(logits[0, 0, 7, 7], pictures)
    assert not seen[1].any()
    rows, columns = seen[0].abs().amax(0).nonzero(as_tuple=True)
    assert (int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1) == (70, 70)


def vgg_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    layers = make_layers(cfgs["E"])
    return {f"features.{key}": weight for key, weight in layers.state_dict().items()}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_the_perceptual_loss_compares_features_before_the_relu(suffix: str, tmp_path: Path) -> None:
    weights = vgg_weights()
    path = tmp_path / f"vgg19.{suffix}"
    if suffix == "pth":
        # As torchvision's own file is written.
        torch.save({**weights, "classifier.0.bias": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    else:
        save_file(weights, path)
    loss = perceptual.Perceptual(path)
    assert not any(weight.requires_grad for weight in loss.parameters())
    generator = torch.Generator().manual_seed(0)
    made, original = (torch.rand(2, 3, 40, 32, generator=generator) for _ in range(2))
    known = make_layers(cfgs["E"])
    known.load_state_dict({key.removeprefix("features."): weight for key, weight in weights.items()})
    mean, deviation = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x, y = (made - mean) / deviation, (original - mean) / deviation
    expected, convolutions = 0.0, 0
    with torch.no_grad():
        for layer in known:
            x, y = layer(x), layer(y)
            if isinstance(layer, nn.Conv2d):
                convolutions += 1
                # conv1_2, conv2_2, conv3_4, conv4_4 and conv5_4, counted from the first.
                weight = {2: 0.1, 4: 0.1, 8: 1.0, 12: 1.0, 16: 1.0}.get(convolutions, 0.0)
                expected += weight * float((x - y).abs().mean())
    made.requires_grad_()
    found = loss(made, original)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert made.grad is not None
    assert made.grad.abs().sum() > 0


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("exit 1",)


def test_other_files_than_vgg19_are_refused_in_a_sentence(tmp_path: Path) -> None:
    weights = vgg_weights()
    for name, content, words in (
        ("less", {k: w for k, w in weights.items() if k != "features.34.bias"}, "lacks 'features.34.bias'"),
        ("other", weights | {"features.2.weight": torch.zeros(64, 64, 1, 1)}, "another network"),
    ):
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=words):
            perceptual.Perceptual(tmp_path / f"{name}.safetensors")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Code(), 2))
    (tmp_path / "text.safetensors").write_text("nothing")
    for path in ("code.pth", "text.safetensors"):
        with pytest.raises(ValueError, match="more than weights or is damaged"):
            perceptual.Perceptual(tmp_path / path)
    with pytest.raises(ValueError, match="there is no file"):
        perceptual.Perceptual(tmp_path / "none.pth")


def patches(count: int = 2, side: int = 8) -> Patches:
    generator = torch.Generator().manual_seed(5)
    small, target, original = (torch.rand(count, 3, n * side, n * side, generator=generator) for n in (1, 4, 4))
    return Patches(small, target, original)


@pytest.mark.parametrize("kind", ["unet", "patch"])
def test_one_backward_pass_gives_the_gradients_of_two(kind: discriminator.Kind) -> None:
    """Those of the upscaler's step with the discriminator frozen, then the discriminator's with the upscaler's pictures
    as they were; and one step of the optimizer takes both."""
    schedule = Schedule(steps=1, batch_size=1, learning_rate=1e-3)
    torch.manual_seed(0)
    training = AdversarialTraining(Upscaler(SMALL), Adversary(schedule=schedule, discriminator=kind, l1_weight=0.7))
    model, judge = copy.deepcopy(training.upscaler), copy.deepcopy(training.discriminator)
    batch = patches()

    judge.requires_grad_(False)
    made = model(batch.small)
    deceived = F.binary_cross_entropy_with_logits(*(lambda x: (x, torch.ones_like(x)))(judge(made)))
    (0.7 * (made - batch.target).abs().mean() + 0.1 * deceived).backward()
    judge.requires_grad_(True)
    for pictures, label in ((batch.original, 1.0), (made.detach(), 0.0)):
        logits = judge(pictures)
        F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label)).backward()

    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-3)
    training(batch).backward()
    pairs = [*zip(training.upscaler.parameters(), model.parameters(), strict=True)]
    pairs += zip(training.discriminator.parameters(), judge.parameters(), strict=True)
    for weight, expected in pairs:
        torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-4, atol=1e-7)
    for part in (model, judge):
        assert all(weight.grad.abs().sum() > 0 for weight in (next(part.parameters()), list(part.parameters())[-1]))
    optimizer.step()
    for part in (model, judge):
        torch.optim.AdamW(part.parameters(), lr=1e-3).step()
    for weight, expected in pairs:
        # Where a gradient is nearly 0, Adam's first step goes by its sign.
        assert (weight - expected).abs().mean() < 1e-6
    assert training.steps == 1
    assert set(training.parts) == {"l1", "gan", "discriminator"}


# Pairs


def decoded(videos: Path, **settings: object) -> Decoded:
    """Every frame of the clips and pictures, or clips of them."""
    config = DatasetConfig(path=str(videos), sizes=((96, 64),), frame_extraction="chunk", **settings)
    clips = [replace(clip, caption=clip.caption or "") for clip in read_dataset(videos)]
    samples = [sample for planned in plan(clips, config, NO_MODEL) for sample in planned.samples]
    return Decoded(by_bucket(samples, 1.0), 3)


def reader(source: Source, **settings: object) -> PairReader:
    wanted = {"scale": 4, "patch": 4, "patches": 2, "whole": False, "degradation": Degradation(), "sharpen": False}
    return PairReader(source, **{**wanted, "seed": 7, **settings})  # type: ignore[arg-type]


def batches(
    pairs: PairReader,
    spoiler: Spoiler | None = None,
    *,
    size: int = 4,
    workers: int = 0,
    process: Process = Process(),  # noqa: B008 (frozen)
    first: int = 0,
    count: int = 3,
) -> list[Patches]:
    made = PatchBatches(pairs, spoiler, size, workers, process, Accelerator(cpu=True), print)
    return list(islice(made(first), count))


def same(left: list[Patches], right: list[Patches], atol: float = 0.0) -> None:
    for a, b in zip(left, right, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("frames", [(1,), (2, 1)])
def test_pairs_do_not_depend_on_who_makes_them(videos: Path, whole: bool, frames: tuple[int, ...]) -> None:
    pairs = reader(decoded(videos, frames=frames), whole=whole, sharpen=True)
    one = batches(pairs)
    assert not torch.equal(one[0].small, one[1].small)
    for workers in (1, 3):
        same(batches(pairs, workers=workers), one)
    # Where workers cannot be forked, they get a copy.
    same(batches(pickle.loads(pickle.dumps(pairs))), one)
    same(batches(pairs, first=1, count=2), one[1:])
    parts = [batches(pairs, size=2, process=Process(rank, 2)) for rank in range(2)]
    joined = [Patches(*(torch.cat(x) for x in zip(*two, strict=True))) for two in zip(*parts, strict=True)]
    same(joined, one)
    other = batches(replace(pairs, seed=8))
    assert not torch.equal(other[0].small, one[0].small)


@pytest.mark.parametrize("whole", [False, True])
def test_small_and_large_patches_show_the_same_place(videos: Path, whole: bool) -> None:
    pairs = reader(decoded(videos, frames=(2, 1)), patch=8, whole=whole, degradation=None)
    for small, target, original in batches(pairs, count=6):
        assert small.shape[1:] == (3, 8, 8)
        assert target.shape[1:] == (3, 32, 32)
        assert torch.equal(target, original)
        # Only near its edge does what is small depend on what lies around it.
        inner = (..., slice(2, -2), slice(2, -2))
        torch.testing.assert_close(downscale(target, 4)[inner], small[inner], rtol=0, atol=1.5 / 255)


def test_patches_of_a_sample_are_more_of_the_same(videos: Path) -> None:
    source = decoded(videos, frames=(1,))
    few, many = (reader(source, patches=n, degradation=None) for n in (1, 4))
    rows = next(few.source.order(2, 0))
    one, four = few[rows], many[rows]
    assert not isinstance(one, str)
    assert not isinstance(four, str)
    assert one.large.shape == (2, 1, 1, 3, 16, 16)
    assert four.large.shape == (8, 1, 1, 3, 16, 16)
    assert torch.equal(four.large[::4], one.large)
    assert many.source.read(rows[0])[0].caption == one.captions[0]


def test_sharpened_targets_stand_beside_the_originals(videos: Path) -> None:
    plain, sharp = (reader(decoded(videos, frames=(1,)), sharpen=x, degradation=None) for x in (False, True))
    for a, b in zip(batches(plain), batches(sharp), strict=True):
        assert torch.equal(a.original, b.original)
        assert torch.equal(a.target, a.original)
        assert not torch.equal(b.target, b.original)
        assert b.target.std() > b.original.std()


def test_broken_clips_are_replaced_and_named(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = decoded(videos, frames=(1,))
    (group,) = source.groups
    lost = [replace(sample, clip=replace(sample.clip, path=tmp_path / "gone.mp4")) for sample in group.samples[:3]]
    broken = Decoded([replace(group, samples=[*lost, *group.samples[3:6]])], 3)
    assert len(batches(reader(broken), count=6)) == 6
    assert capsys.readouterr().out.count("left out") == len({sample.clip.name for sample in lost})
    with pytest.raises(ValueError, match=r"none of the samples .* is not there"):
        batches(reader(Decoded([replace(group, samples=lost)], 3)))


def test_shapes_are_drawn_at_both_sizes_and_cut_at_their_outline() -> None:
    clips = MovingShapes(1 << 30, 5, 24, 48, seed=1)
    still, moving = (DrawnShapes(clips, 4, whole_clips) for whole_clips in (False, True))
    for item in range(7):
        frame, clip = still.show(item), moving.show(item)
        assert frame.small is not None
        assert clip.small is not None
        torch.testing.assert_close(frame.large[0], clip.large[item % 5], rtol=0, atol=1e-4)
        torch.testing.assert_close(frame.small[0], clip.small[item % 5], rtol=0, atol=1e-4)
        # A pixel is nearly the mean of those it becomes.
        assert (F.avg_pool2d(clip.large, 4) - clip.small).abs().mean() < 5e-3
    found = batches(reader(still, degradation=None, whole=True, patch=6), count=8)
    assert all(float(patch.amax() - patch.amin()) > 0.1 for batch in found for patch in batch.target)
    for batch in found:
        assert (F.avg_pool2d(batch.target, 4) - batch.small).abs().mean() < 0.03


# Artefacts


def spoiler(path: Path, frames: int = 4, **settings: float) -> Spoiler:
    return Spoiler(Artefacts(**settings), str(path), frames, Accelerator(cpu=True))


def clips_of(count: int, frames: int = 4) -> Tensor:
    return torch.stack([texture(frames, 8, 16, n).permute(0, 3, 1, 2) for n in range(count)])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_round_trip_is_the_autoencoders(debug_checkpoint: Path) -> None:
    clips, captions = clips_of(3), ["a", "b", "c"]
    model = checkpoint.load(debug_checkpoint)
    video = rearrange(clips, "N F C H W -> N C F H W") * 2 - 1
    expected = rearrange(model.autoencoder.decode(model.autoencoder.encode(video)), "N C F H W -> N F C H W") / 2 + 0.5
    plain = spoiler(debug_checkpoint, autoencoder=1.0, latent_noise=0.0)(clips, captions, generators(1, 2, 3))
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    assert torch.equal(spoiler(debug_checkpoint, autoencoder=0.0)(clips, captions, generators(1, 2, 3)), clips)
    noisy = spoiler(debug_checkpoint, autoencoder=1.0, latent_noise=0.5)
    before = clips.clone()
    found = noisy(clips, captions, generators(1, 2, 3))
    assert torch.equal(clips, before)
    assert (found - expected).abs().mean() > 1e-3
    # A clip's own generator decides, not its place.
    turned = noisy(clips.flip(0), captions[::-1], generators(3, 2, 1))
    torch.testing.assert_close(turned.flip(0), found, rtol=0, atol=1e-4)


def test_so_many_clips_are_spoiled_as_the_recipe_says(debug_checkpoint: Path) -> None:
    clips = clips_of(1, frames=1).expand(200, -1, -1, -1, -1)
    half = spoiler(debug_checkpoint, autoencoder=0.3, latent_noise=0.0)
    found = half(clips, [""] * 200, generators(*range(200)))
    changed = int((found != clips).flatten(1).any(1).sum())
    assert 35 < changed < 85


def test_sdedit_walks_back_like_the_sampler(debug_checkpoint: Path) -> None:
    """The same in the sampler's coordinates, where noise is added to latents instead of mixed with them."""
    edit = spoiler(debug_checkpoint, sdedit=1.0)
    model = checkpoint.load(debug_checkpoint)
    schedule = NoiseSchedule.from_config(model.config.diffusion)
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(2, 4, 4, 4, 8, generator=generator) for _ in range(2))
    captions, shares = ["a red circle", "two words"], torch.tensor([0.2, 0.7])
    found = edit._edit(latents, noise, captions, shares)
    with torch.no_grad():
        context = model.text_encoder.encode(captions)
        for n in range(2):
            highest = float(shares[n]) * 999
            levels = torch.tensor([highest * (1 - step / STEPS) for step in range(STEPS)], dtype=torch.float64)
            sigmas = torch.cat([schedule.sigma(levels), torch.zeros(1)])[:, None]

            def denoise(x: Tensor, sigma: Tensor, n: int = n, context: Tensor = context) -> Tensor:
                x_t = x / float(1 + sigma**2) ** 0.5
                t = schedule.timestep(sigma).float()
                return schedule.to_x0_eps(model.unet(x_t, t, context[n : n + 1]), x_t, t)[0]

            start = latents[n : n + 1] + float(sigmas[0]) * noise[n : n + 1]
            expected = euler(denoise, start, sigmas, None)
            torch.testing.assert_close(found[n : n + 1], expected, rtol=0, atol=2e-3)
    clips = clips_of(2)
    assert not torch.equal(edit(clips, captions, generators(0, 1)), edit(clips, captions[::-1], generators(0, 1)))
    with pytest.raises(ValueError, match="frame positions"):
        spoiler(debug_checkpoint, frames=99, sdedit=0.5)


def test_spoiled_pairs_do_not_depend_on_who_makes_them(debug_checkpoint: Path) -> None:
    source = DrawnShapes(MovingShapes(1 << 30, 4, 8, 16, seed=1), 4, whole_clips=True)
    pairs = reader(source, whole=True, degradation=None)
    spoil = spoiler(debug_checkpoint, autoencoder=0.5, sdedit=0.5)
    one = batches(pairs, spoil)
    same(batches(pairs, spoil, workers=2), one)
    same(batches(pairs, spoil, first=1, count=2), one[1:])
    parts = [batches(pairs, spoil, size=2, process=Process(rank, 2)) for rank in range(2)]
    joined = [Patches(*(torch.cat(x) for x in zip(*two, strict=True))) for two in zip(*parts, strict=True)]
    # Other convolutions of other batches round differently.
    same(joined, one, atol=1e-4)


# Recipes

RECIPE = """\
title = "mine"
licence = "MIT"
origin = "a test"
output = "{folder}/mine.safetensors"
precision = "fp32"
device = "cpu"
workers = 0
patch = 8
patches = 2
sharpen = true
[[datasets]]
path = "{videos}"
sizes = [[96, 64]]
frame_extraction = "chunk"
[upscaler]
groups = 1
blocks = 1
features = 8
reduction = 4
[degradation]
[schedule]
steps = 4
batch_size = 4
learning_rate = 1e-3
warmup_steps = 1
save_every = 1
[gan]
discriminator = "unet"
[gan.schedule]
steps = 4
batch_size = 2
learning_rate = 1e-3
warmup_steps = 1
save_every = 1
log_every = 2
[validation]
clips = 2
every = 2
"""


def write(folder: Path, videos: Path, text: str = RECIPE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mine.toml"
    text = text.replace("{folder}", folder.as_posix()).replace("{videos}", videos.as_posix())
    path.write_text(text, encoding="utf-8")
    return path


def made(path: Path, resume: bool = False) -> Path:
    output = run_recipe(path, resume=resume)
    assert output is not None
    return output


@pytest.fixture(scope="module")
def trained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of both stages, without any model."""
    return made(write(tmp_path_factory.mktemp("trained"), videos))


def test_both_stages_train_without_a_model(trained: Path, videos: Path) -> None:
    folder = trained.parent
    stages = [load_file(folder / f"{name}.safetensors") for name in ("upscaler", "gan")]
    assert stages[0].keys() == stages[1].keys() == Upscaler(SMALL).state_dict().keys()
    assert any(not torch.equal(stages[0][key], stages[1][key]) for key in stages[0])
    model = upscaler.load(trained)
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, stages[1][key].half().float()), key
    metadata = checkpoint.read_header(trained).metadata
    recipe = json.loads(metadata["recipe"])
    assert recipe["gan"]["discriminator"] == "unet"
    assert recipe["datasets"][0]["path"] == videos.name
    assert str(folder) not in metadata["recipe"]


def test_validation_compares_with_bicubic_on_clips_that_are_held_out(trained: Path) -> None:
    folder = trained.parent
    for stage in ("upscaler", "gan"):
        lines = [json.loads(line) for line in (folder / f"{stage}.validation.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 2, 4]
        assert all(line["bicubic"] == lines[0]["bicubic"] for line in lines)
        assert len({line["psnr"] for line in lines}) > 1
        assert 0 < lines[0]["bicubic"]["ssim"] < 1
        sheet = Image.open(folder / "samples" / stage / "step-000004.png")
        # Two clips below each other, each of three pictures beside each other, as many as there is room for.
        assert sheet.width >= 3 * 96
        assert sheet.height >= 2 * 64
    log = (folder / "log.txt").read_text()
    assert "gan  step 4  PSNR" in log
    assert "gan  step 4  l1 0." in log
    assert "discriminator 1." in log


def test_data_is_checked_as_it_would_be_used(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Captions are not needed, and frames have the size of the result."""
    assert main(["data", "check", str(write(tmp_path, videos))]) == 0
    told = capsys.readouterr().out
    assert "left out: 0 (0%)" in told
    assert "samples of 1 x 96x64: " in told
    assert main(["data", "check", str(videos)]) == 1
    assert "no caption" in capsys.readouterr().out


class Interrupted(Exception):
    pass


def test_a_stage_that_is_interrupted_goes_on_to_the_same_bytes(
    trained: Path, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, videos)
    save = States.save

    def save_and_stop(self: States, step: int, progress: dict[str, Any]) -> bool:
        saved = save(self, step, progress)
        if (self.name, step) in (("upscaler", 1), ("gan", 2)):
            raise Interrupted
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(States, "save", save_and_stop)
        for resume in (False, True):
            with pytest.raises(Interrupted):
                run_recipe(path, resume=resume)
    result = load_file(made(path, resume=True))
    for key, weight in load_file(trained).items():
        assert torch.equal(result[key], weight), key
    assert (tmp_path / "log.txt").read_text().count("going on from step") == 2


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def test_two_processes_train_like_one_with_twice_the_batch(videos: Path, tmp_path: Path) -> None:
    # Both cut two patches from each sample.
    text = RECIPE.replace("save_every = 1", "save_every = 100")
    one = write(tmp_path / "one", videos, text.replace("size = 4", "size = 8").replace("size = 2", "size = 4"))
    two = write(tmp_path / "two", videos, text)
    made(one)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "videofactory_train", "train", str(two)]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("upscaler", "gan"):
        losses = [json.loads((path.parent / f"{stage}.losses.json").read_text()) for path in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_training_goes_on_from_a_file(trained: Path, videos: Path, tmp_path: Path) -> None:
    text = RECIPE.replace("[[datasets]]", f'start = "{trained.as_posix()}"\n[[datasets]]', 1)
    text = text[: text.index("[gan]")].replace("learning_rate = 1e-3", "learning_rate = 1e-12")
    found, start = load_file(made(write(tmp_path, videos, text))), load_file(trained)
    for key, weight in start.items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"start: .* groups = 1, blocks = 1, features = 8"):
        made(write(tmp_path / "other", videos, text.replace("blocks = 1", "blocks = 2")))


def test_clips_of_several_frames_are_spoiled_by_a_model(videos: Path, debug_checkpoint: Path, tmp_path: Path) -> None:
    text = RECIPE[: RECIPE.index("[gan]")].replace("sizes = [[96, 64]]", "frames = [4]")
    text = text.replace("patch = 8", f'patch = 4\ncheckpoint = "{debug_checkpoint.as_posix()}"')
    text += "[artefacts]\nsdedit = 0.5\n"
    path = write(tmp_path, videos, text)
    recipe = read_recipe(path)
    assert isinstance(recipe, UpscalerRecipe)
    assert recipe.datasets[0].sizes == ()
    losses = made(path).with_name("upscaler.losses.json").read_text()
    assert len(json.loads(losses)) == 4


def test_a_dry_run_says_how_long_both_stages_take(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_recipe(write(tmp_path, videos), dry_run=True) is None
    printed = capsys.readouterr().out
    assert "upscaler: " in printed
    assert "gan: " in printed
    assert "in all" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sizes = [[96, 64]]\n", "", "datasets: without a checkpoint each needs sizes"),
        ("sizes = [[96, 64]]", "sizes = [[96, 62]]", r"96x62 does not divide into cells of 4 pixels; use 96x60"),
        ("patch = 8", "patch = 20", r"patch: frames of 96x64 have no patches of 80 pixels; use 16"),
        ("patch = 8", "patch = 7", r"patch: the discriminator sees 28 pixels .* use 8"),
        ("patches = 2", "patches = 3", "patches: 3 do not divide a batch of 4"),
        ("[degradation]", "[artefacts]", "checkpoint: artefacts are those of a model"),
        ("[degradation]", "[degradation]\nshared = 2.0", "shared"),
        ('discriminator = "unet"', 'discriminator = "net"', "net"),
        ('discriminator = "unet"', 'vgg = "none.pth"', "there is no file none.pth"),
        ('discriminator = "unet"', "weight = -1.0", "weight"),
        ("clips = 2", "clips = 6", "validation holds out 6 of 6 clips"),
        ("clips = 2", "clips = 0", "clips and every"),
    ],
)
def test_recipes_that_cannot_be_used_are_refused_in_a_sentence(
    videos: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in RECIPE
    text = RECIPE.replace(old, new, 1).replace("steps = 4", "steps = 1")
    with pytest.raises(ValueError, match=message):
        run_recipe(write(tmp_path, videos, text))
    assert not list(tmp_path.glob("mine.safetensors"))


def test_shapes_need_a_model(tmp_path: Path, videos: Path) -> None:
    start, end = RECIPE.index("[[datasets]]"), RECIPE.index("[upscaler]")
    with pytest.raises(ValueError, match="checkpoint: shapes are drawn in the size of a model"):
        run_recipe(write(tmp_path, videos, RECIPE[:start] + RECIPE[end:]))


def test_what_is_held_out_depends_on_names_and_seed_alone(videos: Path) -> None:
    (group,) = decoded(videos, frames=(1,)).groups
    samples = list(group.samples)
    chosen = []
    for order in (samples, samples[::-1]):
        left, held_out = hold_out([order[:9], order[9:]], 2, 0)
        assert {sample.clip.name for part in left for sample in part} | {s.clip.name for s in held_out} == {
            sample.clip.name for sample in samples
        }
        chosen.append({sample.clip.name for sample in held_out})
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 2
    assert len({frozenset(s.clip.name for s in hold_out([samples], 2, seed)[1]) for seed in range(6)}) > 1


@pytest.mark.parametrize("kind", ["unet", "patch"])
def test_a_discriminator_learns_to_tell_pictures_apart(kind: discriminator.Kind) -> None:
    torch.manual_seed(0)
    schedule = Schedule(steps=1, batch_size=1, learning_rate=1e-3)
    training = AdversarialTraining(Upscaler(SMALL), Adversary(schedule=schedule, discriminator=kind))
    optimizer = torch.optim.AdamW(training.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        training.parts = {}
        training(patches()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(training.parts["discriminator"]))
    assert losses[-1] < 0.8 * losses[0]
