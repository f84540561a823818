"""From a folder of clips to a file that loads: stages and LoRA, interruptions, several processes, every recipe."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from videofactory_train.cli import main
from videofactory_train.data.moving_shapes import MovingShapes
from videofactory_train.denoiser import ByTurns, LatentBatches, Latents, WindowBatches
from videofactory_train.run import run_recipe

from videofactory_core import adapters, checkpoint
from videofactory_core.condition import Condition, GivenFrames
from videofactory_core.config import PRESETS
from videofactory_core.objective import Process
from videofactory_core.video import read_video, write_video

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = Path(__file__).parent.parent / "train" / "recipes"

COMMON = """\
title = "mine"
licence = "MIT"
origin = "a test"
checkpoint = "{checkpoint}"
output = "{folder}/mine.safetensors"
precision = "fp32"
device = "cpu"
workers = 0
[[datasets]]
path = "{clips}"
frame_extraction = "chunk"
"""
SCHEDULE = """
steps = 4
batch_size = 2
learning_rate = 1e-2
warmup_steps = 1
save_every = 2
"""
EVENTS = """
[validation]
clips = 1
every = 2
[samples]
prompts = ["a red circle moving right", "a blue square"]
every = 2
steps = 2
guidance_scale = 2.0
"""
LORA = f"""{COMMON}
[adapter]
layers = 'attn|merge'
rank = 2
alpha = 2.0
[schedule]{SCHEDULE}
{EVENTS}"""
STAGES = f"""{COMMON}
[[stages]]
kind = "addition"
layers = 'temporal'
[stages.schedule]{SCHEDULE}
[[stages]]
kind = "swap"
layers = 'merge'
min_snr_gamma = 5.0
[stages.schedule]{SCHEDULE}
"""


def draw_clips(folder: Path) -> None:
    """Five clips of 8 to 12 frames with captions, and a picture."""
    folder.mkdir(parents=True)
    for i in range(5):
        clip = MovingShapes(5, 8 + i, 16, 32, seed=9)[i]
        write_video(folder / f"clip{i}.mp4", rearrange(clip["video"], "C F H W -> F H W C") / 2 + 0.5, 8)
        (folder / f"clip{i}.txt").write_text(clip["caption"], encoding="utf-8")
    Image.new("RGB", (40, 20), "orange").save(folder / "orange.png")
    (folder / "orange.txt").write_text("nothing but orange", encoding="utf-8")


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "clips"
    draw_clips(folder)
    return folder


def write(folder: Path, text: str, clips: Path, source: Path) -> Path:
    """A recipe of a test, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "mine.toml"
    for name, value in (("folder", folder), ("clips", clips), ("checkpoint", source)):
        text = text.replace(f"{{{name}}}", value.as_posix())
    path.write_text(text, encoding="utf-8")
    return path


def made(recipe: Path, resume: bool = False) -> Path:
    output = run_recipe(recipe, resume=resume)
    assert output is not None
    return output


