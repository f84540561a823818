"""Many clips from a list of prompts: stopped and continued, by one process and by two, with refined prompts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from language_models import LanguageServer, better, language_server
from videofactory_train.data.moving_shapes import HELD_OUT, caption, draw, generator_for, random_scene
from videofactory_train.data.shape_checker import check, summarise
from videofactory_train.data.sources import read_dataset
from videofactory_train.evaluate import protocols, refine
from videofactory_train.evaluate.generate import Job, Settings, jobs_for, make_clips, read_prompts
from videofactory_train.evaluate.protocols import SHAPES, carry_out, judge_shapes, msrvtt, shapes, ucf101, webvid
from videofactory_train.evaluate.refine import Refinement

from videofactory_core import checkpoint
from videofactory_core.pipeline import generate
from videofactory_core.video import read_metadata, read_video, write_video

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ["a red circle", "ein grünes Quadrat", "a red circle", "two dogs"]
JOBS = jobs_for(PROMPTS, clips=2, seed=5)


@pytest.fixture(scope="module")
def settings(debug_checkpoint: Path) -> Settings:
    return Settings(debug_checkpoint, steps=2, device="cpu")


@pytest.fixture(scope="module")
def whole(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that one process made in one go."""
    out = tmp_path_factory.mktemp("whole") / "clips"
    assert make_clips(JOBS, out, settings) == len(JOBS)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_each_clip_is_that_of_its_prompt_and_seed(whole: Path, settings: Settings) -> None:
    assert [job.seed for job in JOBS] == list(range(5, 13))
    assert [job.number for job in JOBS] == [0, 0, 1, 1, 2, 2, 3, 3]
    names = ["generate.json", "metadata.jsonl", *(f"0000{job.number}-{job.seed}.mp4" for job in JOBS)]
    assert sorted(contents(whole)) == sorted(names)
    model = checkpoint.load(settings.checkpoint)
    for job in (JOBS[0], JOBS[3]):
        expected = generate(model, job.prompt, seed=job.seed, steps=2)
        write_video(whole.parent / "expected.mp4", expected, model.config.fps)
        found = read_video(whole / job.file)
        assert torch.equal(found.frames, read_video(whole.parent / "expected.mp4").frames)
        told = json.loads(found.metadata["videofactory"])
        assert (told["prompt"], told["seed"], told["steps"]) == (job.prompt, job.seed, 2)
    # The same prompt has noise of its own each time.
    assert (whole / "00000-5.mp4").read_bytes() != (whole / "00002-9.mp4").read_bytes()


