"""Videos that pass through frame by frame: their times, sound, damage and memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from videofactory_core.video import DamagedVideo, open_frames, read_frames, read_video, write_frames, write_video

RATE = 48_000
FLASH = 1.0


def shift_clip(count: int, height: int = 96, width: int = 160) -> Tensor:
    """A texture moves by a pixel from frame to frame, so that most of a frame comes from those before; with noise."""
    generator = np.random.default_rng(0)
    texture = generator.integers(0, 249, (height // 4 + 1, (width + count) // 4 + 1, 3), dtype=np.uint8)
    texture = texture.repeat(4, 0).repeat(4, 1)
    frames = np.stack([texture[:height, i : i + width] for i in range(count)])
    return torch.from_numpy(frames + generator.integers(0, 7, frames.shape, dtype=np.uint8))


def encode(path: Path, frames: Tensor, codec: str = "libx264", **settings: Any) -> None:
    """A file by another writer at 10 frames a second: `pixel_format`, `options`, `muxer`, `pts` in milliseconds."""
    pts = settings.get("pts", range(0, 100 * len(frames), 100))
    with av.open(str(path), "w", options=settings.get("muxer", {})) as file:
        stream = file.add_stream(codec, rate=10, options=settings.get("options", {}))
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = settings.get("pixel_format", "yuv420p")
        if "pts" in settings:
            stream.codec_context.time_base = Fraction(1, 1000)
        for pixels, time in zip(frames.numpy(), pts, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            if "pts" not in settings:
                frame.pts, frame.time_base = time // 100, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def chirp(rate: int = RATE) -> Any:
    """50 ms that rise from 300 to 3000 Hz: one place alone fits it."""
    t = np.arange(round(0.05 * rate)) / rate
    return np.sin(2 * np.pi * (300 * t + 27_000 * t**2)) * np.hanning(len(t)) * 0.8


def encode_flash(
    path: Path, video: str, audio: str, starts: float = 0.0, seconds: float = 2.0, **settings: Any
) -> None:
    """Black with a flash and silence with a chirp `FLASH` seconds after the first frame; sound `starts` as long after.

    `size` of the picture, `rate` and `channels` of the sound; `late`: seconds at which the earlier of both begins.
    """
    rate, channels = settings.get("rate", RATE), settings.get("channels", 2)
    late, (width, height) = settings.get("late", 0.0), settings.get("size", (64, 48))
    picture_at, sound_at = late + max(0.0, -starts), late + max(0.0, starts)
    length = round((seconds - starts) * rate)
    samples = np.zeros(length)
    at = round((FLASH - starts) * rate)
    samples[at : at + len(chirp(rate))] = chirp(rate)[: max(0, length - at)]
    samples += np.random.default_rng(0).normal(0, 0.003, length)
    with av.open(str(path), "w") as file:
        picture = file.add_stream(video, rate=10)
        picture.width, picture.height, picture.pix_fmt = width, height, "yuv420p"
        options = {"strict": "-2"} if audio == "vorbis" else {}
        sound = file.add_stream(audio, rate=rate, options=options)
        sound.codec_context.layout = {1: "mono", 2: "stereo", 6: "5.1"}[channels]
        packets: list[Any] = []
        for number in range(round(seconds * 10)):
            pixels = np.full((height, width, 3), 235 if abs(number / 10 - FLASH) < 1e-6 else 10, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number + round(picture_at * 10), Fraction(1, 10)
            packets += picture.encode(frame)
        packets += picture.encode(None)
        for begin in range(0, length, 4096):
            part = np.tile(samples[begin : begin + 4096], (channels, 1)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=sound.codec_context.layout.name)
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            frame.pts = begin + round(sound_at * rate)
            packets += sound.encode(frame)
        packets += sound.encode(None)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            file.mux(packet)


def flash_and_chirp(path: Path) -> tuple[float, float, float, str]:
    """Seconds after the first frame of the flash, of the chirp and of the end of the sound, and its codec."""
    with av.open(str(path)) as file:
        means = [(frame.time, frame.to_ndarray(format="gray").mean()) for frame in file.decode(video=0)]
    times = [time for time, _ in means]
    if path.suffix == ".avi":
        times = [number / 10 for number in range(len(times))]
    flash = times[int(np.argmax([mean for _, mean in means]))]
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        pieces = [
            (frame.time, frame.sample_rate, frame.to_ndarray().astype(np.float64), frame.format.is_planar)
            for frame in file.decode(stream)
        ]
        name = {"mp3float": "mp3"}.get(stream.codec_context.name, stream.codec_context.name)
        channels = len(stream.codec_context.layout.channels)
    rate = pieces[0][1]
    end = max(time + piece.size / channels / rate for time, _, piece, _ in pieces)
    whole = np.zeros(round((end + 1) * rate))
    for time, _, piece, planar in pieces:
        samples = piece[0] if planar else piece.reshape(-1, channels)[:, 0]
        begin = round(time * rate)
        samples = samples[max(0, -begin) :]
        whole[max(0, begin) : max(0, begin) + len(samples)] = samples
    found = np.correlate(whole, chirp(rate), "valid")
    return flash - times[0], int(np.argmax(found)) / rate - times[0], end - times[0], name


def pass_through(source: Path, target: Path, **settings: Any) -> None:
    with open_frames(source) as clip:
        write_frames(target, (frame.pixels for frame in clip), clip.fps, audio=source, **settings)


SOURCES = [
    ("a.mp4", "libx264", "aac", {}),
    ("a.mp4", "libx264", "mp3", {}),
    ("a.mp4", "libx264", "ac3", {}),
    ("a.mp4", "libx264", "opus", {}),
    ("a.mp4", "libx264", "alac", {}),
    ("a.mkv", "libx264", "aac", {}),
    ("a.mkv", "libx264", "flac", {}),
    ("a.mkv", "libx264", "eac3", {}),
    ("a.mkv", "libx264", "mp3", {}),
    ("a.mkv", "libx264", "pcm_s16le", {"channels": 6}),
    ("a.mov", "libx264", "pcm_s16le", {"rate": 44_100}),
    ("a.mov", "mpeg4", "aac", {"rate": 44_100}),
    ("a.webm", "libvpx-vp9", "opus", {}),
    ("a.webm", "libvpx-vp9", "vorbis", {}),
    ("a.avi", "mpeg4", "pcm_s16le", {"rate": 44_100, "channels": 1}),
    ("a.avi", "mpeg4", "mp3", {"rate": 44_100}),
    ("a.mkv", "libx264", "mp3", {"rate": 8000, "channels": 1}),
    ("a.ts", "libx264", "aac", {}),
    ("a.ts", "mpeg2video", "mp2", {}),
]
# Which of them the new files hold as they are.
COPIED = {".mp4": {"aac", "mp3", "ac3", "eac3", "flac", "opus", "alac"}, ".webm": {"opus", "vorbis"}}


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize(("name", "video", "audio", "settings"), SOURCES)
def test_sound_stays_in_step(
    name: str, video: str, audio: str, settings: dict[str, Any], suffix: str, tmp_path: Path
) -> None:
    source, target = tmp_path / name, tmp_path / f"out{suffix}"
    encode_flash(source, video, {"mp3": "libmp3lame", "opus": "libopus"}.get(audio, audio), **settings)
    flash, before, _, _ = flash_and_chirp(source)
    pass_through(source, target)
    seen, heard, end, codec = flash_and_chirp(target)
    assert abs(seen - flash) < 2e-3
    assert abs((heard - seen) - (before - flash)) < 5e-3, (before, heard)
    assert end == pytest.approx(2, abs=0.08)
    kept = audio in COPIED[suffix] and settings.get("rate") != 8000
    assert codec == (audio if kept else {".mp4": "aac", ".webm": "opus"}[suffix])
    if kept and suffix != ".webm":
        assert heard - seen == pytest.approx(before - flash, abs=1e-3)


def sound_packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(audio=0) if packet.size]


def test_copied_sound_is_the_same_sound(tmp_path: Path) -> None:
    encode_flash(tmp_path / "a.mkv", "libx264", "aac")
    pass_through(tmp_path / "a.mkv", tmp_path / "b.mp4")
    packets = sound_packets(tmp_path / "b.mp4")
    assert packets == sound_packets(tmp_path / "a.mkv")[: len(packets)]


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize(("name", "audio"), [("a.mkv", "aac"), ("a.webm", "libopus"), ("a.mov", "pcm_s16le")])
@pytest.mark.parametrize(("starts", "late"), [(0.4, 0.0), (0.7, 0.0), (-0.4, 0.0), (-1.2, 0.3), (0.0, 2.0)])
def test_sound_that_starts_at_another_time_stays_in_step(
    name: str, audio: str, starts: float, late: float, suffix: str, tmp_path: Path
) -> None:
    source, target = tmp_path / name, tmp_path / f"out{suffix}"
    encode_flash(source, "libvpx-vp9" if name == "a.webm" else "libx264", audio, starts=starts, late=late)
    flash, before, _, _ = flash_and_chirp(source)
    assert (flash, before) == pytest.approx((FLASH, FLASH), abs=2e-3)
    pass_through(source, target)
    seen, heard, end, _ = flash_and_chirp(target)
    assert (seen, heard) == pytest.approx((FLASH, FLASH), abs=3e-3)
    assert end == pytest.approx(2, abs=0.08)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("audio", ["aac", "libopus"])
def test_sound_is_cut_where_the_picture_ends_and_may_end_before(audio: str, suffix: str, tmp_path: Path) -> None:
    encode_flash(tmp_path / "a.mkv", "libx264", audio)
    picture = torch.zeros(20, 16, 16, 3, dtype=torch.uint8)
    for seconds in (1.5, 4):
        write_frames(tmp_path / f"out{suffix}", picture, 20 / seconds, audio=tmp_path / "a.mkv")
        _, heard, end, _ = flash_and_chirp(tmp_path / f"out{suffix}")
        assert heard == pytest.approx(FLASH, abs=3e-3)
        assert end == pytest.approx(min(seconds, 2), abs=0.08)
        assert len(read_video(tmp_path / f"out{suffix}").frames) == 20


def test_sound_of_a_file_without_picture_starts_with_the_picture(tmp_path: Path) -> None:
    encode_flash(tmp_path / "a.mp4", "libx264", "aac")
    with av.open(str(tmp_path / "a.mp4")) as video, av.open(str(tmp_path / "a.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=RATE)
        stream.codec_context.layout = "stereo"
        for frame in video.decode(audio=0):
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    write_frames(tmp_path / "b.mp4", torch.zeros(30, 16, 16, 3), 10, audio=tmp_path / "a.wav")
    _, heard, _, codec = flash_and_chirp(tmp_path / "b.mp4")
    assert (heard, codec) == (pytest.approx(FLASH, abs=3e-3), "aac")


def test_a_gap_in_the_sound_becomes_silence(tmp_path: Path) -> None:
    encode_flash(tmp_path / "a.mkv", "libx264", "pcm_s16le")
    with av.open(str(tmp_path / "a.mkv")) as whole, av.open(str(tmp_path / "b.mkv"), "w") as part:
        streams = {}
        for stream in (whole.streams.video[0], whole.streams.audio[0]):
            add = getattr(part, "add_stream_from_template", None)
            streams[stream.index] = add(stream) if add else part.add_stream(template=stream)
        for packet in whole.demux():
            if packet.pts is None or (packet.stream.type == "audio" and 0.3 < packet.time_base * packet.pts < 0.9):
                continue
            packet.stream = streams[packet.stream.index]
            part.mux(packet)
    pass_through(tmp_path / "b.mkv", tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as file:
        ends = [0.0]
        for frame in file.decode(audio=0):
            assert frame.time == pytest.approx(ends[-1], abs=1e-3)
            ends.append(frame.time + frame.samples / frame.sample_rate)
    seen, heard, _, _ = flash_and_chirp(tmp_path / "b.mp4")
    assert (seen, heard) == pytest.approx((FLASH, FLASH), abs=3e-3)


def test_without_sound_there_is_none(tmp_path: Path) -> None:
    write_video(tmp_path / "silent.mp4", shift_clip(3), 8)
    encode_flash(tmp_path / "loud.mp4", "libx264", "aac")
    pass_through(tmp_path / "silent.mp4", tmp_path / "a.mp4")
    pass_through(tmp_path / "loud.mp4", tmp_path / "b.gif")
    for name in ("a.mp4", "b.gif"):
        with av.open(str(tmp_path / name)) as file:
            assert [stream.type for stream in file.streams] == ["video"]
    assert len(read_video(tmp_path / "b.gif").frames) == 20


def test_equal_sound_gives_equal_bytes(tmp_path: Path) -> None:
    encode_flash(tmp_path / "a.mkv", "libx264", "pcm_s16le")
    for suffix in (".mp4", ".webm"):
        files = set()
        for index in range(3):
            pass_through(tmp_path / "a.mkv", tmp_path / f"{index}{suffix}")
            files.add((tmp_path / f"{index}{suffix}").read_bytes())
        assert len(files) == 1


# Times


def shown_times(path: Path) -> list[float]:
    with open_frames(path) as clip:
        return [frame.time for frame in clip]


@pytest.mark.parametrize(("suffix", "tick"), [(".mp4", 1 / 90_000), (".webm", 1 / 1000), (".gif", 1 / 100)])
def test_times_are_kept(suffix: str, tick: float, tmp_path: Path) -> None:
    times = np.cumsum([0, *np.random.default_rng(1).uniform(0.015, 0.3, 39)]).tolist()
    write_frames(tmp_path / f"a{suffix}", shift_clip(40), 10, times=times)
    assert shown_times(tmp_path / f"a{suffix}") == pytest.approx(times, abs=0.51 * tick)
    with open_frames(tmp_path / f"a{suffix}") as clip:
        assert clip.variable
        assert clip.fps == pytest.approx(39 / times[-1], rel=1e-3)
    with av.open(str(tmp_path / f"a{suffix}")) as file:
        assert file.duration / av.time_base == pytest.approx(times[-1] + 0.1, abs=0.02)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_equal_times_follow_each_other(suffix: str, tmp_path: Path) -> None:
    write_frames(tmp_path / f"a{suffix}", shift_clip(5), 10, times=[0.0, 0.5, 0.5, 0.5, 1.0])
    assert shown_times(tmp_path / f"a{suffix}") == pytest.approx([0.0, 0.5, 0.5, 0.5, 1.0], abs=0.021)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_variable_rate_is_noticed_and_passes_through(name: str, tmp_path: Path) -> None:
    pts = [500, *(500 + np.cumsum(np.random.default_rng(2).integers(20, 200, 29))).tolist()]
    encode(tmp_path / name, shift_clip(30), pts=pts, options={"bf": "3"})
    times = [(milliseconds - 500) / 1000 for milliseconds in pts]
    waiting: list[float] = []

    def pictures(clip: Any) -> Iterator[Tensor]:
        for frame in clip:
            waiting.append(frame.time)
            yield frame.pixels

    with open_frames(tmp_path / name) as clip:
        assert (clip.variable, clip.frames) == (True, 30)
        assert clip.fps == pytest.approx(29 / times[-1], rel=1e-3)
        # Frames may be taken some at a time.
        batches = iter(list(pictures(clip)))
        write_frames(tmp_path / "b.mp4", batches, clip.fps, times=(waiting.pop(0) for _ in iter(int, 1)))
    assert shown_times(tmp_path / "b.mp4") == pytest.approx(times, abs=1.1e-3)


@pytest.mark.parametrize("rate", [Fraction(24_000, 1001), 24, 30, 60])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.gif", "a.ts"])
def test_a_constant_rate_is_one_though_times_are_rounded(name: str, rate: Fraction | int, tmp_path: Path) -> None:
    if name == "a.gif":
        write_video(tmp_path / name, shift_clip(60, 16, 16), min(50, float(rate)))
    else:
        with av.open(str(tmp_path / name), "w") as file:
            stream = file.add_stream("mpeg4" if name == "a.avi" else "libx264", rate=rate)
            stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
            for pixels in shift_clip(60, 16, 16).numpy():
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode(None))
    expected = min(50, float(rate)) if name == "a.gif" else float(rate)
    with open_frames(tmp_path / name) as clip:
        assert (clip.variable, clip.frames) == (False, 60)
        assert clip.fps == pytest.approx(expected, rel=6e-3 if name == "a.gif" else 1e-5)
        times = [frame.time for frame in clip]
    assert times == pytest.approx([number / expected for number in range(60)], abs=0.0101)


def test_what_an_edit_list_hides_is_not_shown(tmp_path: Path) -> None:
    """From 25 on of 60, cut without encoding: the frames from 20 on are only decoded."""
    encode(tmp_path / "whole.mp4", shift_clip(60), options={"g": "20", "bf": "2"})
    with (
        av.open(str(tmp_path / "whole.mp4")) as whole,
        av.open(str(tmp_path / "part.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as part,
    ):
        source = whole.streams.video[0]
        add = getattr(part, "add_stream_from_template", None)
        target = add(source) if add else part.add_stream(template=source)
        shift = int(2.5 / source.time_base)
        for packet in whole.demux(source):
            if packet.pts is not None and packet.pts * source.time_base * 10 >= 20:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, target
                part.mux(packet)
    with open_frames(tmp_path / "part.mp4") as clip:
        assert (clip.frames, clip.variable, clip.fps, clip.missing) == (35, False, pytest.approx(10), 0)
        frames = list(clip)
    assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in range(35)])
    assert torch.equal(frames[0].pixels, read_video(tmp_path / "whole.mp4", 1, 25).frames.mul(255).round().byte()[0])


# Frames


def assert_as_read(path: Path) -> Tensor:
    """The frames are those of `read_video`, which come back."""
    expected = (read_video(path).frames * 255).round().to(torch.uint8)
    with open_frames(path) as clip:
        frames = torch.stack([frame.pixels for frame in clip])
        assert (clip.height, clip.width) == frames.shape[1:3]
        assert clip.frames == len(frames)
    assert torch.equal(frames, expected)
    return frames


def test_unusual_pixels_are_read_as_ever(tmp_path: Path) -> None:
    clip = shift_clip(4, 48, 80)
    encode(tmp_path / "ten.mkv", clip, "ffv1", pixel_format="yuv422p10le")
    assert_as_read(tmp_path / "ten.mkv")
    encode(tmp_path / "ten.mp4", clip, pixel_format="yuv420p10le")
    assert_as_read(tmp_path / "ten.mp4")
    alpha = torch.arange(80, dtype=torch.uint8).mul(3).expand(4, 48, 80).unsqueeze(-1)
    with av.open(str(tmp_path / "alpha.mov"), "w") as file:
        stream = file.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "rgba"
        for pixels in torch.cat([clip, alpha], -1).numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba")))
        file.mux(stream.encode(None))
    expected = (clip * (alpha / 255)).round()
    assert (assert_as_read(tmp_path / "alpha.mov") - expected).abs().max() <= 1


@pytest.mark.parametrize("turned", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)])
def test_turned_videos_stand_upright(turned: tuple[int, int, int, int], tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", shift_clip(3, 48, 80), 8)
    # The track header's matrix a b u, c d v, x y w in 16.16 and 2.30 fixed point.
    a, b, c, d = turned
    plain, other = (
        (np.array(numbers) * (1 << 16)).astype(">i4").tobytes()
        for numbers in ([1, 0, 0, 0, 1, 0, 0, 0, 1 << 14], [a, b, 0, c, d, 0, 0, 0, 1 << 14])
    )
    data = (tmp_path / "a.mp4").read_bytes()
    header = data.index(b"tkhd")
    (tmp_path / "b.mp4").write_bytes(data[:header] + data[header:].replace(plain, other, 1))
    frames = assert_as_read(tmp_path / "b.mp4")
    assert frames.shape[1:3] == ((80, 48) if a == 0 else (48, 80))


@pytest.mark.parametrize(("aspect", "shown"), [(Fraction(2), (192, 48)), (Fraction(1, 2), (96, 96))])
def test_pixels_become_square(aspect: Fraction, shown: tuple[int, int], tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.sample_aspect_ratio = 96, 48, "yuv420p", aspect
        for pixels in shift_clip(3, 48, 96).numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    with open_frames(tmp_path / "a.mp4") as clip:
        assert (clip.width, clip.height) == shown
        frames = [frame.pixels for frame in clip]
    assert torch.equal(torch.stack(frames), read_frames(tmp_path / "a.mp4", [0, 0.1, 0.2]))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4), (2, 6), (1, 5)])
@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a.mkv"])
def test_tiny_videos_pass_through(name: str, height: int, width: int, tmp_path: Path) -> None:
    if name == "a.mkv":
        encode(tmp_path / name, shift_clip(3, 8, 8)[:, :height, :width], "ffv1", pixel_format="bgr0")
    else:
        write_video(tmp_path / name, shift_clip(3, 8, 8)[:, :height, :width], 8)
    frames = assert_as_read(tmp_path / name)
    with open_frames(tmp_path / name) as clip:
        write_frames(tmp_path / "b.mp4", (frame.pixels.float() / 255 for frame in clip), clip.fps)
    assert len(read_video(tmp_path / "b.mp4").frames) == len(frames) == 3


# Damage


def damage(path: Path, number: int, share: float) -> bytes:
    """The file with the last `share` of one packet, from `number` on in the order of decoding, lost to zeros.

    H.264 has no way to tell most other wrong bytes.
    """
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    # A small one may occur elsewhere too.
    packet = next(packet for packet in packets[number:] if len(packet) > 100)
    assert data.count(packet) == 1
    length = round(len(packet) * share)
    end = data.index(packet) + len(packet)
    data[end - length : end] = bytes(length)
    return bytes(data)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize(
    "options", [{"g": "20", "crf": "10", "bf": "0"}, {"g": "20", "crf": "10", "bf": "3", "sc_threshold": "0"}]
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_damaged_frames_are_told_or_repeated(name: str, options: dict[str, str], share: float, tmp_path: Path) -> None:
    source, broken = tmp_path / name, tmp_path / f"broken{Path(name).suffix}"
    encode(source, shift_clip(70), options=options)
    with open_frames(source) as clip:
        clean = list(clip)
    for number in (23, 26):
        broken.write_bytes(damage(source, number, share))
        with (
            open_frames(broken) as clip,
            pytest.raises(DamagedVideo, match=r"broken.* is damaged at 2\.\d0 seconds: repair") as info,
        ):
            list(clip)
        assert "\n" not in str(info.value)
        with open_frames(broken, repeat_damaged=True) as clip:
            frames = list(clip)
            assert 0 < clip.repeated <= 20
        assert [frame.time for frame in frames] == [frame.time for frame in clean]
        good = [torch.equal(a.pixels, b.pixels) for a, b in zip(frames, clean, strict=True)]
        assert good.count(False) == clip.repeated
        # Nothing else than the last good frame stands for what is damaged, which ends with the next key frame.
        first, last = good.index(False), len(good) - good[::-1].index(False)
        assert 20 < first <= 27
        assert last == 40
        assert all(torch.equal(frame.pixels, clean[first - 1].pixels) for frame in frames[first:last])
        if options["bf"] == "0":
            assert first == number
            assert f"at {number / 10:.2f} seconds" in str(info.value)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_damage_in_an_avi_is_told_or_repeated(share: float, tmp_path: Path) -> None:
    encode(tmp_path / "a.avi", shift_clip(40), "mpeg4", options={"g": "10"})
    with open_frames(tmp_path / "a.avi") as clip:
        clean = list(clip)
    (tmp_path / "b.avi").write_bytes(damage(tmp_path / "a.avi", 14, share))
    with open_frames(tmp_path / "b.avi") as clip, pytest.raises(ValueError, match=r"is damaged at 1\.40 seconds"):
        list(clip)
    with open_frames(tmp_path / "b.avi", repeat_damaged=True) as clip:
        frames = list(clip)
    assert (len(frames), clip.repeated) == (40, 6)
    for number in range(40):
        same = 13 if 14 <= number < 20 else number
        assert torch.equal(frames[number].pixels, clean[same].pixels)
        assert frames[number].time == pytest.approx(number / 10)


@pytest.mark.parametrize("repeat", [True, False])
def test_nothing_stands_for_a_damaged_first_frame(repeat: bool, tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", shift_clip(30), options={"g": "10"})
    (tmp_path / "b.mp4").write_bytes(damage(tmp_path / "a.mp4", 0, 1.0))
    with (
        pytest.raises(ValueError, match=r"b.mp4 is damaged at 0.00 seconds: repair"),
        open_frames(tmp_path / "b.mp4", repeat),
    ):
        pass


def test_a_file_that_breaks_off_is_told_at_once(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", shift_clip(60), options={"g": "10"}, muxer={"movflags": "faststart"})
    clean = assert_as_read(tmp_path / "a.mp4")
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: len(data) * 6 // 10])
    with (
        pytest.raises(DamagedVideo, match=r"b.mp4 breaks off at [2-4]\.\d0 seconds, \d.\d0 before"),
        open_frames(tmp_path / "b.mp4"),
    ):
        pass
    with open_frames(tmp_path / "b.mp4", repeat_damaged=True) as clip:
        frames = list(clip)
        assert 1.5 < clip.missing < 4.5
        assert clip.missing == pytest.approx(6 - len(frames) / 10, abs=0.4)
    good = len(frames) - clip.repeated
    assert torch.equal(torch.stack([frame.pixels for frame in frames[:good]]), clean[:good])
    for name in ("a.webm", "a.ts"):
        encode(tmp_path / name, shift_clip(60), "libvpx-vp9" if name == "a.webm" else "libx264", options={"g": "10"})
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) * 6 // 10])
        with open_frames(tmp_path / name, repeat_damaged=True) as clip:
            assert 10 < len(list(clip)) < 50


def test_files_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("this is a letter, not a video\n" * 20)
    with pytest.raises(ValueError, match=r"text.mp4 cannot be read as a video"), open_frames(tmp_path / "text.mp4"):
        pass
    with pytest.raises(FileNotFoundError, match="is not a file"), open_frames(tmp_path / "none.mp4"):
        pass
    with pytest.raises(FileNotFoundError, match="is not a file"):
        write_frames(tmp_path / "b.mp4", shift_clip(2), 8, audio=tmp_path / "none.mp4")
    with pytest.raises(ValueError, match=r"text.mp4 cannot be read .* for the sound"):
        write_frames(tmp_path / "b.mp4", shift_clip(2), 8, audio=tmp_path / "text.mp4")
    with pytest.raises(ValueError, match="there are no frames"):
        write_frames(tmp_path / "b.mp4", iter(()), 8)
    assert [path.name for path in tmp_path.iterdir()] == ["text.mp4"]


@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt(), OSError("lost"), ValueError("bad")])
@pytest.mark.parametrize("after", [0, 5])
def test_what_the_frames_raise_comes_out_and_leaves_the_old_file(
    failure: BaseException, after: int, tmp_path: Path
) -> None:
    write_video(tmp_path / "a.mp4", shift_clip(2), 8)
    before = (tmp_path / "a.mp4").read_bytes()

    def pictures() -> Iterator[Tensor]:
        yield from shift_clip(5)[:after]
        raise failure

    with pytest.raises(type(failure)) as info:
        write_frames(tmp_path / "a.mp4", pictures(), 8)
    assert info.value is failure
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == before


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
@pytest.mark.parametrize("limit", [0, 20_000, 60_000])
def test_a_disk_that_fills_up_leaves_nothing(limit: int, tmp_path: Path) -> None:
    import resource

    encode_flash(tmp_path / "a.mkv", "libx264", "pcm_s16le")
    noise = torch.rand(30, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match=r"was not written .*: check the free space and the folder"):
            write_frames(tmp_path / "b.mp4", noise, 8, audio=tmp_path / "a.mkv")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mkv"]


def test_frames_must_fit_together(tmp_path: Path) -> None:
    wrong = [
        {"frames": [torch.zeros(8, 8, 3), torch.zeros(8, 10, 3)]},
        {"frames": [torch.zeros(8, 8)]},
        {"frames": [torch.zeros(8, 8, 3, dtype=torch.int64)]},
        {"frames": torch.zeros(3, 8, 8, 3), "times": [0.0, 0.1]},
    ]
    for settings in wrong:
        with pytest.raises(AssertionError):
            write_frames(tmp_path / "a.mp4", fps=8, **settings)
    assert not list(tmp_path.iterdir())


PEAK = """
import sys
from videofactory_core.video import open_frames, write_frames
with open_frames(sys.argv[1]) as clip:
    write_frames(sys.argv[2], (frame.pixels for frame in clip), clip.fps, audio=sys.argv[1])
sys.path.append(sys.argv[3])
from peak import peak_bytes
print(peak_bytes())
"""


def test_memory_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    """512 frames in memory are 113 MB, and their sound 20 MB."""
    peaks = []
    for count in (16, 512):
        encode_flash(tmp_path / "a.mkv", "libx264", "pcm_s16le", seconds=count / 10, size=(320, 240))
        command = [sys.executable, "-c", PEAK, str(tmp_path / "a.mkv"), str(tmp_path / "b.mp4")]
        command.append(str(Path(__file__).parent))
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert abs(peaks[1] - peaks[0]) < 50e6, peaks
