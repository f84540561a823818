"""`videofactory generate` with pictures and videos as conditions, and clips of any length, from file to file."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
import wave
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image
from torch import Tensor
from videofactory_train.cli import main
from videofactory_train.given import Screen, Spread, look, read_picture

from videofactory_core import checkpoint, video
from videofactory_core.checkpoint import Model
from videofactory_core.fit import fit_frames
from videofactory_core.long import generate_long
from videofactory_core.pipeline import generate
from videofactory_core.upscaler import Upscaler, UpscalerConfig, save
from videofactory_core.video import open_frames, read_metadata, read_video, write_frames, write_video

PROMPT = "a red circle"
PLAIN = {
    "prompt": PROMPT,
    "negative_prompt": "",
    "num_frames": 4,
    "width": 16,
    "height": 8,
    "steps": 2,
    "guidance_scale": 2.0,
    "frame_guidance_scale": 1.0,
    "sampler": "ddim",
    "seed": 0,
    "fps": 8.0,
    "checkpoint": "debug.safetensors",
    "title": "debug",
    "loras": [],
}
# With two given frames or more, by whether the model knows what they are.
GUIDANCE = {False: {}, True: {"guidance_scale": 1.0, "frame_guidance_scale": 2.0}}
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


@pytest.fixture(scope="session")
def checkpoints(debug_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The debug model, whose clips have 4 frames of 16x8 at 8 a second: as it is, and as if it knew given frames."""
    model = checkpoint.load(debug_checkpoint)
    knows = replace(model, config=replace(model.config, given_frames=True))
    path = tmp_path_factory.mktemp("knows") / "debug.safetensors"
    checkpoint.save(path, knows, model.metadata)
    return {False: debug_checkpoint, True: path}


