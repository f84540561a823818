"""A recipe from TOML to a checkpoint that generates, and golden losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from videofactory_train.denoiser import LatentBatches, Latents
from videofactory_train.run import run_recipe
from videofactory_train.state import States

from videofactory_core import checkpoint, upscaler
from videofactory_core.objective import Process

TINY = """
title = "tiny"
licence = "Apache-2.0"
origin = "a test"
preset = "debug"
output = "{folder}/tiny.safetensors"
clips = 8
precision = "no"
workers = 0
[autoencoder]
[autoencoder.schedule]
steps = 2
batch_size = 4
learning_rate = 1e-3
[[stages]]
kind = "images"
[stages.schedule]
steps = 2
batch_size = 4
learning_rate = 1e-3
[[stages]]
kind = "addition"
[stages.schedule]
steps = 2
batch_size = 2
learning_rate = 1e-3
[[stages]]
kind = "swap"
[stages.schedule]
steps = 3
batch_size = 2
learning_rate = 1e-3
"""


def made(recipe: Path, resume: bool = False) -> Path:
    """What a recipe makes."""
    output = run_recipe(recipe, resume=resume)
    assert output is not None
    return output


def write_recipe(folder: Path, text: str = TINY) -> Path:
    path = folder / "tiny.toml"
    path.write_text(text.replace("{folder}", folder.as_posix()))
    return path


def test_run_trains_every_part_and_writes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    model = checkpoint.load(made(write_recipe(tmp_path)))
    assert model.metadata.licence == "Apache-2.0"
    assert model.config.unet.merge == "swap"
    # The latent scale is measured, not the default.
    assert model.config.autoencoder.scale_factor != 0.18215
    colours = checkpoint.preview_colours(model.metadata)
    assert colours is not None
    assert [len(row) for row in colours[0]] == [3] * model.config.autoencoder.latent_channels
    fresh = checkpoint.build(model.config)
    swap = [k for k in fresh.unet.state_dict() if ".merge.proj_out.weight" in k]
    assert swap
    assert all(model.unet.state_dict()[k].abs().sum() > 0 for k in swap)


def test_second_start_goes_on_behind_finished_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    first = made(recipe).read_bytes()
    (tmp_path / "3-swap.safetensors").unlink()
    capsys.readouterr()
    with pytest.raises(ValueError, match="--resume"):
        run_recipe(recipe)
    assert made(recipe, resume=True).read_bytes() == first
    printed = capsys.readouterr().out
    assert "2-addition: found" in printed
    assert "3-swap  step 3/3" in printed


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", ["autoencoder", "3-swap"])
def test_an_interrupted_stage_goes_on_with_the_same_bytes(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TINY.replace("steps = 3\n", "steps = 3\nsave_every = 1\n").replace(
        "steps = 2\n", "steps = 2\nsave_every = 1\n"
    )
    (tmp_path / "whole").mkdir()
    whole = made(write_recipe(tmp_path / "whole", text)).read_bytes()
    (tmp_path / "parts").mkdir()
    recipe = write_recipe(tmp_path / "parts", text)
    save = States.save

    def save_and_stop(self: States, step: int, progress: dict[str, Any]) -> bool:
        saved = save(self, step, progress)
        if self.name == name:
            raise Interrupted
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(States, "save", save_and_stop)
        with pytest.raises(Interrupted):
            run_recipe(recipe)
    capsys.readouterr()
    assert made(recipe, resume=True).read_bytes() == whole
    assert f"{name}  going on from step 1" in capsys.readouterr().out
    assert not list((tmp_path / "parts" / "states").iterdir())


def test_losses_repeat_under_a_seed(tmp_path: Path) -> None:
    losses = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        run_recipe(write_recipe(folder))
        losses.append(json.loads((folder / "3-swap.losses.json").read_text()))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("opening", "stride", "frames"),
    [(1, 1, {0}), (3, 1, {0, 1, 2}), (None, 1, {0, 1, 2, 3, 4}), (None, 2, {0, 2, 4})],
)
def test_batches_hold_single_frames_of_the_opening_or_clips(opening: int | None, stride: int, frames: set[int]) -> None:
    numbers = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(6, 4, 5, 2, 2)
    batches = LatentBatches(Latents(numbers, torch.zeros(6, 77)), 8, opening, stride, 0, Process())(0)
    latents = [next(batches).latents for _ in range(20)]
    assert {batch.shape[2] for batch in latents} == {len(frames) if opening is None else 1}
    tokens = torch.arange(6).view(6, 1).expand(6, 77)
    orders = [next(LatentBatches(Latents(numbers, tokens), 8, 1, 1, seed, Process())(0)).tokens for seed in (0, 1)]
    assert not torch.equal(*orders)
    assert {int(number) for batch in latents for number in batch.unique()} == frames


def test_a_stage_may_leave_the_text_encoder_as_it_is(tmp_path: Path) -> None:
    frozen = TINY.replace('kind = "addition"', 'kind = "addition"\nfreeze_text = true')
    run_recipe(write_recipe(tmp_path, frozen))
    before, during, after = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("1-images", "2-addition", "3-swap")
    )
    text = [key for key in before if key.startswith("text_encoder.")]
    assert text
    assert all(torch.equal(during[key], before[key]) for key in text)
    assert not all(torch.equal(after[key], during[key]) for key in text)
    assert not all(torch.equal(during[key], before[key]) for key in before if key.startswith("unet."))


def test_an_upscaler_is_trained_for_a_model(tmp_path: Path) -> None:
    source = made(write_recipe(tmp_path))
    recipe = tmp_path / "x4.toml"
    recipe.write_text(
        f"""
