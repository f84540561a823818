"""Recipes: what is shipped can be read, and what is wrong is named with its line and the nearest right word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from videofactory_train.recipe import (
    AdapterRecipe,
    FinetuneRecipe,
    ModelRecipe,
    UpscalerRecipe,
    describe,
    line_of,
    read_recipe,
)

RECIPES = sorted((Path(__file__).parent.parent / "train" / "recipes").glob("*.toml"))

TEXT = """\
title = "mine"
licence = "MIT"
origin = "a test"
checkpoint = "model.safetensors"
output = "runs/mine/mine.safetensors"

[[datasets]]
path = "clips"
[[datasets]]
path = "more"
weight = 2.0

[[stages]]
kind = "addition"
[stages.schedule]
steps = 10
batch_size = 1
learning_rate = 1e-4
[[stages]]
kind = "swap"
layers = 'merge'
[stages.schedule]
steps = 10
batch_size = 1
learning_rate = 1e-4
"""


def read(folder: Path, text: str = TEXT) -> FinetuneRecipe:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    recipe = read_recipe(path)
    assert isinstance(recipe, FinetuneRecipe)
    return recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_can_be_read(path: Path) -> None:
    kinds = {"demo": ModelRecipe, "demo-x4": UpscalerRecipe, "rcan-x4": UpscalerRecipe, "demo-boomerang": AdapterRecipe}
    kinds |= {"lora-8gb": AdapterRecipe, "lora-12gb": AdapterRecipe}
    assert type(read_recipe(path)) is kinds.get(path.stem, FinetuneRecipe)


def test_every_setting_of_the_recipes_for_cards_is_commented() -> None:
    for path in RECIPES:
        if path.stem in ("lora-8gb", "lora-12gb", "swap-ca-16gb", "rcan-x4"):
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if " = " in line]
            bare = [line for line in lines if "#" not in line]
            allowed = (
                "prompts",
                "learning_rate",
                "warmup_steps",
                "guidance_scale",
                "steps",
                "weight",
                "every",
                "frames",
                "sizes",
            )
            assert not [line for line in bare if not line.startswith(allowed)], path


def test_a_recipe_is_read(tmp_path: Path) -> None:
    recipe = read(tmp_path)
    assert [dataset.path for dataset in recipe.datasets] == ["clips", "more"]
    assert [stage.kind for stage in recipe.stages] == ["addition", "swap"]
    assert recipe.stages[1].layers == "merge"
    assert recipe.stages[0].schedule.optimizer == "adamw"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("weight = 2.0", "wieght = 2.0", 11, ["wieght", "did you mean 'weight'"]),
        ("weight = 2.0", 'weight = "2"', 11, ["datasets.weight", "float"]),
        ("weight = 2.0", "weight = 0.0", 11, ["weight"]),
        ('kind = "swap"', 'kind = "swop"', 20, ["stages.kind", "addition, swap"]),
        ("layers = 'merge'\n[stages.schedule]\nsteps = 10", "[stages.schedule]\nsteps = 0", 22, ["steps"]),
        ("layers = 'merge'", "min_snr_gama = 5.0", 21, ["did you mean 'min_snr_gamma'"]),
        ("layers = 'merge'", "min_snr_gamma = -5.0", 21, ["min_snr_gamma", "below 0"]),
        ("learning_rate = 1e-4\n[[stages]]", "[[stages]]", 15, ["stages.schedule", "'learning_rate' is missing"]),
        ('checkpoint = "model.safetensors"', 'checkpoint = ""\nqqq = 1', 5, ["qqq", "known are"]),
        ("runs/mine/mine.safetensors", "runs/mine/mine.ckpt", 5, ["output", ".safetensors"]),
        ('[[datasets]]\npath = "clips"\n[[datasets]]\npath = "more"\nweight = 2.0\n', "", 1, ["datasets"]),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, old: str, new: str, line: int, words: list[str]) -> None:
    assert old in TEXT
    with pytest.raises(ValueError, match=rf"mine\.toml, line {line}: ") as error:
        read(tmp_path, TEXT.replace(old, new, 1))
    assert all(word in str(error.value) for word in words), error.value


def test_lines_are_found_behind_comments_and_in_dotted_keys() -> None:
    text = '# title = 1\n[a] # "x"\nb.c = 1\n"d" = 2\n[[e]]\n[[e]]\n[e.f]\ng = 1\n[[e.h]]\n[[e.h]]\ni = 0\n'
    for keys, line in (
        (("a", "b", "c"), 3),
        (("a", "d"), 4),
        (("e", 1), 6),
        (("e", 1, "f", "g"), 8),
        (("e", 1, "f", "none"), 7),
        (("e", 1, "h", 1, "i"), 11),
        (("none",), 1),
    ):
        assert line_of(text, keys) == line, keys


@pytest.mark.parametrize(
    ("content", "message"), [(b"title =", "not valid TOML"), (b"\xff\xfe\x00", "not valid TOML"), (None, "there is no")]
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "no.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_a_recipe_describes_itself_without_telling_folders(tmp_path: Path) -> None:
    text = TEXT.replace('"clips"', '"/home/me/secret/clips"').replace('"runs/mine/', '"/home/me/runs/')
    described = json.loads(describe(read(tmp_path, text)))
    assert described["datasets"][0]["path"] == "clips"
    assert described["output"] == "mine.safetensors"
    assert described["stages"][1]["schedule"]["learning_rate"] == 1e-4
    assert "home" not in json.dumps(described)