def test_a_lora_comes_with_validation_samples_logs_and_its_history(
    tmp_path: Path, clips: Path, debug_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = made(write(tmp_path, LORA, clips, debug_checkpoint))
    printed = capsys.readouterr().out
    model = checkpoint.load(debug_checkpoint)
    before = {key: value.clone() for key, value in model.unet.state_dict().items()}
    report = adapters.merge(model, adapters.read(output))
    assert not report.unmatched
    changed = {key for key, value in model.unet.state_dict().items() if not torch.equal(value, before[key])}
    assert any(".merge." in key for key in changed)
    assert all("attn" in key or "merge" in key for key in changed)

    lines = [json.loads(line) for line in (tmp_path / "adapter.validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all(len(line["quantiles"]) == 4 for line in lines)
    for step in (0, 2, 4):
        folder = tmp_path / "samples" / "adapter" / f"step-{step:06d}"
        assert sorted(path.name for path in folder.iterdir()) == ["1.mp4", "2.mp4", "sheet.jpg"]
    clip = read_video(folder / "1.mp4")
    assert clip.frames.shape == (4, 8, 16, 3)
    assert json.loads(clip.metadata["videofactory"])["training_step"] == 4
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))

    capsys.readouterr()
    assert main(["inspect", str(output)]) == 0
    said = capsys.readouterr().out
    assert f'"file": "{debug_checkpoint.name}"' in said
    assert re.search(r"trained with +\d+ samples, [0-9a-f]{32}", said)
    assert main(["inspect", str(output), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["history"]
    assert json.loads(found["recipe"])["schedule"]["steps"] == 4
    header = checkpoint.read_header(output).metadata
    assert json.loads(header["recipe"])["adapter"]["rank"] == 2
    assert re.fullmatch(r"\d+ samples, [0-9a-f]{32}", header["dataset"])
    assert json.loads(header["parents"])[0]["file"] == debug_checkpoint.name
    assert header["modelspec.license"] == "MIT"
    assert "left out orange.png: a picture needs a bucket of one frame" in printed
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines() == printed.splitlines()


def test_stages_change_what_they_name_and_nothing_else(tmp_path: Path, clips: Path, debug_checkpoint: Path) -> None:
    output = made(write(tmp_path, STAGES, clips, debug_checkpoint))
    before, after = checkpoint.load(debug_checkpoint), checkpoint.load(output)
    assert after.config == before.config
    kept, changed = set(), set()
    for part, module in after.parts().items():
        for key, value in before.parts()[part].state_dict().items():
            # The result is stored in half precision.
            (kept if torch.equal(module.state_dict()[key], value.half().float()) else changed).add(f"{part}.{key}")
    assert all("temporal" in key or "merge" in key for key in changed)
    assert any("temporal.convs" in key for key in changed)
    assert any("merge.to_q" in key for key in changed)
    assert any("text_encoder" in key for key in kept)
    assert after.metadata.licence == "MIT; trained from debug: Apache-2.0"
    assert [stage["kind"] for stage in json.loads(after.metadata.other["recipe"])["stages"]] == ["addition", "swap"]


def test_training_lowers_the_loss_on_what_it_is_shown(tmp_path: Path, clips: Path, debug_checkpoint: Path) -> None:
    text = STAGES.replace("layers = 'merge'", "layers = ''").replace("steps = 4", "steps = 30")
    made(write(tmp_path, text, clips, debug_checkpoint))
    losses = json.loads((tmp_path / "2-swap.losses.json").read_text())
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_what_is_trained_does_not_depend_on_where_the_latents_come_from(
    tmp_path: Path, clips: Path, debug_checkpoint: Path
) -> None:
    cached = write(tmp_path / "cached", STAGES, clips, debug_checkpoint)
    made(cached)
    fresh = write(
        tmp_path / "fresh", STAGES.replace("workers", "cache_latents = false\nworkers"), clips, debug_checkpoint
    )
    made(fresh)
    assert not (tmp_path / "fresh" / "cache").exists()
    losses = [json.loads((tmp_path / name / "2-swap.losses.json").read_text()) for name in ("cached", "fresh")]
    # The cache rounds to half precision.
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] != losses[1]


def test_pictures_and_clips_train_together(tmp_path: Path, clips: Path, debug_checkpoint: Path) -> None:
    text = STAGES.replace('frame_extraction = "chunk"', 'frame_extraction = "chunk"\nframes = [1, 2, 4]')
    text = text.replace("steps = 4", "steps = 12")
    made(write(tmp_path, text, clips, debug_checkpoint))
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert "left out" not in log.replace("0 left out", "")
    frames = {
        round(float(rate) / float(clip)) for clip, rate in re.findall(r"([\d.]+) clips/s  ([\d.]+) frames/s", log)
    }
    assert {1, 4} <= frames


def test_a_clip_without_readable_frames_is_named_and_left_out(
    tmp_path: Path, debug_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clips"
    draw_clips(folder)
    path = write(tmp_path, STAGES.replace("workers", "cache_latents = false\nworkers"), folder, debug_checkpoint)
    # Its index is whole, its frames are not.
    whole = (folder / "clip2.mp4").read_bytes()
    start = whole.index(b"mdat") + 4
    (folder / "clip2.mp4").write_bytes(whole[:start] + bytes(len(whole) - start))
    made(path)
    printed = capsys.readouterr().out
    assert printed.count("left out clip2.mp4:") == 1, "once, though two stages ask"
    assert "2-swap  step 4/4" in printed


def test_a_dry_run_says_what_it_will_take_and_leaves_nothing(
    tmp_path: Path, clips: Path, debug_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, STAGES.replace("steps = 4", "steps = 36000"), clips, debug_checkpoint)
    assert run_recipe(path, dry_run=True) is None
    printed = capsys.readouterr().out
    found = re.findall(r"^(1-addition|2-swap): ([\d.]+) s a step, 36000 steps in ([\d.]+) hours, peak", printed, re.M)
    assert [name for name, _, _ in found] == ["1-addition", "2-swap"]
    assert all(float(hours) == pytest.approx(10 * float(seconds), abs=0.06) for _, seconds, hours in found)
    assert "in all " in printed
    # The latents of the clips that it looked at are there for the run itself.
    assert sorted(item.name for item in tmp_path.iterdir()) == ["cache", "mine.toml"]


def test_folders_are_not_shared_by_accident(tmp_path: Path, clips: Path, debug_checkpoint: Path) -> None:
    path = write(tmp_path, STAGES, clips, debug_checkpoint)
    made(path)
    with pytest.raises(ValueError, match="--resume"):
        run_recipe(path)
    other = tmp_path / "other.toml"
    other.write_text(path.read_text().replace("/mine.safetensors", "/other.safetensors"))
    with pytest.raises(ValueError, match=r"holds the run of mine\.safetensors: give output a folder of its own"):
        run_recipe(other, resume=True)


# Each run imports PyTorch anew, so there are few of them.


def command(recipe: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "videofactory_train", "train", str(recipe), *options]


def environment() -> dict[str, str]:
    places = [str(Path(sys.modules[name].__file__ or "").parent.parent) for name in ("videofactory_train",)]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*places, *sys.path])}


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, clips: Path, debug_checkpoint: Path) -> None:
    """Killed three times, wherever that hits, also while a state is written, which happens at every step."""
    text = STAGES.replace("steps = 4", "steps = 12").replace("save_every = 2", "save_every = 1")
    whole = made(write(tmp_path / "whole", text, clips, debug_checkpoint)).read_bytes()
    path = write(tmp_path / "parts", text, clips, debug_checkpoint)
    moments = random.Random(0)
    kills = 0
    for attempt in range(3):
        options = ["--resume"] if attempt else []
        process = subprocess.Popen(
            command(path, *options), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        steps = (line for line in process.stdout if " step " in line)
        # Behind the second one the state of the first is there.
        for _ in range(moments.randrange(2, 6)):
            next(steps)
        time.sleep(moments.uniform(0.0, 0.1))
        process.kill()
        process.stdout.read()
        kills += process.wait() == -signal.SIGKILL
    assert kills == 3
    assert made(path, resume=True).read_bytes() == whole
    assert "going on from step" in (path.parent / "log.txt").read_text()


@pytest.mark.parametrize("kind", ["DDP", "FSDP2"])
def test_two_processes_train_like_one_with_twice_the_batch(
    kind: str, tmp_path: Path, clips: Path, debug_checkpoint: Path
) -> None:
    text = STAGES.replace("warmup_steps = 1", "warmup_steps = 1\ngradient_accumulation_steps = 2") + EVENTS
    one = write(tmp_path / "one", text.replace("batch_size = 2", "batch_size = 4"), clips, debug_checkpoint)
    made(one)
    two = write(tmp_path / "two", text, clips, debug_checkpoint)
    # What `accelerate launch` starts on GPUs; without one it starts a single process.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += command(two)[1:] if kind == "DDP" else [str(Path(__file__).with_name("fsdp_on_cpu.py")), str(two)]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("1-addition", "2-swap"):
        losses = [json.loads((path.parent / f"{stage}.losses.json").read_text()) for path in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        found = [(path.parent / f"{stage}.validation.jsonl").read_text().splitlines() for path in (one, two)]
        assert [json.loads(line)["loss"] for line in found[0]] == pytest.approx(
            [json.loads(line)["loss"] for line in found[1]], rel=1e-4
        )
    weights = [load_file(path.parent / "mine.safetensors") for path in (one, two)]
    for key, weight in weights[0].items():
        torch.testing.assert_close(weights[1][key], weight, rtol=2e-2, atol=2e-3)
    # One process of the two wrote the log and the samples.
    assert (two.parent / "log.txt").read_text().count("2-swap  step 4/4") == 1
    assert (two.parent / "samples" / "2-swap" / "step-000004" / "2.mp4").is_file()


def shrunk(name: str, folder: Path, clips: Path, source: Path) -> Path:
    """A shipped recipe with two steps a stage, on the smallest model and the clips of the tests."""
    text = (RECIPES / name).read_text(encoding="utf-8")
    for pattern, new in (
        (r'^preset = "\w+"', 'preset = "debug"'),
        (r'^checkpoint = "[^"]+"', f'checkpoint = "{source.as_posix()}"'),
        (r'^output = "[^"]*/([^/"]+)"', rf'output = "{folder.as_posix()}/\1"'),
        (r'^device = "cuda"', 'device = "cpu"'),
        (r'^path = "[^"]+"', f'path = "{clips.as_posix()}"'),
        (r"^sizes = .*\]\]", "sizes = [[16, 8], [8, 8]]"),
        (r"^frames = \[8, 16\]", "frames = [2, 4]"),
        (r"^frames = \[1, 16\]", "frames = [1, 4]"),
        (r"^frames = \[16\]", "frames = [4]"),
        (r"^steps = \d+", "steps = 2"),
        (r"^clips = \d{3,}", "clips = 4"),
        (r"^clips = 8 ", "clips = 1 "),
        (r"^batch_size = \d+", "batch_size = 2"),
        (r"^patch = \d+", "patch = 4"),
        (r"^workers = \d+", "workers = 0"),
        (r'^optimizer = "adamw8bit"', 'optimizer = "adamw"'),
        (r'^precision = "bf16"', 'precision = "bf16"\ncache_directory = "{}"'.format((folder / "cache").as_posix())),
    ):
        # An upscaler's recipe has nothing to keep.
        if "cache_directory" not in new or ("[[datasets]]" in text and "[upscaler]" not in text):
            text = re.sub(pattern, new, text, flags=re.M)
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.toml")))
def test_every_recipe_runs(name: str, tmp_path: Path, clips: Path, debug_checkpoint: Path) -> None:
    output = made(shrunk(name, tmp_path, clips, debug_checkpoint))
    losses = [json.loads(path.read_text()) for path in tmp_path.glob("*.losses.json") if "latents" not in path.name]
    assert losses
    assert all(len(found) == 2 for found in losses)
    assert checkpoint.read_header(output).metadata["modelspec.title"]


GIVEN = """\
title = "mine"
licence = "MIT"
origin = "a test"
checkpoint = "{checkpoint}"
output = "{folder}/mine.safetensors"
precision = "fp32"
device = "cpu"
workers = 0
clips = 4
[[stages]]
layers = 'temporal'
[stages.schedule]
steps = 4
batch_size = 2
learning_rate = 1e-2
save_every = 2
[stages.condition]
independent = 0.5
frame_dropout = 0.5
frames = { none = 1, first = 1 }
[stages.windows]
clips = 3
frames = 16
condition = { frames = { prefix = 1 } }
"""


def test_a_model_that_learns_given_frames_says_so(tmp_path: Path, clips: Path, debug_checkpoint: Path) -> None:
    assert not checkpoint.check(debug_checkpoint)[0].config.given_frames
    recipe = write(tmp_path / "whole", GIVEN, clips, debug_checkpoint)
    output = made(recipe)
    assert checkpoint.check(output)[0].config.given_frames
    assert checkpoint.check(output)[0].config.chunk_frames == 8
    # Also when only windows give them.
    start, end = GIVEN.index("[stages.condition]"), GIVEN.index("[stages.windows]")
    windows = write(tmp_path / "windows", GIVEN[:start] + GIVEN[end:], clips, debug_checkpoint)
    assert checkpoint.check(made(windows))[0].config.given_frames
    # And when it is trained further without any.
    later = STAGES.replace("min_snr_gamma = 5.0", "")
    assert checkpoint.check(made(write(tmp_path / "later", later, clips, output)))[0].config.given_frames
    assert not checkpoint.check(made(write(tmp_path / "no", later, clips, debug_checkpoint)))[0].config.given_frames


def test_windows_are_frames_of_one_clip_by_turns_and_every_second_batch() -> None:
    numbers = torch.arange(5 * 20).view(5, 1, 20, 1, 1).half()
    data = Latents(numbers, torch.arange(5)[:, None, None].expand(5, 1, 77))
    condition = Condition(GivenFrames(prefix=1))
    windows = WindowBatches(data, condition, 5, 4, (1, 2), 0, Process())
    seen = set()
    for number, batch in zip(range(80), windows(0), strict=False):
        frames = 4 + 4 * (number % 2)
        assert batch.latents.shape == (5 if frames == 4 else 3, 1, frames, 1, 1)
        assert batch.condition is condition
        stride = 1 + number // 2 % 2
        assert (batch.latents.diff(dim=2) == stride).all()
        first = batch.latents[:, 0, 0, 0, 0].long()
        assert torch.equal(first // 20, batch.tokens[:, 0, 0])
        assert (first % 20 < 20 - (frames - 1) * stride).all()
        seen |= {(frames, stride, start) for start in (first % 20).tolist()}
    assert len(seen) == 17 + 13 + 14 + 6
    again = next(windows(7))
    assert torch.equal(again.latents, next(itertools.islice(windows(0), 7, None)).latents)

    alone = WindowBatches(data, condition, 5, 4, (1,), 0, Process())
    assert all((batch.latents.diff(dim=2) == 1).all() for batch in itertools.islice(alone(0), 8))

    halves = [next(WindowBatches(data, condition, 5, 4, (1, 2), 0, Process(rank, 2))(0)).latents for rank in range(2)]
    whole = next(WindowBatches(data, condition, 10, 4, (1, 2), 0, Process())(0)).latents
    assert torch.equal(torch.cat(halves), whole)

    plain = LatentBatches(data, 5, None, 1, 0, Process())
    mixed = ByTurns(plain, windows)
    for first in (0, 3):
        for number, batch in zip(range(first, first + 4), mixed(first), strict=False):
            alone = next((windows if number % 2 else plain)(number // 2))
            assert torch.equal(batch.latents, alone.latents)
            assert (batch.condition is None) == (number % 2 == 0)


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (GIVEN, "stages.windows.frames=15", "windows.frames: 15 are too few; use 16 or more"),
        (GIVEN, "stages.windows.strides=[3]", "windows.frames: 16 are too few; use 24 or more"),
        (GIVEN, "stages.windows.clips=0", "clips: 0 are none; use 1 or more"),
        (GIVEN, "stages.windows.frames=-3", "frames: -3 are none; use 1 or more"),
        (GIVEN, "clips=-4", "datasets: name one or more folders of clips, or set clips"),
        (GIVEN, "stages.windows.strides=[]", r"strides: \[\] are none; use numbers from 1 on"),
        (GIVEN, "stages.windows.strides=[1, 0]", r"strides: \[1, 0\] are none; use numbers from 1 on"),
        (STAGES, "stages.windows={clips=3, condition={frames={first=1}}}", "windows are those of drawn clips"),
        (LORA, "condition={frames={first=1}}", "a LoRA file cannot say that it knows given frames"),
    ],
)
def test_conditions_that_cannot_be_trained_are_refused(
    text: str, change: str, message: str, tmp_path: Path, clips: Path, debug_checkpoint: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run_recipe(write(tmp_path, text, clips, debug_checkpoint), changes=[change])
    assert not (tmp_path / "mine.safetensors").exists()


def test_windows_of_all_stages_are_looked_at_before_the_first(
    tmp_path: Path, clips: Path, debug_checkpoint: Path
) -> None:
    two = GIVEN + GIVEN[GIVEN.index("[[stages]]") :].replace("frames = 16", "frames = 15")
    with pytest.raises(ValueError, match="15 are too few; use 16 or more"):
        run_recipe(write(tmp_path, two, clips, debug_checkpoint))
    assert not [*tmp_path.rglob("*.losses.json"), *tmp_path.rglob("states/*")]


def test_windows_longer_than_the_positions_of_the_model_are_refused(tmp_path: Path, clips: Path) -> None:
    config = PRESETS["debug"]
    config = replace(config, unet=replace(config.unet, temporal_positions=2 * config.frames - 1))
    path = tmp_path / "short.safetensors"
    checkpoint.save(path, checkpoint.build(config), checkpoint.Metadata(title="a", licence="MIT", origin="a test"))
    with pytest.raises(ValueError, match="the model knows 7 frame positions; windows need 8"):
        run_recipe(write(tmp_path, GIVEN, clips, path))


def test_data_check_says_what_is_left_out_and_ends_with_1(
    tmp_path: Path, debug_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clips"
    draw_clips(folder)
    arguments = ["data", "check", str(folder), "--checkpoint", str(debug_checkpoint)]
    assert main([*arguments, "--max-dropped", "0.2"]) == 0
    (folder / "clip3.txt").unlink()
    assert main([*arguments, "--max-dropped", "0.2"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"clip3\.mp4 .*no caption", printed)
    recipe = write(tmp_path / "run", LORA, folder, debug_checkpoint)
    assert main(["data", "check", str(recipe), "--sheet", str(tmp_path / "sheet.png"), "--max-dropped", "0.5"]) == 0
    assert Image.open(tmp_path / "sheet.png").width > 100
    assert main(["data", "check", str(tmp_path / "none")]) == 2


@pytest.fixture
def interrupted(tmp_path: Path, clips: Path, debug_checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
    path = write(tmp_path, STAGES.replace("steps = 4", "steps = 4000"), clips, debug_checkpoint)
    with subprocess.Popen(
        command(path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, interrupted: subprocess.Popen[str]) -> None:
    assert interrupted.stdout is not None
    for line in interrupted.stdout:
        if "step 5/" in line:
            break
    interrupted.send_signal(signal.SIGINT)
    _, error = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130
    assert "--resume" in error
    assert list((tmp_path / "states").glob("1-addition-step*"))
