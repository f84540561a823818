"""Curation by the real command, stopped, broken and continued in every way: its rows are those of a run in peace."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from videofactory_core.video import write_video

pytest.importorskip("pyarrow")
pytest.importorskip("scenedetect")

FPS = 8
# Of which two give one clip and the others two: 200 clips.
VIDEOS = 101
DEADLY = "000.mp4"
NEEDS_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
RUNNERS = ["local", pytest.param("ray", marks=NEEDS_RAY)]
CONFIG = """
[scenes]
min_seconds = 0.5
max_seconds = 1.0
[motion]
estimator = "flow:estimator"
width = 64
fps = 4
"""
# Notes each process in which it is opened, and ends that which is shown white.
FLOW = """
import os
import numpy as np

def estimator(weights):
    with open(os.environ["OPENED"], "a") as file:
        file.write(f"{os.getpid()}\\n")
    def estimate(first, second):
        if first.min() > 240:
            os._exit(9)
        return np.stack([second.mean(2) - first.mean(2)] * 2, 2).astype(np.float32)
    return estimate
"""
Table = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small videos of a square that moves, the first of which is white throughout."""
    folder = tmp_path_factory.mktemp("runs") / "videos"
    folder.mkdir()
    for number in range(VIDEOS):
        random = np.random.default_rng(number)
        frames = np.repeat(np.kron(random.random((6, 8, 3)), np.ones((8, 8, 1)))[None], FPS * (1 + (number > 1)), 0)
        for i, frame in enumerate(frames):
            left = i * random.integers(1, 3)
            frame[16:32, left : left + 16] = random.random(3)
        if number == 0:
            frames[:] = 1.0
        write_video(folder / f"{number:03}.mp4", torch.from_numpy(frames).float(), FPS)
    return folder


@dataclass(frozen=True)
class Place:
    """A folder in which commands are given, and what they find around them."""

    folder: Path
    around: dict[str, str]
    # Processes of commands that were stopped.
    stopped: list[psutil.Process] = field(default_factory=list)

    def start(self, videos: Path, runner: str) -> subprocess.Popen[str]:
        """A curation of `videos` into `out`, under way; paths are relative where they can be."""
        command = [sys.executable, "-m", "videofactory_train", "curate", str(videos), "--out", "out", "--workers", "2"]
        command += ["--config", "curate.toml", "--stages", "scenes,keyframe,motion", "--runner", runner]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **self.around},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            # As a shell does, so that Ctrl-C reaches all that it starts.
            start_new_session=True,
        )

    def finish(self, videos: Path, runner: str) -> Table:
        """A whole run, and what there is then."""
        run = self.start(videos, runner)
        said, _ = run.communicate(timeout=900)
        assert run.returncode == 0, said
        return self.table()

    def wait(self, run: subprocess.Popen[str], rows: float) -> None:
        """Until there are so many rows of all stages."""
        while self.done() < rows:
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.01)

    def stop(self, run: subprocess.Popen[str], number: int) -> str:
        """Send a signal to a run that is under way; returns what it has said until then."""
        assert run.poll() is None, run.communicate()[0]
        self.stopped.extend(psutil.Process(run.pid).children(recursive=True))
        os.killpg(run.pid, number) if number == signal.SIGINT else run.kill()
        return run.communicate(timeout=60)[0]

    def table(self) -> Table:
        """The rows of every stage, and the sources, each of which must be there once; of paths, the file's name."""
        import pyarrow.parquet as pq

        found: Table = {}
        for folder in [self.folder / "out" / "sources", *(self.folder / "out" / "stages").iterdir()]:
            rows = [row for part in folder.glob("part-*") for row in pq.read_table(part).to_pylist()]
            name = folder.name.partition("@")[0]
            identity = "source_id" if name == "sources" else "clip_id"
            for row in rows:
                row |= {"path": Path(row["path"]).name} if row.get("path") else {}
            found[name] = {row[identity]: row for row in rows}
            assert len(found[name]) == len(rows), f"{name} has a row twice"
        return found

    def done(self) -> int:
        """How many rows there are, of all stages."""
        import pyarrow.parquet as pq

        return sum(pq.read_metadata(part).num_rows for part in (self.folder / "out").glob("stages/*/part-*"))


