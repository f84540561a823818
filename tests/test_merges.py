"""The comparison of merges: runs start alike, repeat, and go on behind an interruption."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from videofactory_train.evaluate.ablation import Comparison, begin, compare, read_outcome
from videofactory_train.evaluate.bench import Budget, Place, prepare
from videofactory_train.loop import Schedule
from videofactory_train.recipe import AutoencoderStage, DenoiserStage, ModelRecipe

from benchmarks.merges import MERGES, table
from videofactory_core import checkpoint
from videofactory_core.objective import Objective

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = Schedule(steps=2, batch_size=2, learning_rate=1e-3)
BUDGET = Budget(
    Schedule(steps=6, batch_size=2, learning_rate=1e-2, warmup_steps=1, save_every=2),
    Objective(timestep_shift=4.0),
    clips=3,
    quantiles=2,
    samples=1,
)
# What the command does, in a process that can be killed.
COMMAND = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_merges import BUDGET, MERGES, compare, recipe
if __name__ == "__main__":
    compare(recipe(Path(sys.argv[1])), Path(sys.argv[1]) / "merges", MERGES, (0,), BUDGET, 2)
"""


def recipe(folder: Path) -> ModelRecipe:
    return ModelRecipe(
        title="tiny",
        licence="Apache-2.0",
        origin="a test",
        preset="debug",
        output=str(folder / "tiny.safetensors"),
        clips=8,
        autoencoder=AutoencoderStage(FEW),
        stages=(DenoiserStage(kind="addition", schedule=FEW), DenoiserStage(kind="swap", schedule=FEW)),
        precision="no",
        workers=0,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison]:
    """A comparison that nothing interrupted, and its recipe's folder."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, compare(recipe(folder), folder / "merges", MERGES, (0,), BUDGET, 1)


def test_every_run_starts_from_the_same_output(tmp_path: Path) -> None:
    place = Place(tmp_path / "merges")
    prepare(recipe(tmp_path), place, BUDGET)
    start = checkpoint.load(place.start)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 4, 4, 8, generator=generator)
    context = torch.randn(2, 77, 16, generator=generator)
    models = {name: begin(start, name, 0) for name in MERGES}
    with torch.no_grad():
        outputs = [model.unet(x, torch.tensor([100, 900]), context) for model in models.values()]
    assert outputs[0].std() > 0.01
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    assert {name: (m.config.unet.merge, m.config.unet.swap_query) for name, m in models.items()} == {
        "none": ("fuse", "swapped"),
        "temporal queries": ("swap", "temporal"),
        "spatial queries": ("swap", "spatial"),
        "swapped": ("swap", "swapped"),
    }
    # Fresh weights depend on the seed alone.
    key = "input_blocks.1.1.merge.to_q.weight"
    fresh = models["swapped"].unet.state_dict()[key]
    assert torch.equal(fresh, models["spatial queries"].unet.state_dict()[key])
    assert not torch.equal(fresh, begin(start, "swapped", 1).unet.state_dict()[key])


def test_runs_see_the_same_but_learn_differently(whole: tuple[Path, Comparison]) -> None:
    outcomes = {name: found[0] for name, found in whole[1].outcomes.items()}
    assert tuple(outcomes) == MERGES
    first = outcomes["none"]
    for outcome in outcomes.values():
        assert outcome.before == pytest.approx(first.before, rel=1e-4)
        # The first loss is that of the same batch with the same noise and the same output.
        assert outcome.losses[0] == pytest.approx(first.losses[0], rel=1e-4)
        assert len(outcome.losses) == BUDGET.schedule.steps
        assert outcome.after != pytest.approx(outcome.before, rel=1e-4)
    assert len({outcome.after for outcome in outcomes.values()}) == len(MERGES)
    assert not whole[1].missing


def test_finished_runs_stay_and_others_repeat(whole: tuple[Path, Comparison]) -> None:
    folder, found = whole
    files = sorted((folder / "merges").glob("*.json"))
    assert len(files) == len(MERGES)
    again, kept = files[0], files[1]
    again.unlink()
    times = kept.stat().st_mtime_ns
    assert compare(recipe(folder), folder / "merges", MERGES, (0,), BUDGET, 1) == found
    assert kept.stat().st_mtime_ns == times
    # A result of another budget does not count, and is not lost either.
    longer = replace(BUDGET, objective=Objective(timestep_shift=2.0))
    with pytest.raises(ValueError, match=r"objective\.timestep_shift \(4\.0, not 2\.0\)"):
        read_outcome(Place(folder / "merges"), "none", 0, longer)
    assert kept.stat().st_mtime_ns == times


def test_a_killed_command_goes_on_with_the_same_numbers(tmp_path: Path, whole: tuple[Path, Comparison]) -> None:
    folder = tmp_path / "merges"
    command = subprocess.Popen([sys.executable, "-c", COMMAND, str(tmp_path)], stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    # Until one run is done and another is under way.
    while not (any(folder.glob("*.json")) and any(folder.glob("work/*/states/*-step*"))):
        assert command.poll() is None, command.stderr and command.stderr.read().decode()
        assert time.monotonic() < until
        time.sleep(0.01)
    command.kill()
    command.communicate()
    done = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    assert len(done) < len(MERGES)
    there = compare(recipe(tmp_path), folder, MERGES, (0,), BUDGET, 1, train=False)
    assert {f"{name.replace(' ', '-')}-{seed}.json" for name, seed in there.missing} | done.keys() == {
        path.name for path in (whole[0] / "merges").glob("*.json")
    }
    assert compare(recipe(tmp_path), folder, MERGES, (0,), BUDGET, 1).outcomes == whole[1].outcomes
    assert all((folder / name).read_bytes() == content for name, content in done.items())
    assert not any(folder.glob("work/*/states/*-step*"))


def test_table_says_means_spreads_and_every_seed(whole: tuple[Path, Comparison]) -> None:
    template = whole[1].outcomes["none"][0]
    outcomes = {
        "none": [
            replace(template, seed=seed, after=after, scores=dict.fromkeys(template.scores, score))
            for seed, after, score in ((0, (0.1, 0.3), 0.5), (1, (0.2, 0.6), 1.0))
        ]
    }
    text = table(outcomes, BUDGET)
    assert "| none | 0.30000 | 0.14142 | 0.20000 | 0.40000 | 0.15000 | 0.45000 |" in text
    assert "| none | 75% (50%, 100%) |" in text
