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
from torch import Tensor

from videofactory_core import video
from videofactory_core.video import check_writable, read_metadata, read_video, write_video

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
    convert, calls = video._to_uint8, []

    def fail_later(pixels: Tensor) -> video.Pixels:
        calls.append(pixels)
        if len(calls) == 5:
            raise failure
        return convert(pixels)

    monkeypatch.setattr(video, "_to_uint8", fail_later)
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
