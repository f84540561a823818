"""Video files: what comes back after writing, what other writers' files look like, and what failures leave behind."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from videofactory_core.video import (
    Probe,
    check_writable,
    probe,
    read_frames,
    read_metadata,
    read_video,
    write,
    write_video,
)

SUFFIXES = (".mp4", ".webm", ".gif")
METADATA = {
    "prompt": 'a "cat" = 50%\nin the rain; \u732b \u00e9\u00e8',
    "videofactory": json.dumps({"seed": 7, "steps": [1, 2], "negative": "\n\\ \u00df"}),
    "empty": "",
}
# 4:2:0 at crf 16 stays above 36 dB on smooth content; 256 dithered colours for a whole clip cost more.
LOWEST_PSNR = {".mp4": 36, ".webm": 36, ".gif": 24}
KR_KB = {"bt709": (0.2126, 0.0722), "smpte170m": (0.299, 0.114)}


def smooth_clip(frames: int, height: int, width: int) -> Tensor:
    t, y, x = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    red, green = torch.sin(x / 9 + t / 5), torch.sin(y / 7 - t / 4)
    return 0.5 + 0.4 * torch.stack([red, green, torch.cos((x + y) / 11 + t / 6)], dim=-1)


def psnr(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float(-10 * (a - b).square().mean().log10())


def patches() -> Tensor:
    """Four 32x32 patches, whose colours have chroma of both signs."""
    colours = torch.tensor([[255, 0, 0], [20, 200, 60], [0, 40, 255], [250, 220, 10]]) / 255
    return colours.repeat_interleave(32, 0).expand(4, 32, 128, 3).contiguous()


def to_yuv(rgb: Sequence[float], matrix: str, full_range: bool) -> list[int]:
    """ITU-T H.273: Y = KR R + (1 - KR - KB) G + KB B, Cb = (B - Y) / (2 - 2 KB), Cr = (R - Y) / (2 - 2 KR)."""
    kr, kb = KR_KB[matrix]
    luma = kr * rgb[0] + (1 - kr - kb) * rgb[1] + kb * rgb[2]
    chroma = (rgb[2] - luma) / (2 - 2 * kb), (rgb[0] - luma) / (2 - 2 * kr)
    scale, offset, chroma_scale = (255, 0, 255) if full_range else (219, 16, 224)
    return [round(offset + scale * luma), *(round(128 + chroma_scale * c) for c in chroma)]


def encode(path: Path, arrays: list[Any], array_format: str, codec: str, **settings: Any) -> None:
    """A file by another writer: `settings` are `pixel_format`, `options`, and `pts` in tenths of a second."""
    pts = settings.get("pts", range(len(arrays)))
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10, options=settings.get("options", {}))
        frames = [av.VideoFrame.from_ndarray(array, format=array_format) for array in arrays]
        stream.width, stream.height = frames[0].width, frames[0].height
        stream.pix_fmt = settings.get("pixel_format", array_format)
        for frame, time in zip(frames, pts, strict=True):
            frame.pts, frame.time_base = time, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def turn_header(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Give an .mp4 without display matrix the matrix `a b c d`."""
    a, b, c, d = matrix
    # The track header's matrix a b u, c d v, x y w in 16.16 and 2.30 fixed point, big-endian.
    numbers = ([1, 0, 0, 0, 1, 0, 0, 0, 1 << 14], [a, b, 0, c, d, 0, 0, 0, 1 << 14])
    plain, turned = (np.array(n, dtype=">i4") * (1 << 16) for n in numbers)
    data = path.read_bytes()
    header = data.index(b"tkhd")
    assert data.count(plain.astype(">i4").tobytes(), header) == 1
    path.write_bytes(
        data[:header] + data[header:].replace(plain.astype(">i4").tobytes(), turned.astype(">i4").tobytes())
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("frames", "height", "width", "fps"), [(12, 48, 80, 8), (31, 64, 64, 25), (1, 32, 48, 10)])
def test_a_clip_comes_back(suffix: str, frames: int, height: int, width: int, fps: float, tmp_path: Path) -> None:
    clip = smooth_clip(frames, height, width)
    write_video(tmp_path / f"clip{suffix}", clip, fps)
    back = read_video(tmp_path / f"clip{suffix}")
    assert back.frames.dtype == torch.float32
    assert back.frames.shape == clip.shape
    assert psnr(back.frames, clip) > LOWEST_PSNR[suffix]
    # A .gif's times are rounded to hundredths of a second.
    error = 0.01 / max(1, frames - 1) * fps**2 if suffix == ".gif" else 1e-4
    assert abs(back.fps - fps) <= error


def test_bytes_and_floats_give_the_same_file(tmp_path: Path) -> None:
    clip = smooth_clip(3, 16, 16)
    write_video(tmp_path / "float.mp4", clip, 8)
    write_video(tmp_path / "bytes.mp4", (clip * 255).round().to(torch.uint8), 8)
    assert (tmp_path / "float.mp4").read_bytes() == (tmp_path / "bytes.mp4").read_bytes()


