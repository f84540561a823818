"""Ten steps of the demo recipe give the numbers that they always gave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from videofactory_train.loop import Schedule
from videofactory_train.recipe import ModelRecipe, read_recipe
from videofactory_train.run import ModelRun
from videofactory_train.workspace import Workspace

ROOT = Path(__file__).parent.parent
# One stage of each kind, by its place in the recipe.
STAGES = (0, 4, 5)


def test_losses_are_those_of_every_earlier_version(tmp_path: Path) -> None:
    recipe = read_recipe(ROOT / "train" / "recipes" / "demo.toml")
    assert isinstance(recipe, ModelRecipe)

    def few(schedule: Schedule, batch_size: int) -> Schedule:
        return replace(schedule, steps=10, batch_size=batch_size)

    stages = [recipe.stages[i] for i in STAGES]
    assert [stage.kind for stage in stages] == ["images", "addition", "swap"]
    recipe = replace(
        recipe,
        output=str(tmp_path / "demo.safetensors"),
        clips=4,
        precision="no",
        device="cpu",
        workers=0,
        autoencoder=replace(recipe.autoencoder, schedule=few(recipe.autoencoder.schedule, 2)),
        stages=tuple(replace(s, schedule=few(s.schedule, 2 if s.kind == "images" else 1)) for s in stages),
    )
    work = Workspace(recipe, tmp_path)
    torch.manual_seed(recipe.seed)
    run = ModelRun(recipe, work)
    run.train_denoiser(run.latents(run.train_autoencoder()))
    golden = json.loads((Path(__file__).parent / "golden_losses.json").read_text(encoding="utf-8"))
    for name, losses in golden.items():
        found = json.loads((tmp_path / f"{name}.losses.json").read_text(encoding="utf-8"))
        # Other processors and versions of PyTorch round differently, and steps add that up.
        assert found == pytest.approx(losses, rel=1e-3), name