@pytest.fixture(params=[False, True], ids=["untrained", "trained"])
def trained(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def model(checkpoints: dict[bool, Path], trained: bool) -> Model:
    return checkpoint.load(checkpoints[trained])


@pytest.fixture
def command(checkpoints: dict[bool, Path], trained: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run `videofactory generate` with that model in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, prompt: str = PROMPT) -> int:
        return main(["generate", prompt, "--checkpoint", str(checkpoints[trained]), "--steps", "2", *arguments])

    return run


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every frame that goes to the encoder, as it goes there."""
    frames: list[Tensor] = []

    def watched(path, taken, *arguments, **keywords):
        def passed():
            for frame in taken:
                frames.append(frame.clone())
                yield frame

        frames.clear()
        write_frames(path, passed(), *arguments, **keywords)

    monkeypatch.setattr(video, "write_frames", watched)
    return frames


def drawn(count: int, width: int = 16, height: int = 8) -> Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(count))


def picture(path: str, pixels: Tensor, **settings: Any) -> Tensor:
    """Write a picture of whole levels; returns what is in it."""
    levels = (pixels * 255).round().to(torch.uint8)
    Image.fromarray(levels.numpy()).save(path, **settings)
    return levels.float() / 255


def stored(path: str) -> Tensor:
    """All frames of a video, as the command reads them."""
    with open_frames(path) as stream:
        return torch.stack([frame.pixels for frame in stream])


def long(model: Model, prompt: str = PROMPT, **settings: Any) -> Tensor:
    return torch.cat([*generate_long(model, prompt, **{"steps": 2, **settings})])


def settings_of(path: str) -> dict[str, Any]:
    return json.loads(read_metadata(path)["videofactory"])


def lines(text: str) -> list[str]:
    """What the command says, without its progress and its warnings."""
    return [line for line in text.splitlines() if line.startswith("videofactory: ") and "warning" not in line]


def tone(path: Path, clip: Tensor, fps: float) -> Path:
    """A clip with sound as long as it is."""
    with wave.open(str(path.with_suffix(".wav")), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", "not compressed"))
        count = int(16000 * len(clip) / fps)
        file.writeframes(b"".join(struct.pack("<h", int(9000 * math.sin(i / 5))) for i in range(count)))
    write_frames(path, clip, fps, audio=path.with_suffix(".wav"))
    return path


def sound(path: str) -> list[bytes]:
    with av.open(path) as file:
        return [bytes(packet) for packet in file.demux(audio=0)] if file.streams.audio else []


def test_without_options_it_is_what_it_was(command, model: Model) -> None:
    assert command("--out", "clip.mp4") == 0
    assert settings_of("clip.mp4") == PLAIN
    frames = generate(model, PROMPT, steps=2)
    write_frames("pipeline.mp4", frames, 8.0, {"videofactory": json.dumps(PLAIN, ensure_ascii=False)})
    assert Path("clip.mp4").read_bytes() == Path("pipeline.mp4").read_bytes()


def test_frames_alone_are_made_at_once(command, model: Model, written: list[Tensor]) -> None:
    assert command("--frames", "9", "--out", "clip.mp4") == 0
    assert torch.equal(torch.stack(written), generate(model, PROMPT, steps=2, num_frames=9))
    assert settings_of("clip.mp4") == {**PLAIN, "num_frames": 9}


def test_pictures_are_frames_at_their_places(
    command, model: Model, written: list[Tensor], capsys: pytest.CaptureFixture[str], trained: bool
) -> None:
    shown = [picture(f"{name}.png", frame) for name, frame in zip("abc", drawn(3), strict=True)]
    assert command("--first-frame", "a.png", "--frame", "-2=b.png", "--last-frame", "c.png", "--out", "clip.mp4") == 0
    given = {0: shown[0], 2: shown[1], 3: shown[2]}
    assert torch.equal(torch.stack(written), generate(model, PROMPT, steps=2, given=given))
    added = {"given": {"0": "a.png", "3": "c.png", "2": "b.png"}, "fit": "crop", "chunk": 4, "overlap": 3}
    assert settings_of("clip.mp4") == {**PLAIN, **GUIDANCE[trained], **added}
    told = capsys.readouterr().err
    assert lines(told) == []
    # The core says what a model is that never learned it, as a line of the command.
    assert ("warning: this model was never trained on given frames" in told) == (not trained)


@pytest.mark.parametrize("trained", [True], indirect=True)
def test_more_frames_than_trained_with_a_picture_come_in_chunks(command, model: Model, written: list[Tensor]) -> None:
    shown = picture("a.png", drawn(1)[0])
    options = ["--anchors", "1", "--match-colours", "--stagger", "0.5", "--frame-guidance-scale", "1.5"]
    assert command("--first-frame", "a.png", "--frames", "9", "--overlap", "2", *options, "--out", "clip.mp4") == 0
    chunking = {"overlap": 2, "anchors": 1, "match_colours": True, "stagger": 0.5, "frame_guidance_scale": 1.5}
    assert torch.equal(torch.stack(written), long(model, num_frames=9, given={0: shown}, **chunking))
    assert settings_of("clip.mp4").items() >= {**chunking, "chunk": 4}.items()


def test_a_prompt_may_change_over_the_frames(command, model: Model, written: list[Tensor]) -> None:
    changing = f'"0": "{PROMPT}", "6": "a blue square"'
    assert command("--length", "1", "--overlap", "2", "--out", "clip.mp4", prompt=changing) == 0
    assert torch.equal(torch.stack(written), long(model, changing, num_frames=8, overlap=2))
    assert settings_of("clip.mp4")["prompt"] == changing


def test_a_length_is_in_seconds_and_the_bar_counts_all_steps(
    command, model: Model, written: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--length", "1.25", "--overlap", "2", "--out", "clip.mp4") == 0
    assert torch.equal(torch.stack(written), long(model, num_frames=10, overlap=2))
    # Four chunks of two steps.
    assert re.findall(r"(\d+)/(\d+) \[", capsys.readouterr().err)[-1] == ("8", "8")
    assert command("--length", "1.25", "--chunk", "6", "--fps", "4", "--out", "clip.mp4") == 0
    assert torch.equal(torch.stack(written), long(model, num_frames=5, chunk=6))


@pytest.mark.parametrize("trained", [True], indirect=True)
def test_pictures_of_any_kind_are_fitted_and_that_is_said(
    command, model: Model, written: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    wide = picture("wide.png", drawn(1, 40, 10)[0])
    clear = torch.cat([drawn(1)[0], (torch.arange(16) < 8).float().expand(8, 16)[..., None]], dim=2)
    picture("clear.png", clear)
    for fit, said in {"crop": "cut", "pad": "set between black bars", "stretch": "pulled"}.items():
        options = ["--first-frame", "wide.png", "--last-frame", "clear.png", "--fit", fit, "--batch", "2"]
        assert command(*options, "--out", f"{fit}.mp4") == 0
        assert [line.split(": ", 1)[1] for line in lines(capsys.readouterr().err)] == [
            f"wide.png: 40x10 was {said} to the shape of 16x8",
            "clear.png: what is transparent became black",
        ]
        given = {
            0: fit_frames(wide[None], 16, 8, fit)[0][0],
            3: fit_frames(read_picture(Path("clear.png"))[None], 16, 8)[0][0],
        }
        assert torch.equal(torch.stack(written), generate(model, PROMPT, steps=2, seed=1, given=given))
        assert settings_of(f"{fit}-1.mp4")["fit"] == fit


def test_pictures_are_read_upright_with_their_transparency(tmp_path: Path) -> None:
    pixels = drawn(1, 6, 4)[0]
    turned = Image.Exif()
    turned[0x0112] = 6
    shown = picture(str(tmp_path / "turned.png"), pixels, exif=turned)
    # Turned by a quarter, clockwise.
    assert torch.equal(read_picture(tmp_path / "turned.png"), shown.transpose(0, 1).flip(1))
    picture(str(tmp_path / "photo.jpg"), torch.full((16, 16, 3), 0.4), exif=turned)
    assert read_picture(tmp_path / "photo.jpg").shape == (16, 16, 3)
    clear = Image.new("P", (2, 1))
    clear.putpalette([255, 0, 0, 0, 0, 255])
    clear.putpixel((1, 0), 1)
    clear.save(tmp_path / "palette.gif", transparency=1)
    assert read_picture(tmp_path / "palette.gif")[0].tolist() == [[1, 0, 0, 1], [0, 0, 1, 0]]
    Image.new("L", (2, 1), 51).save(tmp_path / "grey.png")
    assert torch.equal(read_picture(tmp_path / "grey.png"), torch.full((1, 2, 3), 0.2))
    Image.new("I;16", (2, 1), 13107).save(tmp_path / "deep.png")
    assert torch.allclose(read_picture(tmp_path / "deep.png"), torch.full((1, 2, 1), 0.2))


def test_a_video_goes_on(
    command, model: Model, written: list[Tensor], capsys: pytest.CaptureFixture[str], trained: bool
) -> None:
    write_video("own.mp4", drawn(9), 8.0)
    own = stored("own.mp4")
    assert command("--extend", "own.mp4", "--new-frames", "5", "--overlap", "2", "--out", "more.mp4", prompt="") == 0
    assert torch.equal(torch.stack(written[:9]), own)
    given = dict(enumerate(own[-2:].float() / 255))
    assert torch.equal(torch.stack(written[9:]), long(model, "", num_frames=7, given=given, overlap=2)[2:].clamp(0, 1))
    made = read_video("more.mp4")
    assert (made.frames.shape, made.fps) == ((14, 8, 16, 3), 8.0)
    added = {"extend": "own.mp4", "backward": False, "new_frames": 5, "chunk": 4, "overlap": 2}
    assert settings_of("more.mp4") == {**PLAIN, **GUIDANCE[trained], "prompt": "", "num_frames": 7, **added}
    assert lines(capsys.readouterr().err) == []


def test_a_video_begins_earlier(command, model: Model, written: list[Tensor]) -> None:
    write_video("own.mp4", drawn(6), 8.0)
    own = stored("own.mp4")
    assert command("--extend", "own.mp4", "--backward", "--length", "0.5", "--overlap", "2", "--out", "more.mp4") == 0
    given = {4: own[0].float() / 255, 5: own[1].float() / 255}
    assert torch.equal(torch.stack(written[:4]), long(model, num_frames=6, given=given, overlap=2)[:4].clamp(0, 1))
    assert torch.equal(torch.stack(written[4:]), own)
    assert settings_of("more.mp4")["backward"] is True


@pytest.mark.parametrize("trained", [True], indirect=True)
def test_by_default_a_chunk_is_filled(command, written: list[Tensor]) -> None:
    write_video("own.mp4", drawn(6), 8.0)
    for options, count in {(): 7, ("--overlap", "1"): 9, ("--chunk", "16"): 18}.items():
        assert command("--extend", "own.mp4", *options, "--out", "more.mp4") == 0
        assert len(written) == count
    for options, count in {(): 14, ("--chunk", "16"): 20}.items():
        assert command("--between", "own.mp4", "own.mp4", *options, "--out", "more.mp4") == 0
        assert len(written) == count


@pytest.mark.parametrize("trained", [True], indirect=True)
def test_a_video_shorter_than_the_overlap_is_all_that_is_seen(
    command, model: Model, written: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    write_video("short.mp4", drawn(2), 8.0)
    own = stored("short.mp4")
    assert command("--extend", "short.mp4", "--new-frames", "3", "--out", "more.mp4") == 0
    given = dict(enumerate(own.float() / 255))
    assert torch.equal(torch.stack(written[2:]), long(model, num_frames=5, given=given, overlap=3)[2:].clamp(0, 1))
    said = ["videofactory: short.mp4 has 2 frames, so the model sees 2 of it and not 3"]
    assert lines(capsys.readouterr().err) == said


def test_a_transition_leads_from_one_video_to_another_in_the_size_of_the_first(
    command, model: Model, written: list[Tensor], capsys: pytest.CaptureFixture[str], trained: bool
) -> None:
    write_video("a.mp4", drawn(6), 8.0)
    write_video("b.mp4", drawn(5, 24, 24), 8.0)
    a, b = stored("a.mp4"), stored("b.mp4")
    options = ["--chunk", "9", "--overlap", "3", "--fit", "pad"]
    assert command("--between", "a.mp4", "b.mp4", *options, "--out", "both.mp4") == 0
    fitted = (fit_frames(b.float() / 255, 16, 8, "pad")[0] * 255).round().to(torch.uint8)
    assert torch.equal(torch.stack(written[:6]), a)
    assert torch.equal(torch.stack(written[9:]), fitted)
    known = torch.cat([a[-3:], fitted[:3]]).float() / 255
    made = long(model, num_frames=9, chunk=9, given=dict(zip((0, 1, 2, 6, 7, 8), known, strict=True)))
    assert torch.equal(torch.stack(written[6:9]), made[3:6].clamp(0, 1))
    assert lines(capsys.readouterr().err) == [
        "videofactory: b.mp4: 24x24 was set between black bars to the shape of 16x8"
    ]
    added = {"between": ["a.mp4", "b.mp4"], "new_frames": 3, "fit": "pad", "chunk": 9, "overlap": 3}
    assert settings_of("both.mp4") == {**PLAIN, **GUIDANCE[trained], "num_frames": 9, **added}


def test_frames_in_between_make_a_video_smoother(
    command, model: Model, written: list[Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    write_video("own.mp4", drawn(5), 4.0)
    own = stored("own.mp4")
    assert command("--fps-times", "2", "own.mp4", "--overlap", "2", "--out", "smooth.mp4", prompt="") == 0
    given = dict(zip(range(0, 9, 2), own.float() / 255, strict=True))
    made = long(model, "", num_frames=9, given=given, overlap=2)
    assert torch.equal(torch.stack(written[::2]), own)
    assert torch.equal(torch.stack(written[1::2]), made[1::2].clamp(0, 1))
    assert read_video("smooth.mp4").fps == 8.0
    assert settings_of("smooth.mp4")["fps_times"] == [2, "own.mp4"]
    # At the model's own rate there is nothing to say.
    assert lines(capsys.readouterr().err) == []
    assert command("--fps-times", "3", "own.mp4", "--out", "smooth.mp4") == 0
    assert len(written) == 13
    assert "trained on 8 frames a second and these are 12" in lines(capsys.readouterr().err)[0]


def test_frames_of_a_video_are_read_again_only_when_they_are_asked_for_again(checkpoints, tmp_path: Path) -> None:
    write_video(tmp_path / "own.mp4", drawn(6), 8.0)
    source = look(tmp_path / "own.mp4", 1)
    spread = Spread(source, 3, Screen.of(source, checkpoint.check(checkpoints[True])[0].config, None, "crop"))
    own = stored(str(tmp_path / "own.mp4")).float() / 255
    assert list(spread) == [0, 3, 6, 9, 12, 15]
    for index in (0, 3, 9, 15, 15, 6, 0):
        assert torch.equal(spread[index], own[index // 3])
    assert 4 not in spread
    assert 18 not in spread


@pytest.mark.parametrize("trained", [True], indirect=True)
def test_videos_of_other_sizes_keep_theirs(command, written: list[Tensor]) -> None:
    # A slope that leans as much as the picture is wide, so that a part of it would have another contrast.
    slope = torch.linspace(0, 1, 60)[None, None, :, None].expand(9, 36, 60, 3)
    write_video("own.mp4", slope, 8.0)
    for options, size in {
        (): (14, 8),
        ("--size", "20x12"): (20, 12),
        ("--size", "16x16", "--fit", "pad"): (16, 16),
        ("--size", "16x16", "--fit", "stretch"): (16, 16),
    }.items():
        assert command("--extend", "own.mp4", *options, "--out", "more.mp4") == 0
        assert torch.equal(torch.stack(written[:9]), stored("own.mp4"))
        assert {frame.shape for frame in written} == {(36, 60, 3)}
        found = settings_of("more.mp4")
        assert (found["width"], found["height"]) == size


@pytest.mark.parametrize("fit", ["stretch", "pad"])
@pytest.mark.parametrize("size", [None, (32, 32), (120, 24)])
def test_what_the_model_makes_lies_over_what_it_was_shown(checkpoints, tmp_path: Path, fit, size) -> None:
    write_video(tmp_path / "own.mp4", torch.linspace(0, 1, 60)[None, None, :, None].expand(2, 36, 60, 3), 8.0)
    source = look(tmp_path / "own.mp4", 1)
    screen = Screen.of(source, checkpoint.check(checkpoints[True])[0].config, size, fit)
    there = screen.to_model(source.head)
    assert there.shape == (1, screen.height, screen.width, 3)
    # But for pixels at edges, which are a mixture.
    strays = (screen.to_video(there[0]) - source.head[0].float() / 255).abs()[4:-4, 8:-8]
    assert strays.mean() < 0.02


@pytest.mark.parametrize("trained", [True], indirect=True)
def test_new_frames_are_upscaled_for_large_videos(command, written: list[Tensor]) -> None:
    torch.manual_seed(0)
    save(Path("small.safetensors"), Upscaler(UpscalerConfig(1, 1, 8, 4)), "small", "MIT", "a test")
    write_video("own.mp4", drawn(5, 64, 32), 8.0)
    assert command("--extend", "own.mp4", "--out", "plain.mp4") == 0
    plain = torch.stack(written[5:])
    assert command("--extend", "own.mp4", "--upscale", "--upscaler", "small.safetensors", "--out", "large.mp4") == 0
    assert torch.equal(torch.stack(written[:5]), stored("own.mp4"))
    assert torch.stack(written[5:]).shape == plain.shape == (1, 32, 64, 3)
    assert not torch.equal(torch.stack(written[5:]), plain)


@pytest.mark.parametrize("trained", [True], indirect=True)
def test_sound_stays_where_its_frames_stay(command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tone(tmp_path / "own.mp4", drawn(8), 8.0).name
    assert command("--extend", own, "--out", "more.mp4") == 0
    assert command("--fps-times", "2", own, "--out", "smooth.mp4") == 0
    # The last frame stands for half as long.
    assert sound("more.mp4") == sound(own)
    assert 0 < len(sound(own)) - len(sound("smooth.mp4")) <= 2
    assert lines(capsys.readouterr().err)[:-1] == []
    for options in (["--backward"], ["--fps", "16"]):
        assert command("--extend", own, *options, "--out", "silent.mp4") == 0
        assert sound("silent.mp4") == []
        assert lines(capsys.readouterr().err)[-1] == "videofactory: the sound of own.mp4 is left out"
    write_video("mute.mp4", drawn(4), 8.0)
    assert command("--between", "mute.mp4", own, "--out", "both.mp4") == 0
    assert "the sound of own.mp4 is left out" in capsys.readouterr().err
    assert command("--between", own, "mute.mp4", "--out", "both.mp4") == 0
    assert sound("both.mp4") == sound(own)
    assert lines(capsys.readouterr().err) == []


def times(path: str) -> list[float]:
    with open_frames(path) as stream:
        return [round(frame.time, 3) for frame in stream]


@pytest.mark.parametrize("trained", [True], indirect=True)
def test_times_of_videos_stay(command) -> None:
    moments = [0.0, 0.1, 0.25, 0.3, 0.7, 0.8]
    write_frames("variable.mp4", drawn(6), 8.0, times=moments)
    with open_frames("variable.mp4") as stream:
        assert stream.variable
        interval = 1 / stream.fps
    added = [index * interval for index in range(2)]
    assert command("--extend", "variable.mp4", "--new-frames", "2", "--out", "more.mp4") == 0
    assert times("more.mp4") == pytest.approx([*moments, *(0.8 + interval + time for time in added)], abs=0.002)
    assert command("--extend", "variable.mp4", "--backward", "--new-frames", "2", "--out", "more.mp4") == 0
    assert times("more.mp4") == pytest.approx([*added, *(2 * interval + time for time in moments)], abs=0.002)
    assert command("--fps-times", "2", "variable.mp4", "--out", "smooth.mp4") == 0
    between = [(a + b) / 2 for a, b in pairwise(moments)]
    assert times("smooth.mp4") == pytest.approx(sorted([*moments, *between]), abs=0.002)
    assert command("--extend", "variable.mp4", "--new-frames", "2", "--fps", "10", "--out", "more.mp4") == 0
    assert times("more.mp4") == pytest.approx([index / 10 for index in range(8)], abs=0.002)
    write_video("slow.mp4", drawn(3), 4.0)
    write_video("quick.mp4", drawn(3), 8.0)
    assert command("--between", "slow.mp4", "quick.mp4", "--new-frames", "1", "--out", "both.mp4") == 0
    assert times("both.mp4") == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1.125, 1.25], abs=0.002)


@pytest.mark.parametrize("trained", [True], indirect=True)
def test_another_rate_is_said_once(command, capsys: pytest.CaptureFixture[str]) -> None:
    write_video("own.mp4", drawn(5), 25.0)
    assert command("--extend", "own.mp4", "--batch", "2", "--out", "more.mp4") == 0
    assert lines(capsys.readouterr().err) == [
        "videofactory: the model was trained on 8 frames a second and these are 25;"
        " motion may be faster or slower than it learned"
    ]
    assert read_video("more-1.mp4").fps == 25.0


@pytest.fixture
def inputs(tmp_path: Path) -> None:
    """What the refusals below read."""
    for name in "ab":
        picture(str(tmp_path / f"{name}.png"), drawn(1)[0])
    write_video(tmp_path / "own.mp4", drawn(6), 8.0)
    write_video(tmp_path / "square.mp4", drawn(2, 20, 20), 8.0)
    write_video(tmp_path / "one.mp4", drawn(1), 8.0)
    Image.new("F", (16, 8), 0.5).save(tmp_path / "float.tif")
    for name in ("text.png", "text.mp4"):
        (tmp_path / name).write_text("no picture")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:-40])


@pytest.mark.parametrize("trained", [True], indirect=True)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--first-frame nowhere.png", "nowhere.png is not a file: check the name"),
        ("--extend nowhere.mp4", "nowhere.mp4 is not a file: check the name"),
        ("--between own.mp4 nowhere.mp4", "nowhere.mp4 is not a file: check the name"),
        ("--fps-times 2 nowhere.mp4", "nowhere.mp4 is not a file: check the name"),
        ("--first-frame text.png", "text.png cannot be read as a picture"),
        ("--first-frame torn.png", "torn.png cannot be read as a picture"),
        ("--first-frame own.mp4", "own.mp4 cannot be read as a picture"),
        ("--extend text.mp4", "text.mp4 cannot be read as a video"),
        ("--first-frame a.png --frame 0=b.png", "frame 0 is given twice, as a.png and b.png; leave one out"),
        ("--last-frame a.png --frame 3=b.png", "frame 3 is given twice, as a.png and b.png; leave one out"),
        ("--frame 4=a.png", "a.png is given as frame 4 and the clip has 4; name one of 0 to 3"),
        ("--frame -5=a.png", "a.png is given as frame -5 and the clip has 4; name one of 0 to 3"),
        ("--frames 2 --first-frame a.png --last-frame b.png", "all 2 frames are given"),
        ("--frames 0 --first-frame a.png", "at least 1 frame"),
        ("--first-frame a.png --size 0x8", "multiples of 2"),
        ("--first-frame a.png --size 400000x400000", "GiB"),
        ("--extend own.mp4 --first-frame a.png", "--extend and --first-frame do not go together"),
        ("--extend own.mp4 --between own.mp4 own.mp4", "--extend and --between do not go together"),
        ("--fps-times 2 own.mp4 --frame 1=a.png", "--fps-times and --frame do not go together"),
        ("--backward", "add --extend VIDEO, or leave it out"),
        ("--between own.mp4 own.mp4 --backward", "add --extend VIDEO, or leave it out"),
        ("--new-frames 3", "--new-frames says nothing without a video; use --frames or --length"),
        ("--extend own.mp4 --frames 9", "--frames says nothing with --extend; use --new-frames or --length"),
        ("--fps-times 2 own.mp4 --length 2", "--length says nothing with --fps-times; leave it out"),
        ("--frames 9 --length 2", "--frames and --length both say how long; use one of them"),
        ("--extend own.mp4 --new-frames 0", "0 new frames are none; ask for 1 or more"),
        ("--length 0", "makes no clip; ask for more than a frame"),
        ("--length nan", "makes no clip; ask for more than a frame"),
        ("--length inf", "makes no clip; ask for more than a frame"),
        ("--length 1e300", "frames are too many; ask for 1000000 at most"),
        ("--frames 2000000 --chunk 4", "2e+06 frames are too many"),
        ("--extend own.mp4 --length 1e9", "8e+09 frames are too many"),
        ("--extend own.mp4 --new-frames 1000001", "1e+06 frames are too many"),
        ("--seed 18446744073709551616", "is no number of 64 bits"),
        ("--first-frame float.tif", "float.tif cannot be read as a picture (nothing says what"),
        ("--device cuda:99", "there is no device 'cuda:99'"),
        ("--extend own.mp4 --fps 0", "frames a second do not fit"),
        ("--fps-times 200 own.mp4", "frames a second do not fit"),
        ("--fps-times 1 own.mp4", "such as 2 clip.mp4, not 1 own.mp4"),
        ("--fps-times own.mp4 2", "such as 2 clip.mp4, not own.mp4 2"),
        ("--fps-times 2 one.mp4", "one.mp4 has one frame and nothing lies between"),
        ("--extend square.mp4 --size 16x8", "leave --size out, or add --fit pad or --fit stretch"),
        ("--extend own.mp4 --out own.mp4", "own.mp4 is to be read; name another file to write"),
        ("--chunk 1", "use 2 or more"),
        ("--chunk 33 --length 9", "32 frame positions"),
        ("--length 2 --anchors 29", "32 frame positions"),
        ("--length 2 --overlap 4", "chunks of 4 frames cannot overlap by 4; use 1 to 3"),
        ("--length 2 --overlap 0", "chunks of 4 frames cannot overlap by 0; use 1 to 3"),
        ("--length 2 --anchors -1", "-1 anchors cannot be shown; use 0 or more"),
        ("--stagger -1", "stagger is -1.0; use 0"),
        ("--stagger nan", "stagger is nan; use 0"),
        ("--first-frame a.png --frame-guidance-scale 0.5", "frame guidance scale 0.5 is below 1"),
        ('--negative-prompt "0":b', "the prompt schedule breaks off at"),
        ("--first-frame a.png --frame-guidance-scale nan", "frame guidance scale nan is below 1"),
    ],
)
def test_bad_input_gets_one_sentence_before_the_model_is_loaded(
    command,
    inputs: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: str,
    words: str,
) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert command(*options.split()) == 2
    told = lines(capsys.readouterr().err)
    assert len(told) == 1
    assert words in told[0]
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_a_place_that_is_none_is_refused(command, inputs: None, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("a.png", "first=a.png", "1=", "1.5=a.png"):
        with pytest.raises(SystemExit) as stopped:
            command("--frame", text)
        assert stopped.value.code == 2
        assert "write INDEX=IMAGE, for example 8=middle.png" in capsys.readouterr().err


@pytest.mark.parametrize("trained", [True], indirect=True)
def test_a_damaged_video_is_refused_and_leaves_nothing(command, capsys: pytest.CaptureFixture[str]) -> None:
    write_video("own.mp4", drawn(12, 64, 48), 8.0)
    with av.open("own.mp4") as file:
        place = [packet for packet in file.demux(video=0) if packet.size][6].pos
    data = bytearray(Path("own.mp4").read_bytes())
    data[place + 4 : place + 12] = bytes(8)
    Path("own.mp4").write_bytes(data)
    for options in (["--extend", "own.mp4"], ["--fps-times", "2", "own.mp4"], ["--between", "own.mp4", "own.mp4"]):
        assert command(*options, "--out", "more.mp4") == 2
        assert re.search(r"own.mp4 is damaged at [\d.]+ seconds: repair or replace it$", capsys.readouterr().err, re.M)
    assert [path.name for path in Path().iterdir()] == ["own.mp4"]


def test_memory_does_not_grow_with_the_video(checkpoints: dict[bool, Path], tmp_path: Path) -> None:
    """In processes of their own, as the command is run."""
    peaks = []
    for count in (16, 400):
        source, out = tmp_path / f"{count}.mp4", tmp_path / "more.mp4"
        write_frames(source, (frame.expand(180, 320, 3) for frame in drawn(count, 1, 1)), 8.0)
        arguments = [PROMPT, "--checkpoint", str(checkpoints[True]), "--steps", "1", "--extend", str(source)]
        arguments += ["--new-frames", "2", "--out", str(out)]
        told = subprocess.run(
            [sys.executable, "-c", COMMAND, "generate", *arguments], check=True, capture_output=True, text=True
        )
        peaks.append(int(told.stdout.splitlines()[-1]))
        assert told.stdout.splitlines()[0] == str(out)
        with open_frames(out) as stream:
            assert stream.frames == count + 2
    # All its frames would be 66 MB more.
    assert abs(peaks[1] - peaks[0]) < 40e6, peaks
