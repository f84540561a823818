"""Upscaling in the real host: the node for frames, the node for video files, and the host's own node beside them."""

from __future__ import annotations

import math
import struct
import wave
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from comfy_server import Failed, Host
from graphs import Graph, node

from videofactory_core import upscaler
from videofactory_core.video import read_video, write_frames


def drawn(count: int, height: int = 36, width: int = 64) -> torch.Tensor:
    """Frames `[F, H, W, 3]` of a disc that moves over a slope of grey."""
    x, y = torch.arange(width), torch.arange(height)[:, None]
    frames = []
    for i in range(count):
        disc = ((x - 10 - 2 * i) ** 2 + (y - height / 2) ** 2 < 60).float()
        slope = (x / width).expand(height, width)
        frames.append(torch.stack([disc, slope, slope], dim=-1))
    return torch.stack(frames)


def tone(path: Path, seconds: float) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", "not compressed"))
        numbers = (int(9000 * math.sin(i / 5)) for i in range(int(16000 * seconds)))
        file.writeframes(b"".join(struct.pack("<h", number) for number in numbers))
    return path


@pytest.fixture
def clip(host: Host, tmp_path: Path) -> Path:
    """A video with sound among the host's inputs."""
    path = host.base / "input" / "clip.mp4"
    write_frames(path, drawn(8), 8.0, audio=tone(tmp_path / "tone.wav", 1.0))
    return path


def upscaled(clip: str, model: str = "demo-x4 [bundled]", **settings: Any) -> Graph:
    settings = {"tile": 0, "repeat_damaged": False, **settings}
    return {
        "source": node("LoadVideo", file=clip),
        "load": node("VideoFactoryUpscalerLoader", upscaler=model),
        "upscale": node("VideoFactoryUpscaleVideo", upscale_model=["load", 0], video=["source", 0], **settings),
        "save": node("SaveVideo", video=["upscale", 0], filename_prefix="large", format="auto", codec="auto"),
    }


def test_a_video_file_becomes_larger_with_its_sound(host: Host, clip: Path, tmp_path: Path) -> None:
    (file,) = host.files(host.run(upscaled("clip.mp4")))
    # The command makes the same file from the same one.
    upscaler.upscale_video(upscaler.load(upscaler.BUNDLED).prepare(), clip, tmp_path / "command.mp4", 4)
    expected, found = read_video(tmp_path / "command.mp4"), read_video(file)
    assert found.frames.shape == (8, 144, 256, 3)
    assert found.fps == 8.0
    assert torch.equal(found.frames, expected.frames)
    with av.open(str(clip)) as before, av.open(str(file)) as after:
        assert [bytes(p) for p in before.demux(audio=0)] == [bytes(p) for p in after.demux(audio=0)]


def test_a_damaged_frame_stops_the_graph_or_is_replaced(host: Host, clip: Path) -> None:
    with av.open(str(clip)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
        place = packets[len(packets) // 2].pos
    data = bytearray(clip.read_bytes())
    data[place + 4 : place + 12] = bytes(8)
    (host.base / "input" / "damaged.mp4").write_bytes(data)
    with pytest.raises(Failed, match=r"damaged\.mp4 is damaged at \d\.\d\d seconds"):
        host.run(upscaled("damaged.mp4"))
    (file,) = host.files(host.run(upscaled("damaged.mp4", repeat_damaged=True)))
    assert len(read_video(file).frames) == 8
    assert "damaged frames show the one before them" in host.log.read_text(errors="replace")


def test_frames_of_the_graph_are_a_video_too(host: Host) -> None:
    graph = upscaled("clip.mp4")
    graph["frames"] = node("EmptyImage", width=32, height=16, batch_size=3, color=0xFF8000)
    graph["source"] = node("CreateVideo", images=["frames", 0], fps=8.0)
    (file,) = host.files(host.run(graph))
    assert read_video(file).frames.shape == (3, 64, 128, 3)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": "x2.safetensors"}, "makes pictures 2 times as large and this node is for 4 times"),
        ({"tile": 32}, "tiles of 32 pixels are too small to be of use; use 64 or more, or 0"),
    ],
)
def test_what_cannot_be_is_said(host: Host, clip: Path, settings: dict[str, Any], sentence: str) -> None:
    double = upscaler.Upscaler(upscaler.UpscalerConfig(1, 1, 16, 4, scale=2))
    upscaler.save(host.base / "models" / "upscale_models" / "x2.safetensors", double, "x2", "MIT", "a test")
    with pytest.raises(Failed, match=sentence):
        host.run(upscaled("clip.mp4", **settings))
    assert not list((host.base / "temp").glob("videofactory-*/*.mp4.*"))


def test_the_hosts_own_node_and_ours_give_the_same(inside: Any) -> None:
    found = inside("upscalers_agree")
    assert found["large"] == [2, 144, 256, 3]
    assert found["spread"] > 0.05
    assert max(found["errors"].values()) <= 2e-6, found
    assert found["changed inputs"] == []
