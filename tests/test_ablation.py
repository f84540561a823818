"""`evaluate ablation`: the paper's rows on drawn clips and on files, what is missing, and what compares."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file
from videofactory_train.data.moving_shapes import MovingShapes
from videofactory_train.evaluate import ablation_table, costs
from videofactory_train.evaluate.ablation import (
    Comparison,
    ablation,
    begin,
    compare,
    device_of,
    read_outcome,
    workload_of,
)
from videofactory_train.evaluate.ablation_table import interval, tables
from videofactory_train.evaluate.bench import Place, budget_of, settled
from videofactory_train.evaluate.merges import ROWS, choose, file_name
from videofactory_train.evaluate.result import Result, Scores
from videofactory_train.recipe import TuningRecipe, read_recipe

from videofactory_core import checkpoint
from videofactory_core.config import PRESETS
from videofactory_core.video import read_video, write_video

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = Path(__file__).parent.parent / "train" / "recipes"
SCHEDULE = """
steps = 4
batch_size = 2
learning_rate = 1e-2
warmup_steps = 1
ema_decay = 0.9
"""
COMMON = """\
title = "mine"
licence = "MIT"
origin = "a test"
output = "{folder}/mine.safetensors"
precision = "{precision}"
device = "cpu"
workers = 0
"""
FILES = f"""{COMMON}
checkpoint = "{{checkpoint}}"
[[datasets]]
path = "{{clips}}"
[validation]
clips = 2
quantiles = 2
[samples]
prompts = ["of no interest here"]
steps = 2
guidance_scale = 3.0
[[stages]]
kind = "addition"
[stages.schedule]{SCHEDULE}
[[stages]]
kind = "swap"
layers = 'merge'
min_snr_gamma = 5.0
[stages.schedule]{SCHEDULE}
"""
LORA = f"""{COMMON}
checkpoint = "{{checkpoint}}"
[[datasets]]
path = "{{clips}}"
[adapter]
layers = 'attn'
rank = 2
alpha = 2.0
[schedule]{SCHEDULE}
"""
DRAWN = f"""{COMMON}
preset = "debug"
clips = 8
[autoencoder.schedule]{SCHEDULE}
[[stages]]
kind = "addition"
[stages.schedule]{SCHEDULE}
[[stages]]
kind = "swap"
timestep_shift = 4.0
[stages.schedule]{SCHEDULE}
"""
TUNED = f"""{COMMON}
checkpoint = "{{checkpoint}}"
clips = 8
returns = true
[[stages]]
kind = "swap"
[stages.schedule]{SCHEDULE}
"""


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five clips with captions."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    folder.mkdir()
    for i in range(5):
        clip = MovingShapes(5, 8 + i, 16, 32, seed=9)[i]
        write_video(folder / f"clip{i}.mp4", rearrange(clip["video"], "C F H W -> F H W C") / 2 + 0.5, 8)
        (folder / f"clip{i}.txt").write_text(clip["caption"], encoding="utf-8")
    return folder


def write(
    folder: Path, text: str, clips: Path | None = None, source: Path | None = None, precision: str = "bf16"
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("folder", folder), ("clips", clips), ("checkpoint", source)):
        text = text.replace(f"{{{name}}}", value.as_posix() if value else "")
    path = folder / "mine.toml"
    path.write_text(text.replace("{precision}", precision), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def of_files(
    tmp_path_factory: pytest.TempPathFactory, clips: Path, debug_checkpoint: Path
) -> tuple[Path, Comparison, str]:
    """A finished comparison of two rows on files, with its recipe and what was left of it on the disk."""
    folder = tmp_path_factory.mktemp("files")
    path = write(folder, FILES, clips, debug_checkpoint)
    found = ablation(path, rows=["swapped", "none"], seeds=2, rounds=1)
    return path, found, (folder / "ablation" / "tables.md").read_text(encoding="utf-8")


def test_every_row_begins_as_the_sum_whatever_the_model_had(debug_checkpoint: Path) -> None:
    model = checkpoint.load(debug_checkpoint)
    assert model.config.unet.merge == "swap"
    x = torch.randn(1, 4, 4, 4, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ask = (x, torch.tensor([500]), torch.ones(1, 77, 16))
        before = model.unet(*ask)
        outputs = {name: begin(model, name, 0).unet(*ask) for name in ROWS}
    for output in outputs.values():
        torch.testing.assert_close(output, outputs["none"])
    # Its own trained Swap-CA is left out, of the row that has Swap-CA too.
    assert (outputs["swapped"] - before).abs().max() > 1e-3
    configs = {name: row.config(PRESETS["sd21"].unet) for name, row in ROWS.items()}
    assert len(set(configs.values())) == len(ROWS)
    assert {name for name, config in configs.items() if config.swap_window is None} == {
        "global temporal queries",
        "global spatial queries",
        "global swapped",
    }
    whole = replace(PRESETS["sd21"].unet, swap_window=None)
    assert ROWS["swapped"].config(whole).swap_window == (8, 3, 6)


def test_rows_are_named_as_in_the_table() -> None:
    assert choose([]) == tuple(ROWS)
    assert choose(["swapped", "global-swapped", "none", "sparse causal"]) == (
        "none",
        "swapped",
        "global swapped",
        "sparse causal",
    )
    with pytest.raises(ValueError, match=r"no row 'spatial-query'; did you mean spatial-queries\?"):
        choose(["spatial-query"])
    assert len({file_name(name) for name in ROWS}) == len(ROWS)


def test_files_are_learned_from_measured_and_sampled(of_files: tuple[Path, Comparison, str], clips: Path) -> None:
    path, found, _ = of_files
    place = found.place
    assert not found.missing
    assert tuple(found.outcomes) == ("none", "swapped")
    recipe = settled(read_recipe(path))
    assert isinstance(recipe, TuningRecipe)
    assert found.budget == budget_of(recipe)
    assert (found.budget.layers, found.budget.objective.min_snr_gamma) == ("merge", 5.0)
    assert (found.budget.sampling.steps, found.budget.sampling.guidance_scale) == (2, 3.0)
    first = found.outcomes["none"][0]
    for name, outcomes in found.outcomes.items():
        assert [outcome.seed for outcome in outcomes] == [0, 1]
        # Other batches and noise.
        assert outcomes[0].losses != outcomes[1].losses
        for outcome in outcomes:
            assert outcome.before == pytest.approx(first.before, rel=1e-2)
            assert len(outcome.losses) == 4
            assert outcome.after != outcome.before
            assert outcome.data == first.data
            assert not outcome.scores
            folder = place.samples(name, outcome.seed)
            assert len(list(folder.glob("*.mp4"))) == 2
    assert found.outcomes["swapped"][0].losses[0] == pytest.approx(first.losses[0], rel=1e-2)
    # The real clips are those that were kept from training, and prompts are their captions.
    texts = [(place.real / f"0000{i}.txt").read_text(encoding="utf-8") for i in range(2)]
    assert texts == [(place.samples("none", 0) / f"0000{i}.txt").read_text(encoding="utf-8") for i in range(2)]
    captions = {file.read_text(encoding="utf-8") for file in clips.glob("*.txt")}
    assert set(texts) < captions
    assert re.match(r"3 samples, ", first.data)
    assert read_video(place.real / "00000.mp4").frames.shape == (4, 8, 16, 3)
    # The cache is that of the recipe's own run, and nothing of finished runs is left.
    assert (path.parent / "cache").is_dir()
    assert not list(place.folder.glob("work/*/*.safetensors"))


def test_tables_stand_beside_those_of_the_paper(of_files: tuple[Path, Comparison, str]) -> None:
    _, found, text = of_files
    assert text == tables(found) + "\n"
    losses = [[outcome.loss for outcome in found.outcomes[name]] for name in ("none", "swapped")]
    mean = sum(losses[1]) / 2
    # With one degree of freedom: 12.706 times half of the distance.
    half = 12.706 * abs(losses[1][0] - losses[1][1]) / 2
    ratio = (losses[1][0] / losses[0][0] + losses[1][1] / losses[0][1]) / 2
    quality = next(line for line in text.splitlines() if line.startswith("| swapped | 2 |"))
    assert f"| {mean:.5f} [{mean - half:.5f}, {mean + half:.5f}] | {ratio:.3f} [" in quality
    assert quality.endswith("| 475.09 | 0.839 | 0.3107 | 1.012 |")
    cost = [line for line in text.splitlines() if line.startswith("| swapped |")][-1]
    model = checkpoint.build(PRESETS["debug"])
    weights = [sum(w.numel() for w in begin(model, name, 0).unet.parameters()) for name in ("swapped", "none")]
    assert cost.startswith(f"| swapped | {weights[0] / 1e6:.4g} | {weights[0] / weights[1]:.3f} |")
    assert cost.endswith("| 1601 | 1.082 | 148.2 | 1.095 | 9.83 | 1.049 |")
    assert "Missing" not in text
    assert len(found.costs) == 1
    for done in found.costs:
        assert done.keys() == found.outcomes.keys()
        for found_cost in done.values():
            assert found_cost is not None
            assert 0 < found_cost.forward_seconds < 60
            assert 0 < found_cost.step_seconds < 60
            assert 0 <= found_cost.forward_gib <= found_cost.step_gib < 4


def test_nothing_is_made_twice_and_settings_are_not_mixed(
    of_files: tuple[Path, Comparison, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, found, text = of_files
    times = {file: file.stat().st_mtime_ns for file in found.place.folder.glob("*.json")}
    assert len(times) == 4 + 1
    capsys.readouterr()
    again = ablation(path, rows=["none", "swapped"], seeds=2, rounds=1)
    assert again == found
    assert capsys.readouterr().out == text
    assert {file: file.stat().st_mtime_ns for file in times} == times
    with pytest.raises(ValueError, match=r"none-0\.json has another budget: schedule\.steps \(4, not 5\)"):
        ablation(path, rows=["none"], seeds=1, steps=5)
    # What is only said differently does not matter.
    ablation(path, rows=["none"], seeds=1, changes=["stages.1.schedule.log_every=3"], rounds=1)


def test_what_is_missing_is_said(of_files: tuple[Path, Comparison, str], capsys: pytest.CaptureFixture[str]) -> None:
    path, found, _ = of_files
    # As if it had been killed behind step 2.
    (found.place.work(found.budget) / "states" / "swapped-2-step000002").mkdir(parents=True)
    shown = ablation(path, rows=["none", "swapped"], seeds=3, train=False)
    assert shown.missing == {("none", 2): "0 of 4 steps", ("swapped", 2): "2 of 4 steps"}
    said = capsys.readouterr().out
    assert "* swapped: seed 2 (2 of 4 steps)" in said
    assert not found.place.result("none", 2).exists()


def test_other_data_and_other_starts_are_refused(of_files: tuple[Path, Comparison, str], tmp_path: Path) -> None:
    path, found, _ = of_files
    recipe = settled(read_recipe(path))
    texts = {name: found.place.result(name, 0).read_text(encoding="utf-8") for name in ("none", "swapped")}

    def of(**changes: object) -> Comparison:
        for name, text in texts.items():
            data = json.loads(text) | (changes if name == "swapped" else {})
            Place(tmp_path).result(name, 0).write_text(json.dumps(data), encoding="utf-8")
        return compare(recipe, tmp_path, tuple(texts), (0,), found.budget, 1, train=False)

    assert not of().missing
    with pytest.raises(ValueError, match="do not compare, for their data is"):
        of(data="2 samples")
    with pytest.raises(ValueError, match="do not compare, for their start is"):
        of(start="f" * 64)
    with pytest.raises(ValueError, match="before training swapped, seed 0, had another loss than none, seed 0"):
        of(start="", data="", before=[0.1, 0.2])
    with pytest.raises(ValueError, match=r"swapped-0\.json is no result of an ablation"):
        of(budget={"schedule": 3})


def test_older_results_are_read(tmp_path: Path) -> None:
    """Files that do not say from what they come, how clips were sampled, nor which weights trained."""
    schedule = {"steps": 1000, "batch_size": 8, "learning_rate": 0.0005, "warmup_steps": 50, "ema_decay": 0.99}
    old = {
        "merge": "temporal queries",
        "seed": 1,
        "budget": {
            "schedule": {**schedule, "log_every": 50, "save_every": 250},
            "objective": {"timestep_shift": 4.0, "timestep_range": [0.0, 1.0]},
            "clips": 72,
            "quantiles": 4,
            "samples": 36,
        },
        "parameters": 8_230_000,
        "before": [0.05, 0.02, 0.03, 0.18],
        "after": [0.04, 0.02, 0.03, 0.17],
        "scores": {"colour": 1.0, "direction": 0.75},
        "losses": [0.5] * 1000,
        "torch": "2.15.0",
        "device": "cpu",
    }
    place = Place(tmp_path)
    place.result("temporal queries", 1).write_text(json.dumps(old), encoding="utf-8")
    assert (tmp_path / "temporal-queries-1.json").is_file()
    changes = [f"stages.5.schedule.{key}={value}" for key, value in schedule.items() if key != "batch_size"]
    budget = budget_of(settled(read_recipe(RECIPES / "demo.toml", changes)))
    outcome = read_outcome(place, "temporal queries", 1, budget)
    assert outcome is not None
    assert outcome.loss == pytest.approx(0.065)
    assert outcome.scores["direction"] == 0.75
    assert outcome.budget.differences(budget) == []


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_tables_of_runs_on_another_device_are_made_without_it(device: str) -> None:
    assert device_of(settled(read_recipe(RECIPES / "demo.toml", [f"device={device}"]))) == device


def test_a_budget_comes_from_the_recipe_and_is_settable() -> None:
    demo = settled(read_recipe(RECIPES / "demo.toml"))
    budget = budget_of(demo)
    assert (budget.schedule.steps, budget.objective.timestep_shift, budget.text) == (1800, 4.0, True)
    assert (budget.clips, budget.samples, budget.layers) == (72, 36, "")
    short = budget_of(demo, steps=200, samples=5)
    assert (short.schedule.steps, short.schedule.warmup_steps, short.samples) == (200, 20, 5)
    swap = settled(read_recipe(RECIPES / "swap-ca-16gb.toml"))
    budget = budget_of(swap)
    assert (budget.layers, budget.text, budget.schedule.steps, budget.clips) == ("merge", False, 20000, 8)
    assert budget.sampling.guidance_scale == 9.0
    # A LoRA cannot hold a merge, so the merges themselves learn.
    assert budget_of(settled(read_recipe(RECIPES / "lora-12gb.toml"))).layers == "merge"
    with pytest.raises(ValueError, match="no merges to compare"):
        settled(read_recipe(RECIPES / "rcan-x4.toml"))
    with pytest.raises(ValueError, match="samples: -1"):
        budget_of(demo, samples=-1)


def test_drawn_clips_are_judged(tmp_path: Path) -> None:
    path = write(tmp_path, DRAWN)
    recipe = settled(read_recipe(path))
    budget = replace(budget_of(recipe, steps=2, samples=1), clips=3, quantiles=2)
    found = compare(recipe, tmp_path / "out", ("global swapped",), (0,), budget, 1)
    outcome = found.outcomes["global swapped"][0]
    assert set(outcome.scores) == {"colour", "shape", "direction", "background", "steady", "all"}
    assert outcome.data == "8 drawn clips, seed 0"
    assert len(list(found.place.real.glob("*.mp4"))) == 3
    assert len(list(found.place.samples("global swapped", 0).glob("*.mp4"))) == 1


def test_drawn_clips_for_a_model_of_yours(tmp_path: Path, debug_checkpoint: Path) -> None:
    recipe = settled(read_recipe(write(tmp_path, TUNED, source=debug_checkpoint, precision="fp32")))
    budget = replace(budget_of(recipe, steps=2, samples=1), clips=3, quantiles=2)
    found = compare(recipe, tmp_path / "out", ("none", "sparse causal"), (0,), budget, 1)
    outcome = found.outcomes["sparse causal"][0]
    # The checker knows no directions of shapes that turn back.
    assert not outcome.scores
    assert outcome.data == "8 drawn clips, seed 0, there and back"
    assert len(load_file(found.place.clips)["held_out.latents"]) == 3
    assert (outcome.budget.text, outcome.budget.layers) == (False, "")


def test_a_lora_recipe_compares_merges(tmp_path: Path, clips: Path, debug_checkpoint: Path) -> None:
    path = write(tmp_path, LORA, clips, debug_checkpoint)
    recipe = settled(read_recipe(path, ["validation.clips=1"]))
    found = compare(recipe, tmp_path / "out", ("none",), (0,), budget_of(recipe, samples=0), 1)
    outcome = found.outcomes["none"][0]
    assert outcome.after != outcome.before
    assert not found.place.samples("none", 0).exists()
    # Eight clips are kept without a word, which five are not.
    few = settled(read_recipe(path))
    with pytest.raises(ValueError, match="validation holds out 8 of 5 clips"):
        compare(few, tmp_path / "few", ("none",), (0,), budget_of(few), 1)


def test_a_network_too_large_is_missing_and_said(tmp_path: Path, clips: Path, debug_checkpoint: Path) -> None:
    recipe = settled(read_recipe(write(tmp_path, TUNED, source=debug_checkpoint)))
    budget = replace(budget_of(recipe, steps=1, samples=0), clips=1)
    # A batch larger than any address space.
    budget = replace(budget, schedule=replace(budget.schedule, batch_size=10**14))
    found = compare(recipe, tmp_path / "out", ("none", "swapped"), (0,), budget, 1)
    assert found.missing == {("none", 0): "out of memory", ("swapped", 0): "out of memory"}
    assert "* swapped: seed 0 (out of memory)" in tables(found)
    workload = workload_of(recipe, budget)
    networks = {"none": ROWS["none"].config(workload.model.unet)}
    assert costs.measure_all(workload, networks, 1, tmp_path / "costs.json", print) == [{"none": None}]


def test_metrics_of_videos_find_the_clips_and_their_scores_the_table(
    of_files: tuple[Path, Comparison, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, found, _ = of_files
    asked = []

    def score(generated: Path, real: Path) -> Scores:
        asked.append(generated.name)
        assert real == found.place.real
        # As bright as the clips of the run are, against the real ones.
        values = [
            sum(read_video(file).frames.mean().item() for file in folder.glob("*.mp4")) for folder in (generated, real)
        ]
        result = Result("brightness", values[0] / values[1], None, 2, {"frames": 4})
        return Scores("2 videos", "2 videos", (result,), ())

    ablation(path, rows=["none", "swapped"], seeds=2, rounds=1, score=score)
    assert sorted(asked) == ["none-0", "none-1", "swapped-0", "swapped-1"]
    heading = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| merge | seeds"))
    assert " | brightness | paper: FVD | " in heading
    ablation(path, rows=["none", "swapped"], seeds=2, rounds=1, score=score)
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("values", "expected"),
    # R's t.test(c(1, 2, 3))$conf.int is -0.4841377 to 4.4841377.
    [((1.0, 2.0, 3.0), (-0.4841377, 4.4841377)), ((2.0, 2.0), (2.0, 2.0))],
)
def test_intervals_are_those_of_student(values: tuple[float, ...], expected: tuple[float, float]) -> None:
    assert interval(values) == pytest.approx(expected, abs=1e-3)
    assert interval(values[:1]) is None


def test_students_t_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    exact = [stats.t.ppf(0.975, n) for n in range(1, 11)]
    assert list(ablation_table.STUDENT) == pytest.approx(exact, abs=1e-3)


def test_the_verdict_goes_by_seeds_that_both_have(of_files: tuple[Path, Comparison, str]) -> None:
    _, found, _ = of_files
    template = found.outcomes["none"][0]

    def row(*losses: float) -> list[object]:
        return [replace(template, seed=seed, after=(loss,)) for seed, loss in enumerate(losses)]

    outcomes = {
        "none": row(1.0, 2.0, 3.0),
        # Far apart among themselves, but always a tenth below.
        "temporal queries": row(0.9, 1.8, 2.71),
        "spatial queries": row(1.2, 1.5, 3.1),
        "swapped": row(1.11, 2.2, 3.3),
        "mixture": row(1.0),
    }
    text = tables(replace(found, outcomes=outcomes, costs=()))
    assert (
        "Validation loss against none, by these seeds: lower: temporal queries; higher: swapped;"
        " not told apart from it: spatial queries." in text
    )


def test_seeds_and_workers_are_counts(tmp_path: Path) -> None:
    path = write(tmp_path, DRAWN)
    with pytest.raises(ValueError, match="use 1 or more"):
        ablation(path, seeds=0)
    with pytest.raises(ValueError, match="use 1 or more"):
        ablation(path, workers=0)


def test_processes_of_accelerate_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without accelerate launch"):
        ablation(write(tmp_path, DRAWN))
