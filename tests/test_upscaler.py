"""RCAN against one written out and against spandrel's, frames one after the other, and files that are none."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from spandrel import ModelLoader
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SwinIR import SwinIR
from torch import Tensor
from torch.nn import functional as F

from benchmarks.upscale import compare, demo_clips
from videofactory_core import upscaler
from videofactory_core.upscaler import PRESETS, Upscaler, UpscalerConfig, upscale

SMALL = UpscalerConfig(groups=2, blocks=1, features=8, reduction=4)


def pictures() -> Tensor:
    return torch.rand(2, 3, 9, 11, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "parameters"), [("rcan", 6_660_035), ("rcan-light", 968_291)])
def test_sizes_are_the_papers(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = Upscaler(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters


def written_out(w: dict[str, Tensor], x: Tensor, config: UpscalerConfig) -> Tensor:
    """RCAN as the paper's equations say it, one after the other."""

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=w[f"{name}.weight"].shape[-1] // 2)

    f = first = conv("head.0", x)
    for g in range(config.groups):
        group = f
        for b in range(config.blocks):
            block = conv(f"body.{g}.body.{b}.body.2", conv(f"body.{g}.body.{b}.body.0", f).relu())
            z = torch.stack([channel.mean() for channel in block.flatten(0, 1)]).view(*block.shape[:2], 1, 1)
            s = conv(f"body.{g}.body.{b}.body.3.conv_du.2", conv(f"body.{g}.body.{b}.body.3.conv_du.0", z).relu())
            f = f + block / (1 + (-s).exp())
        f = group + conv(f"body.{g}.body.{config.blocks}", f)
    f = first + conv(f"body.{config.groups}", f)
    for step in (0, 2):
        f = conv(f"tail.0.{step}", f)
        n, channels, height, width = f.shape
        f = (
            f.view(n, channels // 4, 2, 2, height, width)
            .permute(0, 1, 4, 2, 5, 3)
            .reshape(n, -1, 2 * height, 2 * width)
        )
    return conv("tail.1", f)


def test_it_is_the_papers_network() -> None:
    torch.manual_seed(0)
    model = Upscaler(UpscalerConfig(2, 3, 16, 4)).double()
    expected = written_out(model.state_dict(), pictures().double(), model.config)
    assert expected.std() > 0.01
    assert torch.allclose(model(pictures().double()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mean_shift", [False, True])
@pytest.mark.parametrize("scale", [2, 3, 4, 8])
def test_the_known_reader_reads_our_files_and_agrees(scale: int, mean_shift: bool) -> None:
    torch.manual_seed(0)
    model = Upscaler(UpscalerConfig(2, 2, 16, 4, scale, mean_shift)).eval()
    known = ModelLoader().load_from_state_dict(model.state_dict())
    assert known.scale == scale
    with torch.no_grad():
        assert torch.equal(model(pictures()), known.model(pictures()))
        # Channels last is faster, and adds in another order.
        assert torch.allclose(model.prepare()(pictures()), known.model(pictures()), rtol=0, atol=2e-6)


def test_files_are_read_back_with_their_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Upscaler(SMALL).half().float()
    upscaler.save(tmp_path / "small.safetensors", model, "small", "MIT", "a test")
    back = upscaler.load(tmp_path / "small.safetensors")
    assert back.config == SMALL
    assert torch.equal(back(pictures()), model(pictures()))
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]


def test_what_is_no_rcan_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    with pytest.raises(ValueError, match="does not exist"):
        upscaler.load(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        upscaler.load(path)
    save_file({"conv_first.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match="not the weights of an RCAN"):
        upscaler.load(path)
    save_file({**Upscaler(SMALL).state_dict(), "more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="nearly an RCAN's"):
        upscaler.load(path)


def test_the_authors_files_are_read_in_their_own_range(tmp_path: Path) -> None:
    """Their pickles are of the format before PyTorch 1.6, and shift the mean."""
    torch.manual_seed(0)
    model = Upscaler(UpscalerConfig(2, 2, 16, 4, mean_shift=True))
    for path, new in ((tmp_path / "old.pt", False), (tmp_path / "new.pt", True)):
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=new)
        back = upscaler.load(path)
        assert back.config == model.config
        assert torch.equal(back(pictures()), model(pictures()))
    flat = torch.full((1, 3, 8, 8), 0.25)
    unshifted = Upscaler(UpscalerConfig(2, 2, 16, 4))
    unshifted.load_state_dict(model.state_dict(), strict=False)
    mean = torch.tensor(upscaler.MEAN).view(1, 3, 1, 1)
    assert torch.allclose(model(flat), unshifted.enlarge((flat - mean) * 255) / 255 + mean, atol=1e-5)


@pytest.mark.parametrize(
    ("network", "name"),
    [
        (lambda: ESRGAN(num_filters=8, num_blocks=1), "an ESRGAN upscaler"),
        (
            lambda: SwinIR(embed_dim=12, depths=[1], num_heads=[2], upsampler="pixelshuffle", upscale=4),
            "a SwinIR upscaler",
        ),
    ],
)
def test_other_upscalers_are_named_with_what_takes_them(
    tmp_path: Path, network: Callable[[], torch.nn.Module], name: str
) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: value.clone().contiguous() for key, value in network().state_dict().items()}, path)
    with pytest.raises(ValueError, match=f"is {name} and no RCAN: give it to ComfyUI's own Load Upscale Model"):
        upscaler.load(path)


def test_the_bundled_one_makes_the_demos_frames_crisp() -> None:
    """Three of the held-out clips behind `python -m benchmarks upscale-quality`, and its bars."""
    count, means = compare(demo_clips(every=12), upscaler.load(upscaler.BUNDLED).prepare())
    (psnr, ssim, flicker), bicubic = means["upscaler"], means["bicubic"]
    assert count == 3
    assert psnr > bicubic[0] + 1
    assert ssim > bicubic[1] + 0.01
    assert flicker <= bicubic[2]


def test_half_precision_keeps_the_colours() -> None:
    """Both ends stay in float32, so that less is lost than when everything is halved."""
    model = upscaler.load(upscaler.BUNDLED)
    picture = drawn(1)[0].movedim(-1, 0)[None]
    with torch.no_grad():
        exact = model(picture)
        for dtype, bound in ((torch.float16, 0.1), (torch.bfloat16, 1.0)):
            ends = upscaler.load(upscaler.BUNDLED).prepare(dtype=dtype)
            assert {ends.head[0].weight.dtype, ends.tail[1].weight.dtype} == {torch.float32}
            error = (ends(picture) - exact).square().mean().sqrt() * 255
            everything = upscaler.load(upscaler.BUNDLED).to(dtype)
            assert ends(picture).dtype == torch.float32
            assert error < min(bound, 0.8 * (everything(picture).float() - exact).square().mean().sqrt() * 255)


# Frames


def drawn(count: int, height: int = 72, width: int = 128) -> Tensor:
    """Frames `[F, H, W, 3]` with flat parts, edges and fine structure."""
    x, y = torch.arange(width), torch.arange(height)[:, None]
    frames = []
    for i in range(count):
        disc = ((x - 30 - 2 * i) ** 2 + (y - height / 2) ** 2 < 300).float()
        stripes = ((x + y + i) // 3 % 2) * (x > width * 0.7)
        frames.append(torch.stack([disc, stripes.float(), (x + 0 * y) / width], dim=-1))
    return torch.stack(frames)


@pytest.fixture(scope="module")
def network() -> Upscaler:
    return upscaler.load(upscaler.BUNDLED).prepare()


def test_frames_are_the_networks_pictures(network: Upscaler) -> None:
    frames = drawn(2)
    before = frames.clone()
    large = list(upscale(network, frames, 4))
    expected = network(frames.movedim(-1, 1)).clamp(0, 1).movedim(1, -1)
    assert torch.equal(torch.stack(large), expected)
    assert torch.equal(frames, before)
    whole = (frames * 255).round().to(torch.uint8)
    assert torch.equal(next(upscale(network, whole, 4)), next(upscale(network, whole.float() / 255, 4)))


def test_frames_are_the_same_in_batches_of_any_size(network: Upscaler) -> None:
    frames = drawn(5)
    one = torch.stack(list(upscale(network, frames, 4)))
    for batch in (4, 16):
        assert torch.equal(torch.stack(list(upscale(network, frames, 4, batch=batch))), one)


def test_frames_are_taken_one_by_one_and_not_kept(network: Upscaler) -> None:
    taken: list[weakref.ref[Tensor]] = []

    def frames() -> Iterator[Tensor]:
        for frame in drawn(6, 24, 32):
            frame = frame.clone()
            taken.append(weakref.ref(frame))
            yield frame

    for number, _ in enumerate(upscale(network, frames(), 4), 1):
        gc.collect()
        assert len(taken) == number
        assert sum(frame() is not None for frame in taken) <= 1


def test_tiles_have_soft_seams(network: Upscaler) -> None:
    """What differs from the whole frame is the channel attention's mean, a few steps of 8 bits at most."""
    frame = drawn(1, 150, 200)
    whole = next(upscale(network, frame, 4))
    for tile in (64, 96, 128):
        tiled = next(upscale(network, frame, 4, tile=tile))
        assert not torch.equal(tiled, whole)
        assert (tiled - whole).abs().max() < 6 / 255
        assert (tiled - whole).abs().mean() < 0.3 / 255
    assert torch.equal(next(upscale(network, frame, 4, tile=200)), whole)


def test_tiles_of_a_network_that_sees_one_pixel_are_exact() -> None:
    def nearest(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=4, mode="nearest")

    for height, width in ((65, 64), (100, 333), (64, 200), (40, 129)):
        frame = drawn(1, height, width)
        tiled = next(upscale(nearest, frame, 4, tile=64))
        expected = nearest(frame.movedim(-1, 1)).movedim(1, -1)[0]
        assert torch.allclose(tiled, expected, atol=1e-6)


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, RuntimeError])
def test_tiles_are_halved_until_they_fit_and_stay(error: type[RuntimeError]) -> None:
    """A device with room for so many pixels; no other has its limits at hand."""
    seen: list[int] = []

    def device(x: Tensor) -> Tensor:
        seen.append(max(x.shape[2:]))
        if seen[-1] > room:
            raise error("DefaultCPUAllocator: can't allocate memory")
        return F.interpolate(x, scale_factor=4, mode="nearest")

    frames, room = drawn(2, 72, 300), 80
    large = list(upscale(device, frames, 4))
    assert [side for side in seen if side > room] == [300, 150]
    assert max(seen[-8:]) == 75
    assert torch.allclose(large[1], frames[1].repeat_interleave(4, 0).repeat_interleave(4, 1), atol=1e-6)
    room = 40
    with pytest.raises(MemoryError, match="memory is not enough for pictures of 75 pixels a side: close other"):
        next(upscale(device, frames, 4))


def test_other_errors_of_a_network_are_not_taken_for_a_lack_of_memory() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        next(upscale(broken, drawn(1), 4))


def test_tiles_of_seams_alone_are_refused(network: Upscaler) -> None:
    with pytest.raises(ValueError, match="tiles of 32 pixels are too small to be of use; use 64 or more, or 0"):
        next(upscale(network, drawn(1), 4, tile=32))


def test_the_smallest_pictures_can_be_enlarged(network: Upscaler) -> None:
    for height, width in ((1, 1), (4, 4), (1, 7)):
        assert next(upscale(network, torch.rand(1, height, width, 3), 4)).shape == (4 * height, 4 * width, 3)


def test_pictures_too_large_for_the_memory_are_begun_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system ends a process that asks for too much instead of refusing, so it must not be asked."""
    huge, device = torch.empty(1, 1, 1).expand(1, 3, 4320, 7680), torch.device("cpu")
    monkeypatch.setattr(upscaler, "total_memory", lambda device: 8 << 30)
    assert upscaler.largest_tile(huge, 4, device) == 584
    assert upscaler.largest_tile(huge[:, :, :192, :344], 4, device) == 344
