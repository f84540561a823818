"""Curation from videos to kept clips: what is on disk is done, whatever happens to the processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from videofactory_train.cli import main
from videofactory_train.curate import export as module
from videofactory_train.curate import runner
from videofactory_train.curate.config import CurateConfig, read_config
from videofactory_train.curate.curation import Curation
from videofactory_train.curate.decide import Decision, Rules, decide
from videofactory_train.curate.figures import Bars, Histogram
from videofactory_train.curate.report import SCORES, count
from videofactory_train.curate.stage import Row, Stage, Work
from videofactory_train.curate.store import Store
from videofactory_train.curate.work import Task, carry_out
from videofactory_train.data.sources import read_dataset
from videofactory_train.recipe import read_recipe

from videofactory_core.video import probe, read_frames, write_video

if TYPE_CHECKING:
    import pyarrow as pa

pytest.importorskip("pyarrow")
pytest.importorskip("scenedetect")
pytestmark = pytest.mark.usefixtures("one_thread")

FPS = 8
COMMAND = "import sys; from videofactory_train.cli import main; sys.exit(main())"


def shots(path: Path, number: int, scenes: int = 3, seconds: float = 2.5) -> None:
    """A video of cuts between textures, each with a square that moves over it."""
    pictures = np.random.default_rng(number)
    frames = []
    for scene in range(scenes):
        ground = np.kron(pictures.random((6, 8, 3)), np.ones((8, 8, 1)))
        for i in range(round(seconds * FPS)):
            frame = ground.copy()
            left = 2 + (2 * i + scene) % 40
            frame[16:32, left : left + 16] = pictures.random(3)
            frames.append(frame)
    write_video(path, torch.from_numpy(np.stack(frames)).float(), FPS)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of three scenes, one of which has a caption."""
    folder = tmp_path_factory.mktemp("curate") / "videos"
    folder.mkdir()
    for number in range(6):
        shots(folder / f"{number}.mp4", number)
    (folder / "0.txt").write_text("squares on the move", encoding="utf-8")
    return folder


STAGES = "scenes,keyframe,motion"


