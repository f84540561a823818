"""`videofactory upscale` and `videofactory generate --upscale`, from file to file."""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from videofactory_train.cli import main

from videofactory_core import upscaler
from videofactory_core.upscaler import BUNDLED, Upscaler, UpscalerConfig
from videofactory_core.video import open_frames, read_metadata, read_video, write_frames, write_video

# Runs the command on one thread and prints the peak of its memory.
COMMAND = f"""
import sys, torch
sys.path.append({str(Path(__file__).parent)!r})
from peak import peak_bytes
from videofactory_train.cli import main
torch.set_num_threads(1)
code = main(sys.argv[1:])
print(peak_bytes())
sys.exit(code)
"""


def drawn(count: int, height: int = 24, width: int = 32) -> torch.Tensor:
    """Frames `[F, H, W, 3]` of a bar that moves over a slope."""
    x = torch.arange(width)
    slope = (x / width).expand(count, height, width)
    bar = (x == torch.arange(count)[:, None, None] % width).float().expand(count, height, width)
    return torch.stack([slope, bar, 1 - slope], dim=-1)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Twelve frames at eight a second with a tone."""
    with wave.open(str(tmp_path / "tone.wav"), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", "not compressed"))
        file.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(i / 5))) for i in range(24000)))
    path = tmp_path / "clip.mp4"
    write_frames(path, drawn(12), 8.0, {"comment": "drawn"}, audio=tmp_path / "tone.wav")
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A network that takes little time."""
    torch.manual_seed(0)
    path = tmp_path / "small.safetensors"
    upscaler.save(path, Upscaler(UpscalerConfig(1, 1, 8, 4)), "small", "MIT", "a test")
    return path


def sound(path: Path) -> list[bytes]:
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(audio=0)]


