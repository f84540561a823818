"""Prompt to frames, and the command around it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from videofactory_train.cli import main

from videofactory_core import checkpoint
from videofactory_core.pipeline import generate
from videofactory_core.sampling import SAMPLERS
from videofactory_core.video import read_metadata, read_video


@pytest.fixture
def command(debug_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run `videofactory generate` with the debug model in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        return main(["generate", "a red circle", "--checkpoint", str(debug_checkpoint), "--steps", "2", *arguments])

    return run


# Runs the command in 256 MiB beyond what it takes to load the model, which its last argument names.
SHORT_OF_MEMORY = """
import resource, sys
import av, torch
from videofactory_core import checkpoint, pipeline
from videofactory_train.cli import main
checkpoint.load(sys.argv[-1])
torch.set_num_threads(1)
with open("/proc/self/status") as status:
    held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (held + 2**28,) * 2)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.filterwarnings("error")
def test_every_sampler_makes_a_clip_of_the_trained_size(debug_checkpoint: Path, sampler: str) -> None:
    frames = generate(checkpoint.load(debug_checkpoint), "a red circle", steps=3, sampler=sampler)
    assert frames.shape == (4, 8, 16, 3)
    assert frames.isfinite().all()
    assert frames.min() >= 0
    assert frames.max() <= 1


def test_prompt_negative_prompt_guidance_and_seed_change_the_clip(debug_checkpoint: Path) -> None:
    model = checkpoint.load(debug_checkpoint)
    base = generate(model, "a red circle", steps=3)
    assert torch.equal(base, generate(model, "a red circle", steps=3))
    for change in ({"negative_prompt": "blue"}, {"guidance_scale": 1.0}, {"seed": 1}):
        assert not torch.equal(base, generate(model, "a red circle", steps=3, **change))
    assert not torch.equal(base, generate(model, "a blue square", steps=3))


def test_guidance_of_one_does_not_look_at_the_negative_prompt(debug_checkpoint: Path) -> None:
    model = checkpoint.load(debug_checkpoint)
    plain = generate(model, "a red circle", steps=2, guidance_scale=1.0)
    assert torch.equal(plain, generate(model, "a red circle", steps=2, guidance_scale=1.0, negative_prompt="blue"))


def test_steps_are_reported(debug_checkpoint: Path) -> None:
    seen: list[int] = []
    generate(checkpoint.load(debug_checkpoint), "x", steps=3, on_step=lambda step, _: seen.append(step))
    assert seen == [0, 1, 2]


def test_sizes_out_of_training_warn_and_long_prompts_are_read_in_chunks(debug_checkpoint: Path) -> None:
    model = checkpoint.load(debug_checkpoint)
    with pytest.warns(UserWarning, match="trained on 4 frames of 16x8"):
        assert generate(model, "x", steps=1, num_frames=2, width=20, height=6).shape == (2, 6, 20, 3)
    with pytest.warns(UserWarning, match="chunks of 75"):
        generate(model, "word " * 100, steps=1)


def test_empty_prompt_is_allowed(debug_checkpoint: Path) -> None:
    assert generate(checkpoint.load(debug_checkpoint), "", steps=1).isfinite().all()


def test_command_writes_the_file_it_names(command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--seed", "3") == 0
    name = capsys.readouterr().out.strip()
    assert name == "a-red-circle-seed3.mp4"
    video = read_video(name)
    assert video.frames.shape == (4, 8, 16, 3)
    settings = json.loads(read_metadata(name)["videofactory"])
    assert settings["prompt"] == "a red circle"
    assert settings["seed"] == 3
    assert settings["steps"] == 2


def test_same_seed_gives_the_same_bytes(command) -> None:
    assert command("--out", "a.mp4") == command("--out", "b.mp4") == command("--out", "c.mp4", "--seed", "1") == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    assert Path("a.mp4").read_bytes() != Path("c.mp4").read_bytes()


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral"])
def test_a_clip_of_a_batch_is_the_clip_of_its_seed(command, sampler: str) -> None:
    assert command("--batch", "2", "--out", "both.mp4", "--sampler", sampler) == 0
    assert command("--seed", "1", "--out", "second.mp4", "--sampler", sampler) == 0
    assert sorted(p.name for p in Path().iterdir()) == ["both-0.mp4", "both-1.mp4", "second.mp4"]
    assert Path("both-1.mp4").read_bytes() == Path("second.mp4").read_bytes()


def test_half_precision_runs(command) -> None:
    assert command("--dtype", "bfloat16", "--device", "cpu", "--out", "half.mp4") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frames", "0"], "at least 1 frame"),
        (["--frames", "33"], "32 frame positions"),
        (["--size", "17x8"], "multiples of 2"),
        (["--size", "400000x400000"], "GiB"),
        (["--guidance-scale", "0.5"], "below 1"),
        (["--guidance-scale", "nan"], "below 1"),
        (["--sampler", "magic"], "ddim"),
        (["--steps", "0"], "1 to 1000"),
        (["--batch", "0"], "1 or more"),
        (["--fps", "0"], "frames a second"),
        (["--out", "clip.avi"], ".mp4"),
        (["--out", "missing/clip.mp4"], "missing"),
        (["--device", "gpu"], "device"),
        (["--checkpoint", "none.safetensors"], "none.safetensors"),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(
    command, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert command(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("videofactory: ")]
    lines = [line for line in lines if "warning" not in line]
    assert len(lines) == 1
    assert words in lines[0]
    assert not list(Path().iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory as Linux does")
def test_memory_that_runs_out_gets_one_sentence_and_leaves_nothing(debug_checkpoint: Path, tmp_path: Path) -> None:
    command = ["generate", "a cat", "--steps", "1", "--size", "4096x4096", "--checkpoint", str(debug_checkpoint)]
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("videofactory: memory ran out; ask for a smaller size")
    assert not list(tmp_path.iterdir())


def test_foreign_checkpoint_is_named(command, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("model.safetensors").write_bytes(b"not a model at all")
    assert command("--checkpoint", "model.safetensors") == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_inspect_tells_people_and_programs_what_a_file_is(
    debug_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(debug_checkpoint)]) == 0
    text = capsys.readouterr().out
    assert "Apache-2.0" in text
    assert "4 frames of 16x8" in text
    assert main(["inspect", str(debug_checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loadable"] is True
    assert found["config"]["frames"] == 4


def test_unknown_recipe_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "nowhere.toml"]) == 2
    assert "nowhere.toml" in capsys.readouterr().err


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from videofactory_train.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'av', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "videofactory generate" in done.stdout