title = "tiny x4"
licence = "MIT"
origin = "a test"
output = "{(tmp_path / "x4" / "x4.safetensors").as_posix()}"
checkpoint = "{source.as_posix()}"
precision = "no"
workers = 0
patch = 4
[upscaler]
groups = 1
blocks = 1
features = 16
[schedule]
steps = 40
batch_size = 4
learning_rate = 3e-3
warmup_steps = 2
"""
    )
    model = upscaler.load(made(recipe))
    assert model(torch.rand(1, 3, 8, 16)).shape == (1, 3, 32, 64)
    losses = json.loads((tmp_path / "x4" / "upscaler.losses.json").read_text())
    assert sum(losses[-15:]) < 0.8 * sum(losses[:15])


def test_a_lora_is_trained_on_a_model_that_stays_as_it_is(tmp_path: Path) -> None:
    source = made(write_recipe(tmp_path))
    before = source.read_bytes()
    recipe = tmp_path / "lora.toml"
    recipe.write_text(
        f"""
title = "tiny LoRA"
licence = "MIT"
origin = "a test"
output = "{(tmp_path / "lora" / "lora.safetensors").as_posix()}"
checkpoint = "{source.as_posix()}"
clips = 4
returns = true
precision = "no"
workers = 0
[adapter]
layers = "temporal|merge"
rank = 2
alpha = 2.0
[schedule]
steps = 3
batch_size = 2
learning_rate = 1e-2
"""
    )
    weights = load_file(made(recipe))
    assert all(key.startswith("diffusion_model.") for key in weights)
    assert any(".merge." in key and "lora_up" in key and value.any() for key, value in weights.items())
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('preset = "debug"', 'preset = "none"', "preset"),
        ("clips = 8\n", "", "clips"),
        ('kind = "swap"', 'kind = "addition"', "swap"),
        ('kind = "images"', 'kind = "images"\nopening = 0.0', "opening"),
        ('kind = "addition"', 'kind = "addition"\nframe_stride = 0', "frame_stride"),
        ('kind = "images"', 'kind = "images"\ntimestep_range = [0.5, 0.5]', "timestep_range"),
        ('precision = "no"', 'precision = "fp16"', "precision"),
        ('precision = "no"', 'device = "cuda"', "device"),
    ],
)
def test_recipes_that_cannot_be_used_are_refused_in_a_sentence(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in TINY
    if 'device = "cuda"' in new and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=message):
        run_recipe(write_recipe(tmp_path, TINY.replace(old, new)))
    assert not list(tmp_path.glob("*.safetensors"))
