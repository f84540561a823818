"""The comparison of merges: runs start alike, repeat, and go on behind an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from videofactory_train.loop import Schedule
from videofactory_train.recipe import AutoencoderStage, DenoiserStage, ModelRecipe

from benchmarks.merges import MERGES, Budget, Place, begin, compare, prepare, table
from videofactory_core.objective import Objective

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = Schedule(steps=2, batch_size=2, learning_rate=1e-3)
BUDGET = Budget(
    schedule=Schedule(steps=6, batch_size=2, learning_rate=1e-2, warmup_steps=1, save_every=2),
    clips=3,
    quantiles=2,
    samples=1,
)
# What the command does, in a process that can be killed.
COMMAND = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from test_merges import BUDGET, compare, recipe
if __name__ == "__main__":
    compare(recipe(Path(sys.argv[1])), Path(sys.argv[1]) / "merges", BUDGET, (0,), 2)
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
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """A comparison that nothing interrupted: its folder and its results."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, compare(recipe(folder), folder / "merges", BUDGET, (0,), 1)


def test_every_run_starts_from_the_same_output(tmp_path: Path) -> None:
    place = Place(tmp_path / "merges")
    prepare(recipe(tmp_path), place, BUDGET)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 4, 4, 8, generator=generator)
    context = torch.randn(2, 77, 16, generator=generator)
    models = {name: begin(place, name, 0) for name in MERGES}
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
    assert not torch.equal(fresh, begin(place, "swapped", 1).unet.state_dict()[key])


def test_runs_see_the_same_but_learn_differently(whole: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    results = {name: found[0] for name, found in whole[1].items()}
    assert list(results) == list(MERGES)
    first = results["none"]
    for result in results.values():
        assert result["before"] == pytest.approx(first["before"], rel=1e-4)
        # The first loss is that of the same batch with the same noise and the same output.
        assert result["losses"][0] == pytest.approx(first["losses"][0], rel=1e-4)
        assert len(result["losses"]) == BUDGET.schedule.steps
        assert result["after"] != pytest.approx(result["before"], rel=1e-4)
    assert len({tuple(result["after"]) for result in results.values()}) == len(MERGES)


def test_finished_runs_stay_and_others_repeat(whole: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    folder, results = whole
    files = sorted((folder / "merges").glob("*.json"))
    assert len(files) == len(MERGES)
    again, kept = files[0], files[1]
    again.unlink()
    times = kept.stat().st_mtime_ns
    assert compare(recipe(folder), folder / "merges", BUDGET, (0,), 1) == results
    assert kept.stat().st_mtime_ns == times
    # A result of another budget does not count.
    longer = replace(BUDGET, objective=Objective(timestep_shift=2.0))
    assert Place(folder / "merges").read("none", 0, longer) is None


def test_a_killed_command_goes_on_with_the_same_numbers(
    tmp_path: Path, whole: tuple[Path, dict[str, list[dict[str, Any]]]]
) -> None:
    folder = tmp_path / "merges"
    command = subprocess.Popen([sys.executable, "-c", COMMAND, str(tmp_path)], stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    # Until one run is done and another is under way.
    while not (any(folder.glob("*.json")) and any(folder.glob("states/*-step*"))):
        assert command.poll() is None, command.stderr and command.stderr.read().decode()
        assert time.monotonic() < until
        time.sleep(0.01)
    command.kill()
    command.communicate()
    done = {path.name: path.read_bytes() for path in folder.glob("*.json")}
    assert len(done) < len(MERGES)
    assert compare(recipe(tmp_path), folder, BUDGET, (0,), 1) == whole[1]
    assert all((folder / name).read_bytes() == content for name, content in done.items())
    assert not any(folder.glob("states/*-step*"))


def test_table_says_means_spreads_and_every_seed(whole: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    template = json.loads(json.dumps(whole[1]["none"][0]))
    results = {
        "none": [
            template | {"seed": seed, "after": after, "scores": dict.fromkeys(template["scores"], score)}
            for seed, after, score in ((0, [0.1, 0.3], 0.5), (1, [0.2, 0.6], 1.0))
        ]
    }
    text = table(results, BUDGET)
    assert "| none | 0.30000 | 0.14142 | 0.20000 | 0.40000 | 0.15000 | 0.45000 |" in text
    assert "| none | 75% (50%, 100%) |" in text