def test_a_video_becomes_larger_and_keeps_the_rest(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "large.mp4"
    assert main(["upscale", str(clip), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    found = read_video(out)
    assert found.frames.shape == (12, 96, 128, 3)
    assert (found.fps, read_metadata(out)["comment"]) == (8.0, "drawn")
    assert sound(out) == sound(clip)
    with open_frames(clip) as frames:
        network = upscaler.load(BUNDLED).prepare()
        expected = torch.stack(list(upscaler.upscale(network, (frame.pixels for frame in frames), 4)))
    assert (found.frames - expected).abs().mean() < 0.02


def test_batches_do_not_change_a_byte_and_tiles_hardly_a_colour(tmp_path: Path) -> None:
    large = tmp_path / "large.mp4"
    wide = tmp_path / "wide.mp4"
    write_video(wide, drawn(3, 24, 160), 8.0)
    assert main(["upscale", str(wide), "--out", str(large)]) == 0
    for batch in ("4", "16"):
        assert main(["upscale", str(wide), "--out", str(tmp_path / "batch.mp4"), "--batch", batch]) == 0
        assert (tmp_path / "batch.mp4").read_bytes() == large.read_bytes()
    assert main(["upscale", str(wide), "--out", str(tmp_path / "tiled.mp4"), "--tile", "64"]) == 0
    difference = (read_video(tmp_path / "tiled.mp4").frames - read_video(large).frames).abs()
    assert 0 < difference.mean() < 0.004


def test_another_network_and_precision_are_used(clip: Path, small: Path, tmp_path: Path) -> None:
    made = {}
    for name, options in {"a": [], "b": ["--dtype", "bfloat16"], "c": ["--model", str(BUNDLED)]}.items():
        out = tmp_path / f"{name}.webm"
        assert main(["upscale", str(clip), "--model", str(small), *options, "--out", str(out)]) == 0
        made[name] = read_video(out).frames
    assert 0 < (made["a"] - made["b"]).abs().mean() < 0.02
    assert (made["a"] - made["c"]).abs().mean() > 0.05


def test_times_of_a_variable_rate_stay(small: Path, tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.25, 0.3, 0.7, 0.75]
    write_frames(tmp_path / "variable.mp4", drawn(6), 8.0, times=times)
    command = ["upscale", str(tmp_path / "variable.mp4"), "--model", str(small)]
    for name in ("large.mp4", "large.webm"):
        assert main([*command, "--out", str(tmp_path / name)]) == 0
        with open_frames(tmp_path / name) as clip:
            assert [round(frame.time, 2) for frame in clip] == times


@pytest.mark.parametrize(("height", "width"), [(1, 1), (4, 4)])
def test_the_smallest_videos_become_larger(height: int, width: int, small: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "tiny.gif", torch.rand(3, height, width, 3), 10.0)
    assert main(["upscale", str(tmp_path / "tiny.gif"), "--model", str(small), "--out", str(tmp_path / "l.mp4")]) == 0
    assert read_video(tmp_path / "l.mp4").frames.shape == (3, 4 * height, 4 * width, 3)


def test_sources_of_ten_bits_and_turned_ones_come_upright(small: Path, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "ten.mov"), "w") as file:
        stream = file.add_stream("prores_ks", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv422p10le"
        frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 90, np.uint8), format="rgb24").reformat(
            format="yuv422p10le"
        )
        for index in range(3):
            frame.pts, frame.time_base = index, Fraction(1, 8)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert main(["upscale", str(tmp_path / "ten.mov"), "--model", str(small), "--out", str(tmp_path / "l.mp4")]) == 0
    assert read_video(tmp_path / "l.mp4").frames.shape == (3, 64, 128, 3)


def damaged(clip: Path) -> Path:
    """The clip with wrong bytes in the middle."""
    with av.open(str(clip)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
        place = packets[len(packets) // 2].pos
    data = bytearray(clip.read_bytes())
    data[place + 4 : place + 12] = bytes(8)
    path = clip.with_name("damaged.mp4")
    path.write_bytes(data)
    return path


def test_damage_is_told_with_its_time_or_passed_over(
    clip: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["upscale", str(damaged(clip)), "--model", str(small), "--out", str(tmp_path / "large.mp4")]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "damaged.mp4 is damaged at 0." in told
    assert "or allow damaged frames to be repeated" in told
    assert not (tmp_path / "large.mp4").exists()
    assert main([*command, "--repeat-damaged"]) == 0
    assert "damaged frames show the one before them" in capsys.readouterr().err
    assert len(read_video(tmp_path / "large.mp4").frames) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["nowhere.mp4"], "nowhere.mp4"),
        (["{small}"], "cannot be read as a video"),
        (["{clip}", "--out", "{clip}"], "is the video to read; name another file"),
        (["{clip}", "--out", "large.avi"], ".mp4"),
        (["{clip}", "--model", "{clip}"], "clip.mp4"),
        (["{clip}", "--tile", "20"], "tiles of 20 pixels are too small"),
        (["{clip}", "--batch", "0"], "use 1 or more"),
        (["{clip}", "--device", "gpu"], "there is no device"),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(
    clip: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], words: str
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    given = [option.format(clip=clip, small=small) for option in options]
    assert main(["upscale", "--out", str(tmp_path / "large.mp4"), *given]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("videofactory: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="processes are interrupted otherwise there")
def test_an_interrupted_run_leaves_no_half_file(tmp_path: Path) -> None:
    source, out = tmp_path / "long.mp4", tmp_path / "large.mp4"
    write_video(source, drawn(400, 72, 128), 24.0)
    run = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "upscale", str(source), "--out", str(out)], stderr=subprocess.PIPE
    )
    until = time.monotonic() + 60
    while not list(tmp_path.glob(".large.mp4.*")):
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(run.pid, signal.SIGINT)
    _, told = run.communicate(timeout=60)
    assert b"videofactory: interrupted" in told
    assert [path.name for path in tmp_path.iterdir()] == ["long.mp4"]


def test_memory_does_not_grow_with_the_clip(small: Path, tmp_path: Path) -> None:
    peaks = []
    for count in (16, 512):
        source = tmp_path / f"{count}.mp4"
        write_frames(source, (frame for _ in range(count // 16) for frame in drawn(16, 48, 64)), 24.0)
        arguments = ["upscale", str(source), "--model", str(small), "--out", str(tmp_path / "large.mp4")]
        told = subprocess.run([sys.executable, "-c", COMMAND, *arguments], check=True, capture_output=True, text=True)
        peaks.append(int(told.stdout.splitlines()[-1]))
    assert abs(peaks[1] - peaks[0]) < 50e6, peaks


def test_a_generated_clip_is_upscaled_too(debug_checkpoint: Path, small: Path, tmp_path: Path) -> None:
    command = ["generate", "a red circle", "--checkpoint", str(debug_checkpoint), "--steps", "1"]
    assert main([*command, "--out", str(tmp_path / "plain.mp4")]) == 0
    assert main([*command, "--out", str(tmp_path / "large.mp4"), "--upscale", "--upscaler", str(small)]) == 0
    plain, large = (read_video(tmp_path / f"{name}.mp4").frames for name in ("plain", "large"))
    assert large.shape == (len(plain), 4 * plain.shape[1], 4 * plain.shape[2], 3)
    assert json.loads(read_metadata(tmp_path / "large.mp4")["videofactory"])["upscaler"] == "small.safetensors"


def test_an_upscaler_that_nothing_uses_is_refused(small: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", "a red circle", "--upscaler", str(small)]) == 2
    assert "add --upscale, or leave it out" in capsys.readouterr().err