@pytest.fixture(scope="module")
def curated(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of them in one go."""
    out = tmp_path_factory.mktemp("out") / "curated"
    assert main(["curate", str(videos), "--out", str(out), "--stages", STAGES, "--workers", "1"]) == 0
    return out


def table(folder: Path) -> list[tuple[Row, Decision]]:
    return list(Curation.read(folder).clips())


def test_videos_become_measured_clips(curated: Path, videos: Path) -> None:
    found = table(curated)
    assert len(found) == 18
    for row, decision in found:
        assert row["end"] - row["start"] == pytest.approx(2.5, abs=0.01)
        assert row["o_avg"] > 0.2
        assert decision.kept
        assert decision.errors == ()
    assert {row["caption"] for row, _ in found} == {None, "squares on the move"}
    assert len({row["clip_id"] for row, _ in found}) == 18


def test_what_is_done_is_not_done_again(curated: Path, videos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in curated.rglob("part-*")}
    assert main(["curate", str(videos), "--out", str(curated), "--stages", STAGES, "--workers", "1"]) == 0
    assert "scenes: 0 done now" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in curated.rglob("part-*")} == before


def test_thresholds_change_without_anything_being_computed(curated: Path, tmp_path: Path) -> None:
    config = Curation.read(curated).config
    strict = Curation(curated, replace(config, decide=Rules(o_avg=1e6)))
    assert {decision.removed_by for _, decision in strict.clips()} == {("motion",)}
    # But another length of the clips is another scene stage.
    other = replace(config, scenes=replace(config.scenes, min_seconds=1.0))
    assert list(Curation(curated, other).clips()) == []


def test_new_videos_join_the_old_ones(videos: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    command = ["curate", str(folder), "--out", str(out), "--stages", "scenes", "--workers", "1"]
    for number, name in enumerate(("0.mp4", "1.mp4"), 1):
        (folder / name).write_bytes((videos / name).read_bytes())
        assert main(command) == 0
        assert len(table(out)) == 3 * number


def test_broken_sources_are_noted_and_the_rest_goes_on(videos: Path, curated: Path, tmp_path: Path) -> None:
    """Every other video is broken, and the rows of the others are the same as ever."""
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for number in range(6):
        content = (videos / f"{number}.mp4").read_bytes()
        (folder / f"{number}.mp4").write_bytes(content if number % 2 else content[:100])
    (folder / "empty.mp4").touch()
    assert main(["curate", str(folder), "--out", str(out), "--stages", STAGES, "--workers", "1"]) == 0
    sound = {row["clip_id"]: row for row, _ in table(out)}
    expected = {row["clip_id"]: row for row, _ in table(curated)}
    assert len(sound) == 9
    for name, row in sound.items():
        for key in ("start", "end", "o_avg", "o_md", "affine_residual"):
            assert row[key] == expected[name][key]
    numbers = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert len(numbers["failed_sources"]) == 4
    assert all(error for _, error in numbers["failed_sources"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Errors (4)" in page
    assert "empty.mp4" in page


def test_what_failed_is_done_again_when_asked(videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    for name in ("0.mp4", "1.mp4"):
        (folder / name).write_bytes((videos / name).read_bytes())

    def run(stages: str, *more: str) -> str:
        assert main(["curate", str(folder), "--out", str(out), "--workers", "1", "--stages", stages, *more]) == 0
        return capsys.readouterr().out

    run("scenes")
    (folder / "1.mp4").rename(tmp_path / "away.mp4")
    assert "keyframe: 6 done now, 3 of them failed" in run("keyframe")
    (tmp_path / "away.mp4").rename(folder / "1.mp4")
    assert "keyframe: 0 done now" in run("keyframe")
    assert [row["errors"][:9] for row, _ in table(out) if row["errors"]] == ["keyframe:"] * 3
    assert "motion: 6 done now" in run("keyframe,motion", "--retry")
    assert not any(row["errors"] for row, _ in table(out))


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed otherwise there")
def test_a_run_that_is_killed_goes_on_to_the_same_rows(videos: Path, curated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, "curate", str(videos), "--out", str(out), "--workers", "2"]
    moments = np.random.default_rng(0)
    for _ in range(3):
        run = subprocess.Popen([*command, "--stages", STAGES], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(2.0, 6.0))
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    subprocess.run([*command, "--stages", STAGES], check=True, capture_output=True)
    found, expected = table(out), table(curated)
    assert found == expected


@dataclass(frozen=True)
class Fragile(Stage):
    """Fails for some rows, and ends its process for others."""

    name: ClassVar[str] = "fragile"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ("scenes",)
    deadly: str = ""

    @classmethod
    def columns(cls) -> dict[str, Any]:
        import pyarrow as pa

        return {"length": pa.int64()}

    def open(self) -> Work:
        def work(rows: Sequence[Row]) -> list[Row]:
            for row in rows:
                if row["clip_id"] == self.deadly:
                    os._exit(7)
                if row["clip_id"].endswith("3"):
                    raise KeyError("three")
            return [{"length": len(row["clip_id"])} for row in rows]

        return work


def fragile_task(folder: Path, stage: Fragile, ids: Sequence[str]) -> Task:
    import pyarrow as pa

    schema = pa.schema({"clip_id": pa.string(), "status": pa.string()})
    store = Store(folder)
    store.write("scenes@0", [{"clip_id": name, "status": "ok"} for name in ids], schema, "clip_id")
    (part,) = store.parts("scenes@0")
    return Task(stage, "fragile@0", folder, ((part, tuple(ids)),))


def results(folder: Path) -> dict[str, tuple[str, int | None, str | None]]:
    import pyarrow.parquet as pq

    rows = [row for path in (folder / "stages" / "fragile@0").glob("part-*") for row in pq.read_table(path).to_pylist()]
    assert len({row["clip_id"] for row in rows}) == len(rows)
    return {row["clip_id"]: (row["status"], row["length"], row["error"]) for row in rows}


def test_a_bad_row_does_not_spoil_its_neighbours(tmp_path: Path) -> None:
    outcome = carry_out(fragile_task(tmp_path, Fragile(), ["a1", "a2", "a3", "a4"]))
    assert (outcome.rows, outcome.failed) == (4, 1)
    found = results(tmp_path)
    assert found.pop("a3") == ("error", None, "KeyError: 'three'")
    assert set(found.values()) == {("ok", 2, None)}


def test_a_row_that_ends_its_process_is_found_and_left(tmp_path: Path) -> None:
    names = [f"b{i}" for i in range(5, 10)]
    task = fragile_task(tmp_path, Fragile(deadly="b7"), names)
    # Two rows a task, so that others are under way when the process ends.
    part, _ = task.rows[0]
    tasks = [replace(task, rows=((part, tuple(names[first : first + 2])),)) for first in range(0, 5, 2)]
    outcomes = list(runner.local(2)(tasks))
    assert sum(outcome.rows for outcome in outcomes) == 5
    found = results(tmp_path)
    assert found.pop("b7") == ("error", None, "the process that worked on it ended without a word")
    assert found == {name: ("ok", 2, None) for name in names if name != "b7"}


def test_a_part_that_cannot_be_read_is_made_again(videos: Path, curated: Path, tmp_path: Path) -> None:
    import shutil

    out = tmp_path / "out"
    shutil.copytree(curated, out)
    spoiled = sorted(out.glob("stages/motion@*/part-*"))[0]
    spoiled.write_bytes(b"no parquet")
    assert main(["curate", str(videos), "--out", str(out), "--stages", STAGES, "--workers", "1"]) == 0
    assert table(out) == table(curated)


def row(**changes: Any) -> Row:
    scores = {"text_edge": 0.0, "o_avg": 5.0, "o_md": 4.0, "aesthetic": 5.0}
    return {"start": 0.0, "end": 3.0, "name": "a clip", "errors": "", **scores, **changes}


def joined(*rows: Row) -> pa.Table:
    """A table as of `Curation.table`."""
    import pyarrow as pa

    texts = dict.fromkeys(("name", "caption", "caption_text", "errors"), pa.string())
    return pa.Table.from_pylist(rows, pa.schema({**texts, **dict.fromkeys(("start", "end", *SCORES), pa.float64())}))


@pytest.mark.parametrize(
    ("changes", "removed_by"),
    [
        ({}, ()),
        ({"end": 1.9}, ("duration",)),
        ({"end": 2.0}, ()),
        ({"text_edge": 0.5}, ("text",)),
        ({"text_edge": 0.49}, ()),
        ({"o_avg": 0.2}, ("motion",)),
        ({"o_avg": 8.0}, ("motion",)),
        ({"o_avg": 20.0, "o_md": 6.1}, ()),
        ({"aesthetic": 3.99}, ("aesthetics",)),
        ({"aesthetic": 4.0}, ()),
        ({"end": 1.0, "o_avg": 0.0, "aesthetic": 1.0}, ("duration", "motion", "aesthetics")),
        ({"text_edge": None, "o_avg": None, "o_md": None, "aesthetic": None}, ()),
    ],
)
def test_the_papers_rules(changes: dict[str, Any], removed_by: tuple[str, ...]) -> None:
    assert list(decide(joined(row(**changes)), Rules())) == [Decision(removed_by, ())]


def test_rules_are_counted_alone_and_in_order() -> None:
    rows = [row(), row(end=1.0, o_avg=0.0), row(o_avg=0.0), row(aesthetic=None, errors="motion: broken\n")]
    numbers = count(joined(*rows), Rules())
    assert (numbers.clips, numbers.kept) == (4, 1)
    found = {removal.rule: (removal.alone, removal.in_order, removal.measured) for removal in numbers.removals}
    assert found == {"duration": (1, 1, 4), "text": (0, 0, 4), "motion": (2, 1, 4), "aesthetics": (0, 0, 3)}
    assert numbers.errors == (("a clip", "motion: broken"),)
    assert sum(numbers.scores["aesthetic"].counts) == 3


def test_figures_count_every_value_once() -> None:
    values = np.array([0.5, 2.0, 3.0, 5.0, 99.0])
    bars = Bars.of(values, (2, 5), "s")
    assert (bars.labels, bars.counts) == (("0-2 s", "2-5 s", "from 5 s"), (1, 2, 2))
    histogram = Histogram.of(values, (4.0,))
    assert sum(histogram.counts) == 5
    assert histogram.low <= 0.5
    assert histogram.high >= 4.8
    # The one at the end, and the one beyond it.
    assert histogram.counts[-1] == 2


def test_kept_clips_are_cut_out(curated: Path, videos: Path, tmp_path: Path) -> None:
    assert main(["curate", "export", str(curated), "--to", str(tmp_path / "clips")]) == 0
    found = sorted((tmp_path / "clips").glob("*.mp4"))
    assert len(found) == 18
    (clip,) = [one for one, _ in table(curated) if one["clip_id"] == found[1].stem]
    assert probe(found[1]).frames == 20
    times = [clip["start"] + i / FPS for i in range(20)]
    source = read_frames(clip["path"], times).float()
    assert (read_frames(found[1], [i / FPS for i in range(20)]).float() - source).abs().mean() < 4
    assert {path.read_text(encoding="utf-8") for path in (tmp_path / "clips").glob("*.txt")} == {
        "",
        "squares on the move",
    }


@pytest.mark.parametrize("form", ["jsonl", "webdataset"])
def test_lists_and_shards_are_datasets_of_the_trainer(curated: Path, form: str, tmp_path: Path) -> None:
    assert main(["curate", "export", str(curated), "--format", form, "--to", str(tmp_path / "made")]) == 0
    clips = read_dataset(tmp_path / "made")
    assert len(clips) == 18
    assert sum(clip.caption == "squares on the move" for clip in clips) == 3


@pytest.mark.parametrize("form", ["folder", "webdataset"])
def test_an_export_has_what_stays_and_no_more(
    curated: Path, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLIPS", 2)
    monkeypatch.setattr(module, "cut", lambda row, path: path.write_bytes(row["clip_id"].encode()))
    (tmp_path / "mine.mp4").touch()
    (tmp_path / "mine.tar").write_bytes(b"")

    def stay(limit: float) -> set[str]:
        config = replace(Curation.read(curated).config, decide=Rules(o_avg=limit))
        curation = Curation(curated, config)
        count = module.export(curation, form, tmp_path, lambda rows: rows)
        kept = {row["clip_id"] for row, decision in curation.clips() if decision.kept}
        names = [path.name for path in tmp_path.glob("*.mp4")]
        for path in tmp_path.glob("0*.tar"):
            with tarfile.open(path) as shard:
                names += shard.getnames()
        assert {name[:-4] for name in names if name.endswith(".mp4")} - {"mine"} == kept
        assert count == len(kept)
        return kept

    middle = sorted(row["o_avg"] for row, _ in table(curated))[9]
    assert len(stay(0.2)) == 18
    assert 0 < len(stay(middle)) < 18
    assert len(stay(0.2)) == 18
    assert (tmp_path / "mine.mp4").is_file()
    assert (tmp_path / "mine.tar").is_file()


def test_the_trainer_reads_a_curation(curated: Path, tmp_path: Path) -> None:
    clips = read_dataset(curated)
    assert len(clips) == 18
    assert sum(clip.caption is None for clip in clips) == 15
    assert all(clip.end is not None and clip.end - clip.start == pytest.approx(2.5, abs=0.01) for clip in clips)
    recipe = Path("train/recipes/lora-12gb.toml")
    changed = read_recipe(recipe, [f"datasets.path={curated.as_posix()}", "schedule.steps=7"])
    assert {dataset.path for dataset in changed.datasets} == {curated.as_posix()}  # type: ignore[attr-defined]
    assert changed.schedule.steps == 7  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "message"),
    [("schedule.steps", "changes nothing"), ("datasets.9.path=x", "leads nowhere"), ("schedule.step=7", "'steps'")],
)
def test_changes_that_cannot_be_made_are_refused(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_recipe(Path("train/recipes/lora-12gb.toml"), [change])


def test_settings_are_checked_with_the_nearest_name(tmp_path: Path) -> None:
    path = tmp_path / "curate.toml"
    path.write_text("[motion]\nwidht = 320\n", encoding="utf-8")
    with pytest.raises(ValueError, match="did you mean 'width'"):
        read_config(path)
    # The file that shows all settings shows their defaults.
    assert read_config(Path("train/curate/curate.toml")) == CurateConfig()
    path.write_text("[decide]\naesthetic = 5.0\n", encoding="utf-8")
    assert read_config(path) == CurateConfig(decide=Rules(aesthetic=5.0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no file or folder nowhere"),
        (["{videos}", "--stages", "scense"], "there is no stage 'scense'"),
        (["{videos}", "--workers", "0"], "use 1 or more"),
        (["{videos}", "--config", "none.toml"], "none.toml"),
    ],
)
def test_bad_input_gets_one_sentence(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    given = [argument.format(videos=videos) for argument in arguments]
    assert main(["curate", *given, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["curate", "report", str(tmp_path)]) == 2
    assert "is no curation" in capsys.readouterr().err