def test_the_folder_is_a_dataset(whole: Path) -> None:
    clips = read_dataset(whole)
    assert [clip.caption for clip in clips] == [job.prompt for job in JOBS]
    assert [clip.path.name for clip in clips] == [job.file for job in JOBS]
    rows = [json.loads(line) for line in (whole / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[2] == {"file_name": "00001-7.mp4", "prompt": "ein grünes Quadrat", "refined": None, "seed": 7}


def copied(whole: Path, out: Path) -> dict[str, bytes]:
    out.mkdir()
    for name, content in contents(whole).items():
        (out / name).write_bytes(content)
    return contents(whole)


def test_what_is_there_and_whole_is_kept(whole: Path, settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "clips"
    expected = copied(whole, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert make_clips(JOBS, out, settings) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")} == before
    # Gone, cut short, empty, and another's; the list is written anew.
    (out / JOBS[0].file).unlink()
    (out / JOBS[1].file).write_bytes(expected[JOBS[1].file][:-400])
    (out / JOBS[2].file).write_bytes(b"")
    (out / JOBS[3].file).write_bytes(expected[JOBS[4].file])
    (out / "metadata.jsonl").unlink()
    assert make_clips(JOBS, out, settings) == 4
    assert contents(out) == expected


def test_prompts_that_have_changed_are_made_anew(whole: Path, settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "clips"
    expected = copied(whole, out)
    changed = jobs_for([*PROMPTS[:3], "three dogs", "four dogs"], clips=2, seed=5)
    assert make_clips(changed, out, settings) == 4
    assert json.loads(read_metadata(out / "00003-11.mp4")["videofactory"])["prompt"] == "three dogs"
    assert {name: content for name, content in contents(out).items() if name[:5] in ("00000", "00001", "00002")} == {
        name: content for name, content in expected.items() if name[:5] in ("00000", "00001", "00002")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3}, "steps is 2 there and 3 here"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' there and 'bfloat16' here"),
        ({"guidance_scale": 3.0, "sampler": "euler"}, "guidance_scale is 2.0 there and 3.0 here, and others"),
    ],
)
def test_a_folder_of_other_clips_is_left_alone(
    whole: Path, settings: Settings, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    expected = copied(whole, tmp_path / "clips")
    with pytest.raises(ValueError, match=rf"were made in another way \({message}\): name another folder"):
        make_clips(JOBS, tmp_path / "clips", replace(settings, **change))
    assert contents(tmp_path / "clips") == expected


def test_other_weights_under_the_same_name_are_another_way(whole: Path, settings: Settings, tmp_path: Path) -> None:
    copied(whole, tmp_path / "clips")
    model = checkpoint.load(settings.checkpoint)
    with torch.no_grad():
        next(model.unet.parameters()).add_(1e-3)
    checkpoint.save(tmp_path / settings.checkpoint.name, model, model.metadata)
    with pytest.raises(ValueError, match=r"sha256 is .*: name another folder"):
        make_clips(JOBS, tmp_path / "clips", replace(settings, checkpoint=tmp_path / settings.checkpoint.name))


def test_what_the_model_cannot_make_is_refused_before_anything_is_written(settings: Settings, tmp_path: Path) -> None:
    for change, message in (({"steps": 0}, "0 steps"), ({"width": 7}, "multiples of"), ({"frames": 0}, "at least 1")):
        with pytest.raises(ValueError, match=message):
            make_clips(JOBS, tmp_path / "clips", replace(settings, **change))
    assert not (tmp_path / "clips").exists()


# Processes

SCRIPT = """
import sys
from pathlib import Path
from videofactory_train.evaluate.generate import Settings, jobs_for, make_clips

if __name__ == "__main__":
    out, checkpoint, steps = sys.argv[1:]
    settings = Settings(Path(checkpoint), steps=int(steps), device="cpu")
    make_clips(jobs_for({prompts!r}, clips=2, seed=5), Path(out), settings)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def command(folder: Path, out: Path, settings: Settings) -> list[str]:
    script = folder / "make.py"
    script.write_text(SCRIPT.format(prompts=PROMPTS), encoding="utf-8")
    return [str(script), str(out), str(settings.checkpoint), str(settings.steps)]


def test_two_processes_make_what_one_makes(whole: Path, settings: Settings, tmp_path: Path) -> None:
    out = tmp_path / "clips"
    # What `accelerate launch` starts on GPUs.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, *command(tmp_path, out, settings)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("8 clips") == 1
    assert contents(out) == contents(whole)


def test_a_run_that_was_killed_goes_on(whole: Path, settings: Settings, tmp_path: Path) -> None:
    # Slow enough to be met in its midst.
    slow, out, expected = replace(settings, steps=100), tmp_path / "clips", tmp_path / "expected"
    process = subprocess.Popen([sys.executable, *command(tmp_path, out, slow)], env=environment())
    until = time.monotonic() + 240
    while not (out / JOBS[1].file).exists():
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL if os.name == "posix" else process.wait()
    there = [job for job in JOBS if (out / job.file).exists()]
    assert JOBS[:2] == there[:2]
    assert len(there) < len(JOBS)
    assert not (out / "metadata.jsonl").exists()
    few = JOBS[: len(there) + 1]
    assert make_clips(few, out, slow) == 1
    assert make_clips(few, expected, slow) == len(few)
    left = {name: content for name, content in contents(out).items() if not name.endswith(".tmp")}
    assert left == contents(expected)


# Refined prompts


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LanguageServer]:
    monkeypatch.setattr(refine, "PATIENCE", 2.0)
    monkeypatch.setattr(refine, "ATTEMPTS", 1)
    monkeypatch.setenv("no_proxy", "*")
    with language_server() as made:
        made.slowness = 6.0
        yield made


def test_refined_prompts_stand_beside_the_originals(
    server: LanguageServer, settings: Settings, whole: Path, tmp_path: Path
) -> None:
    out, said = tmp_path / "clips", []
    jobs = jobs_for(["a dog", "a page", "slow", "wrong key", "a dog"])
    asked = Refinement(server.address, "small")
    assert make_clips(jobs, out, settings, asked, said.append) == 5
    assert said[0].startswith("1 of 4 prompts refined by small, 3 stay as they were (")
    for words in ("timed out", "no chat completion", "refuses (401"):
        assert words in said[0]
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == [job.prompt for job in jobs]
    assert [row["refined"] for row in rows] == [better("a dog"), None, None, None, better("a dog")]
    assert [clip.caption for clip in read_dataset(out)] == [job.prompt for job in jobs]
    made_of = [json.loads(read_metadata(out / job.file)["videofactory"])["prompt"] for job in jobs]
    assert made_of == [better("a dog"), "a page", "slow", "wrong key", better("a dog")]
    # Another start asks about the others alone, and makes nothing anew.
    server.asked.clear()
    before = contents(out)
    assert make_clips(jobs, out, settings, asked, said.append) == 0
    assert sorted(server.asked) == ["a page", "slow", "wrong key"]
    assert contents(out) == before
    with pytest.raises(ValueError, match="refined_by is 'small' there and None here"):
        make_clips(jobs, out, settings)


def test_nobody_is_asked_unless_that_is_wanted(
    whole: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    make_clips(JOBS[:1], tmp_path / "clips", settings)
    assert (tmp_path / "clips" / JOBS[0].file).read_bytes() == (whole / JOBS[0].file).read_bytes()
    assert not (tmp_path / "clips" / "refined.jsonl").exists()


# Prompt files


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "a dog\n\n  ein Hund, süß  \r\n"),
        ("a.jsonl", '{"prompt": "a dog"}\n{"prompt": "ein Hund, süß", "seed": 3}\n'),
        ("a.csv", 'number,text\n1,a dog\n2,"ein Hund, süß"\n'),
        ("a.csv", "caption;number\na dog;1\nein Hund, süß;2\n"),
    ],
)
def test_prompts_are_read(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8-sig"))
    assert read_prompts(path) == ["a dog", "ein Hund, süß"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", r"a\.txt holds no prompts: write one in each line"),
        ("a.csv", b"number,words\n1,a dog\n", "line 2 has no prompt: call its column 'text' or 'caption' or 'prompt'"),
        ("a.jsonl", b'{"prompt": "a dog"}\n{"prompt": " "}\n', "line 2 has no prompt"),
        ("a.jsonl", b'{"prompt": "a dog"}\n{"prom', "line 2.*: mend or remove it"),
        ("a.mp4", b"\0\0\0\0ftypisom", "holds no prompts: name a .txt"),
    ],
)
def test_files_without_prompts_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_clips_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="there are no prompts"):
        jobs_for([])
    for settings in ({"clips": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match="cannot be made"):
            jobs_for(["a dog"], **settings)


# Protocols


def videos(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        frames = torch.full((4, 16, 16, 3), number / count)
        write_video(folder / f"{1000 + number}.mp4", frames, 8)
    return folder


def test_webvid_draws_pairs_of_what_is_there(tmp_path: Path) -> None:
    folder = videos(tmp_path / "videos", 12)
    listed = tmp_path / "webvid.csv"
    # One is not here, and one has no caption.
    rows = [f"{1000 + number},http://a/{number}.mp4,PT4S,1_2,clip {number}" for number in range(13) if number != 3]
    listed.write_text("\n".join(["videoid,contentUrl,duration,page_dir,name", *rows, "1003,http://a,PT4S,1_2,"]))
    plan = webvid(listed, [folder], pairs=5, seed=1)
    assert len(plan.jobs) == len({job.seed for job in plan.jobs}) == 5
    captions = [f"clip {int(Path(real.path).stem) - 1000}" for real in plan.real]
    assert captions == [real.text for real in plan.real] == [job.prompt for job in plan.jobs]
    assert "clip 3" not in captions
    assert webvid(listed, [folder], pairs=5, seed=1) == plan
    larger, other = webvid(listed, [folder], pairs=11, seed=1), webvid(listed, [folder], pairs=5, seed=2)
    assert larger.real[:5] == plan.real
    assert other.real != plan.real
    plan.write(tmp_path)
    assert [(clip.path, clip.caption) for clip in read_dataset(tmp_path / "real.jsonl")] == [
        (Path(real.path), real.text) for real in plan.real
    ]
    assert json.loads((tmp_path / "protocol.json").read_text())["prompts"] == 5
    with pytest.raises(ValueError, match="gives 11 captioned videos, and 12 pairs are asked for"):
        webvid(listed, [folder], pairs=12)


CLASSES = [f"Class{letter}{number}" for letter in "AB" for number in range(50)] + ["LongJump"]


def test_ucf101_has_a_hundred_clips_of_every_class(tmp_path: Path) -> None:
    classes = tmp_path / "classInd.txt"
    classes.write_bytes("".join(f"{number} {name}\r\n" for number, name in enumerate(CLASSES, 1)).encode())
    lines, table = tmp_path / "captions.txt", tmp_path / "captions.csv"
    lines.write_text("\n".join(f"people do {name}" for name in CLASSES))
    rows = [f"{name.lower() if number % 2 else name},people do {name}" for number, name in enumerate(CLASSES)]
    table.write_text("\n".join(["class,caption", *reversed(rows)]))
    plan = ucf101(lines, classes)
    assert len(plan.jobs) == len({job.seed for job in plan.jobs}) == 10_100
    assert plan.jobs[-1] == Job(100, "people do LongJump", 10_099)
    assert ucf101(table, classes) == plan
    table.write_text("\n".join(["class,caption", *rows[:-1]]))
    with pytest.raises(ValueError, match="lacks 1 classes such as LongJump"):
        ucf101(table, classes)
    lines.write_text("people do nothing")
    with pytest.raises(ValueError, match="has 1 captions and there are 101 classes"):
        ucf101(lines, classes)
    with pytest.raises(ValueError, match="names 1 classes and UCF-101 has 101"):
        ucf101(lines, lines)


def test_msrvtt_has_a_caption_of_each_test_video(tmp_path: Path) -> None:
    names = [f"video{7010 + number}" for number in range(2990)]
    sentences = [{"video_id": name, "caption": f"{name} {word}", "sen_id": 0} for word in "xyz" for name in names]
    listed = [{"video_id": name, "split": "test"} for name in names] + [{"video_id": "video1", "split": "train"}]
    path = tmp_path / "test_videodatainfo.json"
    told = {
        "info": {},
        "videos": listed,
        "sentences": [*sentences, {"video_id": "video1", "caption": "no", "sen_id": 1}],
    }
    path.write_text(json.dumps(told))
    plan = msrvtt(path, seed=1)
    prompts = [job.prompt for job in plan.jobs]
    assert [prompt.split()[0] for prompt in prompts] == names
    counts = [sum(prompt.endswith(word) for prompt in prompts) for word in "xyz"]
    assert min(counts) > 800
    assert msrvtt(path, seed=1) == plan
    assert msrvtt(path, seed=2).jobs != plan.jobs
    table = tmp_path / "captions.jsonl"
    table.write_text("\n".join(json.dumps(sentence) for sentence in reversed(sentences)))
    assert {job.prompt.split()[0] for job in msrvtt(table).jobs} == set(names)
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(prompts))
    assert msrvtt(lines, seed=1).jobs == plan.jobs
    lines.write_text("a dog")
    with pytest.raises(ValueError, match="has captions of 1 videos and MSR-VTT's test split has 2990"):
        msrvtt(lines)
    path.write_text('{"sentences": [{"caption": "a dog"}]}')
    with pytest.raises(ValueError, match="is not built as MSR-VTT's list is"):
        msrvtt(path)


def test_shapes_are_made_and_judged_without_files_of_the_user(settings: Settings, tmp_path: Path) -> None:
    plan = shapes()
    assert len(plan.jobs) == len(HELD_OUT) * 4 == SHAPES.prompts * SHAPES.clips
    assert {job.prompt for job in plan.jobs} == {caption(combination) for combination in HELD_OUT}
    assert [job.seed for job in plan.jobs[:5]] == [0, 1, 2, 3, 0]
    out = tmp_path / "clips"
    carry_out(replace(plan, jobs=plan.jobs[::50]), out, settings)
    verdicts = judge_shapes(out)
    assert [combination for combination, _ in verdicts] == [HELD_OUT[job.number] for job in plan.jobs[::50]]
    # Noise shows nothing.
    assert summarise(verdicts)["all"] == 0
    assert json.loads((out / "protocol.json").read_text())["name"] == "shapes"
    assert not (out / "real.jsonl").exists()


def drawn(out: Path, combinations: Sequence[Any]) -> None:
    """Clips that show what they should, as `shapes` lays them out."""
    out.mkdir()
    rows = []
    for number, combination in enumerate(combinations):
        video = draw(random_scene(combination, generator_for(0, number, 3)))
        write_video(out / f"{number}.mp4", rearrange(video, "C F H W -> F H W C") / 2 + 0.5, 8)
        rows.append(json.dumps({"file_name": f"{number}.mp4", "prompt": caption(combination)}))
    (out / "metadata.jsonl").write_text("\n".join(rows))


def test_the_judge_sees_through_the_files_compression(tmp_path: Path) -> None:
    asked = HELD_OUT[::3]
    drawn(tmp_path / "clips", asked)
    verdicts = judge_shapes(tmp_path / "clips")
    assert summarise(verdicts) == dict.fromkeys(summarise(verdicts), 1.0)
    for number, (combination, verdict) in enumerate(verdicts):
        assert combination == asked[number]
        assert verdict == check(draw(random_scene(combination, generator_for(0, number, 3))))
    rows = (tmp_path / "clips" / "metadata.jsonl").read_text().replace("a red circle", "a dog")
    (tmp_path / "clips" / "metadata.jsonl").write_text(rows)
    with pytest.raises(ValueError, match="has a clip of 'a dog moving"):
        judge_shapes(tmp_path / "clips")


def test_every_protocol_says_what_it_needs() -> None:
    for name, protocol in protocols.PROTOCOLS.items():
        assert protocol.name == name
        assert protocol.needs
        assert protocol.scores
