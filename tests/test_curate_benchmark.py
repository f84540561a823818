"""The benchmark of curation, at a size at which it says nothing about speed."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("scenedetect")

from PIL import Image
from videofactory_train.curate.sources import find_sources

from benchmarks.curate import (
    CLIPS,
    HOURS,
    SCENES,
    VIDEOS,
    Bytes,
    Rate,
    Size,
    alternate,
    beside_scenedetect,
    core_hours,
    on_all_cores,
    overhead,
    plan,
    ratio,
    stages,
    videos,
)
from videofactory_core.video import probe

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = Size(videos=2, few=1, width=160, height=96, fps=8, idle=6, rounds=1, processes=2)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    with videos(TINY) as made:
        for path in made.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_drawn_videos_differ_and_show_their_scenes(
    drawn: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = sorted(drawn.iterdir())
    assert first.read_bytes() != second.read_bytes()
    assert probe(first).duration == pytest.approx(sum(SCENES), abs=0.2)
    monkeypatch.setenv("OPENCV_FFMPEG_THREADS", "1")
    beside_scenedetect(list(find_sources([drawn])), TINY)
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells[1:4]] == ["2", "6", "6"]
    assert float(cells[4]) > 0


def test_stages_are_measured_clip_by_clip(drawn: Path) -> None:
    rates, stored = stages(list(find_sources([drawn])), TINY)
    assert set(rates) == set(stored) >= {"scenes", "keyframe", "motion"}
    for name, rate in rates.items():
        assert rate.clips == 6
        assert rate.video == pytest.approx(2 * sum(SCENES), abs=0.5)
        assert rate.took > 0
        assert rate.decoding > 0
        assert stored[name].part > 0
    # Pictures are most of what is stored.
    picture = io.BytesIO()
    Image.new("RGB", (160, 96)).save(picture, "JPEG")
    assert stored["keyframe"].row > len(picture.getvalue()) > stored["motion"].row


def test_videos_that_are_no_videos_are_named_and_left_out(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "good.mp4").write_bytes(min(drawn.iterdir()).read_bytes())
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    sources = list(find_sources([tmp_path]))
    rates, _ = stages(sources, TINY)
    assert rates["scenes"].clips == 3
    assert "left out" in capsys.readouterr().out
    monkeypatch.setenv("OPENCV_FFMPEG_THREADS", "1")
    beside_scenedetect(sources, TINY)
    assert "| 1 | 3 | 3 |" in capsys.readouterr().out


def test_a_folder_of_ones_own_takes_the_place_of_drawn_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VIDEOS, str(tmp_path))
    with videos(TINY) as folder:
        assert folder == tmp_path


def test_processes_are_compared(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_all_cores(list(find_sources([drawn])), TINY, ["scenes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith(("| 1 ", "| 2 "))] == ["1", "2"]
    assert "bar: 1.6 times one" in lines


def test_runners_are_compared_where_nothing_is_to_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.curate.find_spec", lambda name: None)
    overhead(replace(TINY, processes=1))
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    assert cells[1].strip() == "local"
    assert float(cells[3]) > 0


def test_runs_take_turns() -> None:
    order: list[str] = []
    found = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b", "a", "b"]
    assert [len(values) for values in found.values()] == [2, 2]
    assert ratio([2, 30, 8], [1, 10, 2]) == 3


def test_the_plan_goes_by_hours_or_by_clips(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten times real time, and two clips a second."""
    rate = Rate(clips=20, video=100.0, took=10.0, decoding=5.0)
    assert core_hours("scenes", rate) == core_hours("motion", rate) == pytest.approx(HOURS / 10)
    assert core_hours("keyframe", rate) == core_hours("text", rate) == pytest.approx(CLIPS / 3600 / 2)
    plan({"motion": rate}, {"motion": Bytes(1600.0, 100.0)})
    # 8.1 M parts of 16 rows each: 13 GB of parts and 13 GB of rows.
    assert "| motion | 37,150 | 1,486 | 37.1 | 8,125,000 | 0.026 |" in capsys.readouterr().out