def test_values_out_of_range_are_clamped(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", torch.tensor([-3.0, 0.5, 7.0]).expand(1, 32, 32, 3), 8)
    colour = read_video(tmp_path / "clip.mp4").frames.mean(dim=(0, 1, 2))
    assert (colour - torch.tensor([0, 0.5, 1])).abs().max() <= 3 / 255


@pytest.mark.parametrize("fps", [0.01, 0.5, 24000 / 1001, 29.97, 240])
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_frame_rates_come_back(suffix: str, fps: float, tmp_path: Path) -> None:
    write_video(tmp_path / f"clip{suffix}", smooth_clip(5, 16, 16), fps)
    assert read_video(tmp_path / f"clip{suffix}").fps == pytest.approx(fps, rel=1e-4)


def test_a_gif_lasts_as_long_as_its_frames_say(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.gif", smooth_clip(24, 16, 16), 24)
    with av.open(str(tmp_path / "clip.gif")) as file:
        assert file.duration / av.time_base == pytest.approx(1, abs=0.011)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_solid_colours_stay(suffix: str, tmp_path: Path) -> None:
    write_video(tmp_path / f"clip{suffix}", patches(), 8)
    difference = (read_video(tmp_path / f"clip{suffix}").frames - patches()).abs()
    # Within 8 pixels of a border, half-resolution chroma of two colours meets twice: in writing and in reading.
    inside = difference.unflatten(2, (4, 32))[..., 8:-8, :]
    assert inside.max() <= 3 / 255


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_the_stored_samples_are_what_their_tags_say(suffix: str, tmp_path: Path) -> None:
    colour = (0.9, 0.3, 0.1)
    write_video(tmp_path / f"clip{suffix}", torch.tensor(colour).expand(2, 32, 32, 3), 8)
    with av.open(str(tmp_path / f"clip{suffix}")) as file:
        frame = next(file.decode(video=0))
    # Both codes 1: BT.709, limited range.
    assert (frame.format.name, frame.colorspace, frame.color_range) == ("yuv420p", 1, 1)
    for plane, expected in zip(frame.planes, to_yuv(colour, "bt709", full_range=False), strict=True):
        samples = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]
        assert np.abs(samples.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_chroma_samples_lie_in_the_left_column(suffix: str, tmp_path: Path) -> None:
    """On this ramp, the samples of a centred layout differ by 1.8 levels, their reading by 3.3: halves decide."""
    ramp = torch.linspace(0.1, 0.9, 32)
    row = torch.stack([ramp, torch.full((32,), 0.5), ramp.flip(0)], dim=-1)
    write_video(tmp_path / f"clip{suffix}", row.expand(2, 32, 32, 3), 8)
    with av.open(str(tmp_path / f"clip{suffix}")) as file:
        stored = next(file.decode(video=0)).to_ndarray()[32:].reshape(2, 16, 16).astype(float)
    expected = np.array([to_yuv(row[x].tolist(), "bt709", full_range=False)[1:] for x in range(0, 32, 2)]).T
    assert np.abs((stored.mean(axis=1) - expected)[:, 4:-4].mean(axis=1)).max() < 0.9
    back = read_video(tmp_path / f"clip{suffix}").frames
    assert (back - row)[:, :, 8:-8].mean(dim=(0, 1, 2)).abs().max() < 1.6 / 255


def test_mp4_has_its_index_before_the_pictures(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", smooth_clip(4, 32, 32), 8, METADATA)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("height", "width"), [(21, 35), (21, 36), (22, 35), (1, 1), (3, 2)])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_odd_sides_grow_by_a_copy_of_the_edge(suffix: str, height: int, width: int, tmp_path: Path) -> None:
    clip = smooth_clip(3, height, width)
    write_video(tmp_path / f"clip{suffix}", clip, 8)
    back = read_video(tmp_path / f"clip{suffix}").frames
    if suffix == ".gif":
        assert back.shape == clip.shape
        return
    assert back.shape == (3, height + height % 2, width + width % 2, 3)
    rows = [min(y, height - 1) for y in range(back.shape[1])]
    columns = [min(x, width - 1) for x in range(back.shape[2])]
    assert psnr(back, clip[:, rows][:, :, columns]) > 30


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_metadata_comes_back(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip{suffix}"
    write_video(path, smooth_clip(2, 16, 16), 8, METADATA)
    assert read_metadata(path).items() >= METADATA.items()
    assert read_video(path).metadata == read_metadata(path)


def test_metadata_that_is_no_text_does_not_cost_the_video(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", smooth_clip(2, 16, 16), 8, {"prompt": "caf\udce9"})
    assert read_metadata(tmp_path / "clip.mp4")["prompt"] == "caf?"


def test_a_gif_leaves_metadata_out(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.gif", smooth_clip(2, 16, 16), 8, METADATA)
    assert read_metadata(tmp_path / "clip.gif") == {}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_equal_clips_give_equal_bytes(suffix: str, tmp_path: Path) -> None:
    # Motion and noise make the encoders use everything that could race.
    noise = torch.rand(24, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    clip = smooth_clip(24, 64, 96) * 0.9 + noise * 0.1
    files = set()
    for index in range(3 if suffix == ".gif" else 6):
        write_video(tmp_path / f"{index}{suffix}", clip, 8, METADATA)
        files.add((tmp_path / f"{index}{suffix}").read_bytes())
    assert len(files) == 1


def test_start_and_max_frames_cut_the_clip(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", smooth_clip(12, 32, 32), 8)
    whole = read_video(tmp_path / "clip.mp4").frames
    for start, count in ((0, 5), (3, 4), (10, 9), (11, None)):
        part = read_video(tmp_path / "clip.mp4", max_frames=count, start=start)
        assert torch.equal(part.frames, whole[start:][:count])
        assert part.fps == 8
    with pytest.raises(ValueError, match="has 12 frames, none from number 12 on"):
        read_video(tmp_path / "clip.mp4", start=12)


# Reading what others wrote


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", None])
@pytest.mark.parametrize(("full_range", "height"), [(False, 32), (True, 32), (False, 720)])
def test_colours_follow_the_tags_or_the_convention(
    matrix: str | None, full_range: bool, height: int, tmp_path: Path
) -> None:
    colour = (0.8, 0.2, 0.4)
    samples = to_yuv(colour, matrix or ("bt709" if height > 576 else "smpte170m"), full_range)
    planes = [np.full(height * 32 // size, sample) for size, sample in zip((1, 4, 4), samples, strict=True)]
    array = np.concatenate(planes).astype(np.uint8).reshape(height * 3 // 2, 32)
    tags = {"colorspace": matrix} if matrix else {}
    options = {"color_range": "pc" if full_range else "tv", "crf": "8", **tags}
    encode(tmp_path / "clip.mp4", [array], "yuv420p", "libx264", options=options)
    back = read_video(tmp_path / "clip.mp4").frames
    assert (back - torch.tensor(colour)).abs().max() <= 3 / 255


def test_rgb_files_come_back_exactly(tmp_path: Path) -> None:
    clip = (smooth_clip(3, 21, 35) * 255).round().to(torch.uint8)
    encode(tmp_path / "clip.mkv", list(clip.numpy()), "rgb24", "ffv1", pixel_format="bgr0")
    back = read_video(tmp_path / "clip.mkv").frames
    assert torch.equal((back * 255).round().to(torch.uint8), clip)


def test_transparent_parts_stand_over_black(tmp_path: Path) -> None:
    opaque = (smooth_clip(2, 16, 16) * 255).round().to(torch.uint8)
    alpha = torch.arange(0, 256, 16, dtype=torch.uint8).expand(2, 16, 16).unsqueeze(-1)
    encode(tmp_path / "clip.mov", list(torch.cat([opaque, alpha], -1).numpy()), "rgba", "png")
    expected = opaque.float() * alpha.float() / 255**2
    assert (read_video(tmp_path / "clip.mov").frames - expected).abs().max() <= 0.51 / 255


@pytest.mark.parametrize(
    ("matrix", "turns", "mirrored"),
    [((0, 1, -1, 0), 3, False), ((-1, 0, 0, -1), 2, False), ((0, -1, 1, 0), 1, False), ((-1, 0, 0, 1), 0, True)],
)
def test_frames_are_turned_as_the_file_asks(
    matrix: tuple[int, int, int, int], turns: int, mirrored: bool, tmp_path: Path
) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, smooth_clip(2, 32, 48), 8)
    stored = read_video(path).frames
    turn_header(path, matrix)
    # rot90 turns against the clock.
    expected = stored.flip(2) if mirrored else stored.rot90(turns, (1, 2))
    assert torch.equal(read_video(path).frames, expected)


def test_a_variable_rate_keeps_every_frame_and_the_length(tmp_path: Path) -> None:
    clip = (smooth_clip(5, 16, 16) * 255).round().to(torch.uint8)
    encode(tmp_path / "clip.mp4", list(clip.numpy()), "rgb24", "libx264rgb", pts=(0, 1, 2, 10, 19))
    back = read_video(tmp_path / "clip.mp4")
    assert len(back.frames) == 5
    with av.open(str(tmp_path / "clip.mp4")) as file:
        assert len(back.frames) / back.fps == pytest.approx(file.duration / av.time_base, rel=0.01)


def test_a_size_that_changes_follows_the_first_frame(tmp_path: Path) -> None:
    first, second = (np.full((side, side, 3), value, np.uint8) for side, value in ((32, 60), (64, 200)))
    for name, picture in (("a.h264", first), ("b.h264", second)):
        encode(tmp_path / name, [picture] * 2, "rgb24", "libx264", pixel_format="yuv420p")
    (tmp_path / "c.h264").write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    back = read_video(tmp_path / "c.h264").frames
    assert back.shape == (4, 32, 32, 3)
    assert (back.mean(dim=(1, 2, 3)) * 255 - torch.tensor([60.0, 60, 200, 200])).abs().max() <= 3


def test_a_file_without_duration_is_read(tmp_path: Path) -> None:
    clip = list((smooth_clip(6, 32, 32) * 255).to(torch.uint8).numpy())
    encode(tmp_path / "seekable.webm", clip, "rgb24", "libvpx-vp9", pixel_format="yuv420p")
    data = (tmp_path / "seekable.webm").read_bytes()
    # EBML: the duration's element, its size 8 and the number become an element to skip, of the same length.
    duration = data.index(b"\x44\x89\x88")
    (tmp_path / "clip.webm").write_bytes(data[:duration] + b"\xec\x89" + bytes(9) + data[duration + 11 :])
    with av.open(str(tmp_path / "clip.webm")) as file:
        assert file.duration is None
    back = read_video(tmp_path / "clip.webm")
    assert back.frames.shape == (6, 32, 32, 3)
    assert back.fps == pytest.approx(10)


# Reading by time

B_FRAMES = {"bf": "3", "g": "24"}


def numbered(number: int, width: int = 128, height: int = 32) -> Any:
    """A picture `[H, W, 3]` with its number in eight bars, black or white; the lowest bit is on the left."""
    bits = np.repeat([255 * (number >> bit & 1) for bit in range(8)], width // 8).astype(np.uint8)
    return np.broadcast_to(bits[None, :, None], (height, width, 3)).copy()


def numbers(frames: Tensor) -> list[int]:
    """What `numbered` drew, at any size."""
    _, height, width, _ = frames.shape
    bars = [frames[:, height // 2, (2 * bit + 1) * width // 16].float().mean(-1) > 128 for bit in range(8)]
    return [sum(int(bar[i]) << bit for bit, bar in enumerate(bars)) for i in range(len(frames))]


def encode_numbered(path: Path, codec: str = "libx264", count: int = 90, rate: int = 30, **settings: Any) -> None:
    """Frames by another writer: `first` number, `size`, `options`, `pixel_aspect`, `pts` at `clock` ticks a second."""
    with av.open(str(path), "w") as file:
        # Black and white bars would make every frame a key frame.
        options = {"sc_threshold": "0"} if codec == "libx264" else {}
        stream = file.add_stream(codec, rate=rate, options={**options, **settings.get("options", {})})
        stream.width, stream.height = settings.get("size", (128, 32))
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, settings.get("clock", rate))
        if "pixel_aspect" in settings:
            stream.sample_aspect_ratio = settings["pixel_aspect"]
        for number, pts in zip(range(count), settings.get("pts", range(count)), strict=True):
            picture = numbered(settings.get("first", 0) + number, stream.width, stream.height)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, settings.get("clock", rate))
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "codec", "settings"),
    [
        ("clip.mp4", "libx264", {"options": B_FRAMES}),
        ("long.mp4", "libx264", {"options": {"bf": "3", "g": "250"}}),
        ("open.mp4", "libx264", {"options": {**B_FRAMES, "x264-params": "open-gop=1"}}),
        ("refresh.mp4", "libx264", {"options": {"g": "24", "x264-params": "intra-refresh=1"}}),
        ("late.mp4", "libx264", {"options": B_FRAMES, "pts": range(40, 130)}),
        ("clip.mov", "mpeg4", {"options": B_FRAMES}),
        ("clip.mkv", "libx264", {"options": B_FRAMES}),
        ("clip.webm", "libvpx-vp9", {"options": {"g": "24", "cpu-used": "8", "deadline": "realtime"}}),
        ("clip.ts", "libx264", {"options": B_FRAMES}),
        ("open.ts", "libx264", {"options": {**B_FRAMES, "x264-params": "open-gop=1"}}),
        ("refresh.ts", "libx264", {"options": {"g": "24", "x264-params": "intra-refresh=1"}}),
        ("clip.mpg", "mpeg2video", {"options": B_FRAMES}),
        ("clip.flv", "libx264", {"options": B_FRAMES}),
        ("clip.avi", "libx264", {"options": B_FRAMES}),
        ("clip.h264", "libx264", {"options": B_FRAMES, "rate": 25}),
    ],
)
def test_frames_are_found_by_their_time(name: str, codec: str, settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / name
    encode_numbered(path, codec, **settings)
    rate = settings.get("rate", 30)
    for start in (0.0, 1.3, 2.1):
        for fps in (8.0, 10.0, 24.0, rate):
            times = [start + k / fps for k in range(5)]
            expected = [int(time * rate + 1e-6) for time in times]
            assert numbers(read_frames(path, times)) == expected, (start, fps)
            assert numbers(read_frames(path.read_bytes(), times)) == expected, (start, fps)
    found = probe(path)
    assert (found.width, found.height, found.frames) == (128, 32, 90)
    assert found.fps == pytest.approx(rate, rel=1e-3)
    assert found.duration == pytest.approx(90 / rate, abs=2e-3)
    assert found.timed is (path.suffix not in (".avi", ".h264"))
    assert probe(path.read_bytes()) == found


@pytest.mark.parametrize("mode", ["open-gop=1", "intra-refresh=1"])
@pytest.mark.parametrize("suffix", [".mp4", ".ts"])
def test_a_frame_is_the_same_whichever_way_it_is_reached(suffix: str, mode: str, tmp_path: Path) -> None:
    """A textured picture moves, so that nearly all of a frame comes from those before it."""
    texture = np.random.default_rng(0).integers(0, 256, (16, 64, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    frames = [np.ascontiguousarray(texture[:, i : i + 128]) for i in range(90)]
    path = tmp_path / f"clip{suffix}"
    options = {"g": "24", "bf": "3", "x264-params": mode}
    encode(path, frames, "rgb24", "libx264", pixel_format="yuv420p", options=options)
    # The rate is 10, and a little later avoids rounding.
    whole = read_frames(path, [i / 10 + 1e-3 for i in range(90)])
    for i in range(20, 90, 3):
        assert torch.equal(read_frames(path, [i / 10 + 1e-3])[0], whole[i]), i


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_frames_of_a_variable_rate_stand_as_long_as_they_are_shown(suffix: str, tmp_path: Path) -> None:
    pts = np.cumsum([0, *np.random.default_rng(1).integers(8, 120, 89)]).tolist()
    path = tmp_path / f"clip{suffix}"
    encode_numbered(path, pts=pts, clock=1000, options=B_FRAMES)
    for start in (0, 700, 2900):
        wanted = range(start, start + 1500, 50)
        # Half a millisecond later, because .ts rounds to other fractions of a second.
        shown = numbers(read_frames(path, [milliseconds / 1000 + 5e-4 for milliseconds in wanted]))
        assert shown == [int(np.searchsorted(pts, milliseconds, side="right")) - 1 for milliseconds in wanted]
    found = probe(path)
    # How long the last frame stands is not always in the file.
    assert found.duration == pytest.approx(pts[-1] / 1000, abs=0.15)
    assert (found.frames, found.fps) == (90, pytest.approx(90 / found.duration, rel=0.01))


def test_a_gif_is_read_by_its_delays(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.gif", torch.stack([torch.from_numpy(numbered(i)) for i in range(30)]), 24)
    assert numbers(read_frames(tmp_path / "clip.gif", [i / 24 for i in range(30)])) == list(range(30))
    assert numbers(read_frames(tmp_path / "clip.gif", [i / 8 for i in range(10)])) == list(range(0, 30, 3))
    assert probe(tmp_path / "clip.gif").frames == 30


@pytest.mark.skipif(int(av.__version__.split(".")[0]) < 15, reason="copies no streams of this kind")
@pytest.mark.parametrize("key_frame", [20, 21])
def test_what_an_edit_list_hides_is_not_there(key_frame: int, tmp_path: Path) -> None:
    """A part from 25 on, cut without encoding: what comes before is only decoded, or missing with its key frame."""
    path = tmp_path / "part.mp4"
    encode_numbered(tmp_path / "whole.mp4", count=60, rate=10, options={"g": "20", "bf": "2"})
    with (
        av.open(str(tmp_path / "whole.mp4")) as whole,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as part,
    ):
        source = whole.streams.video[0]
        target = part.add_stream_from_template(source)
        shift = int(2.5 / source.time_base)
        for packet in whole.demux(source):
            if packet.pts is not None and packet.pts * source.time_base * 10 >= key_frame:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, target
                part.mux(packet)
    first = 25 if key_frame == 20 else 40
    assert numbers(read_frames(path, [i / 10 for i in range(60 - first)])) == list(range(first, 60))
    for start in (1.2, 1.5, 1.8):
        assert numbers(read_frames(path, [start, start + 0.1])) == [round(first + 10 * start + i) for i in range(2)]
    found = probe(path)
    assert (found.frames, found.duration) == (60 - first, pytest.approx(6 - first / 10))


def test_without_a_duration_the_frames_are_counted(tmp_path: Path) -> None:
    encode_numbered(tmp_path / "clip.webm", "libvpx-vp9", count=20, rate=10)
    data = (tmp_path / "clip.webm").read_bytes()
    duration = data.index(b"\x44\x89\x88")
    data = data[:duration] + b"\xec\x89" + bytes(9) + data[duration + 11 :]
    found = probe(data)
    assert (found.frames, found.fps, found.duration) == (20, pytest.approx(10), pytest.approx(2))
    assert numbers(read_frames(data, [1.5, 1.9])) == [15, 19]


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [((0, 1, -1, 0), True), ((-1, 0, 0, -1), False), ((0, -1, 1, 0), True), ((-1, 0, 0, 1), False)],
)
def test_turned_frames_are_cut_and_scaled_as_they_are_shown(
    matrix: tuple[int, int, int, int], turned: bool, tmp_path: Path
) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, smooth_clip(2, 64, 96), 8)
    turn_header(path, matrix)
    shown = read_video(path).frames
    assert torch.equal(read_frames(path, [0, 0.125]), (shown * 255).round().to(torch.uint8))
    assert (probe(path).height, probe(path).width) == tuple(shown.shape[1:3]) == ((96, 64) if turned else (64, 96))
    # First 64 x 48 remain of 64 x 96, or 86 x 64 of 96 x 64, then 48 x 48 or 64 x 64.
    side = 48 if turned else 64
    top, left = (shown.shape[1] - side) // 2, (shown.shape[2] - side) // 2
    middle = shown[:, top : top + side, left : left + side].permute(0, 3, 1, 2)
    expected = F.avg_pool2d(middle, 2).permute(0, 2, 3, 1)
    small = read_frames(path, [0, 0.125], size=(side // 2, side // 2), crop=4 / 3)
    assert (small / 255 - expected).abs().max() <= 6 / 255


def test_pictures_are_cut_about_their_middle(tmp_path: Path) -> None:
    """Of eight bars the fourth and the fifth are white."""
    write_video(tmp_path / "clip.mp4", torch.from_numpy(numbered(0b11000)).unsqueeze(0), 8)
    for size, crop, bars in (
        (None, None, [0, 0, 0, 1, 1, 0, 0, 0]),
        (None, 2.0, [0, 1, 1, 0]),
        (None, 1.0, [1, 1]),
        ((24, 8), None, [0, 0, 1, 1, 0, 0]),
        ((8, 8), None, [1, 1]),
        ((32, 16), 3.0, [0, 1, 1, 0]),
        ((48, 16), 2.0, [0, 1, 1, 0]),
        ((16, 32), None, [1]),
    ):
        frame = read_frames(tmp_path / "clip.mp4", [0], size, crop)[0]
        assert size is None or frame.shape == (size[1], size[0], 3)
        # The middle column of each bar, since their borders are blurred.
        middles = (torch.arange(len(bars)) * 2 + 1) * frame.shape[1] // (2 * len(bars))
        found = (frame[:, middles].float().mean(dim=(0, 2)) / 255).tolist()
        assert found == pytest.approx(bars, abs=0.2), (size, crop)


@pytest.mark.parametrize(("aspect", "shown"), [(Fraction(2), (192, 48)), (Fraction(1, 2), (96, 96))])
def test_pixels_become_square(aspect: Fraction, shown: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    encode_numbered(path, count=1, first=0b11000, size=(96, 48), pixel_aspect=aspect)
    assert read_video(path).frames.shape == (1, 48, 96, 3)
    assert (probe(path).width, probe(path).height) == shown
    assert read_frames(path, [0]).shape == (1, shown[1], shown[0], 3)
    # The middle quarter of the width is white.
    white = read_frames(path, [0], crop=shown[0] / shown[1] / 4)
    assert white.shape == (1, shown[1], shown[0] // 4, 3)
    assert white[:, :, 2:-2].float().mean() > 240
    # Turned afterwards.
    turn_header(path, (0, 1, -1, 0))
    assert (probe(path).height, probe(path).width) == shown
    assert read_frames(path, [0]).shape == (1, *shown, 3)
    assert torch.equal(read_frames(path, [0], crop=4 * shown[1] / shown[0]), white.rot90(3, (1, 2)))


def test_transparent_parts_leave_no_seam_when_scaled(tmp_path: Path) -> None:
    """What is transparent is white below, and would shine through where it is scaled before it is put over black."""
    pixels = np.full((64, 64, 4), 255, np.uint8)
    pixels[:, :32] = 255, 255, 255, 0
    pixels[:, 32:] = 0, 0, 0, 255
    encode(tmp_path / "clip.mov", [pixels], "rgba", "png")
    assert read_frames(tmp_path / "clip.mov", [0]).max() == 0
    assert read_frames(tmp_path / "clip.mov", [0], size=(21, 21)).max() == 0


@pytest.mark.parametrize(
    ("name", "tolerance"), [("a.png", 0), ("a.jpg", 16), ("a.webp", 16), ("a.bmp", 0), ("a.tiff", 0)]
)
def test_pictures_are_videos_of_one_frame(name: str, tolerance: int, tmp_path: Path) -> None:
    picture = (smooth_clip(1, 48, 80)[0] * 255).round().to(torch.uint8)
    Image.fromarray(picture.numpy()).save(tmp_path / name, quality=95)
    for source in (tmp_path / name, (tmp_path / name).read_bytes()):
        assert probe(source) == Probe(80, 48, 1, 0.0, 0.0, True)
        shown = read_frames(source, [0])
        assert (shown[0].int() - picture.int()).abs().max() <= tolerance
        assert read_frames(source, [0], size=(16, 16)).shape == (1, 16, 16, 3)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "I;16", "CMYK"])
def test_pictures_of_other_kinds_are_read(mode: str, tmp_path: Path) -> None:
    picture = Image.fromarray((smooth_clip(1, 48, 80)[0] * 255).to(torch.uint8).numpy()).convert("L")
    kind = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257) if mode == "I;16" else picture.convert(mode)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    kind.save(path)
    with Image.open(path) as stored:
        expected = torch.from_numpy(np.array(picture if mode == "I;16" else stored.convert("RGB")))
    shown = read_frames(path, [0])[0]
    assert (shown - expected.reshape(48, 80, -1).int()).abs().max() <= 2


def test_a_palette_may_hold_transparent_colours(tmp_path: Path) -> None:
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([0, 0, 0, 250, 240, 230, 40, 50, 60])
    picture.paste(2, (8, 0, 16, 16))
    picture.save(tmp_path / "a.png", transparency=1)
    shown = read_frames(tmp_path / "a.png", [0])[0]
    assert shown[0, 0].tolist() == [0, 0, 0]
    assert shown[0, 15].tolist() == [40, 50, 60]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photographs_are_turned_as_the_camera_says(orientation: int, tmp_path: Path) -> None:
    photograph = Image.fromarray((smooth_clip(1, 48, 80)[0] * 255).to(torch.uint8).numpy())
    exif = Image.Exif()
    exif[0x0112] = orientation
    photograph.save(tmp_path / "a.jpg", quality=95, exif=exif)
    with Image.open(tmp_path / "a.jpg") as stored:
        expected = torch.from_numpy(np.array(ImageOps.exif_transpose(stored)))
    shown = read_frames(tmp_path / "a.jpg", [0])[0]
    assert (probe(tmp_path / "a.jpg").height, probe(tmp_path / "a.jpg").width) == tuple(shown.shape[:2])
    # Mirrored or turned otherwise, they differ by 200.
    assert (shown.int() - expected.int()).abs().max() <= 16


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six seconds at 10 frames a second with a key frame every second, the index first."""
    path = tmp_path_factory.mktemp("noisy") / "clip.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), dtype=np.uint8)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as file:
        stream = file.add_stream("libx264", rate=10, options={"g": "10", "sc_threshold": "0", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for pixels in noise:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("whole", [True, False])
def test_damage_is_found_where_it_is_and_nowhere_else(whole: bool, noisy: Path, tmp_path: Path) -> None:
    """Frames that are no frames any more, or a few wrong bytes in each, which a decoder only notices in some."""
    data = bytearray(noisy.read_bytes())
    generator = np.random.default_rng(0)
    with av.open(str(noisy)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    for packet in packets[23:30]:
        start, length = (0, packet.size) if whole else (packet.size // 2, 100)
        data[packet.pos + start : packet.pos + start + length] = bytes(length) if whole else generator.bytes(length)
    (tmp_path / "damaged.mp4").write_bytes(data)
    for source in (tmp_path / "damaged.mp4", bytes(data)):
        for times in ([0.0, 1.0, 2.2], [3.0, 3.5, 5.9]):
            assert torch.equal(read_frames(source, times), read_frames(noisy, times))
        message = "cannot be read as a video" if whole else r"is damaged at 2.\d0 seconds"
        with pytest.raises(ValueError, match=message) as info:
            read_frames(source, [2.0, 2.9])
        assert "\n" not in str(info.value)


def test_a_video_that_stops_too_early_is_read_up_to_there(noisy: Path, tmp_path: Path) -> None:
    data = noisy.read_bytes()
    (tmp_path / "half.mp4").write_bytes(data[: len(data) // 2])
    assert probe(tmp_path / "half.mp4").duration == 6
    assert len(read_frames(tmp_path / "half.mp4", [0, 1, 2])) == 3
    with pytest.raises(ValueError, match=r"half\.mp4"):
        read_frames(tmp_path / "half.mp4", [0, 1, 5])
    with pytest.raises(ValueError, match=r"clip.mp4 ends after 6.00 seconds, not after 7.00"):
        read_frames(noisy, [0, 7])


def test_what_holds_no_frames_is_refused_in_one_sentence(tmp_path: Path) -> None:
    session = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    session += b"a=rtpmap:96 H264/90000\n"
    playlist = b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n"
    for data in (b"", b"this is a letter, not a video\n" * 20, session, playlist):
        (tmp_path / "clip.mp4").write_bytes(data)
        for read in (probe, lambda source: read_frames(source, [0])):
            with pytest.raises(ValueError, match=r"the file in memory cannot be read as a video \(Invalid data"):
                read(data)
            with pytest.raises(ValueError, match=r"clip\.mp4 cannot be read as a video \(Invalid data"):
                read(tmp_path / "clip.mp4")
            with pytest.raises(FileNotFoundError, match="is not a file: check the name"):
                read(tmp_path / "other.mp4")


# Failures


def test_unreadable_files_say_so_in_one_sentence(tmp_path: Path) -> None:
    write_video(tmp_path / "good.mp4", smooth_clip(8, 64, 64), 8)
    good = (tmp_path / "good.mp4").read_bytes()
    start = good.index(b"mdat") + 4
    broken = {
        "empty.mp4": b"",
        "text.mp4": b"this is a letter, not a video\n" * 20,
        "short.mp4": good[: len(good) // 4],
        "holes.mp4": good[:start] + b"\xff" * (len(good) - start),
        "unknown.mp4": good.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"),
        "playlist.mp4": b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n",
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as info:
            read_video(tmp_path / name)
        assert "\n" not in str(info.value)
    for name in ("empty.mp4", "text.mp4", "playlist.mp4"):
        with pytest.raises(ValueError, match=name):
            read_metadata(tmp_path / name)


def test_a_sound_file_holds_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
    with pytest.raises(ValueError, match="holds no video"):
        read_video(tmp_path / "sound.wav")


@pytest.mark.parametrize("name", ["nothing.mp4", ".", "http://127.0.0.1:9/clip.mp4"])
def test_a_missing_file_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for read in (read_video, read_metadata):
        with pytest.raises(FileNotFoundError, match="is not a file: check the name"):
            read(name)


@pytest.mark.skipif(sys.platform == "win32", reason="names have no colons there")
def test_a_name_like_a_protocol_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video("pipe:1.mp4", smooth_clip(2, 16, 16), 8)
    assert len(read_video("pipe:1.mp4").frames) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip.avi", "end it with .mp4, .webm, .gif"),
        ("clip", "end it with .mp4, .webm, .gif"),
        ("missing/clip.mp4", "missing is not a folder: create it"),
        ("folder.mp4", "is a folder: choose another name"),
    ],
)
def test_places_that_cannot_take_a_video_are_found_beforehand(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    for attempt in (check_writable, lambda path: write_video(path, smooth_clip(1, 8, 8), 8)):
        with pytest.raises(ValueError, match=message):
            attempt(tmp_path / name)


def test_a_folder_that_refuses_files_is_found_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    check_writable(tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())
    # Root may write everywhere, so the system's refusal is simulated.
    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(OSError, match=r"clip.mp4 cannot be written \(Permission denied\)"):
        check_writable(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("name", "frames", "fps", "message"),
    [
        ("clip.mp4", torch.zeros(0, 8, 8, 3), 8, "no frames"),
        ("clip.mp4", torch.zeros(2, 8, 0, 3), 8, "no frames"),
        ("clip.mp4", torch.zeros(1, 8, 8, 3), 0, "choose 0.01 to 240"),
        ("clip.mp4", torch.zeros(1, 8, 8, 3), 241, "choose 0.01 to 240"),
        ("clip.mp4", torch.zeros(1, 8, 8, 3), float("nan"), "choose 0.01 to 240"),
        ("clip.gif", torch.zeros(1, 8, 8, 3), 60, "choose 0.01 to 50"),
        ("clip.mp4", torch.full((1, 8, 8, 3), float("nan")), 8, "not numbers"),
        ("clip.mp4", torch.zeros(1, 2, 20000, 3), 8, "refused frames of 20000x2"),
        ("clip.gif", torch.zeros(1, 1, 70000, 3), 8, "refused frames of 70000x1"),
    ],
)
def test_clips_that_no_file_holds_leave_nothing(
    name: str, frames: Tensor, fps: float, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, frames, fps)
    assert not list(tmp_path.iterdir())


def test_wrong_shapes_are_programming_errors(tmp_path: Path) -> None:
    for frames in (torch.zeros(8, 8, 3), torch.zeros(2, 3, 8, 8), torch.zeros(1, 8, 8, 3, dtype=torch.int64)):
        with pytest.raises(AssertionError):
            write_video(tmp_path / "clip.mp4", frames, 8)
    with pytest.raises(AssertionError):
        write_video(tmp_path / "clip.mp4", torch.zeros(1, 8, 8, 3), 8, {"Not a name": "x"})


@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_the_old_file(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "clip.mp4", smooth_clip(2, 16, 16), 8)
    before = (tmp_path / "clip.mp4").read_bytes()
    convert, calls = write._to_uint8, []

    def fail_later(pixels: Tensor) -> write.Pixels:
        calls.append(pixels)
        if len(calls) == 5:
            raise failure
        return convert(pixels)

    monkeypatch.setattr(write, "_to_uint8", fail_later)
    with pytest.raises(type(failure)):
        write_video(tmp_path / "clip.mp4", smooth_clip(8, 16, 16), 8)
    assert len(calls) == 5
    assert list(tmp_path.iterdir()) == [tmp_path / "clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
@pytest.mark.parametrize("limit", [0, 2000, 20000])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_writes_that_the_system_refuses_leave_nothing(suffix: str, limit: int, tmp_path: Path) -> None:
    """A limit on the size of files makes writes fail as a full disk does, with another number."""
    import resource

    noise = torch.rand(12, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match=r"was not written .*: check the free space and the folder") as info:
            write_video(tmp_path / f"clip{suffix}", noise, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(info.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: the system reports it when the finished file is flushed."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"was not written \(No space left on device\): check the free space"):
        write_video(tmp_path / "clip.mp4", smooth_clip(2, 16, 16), 8)
    assert not list(tmp_path.iterdir())