def make_place(folder: Path) -> Place:
    (folder / "curate.toml").write_text(CONFIG, encoding="utf-8")
    (folder / "flow.py").write_text(FLOW, encoding="utf-8")
    paths = [str(folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    around = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENED": str(folder / "opened")}
    # A Ray of its own, which keeps its password in the home folder unless it is told one.
    return Place(folder, {**around, "RAY_ADDRESS": "", "RAY_AUTH_TOKEN": "0" * 64})


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = make_place(tmp_path)
    # Ray's sockets do not take long paths.
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as short:
        yield replace(place, around={**place.around, "RAY_TMPDIR": short})
        until = time.monotonic() + 60
        while left := [process for process in place.stopped if is_at_work(process)]:
            assert time.monotonic() < until, f"{left} are still there"
            time.sleep(0.05)
        for process in place.stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture(scope="module")
def in_peace(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """What comes of all videos in one go."""
    return make_place(tmp_path_factory.mktemp("peace")).finish(videos, "local")


def of(sources: Sequence[str], found: Table) -> Table:
    """The part of a table that is about these videos."""
    ids = {row["source_id"] for row in found["sources"].values() if row["path"] in sources}
    clips = {clip for clip, row in found["scenes"].items() if row["source_id"] in ids}
    return {name: {key: row for key, row in rows.items() if key in ids | clips} for name, rows in found.items()}


def some(videos: Path, folder: Path, count: int) -> Path:
    """A folder with the first videos."""
    folder.mkdir(exist_ok=True)
    for path in sorted(videos.iterdir())[:count]:
        shutil.copy2(path, folder)
    return folder


def is_at_work(process: psutil.Process) -> bool:
    try:
        # Two agents of Ray's do nothing but look for it for another minute, when it is killed before they have met it.
        return process.status() != psutil.STATUS_ZOMBIE and "agent" not in " ".join(process.cmdline()).lower()
    except psutil.NoSuchProcess:
        return False


def test_what_comes_in_peace(in_peace: Table) -> None:
    assert {name: len(rows) for name, rows in in_peace.items()} == {
        "sources": VIDEOS,
        "scenes": 200,
        "keyframe": 200,
        "motion": 200,
    }
    (white,) = of([DEADLY], in_peace)["motion"].values()
    assert white["error"] == "the process that worked on it ended without a word"
    assert sum(row["status"] == "ok" for row in in_peace["motion"].values()) == 199
    assert len({row["o_avg"] for row in in_peace["motion"].values()}) == 200


@pytest.mark.parametrize(("runner", "count"), [("local", VIDEOS), pytest.param("ray", 51, marks=NEEDS_RAY)])
def test_ten_kills_change_nothing(
    runner: str, count: int, videos: Path, in_peace: Table, place: Place, tmp_path: Path
) -> None:
    given = some(videos, tmp_path / "videos", count)
    expected = of([path.name for path in given.iterdir()], in_peace)
    whole = sum(len(rows) for name, rows in expected.items() if name != "sources")
    random = np.random.default_rng(0)
    for moment in sorted(random.uniform(0, 0.8 * whole, 10)):
        run = place.start(given, runner)
        # Some come while it works, and some before it has begun.
        seconds = random.uniform(0, 0.1 if place.done() < moment else 1.5)
        place.wait(run, moment)
        time.sleep(seconds)
        place.stop(run, signal.SIGKILL)
    assert place.finish(given, runner) == expected
    # However many tasks a process has had.
    opened = (tmp_path / "opened").read_text(encoding="utf-8").split()
    assert len(opened) == len(set(opened))


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C goes to everything with this window there")
@pytest.mark.parametrize("runner", RUNNERS)
def test_interrupted_then_grown_and_continued_here(
    runner: str, videos: Path, in_peace: Table, place: Place, tmp_path: Path
) -> None:
    given = some(videos, tmp_path / "videos", 10)
    run = place.start(given, runner)
    place.wait(run, 1)
    said = place.stop(run, signal.SIGINT)
    assert run.returncode == 130
    assert said.splitlines()[-1] == "videofactory: interrupted; run the same command again to go on"
    assert "Traceback" not in said
    some(videos, given, 20)
    assert place.finish(given, "local") == of([path.name for path in given.iterdir()], in_peace)


def test_sound_sources_do_not_suffer_from_broken_ones(
    videos: Path, in_peace: Table, place: Place, tmp_path: Path
) -> None:
    """Every other one is broken, in one of many ways."""
    given = some(videos, tmp_path / "videos", VIDEOS)
    sound, broken = [], []
    for number, path in enumerate(sorted(given.iterdir())):
        if number % 2:
            sound.append(path.name)
            continue
        broken.append(path.name)
        content, random = path.read_bytes(), np.random.default_rng(number)
        length, middle = len(content), len(content) // 2
        ways = [
            b"",
            content[:100],
            content[:middle],
            random.bytes(length),
            content[:middle] + random.bytes(200) + content[middle + 200 :],
            content[middle:],
            content.replace(b"moov", b"free"),
            bytes(length),
        ]
        path.write_bytes(ways[number // 2 % len(ways)])
    found, expected = place.finish(given, "local"), of(sound, in_peace)
    assert of(sound, found) == expected
    failed = of(broken, found)["scenes"].values()
    assert sum(row["status"] == "error" and bool(row["error"]) for row in failed) > 0.7 * len(broken)
