"""What `videofactory train` makes from a folder of clips, loaded as it is by the host's nodes and ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from comfy_server import Host
from graphs import Graph, clip_latent, node, saved
from safetensors.torch import load_file
from torch import Tensor
from videofactory_train.data.moving_shapes import Combination, object_mask, random_scene
from videofactory_train.run import run_recipe

from videofactory_core import checkpoint
from videofactory_core.video import write_video

# A look that the demo has never seen.
CAPTION = "a black circle moving right on a yellow background"
FRAMES = 8
HEAD = """\
title = "yellow"
licence = "MIT"
origin = "a test"
checkpoint = "{demo}"
output = "{folder}/{kind}/yellow-{kind}.safetensors"
cache_directory = "{folder}/cache"
precision = "fp32"
device = "cpu"
workers = 0
timestep_shift = 2.0
[[datasets]]
path = "{folder}/clips"
frames = [8]
[validation]
clips = 1
every = 1000
"""
SCHEDULE = """\
steps = {steps}
batch_size = 2
learning_rate = 3e-3
warmup_steps = 4
ema_decay = 0.9
"""
KINDS = {
    "lora": "[adapter]\nlayers = 'transformer_blocks|merge'\nrank = 8\nalpha = 8.0\n[schedule]\n",
    "stage2": "[[stages]]\nkind = \"swap\"\nlayers = ''\n[stages.schedule]\n",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips and what was trained on them."""
    folder = tmp_path_factory.mktemp("command")
    (folder / "clips").mkdir()
    black, yellow = torch.tensor([0.05, 0.1, 0.1]), torch.tensor([0.9, 0.8, 0.1])
    for number in range(5):
        scene = random_scene(Combination("red", "circle", "right", "black"), torch.Generator().manual_seed(number))
        frames = torch.lerp(yellow, black, object_mask(scene, FRAMES)[..., None])
        write_video(folder / "clips" / f"{number}.mp4", frames, fps=8)
        (folder / "clips" / f"{number}.txt").write_text(CAPTION)
    for kind, middle in KINDS.items():
        text = HEAD + middle + SCHEDULE
        if kind == "stage2":
            # There the objective's settings belong to the stage.
            text = text.replace("timestep_shift = 2.0\n", "")
        for name, value in (("demo", checkpoint.DEMO), ("folder", folder), ("kind", kind), ("steps", 30)):
            text = text.replace(f"{{{name}}}", value.as_posix() if isinstance(value, Path) else str(value))
        recipe = folder / f"{kind}.toml"
        recipe.write_text(text, encoding="utf-8")
        run_recipe(recipe)
    return folder


def sample(host: Host, graph: Graph) -> Tensor:
    outputs = host.run(saved(graph, "sample"))
    return load_file(host.files({"sample": outputs["save sample"]})[0])["latent_tensor"]


def graph(host: Host, folder: Path, kind: str) -> Graph:
    """The graph of a result: a LoRA through the host's own Load LoRA, a checkpoint through Load VideoFactory."""
    found = clip_latent(CAPTION, frames=FRAMES, steps=8)
    name = f"yellow-{kind}.safetensors"
    if kind == "lora":
        shutil.copy(folder / kind / name, host.base / "models" / "loras")
        found["lora"] = node("LoraLoaderModelOnly", model=["load", 0], lora_name=name, strength_model=1.0)
        found["sample"]["inputs"]["model"] = ["lora", 0]
    elif kind == "stage2":
        shutil.copy(folder / kind / name, host.base / "models" / "videofactory")
        found["load"]["inputs"]["checkpoint"] = name
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_validation_loss_falls_by_a_fifth(results: Path, kind: str) -> None:
    (file,) = (results / kind).glob("*.validation.jsonl")
    first, *_, last = (json.loads(line)["loss"] for line in file.read_text().splitlines())
    assert last <= 0.8 * first


@pytest.mark.parametrize("kind", KINDS)
def test_clips_from_the_graph_come_nearer_to_the_training_clips(host: Host, results: Path, kind: str) -> None:
    latents = [load_file(path)["latents"] for path in (results / "cache").rglob("*.safetensors") if is_clip(path)]
    assert len(latents) == 5
    told = len(host.log.read_text(errors="replace"))
    base, trained = sample(host, graph(host, results, "base")), sample(host, graph(host, results, kind))

    def distance(found: Tensor) -> float:
        """To the nearest clip, in the autoencoder's latents; the host has frames in the batch and no scale."""
        scale = checkpoint.check(checkpoint.DEMO)[0].config.autoencoder.scale_factor
        return min(float((scale * found - clip.float().transpose(0, 1)).square().mean()) for clip in latents)

    assert distance(trained) < 0.7 * distance(base)
    assert "not loaded" not in host.log.read_text(errors="replace")[told:].lower()


def is_clip(path: Path) -> bool:
    return "latents" in load_file(path)
