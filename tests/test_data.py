"""Datasets: every layout that is read, what is cut out of a clip, what is left out and why, and the report on it."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import tarfile
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from videofactory_train import contact_sheet
from videofactory_train.cli import main
from videofactory_train.data import check as checking
from videofactory_train.data.check import check
from videofactory_train.data.samples import Bucket, DatasetConfig, Planned, Sample, decode, fingerprint, plan
from videofactory_train.data.sources import Clip, read_dataset

from videofactory_core.config import PRESETS, ModelConfig, from_dict
from videofactory_core.video import write_video

# 4 frames of 16x8 at 8 a second, sizes in steps of 2.
MODEL = replace(PRESETS["debug"], fps=8.0)


def make(path: Path, count: int = 24, size: tuple[int, int] = (32, 16), fps: float = 8.0, caption: str = "") -> Path:
    """A clip whose frames are grey, each by its number, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = (10 + 5 * torch.arange(count)).to(torch.uint8)
    write_video(path, levels.view(-1, 1, 1, 1).expand(count, size[1], size[0], 3), fps)
    if caption:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def picture(path: Path, size: tuple[int, int] = (32, 16), caption: str = "") -> Path:
    Image.new("RGB", size, "grey").save(path)
    if caption:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def numbers(frames: Tensor) -> list[int]:
    """What `make` drew."""
    return ((frames.float().mean(dim=(1, 2, 3)) - 10) / 5).round().int().tolist()


def only(clips: Sequence[Clip], model: ModelConfig = MODEL, **settings: Any) -> Planned:
    """The plan of a dataset of one clip."""
    (planned,) = plan(clips, DatasetConfig(path="clips", **settings), model)
    return planned


def shown(planned: Planned) -> list[list[int]]:
    return [numbers(decode(sample)) for sample in planned.samples]


# Layouts


def test_a_folder_has_its_clips_in_order_with_their_captions(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.webm", "deep/er/c.MOV", "deep/a.gif"):
        source = make(tmp_path / "made" / f"a{Path(name).suffix.lower().replace('.mov', '.mp4')}")
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(source, tmp_path / "set" / name)
        (tmp_path / "set" / name).with_suffix(".txt").write_text(f" the caption of {name}\n")
    picture(tmp_path / "set" / "d.png", caption="a picture")
    for name in (".hidden.mp4", ".git/x.mp4", "__MACOSX/b.mp4", "cache/x.mp4", "notes.md", "deep/list.py"):
        (tmp_path / "set" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"x")
    (tmp_path / "set" / "cache" / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55")
    clips = read_dataset(tmp_path / "set")
    assert [clip.name for clip in clips] == ["a.webm", "b.mp4", "d.png", "deep/a.gif", "deep/er/c.MOV"]
    assert [clip.path for clip in clips] == [tmp_path / "set" / clip.name for clip in clips]
    assert [clip.caption for clip in clips] == [
        "a picture" if clip.name == "d.png" else f"the caption of {clip.name}" for clip in clips
    ]
    assert not any(clip.note for clip in clips)
    # The mark does not hide the dataset itself.
    shutil.copy(tmp_path / "set" / "cache" / "CACHEDIR.TAG", tmp_path / "set")
    assert len(read_dataset(tmp_path / "set")) == 5


@pytest.mark.skipif(sys.platform == "win32", reason="needs the right to make links there")
def test_links_are_followed_once(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere" / "a.mp4", caption="a")
    make(tmp_path / "set" / "b.mp4", caption="b")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set")
    assert [clip.name for clip in read_dataset(tmp_path / "set")] == ["b.mp4", "more/a.mp4"]


@pytest.mark.parametrize(
    ("encoding", "guessed"),
    [("utf-8", False), ("utf-8-sig", False), ("utf-16", False), ("utf-16-le", False), ("cp1252", True)],
)
def test_captions_in_other_encodings_are_read(encoding: str, guessed: bool, tmp_path: Path) -> None:
    mark = b"\xff\xfe" if encoding == "utf-16-le" else b""
    make(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_bytes(mark + "a café in Zürich for 5 €\r\n".encode(encoding))
    (clip,) = read_dataset(tmp_path)
    assert clip.caption == "a café in Zürich for 5 €"
    assert clip.note == ("a.txt is not UTF-8; it was read as Windows-1252" if guessed else "")
    assert only([clip]).note == clip.note


def test_clips_without_a_caption_stand_in_the_list_with_the_reason(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4")
    make(tmp_path / "b.mp4", caption="\n \t")
    reasons = [one.reason for one in plan(read_dataset(tmp_path), DatasetConfig(path="x"), MODEL)]
    assert reasons == ["no caption: write one into a.txt", "no caption: b.txt is empty"]


def test_captions_may_have_another_ending(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4", caption="not this")
    (tmp_path / "a.caption").write_text("this")
    assert read_dataset(tmp_path, ".caption")[0].caption == "this"


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        lines = [rows[0].keys(), *(row.values() for row in rows)]
        cells = [["" if cell is None else f'"{cell}"' for cell in line] for line in lines]
        path.write_text("\n".join(",".join(line) for line in cells), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("path_column", "caption_column"),
    [
        ("path", "caption"),
        ("video_path", "caption"),
        ("file_name", "text"),
        ("video", "prompt"),
        ("media_path", "text"),
    ],
)
def test_a_table_names_the_clips(suffix: str, path_column: str, caption_column: str, tmp_path: Path) -> None:
    make(tmp_path / "set" / "clips" / "a, b.mp4")
    make(tmp_path / "elsewhere.mp4")
    rows = [
        {path_column: "clips/a, b.mp4", "score": 1.0, caption_column: "first, of two", "start": None, "end": None},
        {path_column: "clips/a, b.mp4", "score": 2.0, caption_column: " é ", "start": 0.5, "end": 2.0},
        {path_column: str(tmp_path / "elsewhere.mp4"), "score": 3.0, caption_column: "abs", "start": 1.0, "end": None},
        {path_column: "clips/missing.mp4", "score": 3.0, caption_column: "x", "start": 0.0, "end": None},
        {path_column: "clips/a, b.mp4", "score": 3.0, caption_column: "", "start": 0.0, "end": None},
        {path_column: "clips/a, b.mp4", "score": 3.0, caption_column: "x", "start": 2.0, "end": 1.0},
        {path_column: None, "score": 3.0, caption_column: "x", "start": None, "end": None},
    ]
    table = write_rows(tmp_path / "set" / f"metadata{suffix}", rows)
    clips = read_dataset(tmp_path / "set")
    assert clips == read_dataset(table)
    assert [clip.caption for clip in clips] == ["first, of two", "é", "abs", "x", None, None, None]
    assert [(clip.start, clip.end) for clip in clips[:3]] == [(0, None), (0.5, 2.0), (1.0, None)]
    assert clips[1].name == "clips/a, b.mp4 0.5-2 s"
    planned = plan(clips, DatasetConfig(path="x", frame_extraction="chunk"), MODEL)
    assert shown(planned[1]) == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert shown(planned[2])[0] == [8, 9, 10, 11]
    assert [one.reason for one in planned[3:]] == [
        "is not there: check the path",
        f"no caption: line {6 if suffix == '.csv' else 5} of {table.name} has none",
        "it ends before it starts",
        "the line names no file",
    ]


def test_tables_of_spreadsheets_are_read(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4")
    (tmp_path / "metadata.csv").write_bytes('video;text;start\r\na.mp4;"ein Café; nachts";0,5\r\n'.encode("cp1252"))
    (clip,) = read_dataset(tmp_path)
    assert clip.note == "start is '0,5', not a number of seconds"
    (tmp_path / "metadata.csv").write_bytes('video;text;start\r\na.mp4;"ein Café; nachts";0.5\r\n'.encode("cp1252"))
    (clip,) = read_dataset(tmp_path)
    assert (clip.caption, clip.start) == ("ein Café; nachts", 0.5)
    assert clip.note == "metadata.csv is not UTF-8; it was read as Windows-1252"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"path": "a.mp4"}\n{"path": \n', r"line 2 of .*metadata.jsonl is not JSON"),
        ("metadata.jsonl", '{"path": "a.mp4"}\n["a.mp4"]\n', r"line 2 of .*metadata.jsonl is no JSON object"),
        ("metadata.jsonl", '{"clip": "a.mp4", "text": "x"}', r"call that column 'path', not one of clip, text"),
        ("metadata.csv", "clip,text\na.mp4,x\n", r"call that column 'path', not one of clip, text"),
        ("metadata.csv", "path,text\na.mp4," + "x" * 200_000, r"of .*metadata.csv is not CSV \(field larger"),
        ("metadata.csv", "path,text\n", r"holds no clips"),
        ("metadata.parquet", "PAR", r"is not a Parquet file"),
        ("readme.md", "hello", r"holds no clips: put videos there, each with its caption in a .txt file"),
    ],
)
def test_datasets_that_are_none_are_refused_with_the_remedy(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as info:
        read_dataset(tmp_path)
    assert "\n" not in str(info.value)


def test_places_that_are_no_datasets_are_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "a.mp4")
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).write_text("path\na.mp4")
    for name, message in (
        ("nowhere", r"there is no folder or file .*nowhere: check the path"),
        ("a.mp4", r"a.mp4 is no dataset: name a folder, or a file that ends with .jsonl, .csv, .parquet or .tar"),
        (".", r"has metadata.jsonl and metadata.csv: name one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            read_dataset(tmp_path / name)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r'needs pyarrow to be read: run pip install "videofactory\[train\]"'):
        read_dataset(tmp_path / "metadata.parquet")


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return path


def test_shards_are_read_where_they_lie(tmp_path: Path) -> None:
    video = make(tmp_path / "a.mp4").read_bytes()
    long = "a/folder/with/a/name/that/is/longer/than/the/hundred/bytes/of/a/plain/header/of/a/tar/file/so/it/is/split/7"
    members = {
        "0.txt": b"text before video",
        "0.mp4": video,
        "1.mp4": video,
        "1.json": json.dumps({"caption": "from JSON", "fps": 8}).encode(),
        "2.mp4": video,
        "3.mp4": video,
        "3.json": b"{",
        "._0.mp4": b"no video",
        "0.jpg": b"no picture",
        f"{long}.mp4": video,
        f"{long}.txt": "café".encode("cp1252"),
    }
    shard = pack(tmp_path / "set.tar", members)
    clips = {clip.name: clip for clip in read_dataset(shard)}
    assert {name.removeprefix("set.tar/"): clip.caption for name, clip in clips.items()} == {
        "0.mp4": "text before video",
        "0.jpg": "text before video",
        "1.mp4": "from JSON",
        "2.mp4": None,
        "3.mp4": None,
        f"{long}.mp4": "café",
    }
    planned = {one.clip.name: one for one in plan(list(clips.values()), DatasetConfig(path="x"), MODEL)}
    for name in ("0", "1", long):
        assert shown(planned[f"set.tar/{name}.mp4"]) == [[0, 1, 2, 3]]
        (sample,) = planned[f"set.tar/{name}.mp4"].samples
        file = replace(sample, clip=Clip("a.mp4", tmp_path / "a.mp4", "x"))
        assert torch.equal(decode(sample), decode(file))
        assert fingerprint(sample) == fingerprint(file)
    assert planned[f"set.tar/{long}.mp4"].note.endswith("is not UTF-8; it was read as Windows-1252")
    assert planned["set.tar/2.mp4"].reason == "no caption: the shard has no .txt or .json file for it"
    assert planned["set.tar/3.mp4"].reason == "no caption: 3.json is not JSON"
    assert planned["set.tar/0.jpg"].reason.startswith("cannot be read as a video")
    (tmp_path / "both").mkdir()
    shutil.move(shard, tmp_path / "both" / "b.tar")
    make(tmp_path / "both" / "a.mp4", caption="beside")
    assert [clip.name for clip in read_dataset(tmp_path / "both")][:2] == ["a.mp4", "b.tar/0.mp4"]


def test_a_broken_shard_gives_what_it_has_and_says_so(tmp_path: Path) -> None:
    video = make(tmp_path / "a.mp4").read_bytes()
    shard = pack(tmp_path / "set.tar", {f"{i}.{kind}": data for i in range(4) for kind, data in
                                        (("txt", b"a clip"), ("mp4", video))})  # fmt: skip
    shard.write_bytes(shard.read_bytes()[: 2 * 1024 + 2 * (512 + -(-len(video) // 512) * 512) + 1024 + 512 + 200])
    planned = plan(read_dataset(shard), DatasetConfig(path="x"), MODEL)
    assert [bool(one.samples) for one in planned] == [True, True, False, False]
    assert planned[2].reason
    assert planned[3].reason.startswith("the shard cannot be read to its end")
    (tmp_path / "no.tar").write_bytes(b"no tar" * 1000)
    pack(tmp_path / "text.tar", {"0.txt": b"a clip"})
    for name, reason in (("no.tar", "the shard cannot be read"), ("text.tar", "the shard holds no videos or pictures")):
        (one,) = plan(read_dataset(tmp_path / name), DatasetConfig(path="x"), MODEL)
        assert one.reason.startswith(reason)


# Samples


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[0, 1, 2, 3]]),
        ({"frame_extraction": "chunk"}, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        ({"frame_extraction": "slide", "frame_stride": 3}, [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9], [9, 10, 11, 12]]),
        ({"frame_extraction": "slide", "frames": (12,)}, [list(range(12)), list(range(1, 13)), list(range(2, 14))]),
        ({"frame_extraction": "uniform"}, [[0, 1, 2, 3]]),
        ({"frame_extraction": "uniform", "frame_sample": 3}, [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13]]),
        ({"fps": 4.0, "frame_extraction": "chunk"}, [[0, 2, 4, 6]]),
        ({"fps": 12.0}, [[0, 0, 1, 2]]),
        ({"frames": (2, 8, 16)}, [list(range(8))]),
        ({"frames": (1, 16, 8, 4)}, [list(range(8))]),
        ({"frames": (1,)}, [[0]]),
        ({"frames": (1,), "frame_extraction": "uniform", "frame_sample": 2}, [[0], [13]]),
    ],
)
def test_windows_are_cut_as_the_settings_say(
    settings: dict[str, Any], expected: list[list[int]], tmp_path: Path
) -> None:
    make(tmp_path / "a.mp4", 14, caption="a")
    planned = only(read_dataset(tmp_path), **settings)
    assert shown(planned) == expected
    assert {sample.bucket for sample in planned.samples} == {Bucket(len(expected[0]), 16, 8)}
    assert planned.available == (14 if "fps" not in settings else {4.0: 7, 12.0: 21}[settings["fps"]])
    rate = settings.get("fps", 8.0)
    assert planned.used == len({round(time * rate) for sample in planned.samples for time in sample.times})
    assert planned.note == ("frames repeat: the file has 8 a second" if rate > 8 else "")


@pytest.mark.parametrize(("fps", "rate"), [(30.0, 8.0), (29.97, 29.97), (24000 / 1001, 12.0), (25.0, 10.0), (8.0, 8.0)])
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_windows_hold_the_frames_that_are_shown_at_the_rate(
    suffix: str, fps: float, rate: float, tmp_path: Path
) -> None:
    make(tmp_path / f"a{suffix}", 40, fps=fps, caption="a")
    planned = only(read_dataset(tmp_path), fps=rate, frame_extraction="chunk")
    assert planned.available == len([k for k in range(100) if k / rate < 40 / fps - 0.05 / rate])
    # In .webm times are whole milliseconds, and may be late by one.
    begins = [int(1000 * i / fps + 0.5) / 1000 - 1e-3 if suffix == ".webm" else i / fps for i in range(40)]
    expected = [bisect_right(begins, k / rate + 1e-5) - 1 for k in range(planned.available)]
    assert shown(planned) == [expected[k : k + 4] for k in range(0, planned.available - 3, 4)]


@pytest.mark.parametrize(("start", "end", "expected"), [(0.5, 1.0, [4, 5, 6, 7]), (1.25, None, [10, 11, 12, 13])])
def test_a_part_of_a_file_is_a_clip(start: float, end: float | None, expected: list[int], tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", 14)
    planned = only([Clip("a", path, "a", start, end)], frame_extraction="slide")
    assert (planned.available, shown(planned)) == (4, [expected])
    assert only([Clip("a", path, "a", start, start + 0.3)]).reason.startswith(
        "too short: at 8 a second it has 3 of the 4 frames"
    )
    assert only([Clip("a", path, "a", 5.0)]).reason.startswith("too short: at 8 a second it has 0 of")
    beyond = only([Clip("a", path, "a", start, 9.0)])
    assert beyond.note == "the file ends at 1.75 s"


@pytest.mark.parametrize(
    ("size", "settings", "bucket", "note"),
    [
        ((64, 36), {"sizes": ((32, 18), (18, 32), (24, 24))}, (32, 18), ""),
        ((36, 64), {"sizes": ((32, 18), (18, 32), (24, 24))}, (18, 32), ""),
        ((50, 44), {"sizes": ((32, 18), (18, 32), (24, 24))}, (24, 24), ""),
        # 1.35 is nearer to 16:9 by the quotient, and nearer to 1:1 by the difference.
        ((54, 40), {"sizes": ((32, 18), (24, 24))}, (32, 18), ""),
        ((64, 36), {"sizes": ((16, 9 * 2), (48, 20), (32, 18), (16, 8))}, (32, 18), ""),
        ((64, 64), {"sizes": ((32, 32), (64, 64), (128, 128))}, (64, 64), ""),
        ((40, 40), {"sizes": ((96, 96), (64, 64))}, (64, 64), "enlarged 1.6 times"),
        ((64, 64), {"sizes": ((32, 18), (32, 32)), "crop": "16:9"}, (32, 18), ""),
        ((36, 64), {"sizes": ((32, 18),)}, (32, 18), "68% of the picture is cut off"),
    ],
)
def test_the_bucket_of_the_nearest_shape_is_taken(
    size: tuple[int, int], settings: dict[str, Any], bucket: tuple[int, int], note: str, tmp_path: Path
) -> None:
    picture(tmp_path / "a.png", size, caption="a")
    planned = only(read_dataset(tmp_path), frames=(1,), **settings)
    (sample,) = planned.samples
    assert (sample.bucket[1:], planned.note) == (bucket, note)
    assert decode(sample).shape == (1, bucket[1], bucket[0], 3)


def test_crops_cut_the_middle(tmp_path: Path) -> None:
    """Rings of 8 pixels around a white middle of 48x48; 16:9 first leaves less of the height than a square."""
    rings = Image.new("RGB", (64, 64), "black")
    rings.paste("white", (8, 8, 56, 56))
    rings.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    whole, wide = (
        decode(only(read_dataset(tmp_path), frames=(1,), sizes=((32, 32),), crop=crop).samples[0])[0].float()
        for crop in ("bucket", "16:9")
    )
    assert whole[0].max() < 40
    assert whole[:, 0].max() < 40
    assert wide[2:-2].min() > 200


def test_pictures_and_clips_go_to_their_own_buckets(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4", caption="a")
    picture(tmp_path / "b.png", caption="b")
    clips = read_dataset(tmp_path)
    both = plan(clips, DatasetConfig(path="x", frames=(1, 4), frame_extraction="chunk"), MODEL)
    assert [[sample.bucket.frames for sample in one.samples] for one in both] == [[4] * 6, [1]]
    moving = plan(clips, DatasetConfig(path="x"), MODEL)
    assert moving[1].reason == "a picture needs a bucket of one frame: add 1 to frames"
    # A clip that is too short for its buckets does not become a picture behind the user's back.
    short = only([clips[0]], frames=(1, 48))
    assert short.reason == "too short: at 8 a second it has 24 of the 48 frames of the smallest bucket"


def test_files_that_cannot_be_read_are_left_out_with_the_reason(tmp_path: Path) -> None:
    good = make(tmp_path / "a.mp4", caption="a").read_bytes()
    contents = {
        "b.mp4": b"",
        "c.mov": b"a letter" * 99,
        "d.rm": b".RMF" + bytes(99),
        "e.mp4": good[:500],
        "f.heic": b"x",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).with_suffix(".txt").write_text("a")
    (tmp_path / "g.mp4").mkdir()
    planned = plan(read_dataset(tmp_path), DatasetConfig(path="x"), MODEL, workers=3)
    assert [one.clip.name for one in planned] == ["a.mp4", *contents]
    assert not planned[0].reason
    for one in planned[1:]:
        assert one.reason.startswith("cannot be read as a video (")
        assert not one.samples


def test_many_workers_plan_the_same(tmp_path: Path) -> None:
    for number in range(12):
        make(tmp_path / f"{number}.mp4", 2 + number, caption="a")
    clips, config = read_dataset(tmp_path), DatasetConfig(path="x", frame_extraction="slide")
    assert plan(clips, config, MODEL, workers=1) == plan(clips, config, MODEL, workers=5)


def test_sizes_must_suit_the_autoencoder() -> None:
    with pytest.raises(ValueError, match=r"345x190 does not divide into cells of 8 pixels; use 344x184"):
        plan([], DatasetConfig(path="x", sizes=((345, 190),)), PRESETS["sd21"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ""}, "path: "),
        ({"weight": 0.0}, "weight: 0.0 is no share; use a number above 0"),
        ({"weight": float("nan")}, "weight: "),
        ({"num_repeats": 0}, "num_repeats: 0 is too few; use 1 or more"),
        ({"sizes": [[0, 8]]}, "sizes: 0x8 is no picture"),
        ({"frames": [0]}, "frames: a bucket of 0 is empty"),
        ({"fps": -1.0}, "fps: -1.0 is no frame rate"),
        ({"frame_stride": 0, "frame_extraction": "slide"}, "frame_stride: 0 is too few"),
        ({"frame_stride": 2}, 'frame_stride: it needs frame_extraction = "slide", not "head"'),
        ({"frame_sample": 2, "frame_extraction": "slide"}, 'frame_sample: it needs frame_extraction = "uniform"'),
        ({"caption_extension": "txt"}, "caption_extension: 'txt' is no ending; write \".txt\""),
        ({"crop": "4:3"}, "crop: '4:3' is not one of bucket, 16:9"),
        ({"sizes": [[8, 8, 8]]}, "sizes.0: expected 2 values"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as info:  # noqa: PT011
        from_dict(DatasetConfig, {"path": "clips", **settings})
    assert message in str(info.value)


def test_a_sample_that_cannot_be_decoded_names_its_clip(tmp_path: Path) -> None:
    path = make(tmp_path / "a.mp4", caption="a")
    clip = Clip("deep/a.mp4", path, "a")
    late = Sample(clip, (0.0, 9.0), Bucket(2, 16, 8), "bucket")
    with pytest.raises(ValueError, match=r"^deep/a.mp4 ends after 3.00 seconds, not after 9.00: "):
        decode(late)
    (sample,) = only([clip]).samples
    path.unlink()
    with pytest.raises(ValueError, match=r"^deep/a.mp4 is not there: check the path"):
        decode(sample)
    with pytest.raises(ValueError, match=r"^deep/a.mp4 is not there: check the path"):
        decode(replace(sample, clip=replace(clip, place=(0, 99))))


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    noise = torch.randint(0, 256, (40, 96, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / "a.mp4", noise, 8)
    data = (tmp_path / "a.mp4").read_bytes()
    assert len(data) > 300_000
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "b.mp4").write_bytes(data)
    (sample,) = only([Clip("a", tmp_path / "a.mp4", "a")]).samples
    copied = replace(sample, clip=Clip("b", tmp_path / "other" / "b.mp4", "another caption", note="a"))
    assert fingerprint(copied) == fingerprint(sample)
    others = [
        replace(sample, times=tuple(time + 0.125 for time in sample.times)),
        replace(sample, bucket=Bucket(4, 8, 8)),
        replace(sample, crop="16:9"),
    ]
    for number, place in enumerate((100, len(data) // 2, len(data) - 1)):
        changed = bytearray(data)
        changed[place] ^= 1
        (tmp_path / f"{number}.mp4").write_bytes(changed)
        others.append(replace(sample, clip=Clip("c", tmp_path / f"{number}.mp4", "a")))
    (tmp_path / "longer.mp4").write_bytes(data + b"x")
    others.append(replace(sample, clip=Clip("c", tmp_path / "longer.mp4", "a")))
    found = [fingerprint(other) for other in (sample, *others)]
    assert len(set(found)) == len(found)
    assert all(len(name) == 40 and int(name, 16) >= 0 for name in found)


def test_fingerprints_hold_across_machines(tmp_path: Path) -> None:
    """The number is part of the cache's format: when it changes, `DECODING` must."""
    (tmp_path / "a.mp4").write_bytes(bytes(range(256)) * 1000)
    sample = Sample(Clip("a", tmp_path / "a.mp4", "a"), (0.0, 0.125), Bucket(2, 16, 8), "bucket")
    assert fingerprint(sample) == "e0b0d2426c1a2891b729e78d1d028a871d6f4cfe"


# The report


def test_the_report_has_a_line_for_each_clip(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    make(folder / "a.mp4", 24, (64, 32), 16.0, caption="a red ball")
    make(folder / "b.webm", caption=" ".join(["ball"] * 80))
    make(folder / "c.mp4", 3, caption="too short")
    make(folder / "d.mp4")
    picture(folder / "e.png", caption="a picture")
    lines: list[str] = []
    share = check([DatasetConfig(path=str(folder), frame_extraction="chunk")], MODEL, log=lines.append)
    assert share == pytest.approx(3 / 5)
    table = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    assert table == [
        ["clip", "frames", "fps", "size", "samples", "tokens", "note"],
        ["a.mp4", "12/12", "16 -> 8", "64x32 -> 16x8", "3", "3"],
        ["b.webm", "24/24", "8 -> 8", "32x16 -> 16x8", "6", "80", "the caption takes 2 chunks of 75 tokens"],
        ["c.mp4", "0/3", "8 -> 8", "32x16", "0", "2",
         "left out: too short: at 8 a second it has 3 of the 4 frames of the smallest bucket"],
        ["d.mp4", "0", "left out: no caption: write one into d.txt"],
        ["e.png", "0/1", "picture", "32x16", "0", "2",
         "left out: a picture needs a bucket of one frame: add 1 to frames"],
        ["clips: 5, left out: 3 (60%), samples: 9, length: 0:00:04"],
        ["samples of 4 x 16x8: 9"],
    ]  # fmt: skip


def damage(path: Path) -> None:
    """Break a clip behind its first frame."""
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start + (len(data) - start) // 2 :] = b"\xff" * (len(data) - start - (len(data) - start) // 2)
    path.write_bytes(data)


def test_damage_behind_the_beginning_is_found_by_decoding(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    noise = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in ("a.mp4", "b.mp4"):
        make(folder / name, caption="a")
        write_video(folder / name, noise, 8)
    damage(folder / "b.mp4")
    lines: list[str] = []
    config = DatasetConfig(path=str(folder), frames=(8,))
    assert check([config], MODEL, decoding=False, log=lines.append) == 0
    assert check([config], MODEL, log=lines.append) == 0.5
    (row,) = [line for line in lines if line.startswith("b.mp4") and "left out" in line]
    assert "cannot be read as a video" in row or "is damaged at" in row
    assert row.split()[1] == "0/8"


@pytest.mark.parametrize(("broken", "share", "code"), [(0, 0.0, 0), (1, 0.1, 0), (2, 0.1, 1), (2, 0.2, 0), (1, 0.0, 1)])
def test_the_exit_code_says_whether_too_many_are_left_out(
    broken: int, share: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path / "0.mp4", caption="a")
    for number in range(1, 10):
        shutil.copy(path, tmp_path / f"{number}.mp4")
        if number > broken:
            shutil.copy(path.with_suffix(".txt"), tmp_path / f"{number}.txt")
    assert main(["data", "check", str(tmp_path), "--max-dropped", str(share)]) == code
    assert f"clips: 10, left out: {broken} ({broken / 10:.0%})" in capsys.readouterr().out


def test_the_contact_sheet_shows_the_frames_that_are_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    make(folder / "a.mp4", 24, (64, 32), caption="a caption that is far too long for its line " * 9)
    make(folder / "b.mp4", 24, (32, 16), caption="b \u732b")
    picture(folder / "c.png", caption="c")
    lines: list[str] = []
    config = DatasetConfig(path=str(folder), frames=(1, 4), sizes=((32, 16),))
    check([config], MODEL, sheet=tmp_path / "sheet.png", decoding=False, log=lines.append)
    assert lines[-1] == f"{tmp_path / 'sheet.png'} shows 3 of 3 clips"
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = torch.from_numpy(np.array(sheet.convert("L")))
    # Three clips beside each other, each with the frames 32 x 16 that a sample has, below two lines of text.
    cell, top = 4 * 32 + 2 * contact_sheet.MARGIN, contact_sheet.MARGIN + 2 * contact_sheet.LINE_HEIGHT
    for clip in range(2):
        left = clip * cell + contact_sheet.MARGIN
        levels = [int(pixels[top + 8, left + 32 * frame + 16]) for frame in range(4)]
        assert levels == pytest.approx([10, 15, 20, 25], abs=2)
        assert int(pixels[: top - 1, left : left + 60].min()) < 100
    assert int(pixels[top + 8, 2 * cell + 20]) == pytest.approx(128, abs=2)
    assert int(pixels[top + 8, 2 * cell + 20 + 32]) == 255


def test_long_datasets_are_shown_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "SHEET_CLIPS", 3)
    for number in range(8):
        make(tmp_path / "clips" / f"{number}.mp4", 4, caption="a")
    lines: list[str] = []
    check([DatasetConfig(path=str(tmp_path / "clips"))], MODEL, sheet=tmp_path / "a.jpg", log=lines.append)
    assert lines[-1].endswith("a.jpg shows 3 of 8 clips")
    assert (tmp_path / "a.jpg").read_bytes()[:2] == b"\xff\xd8"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sheet.txt", "does not name a picture: end it with .png or .jpg"),
        ("nowhere/sheet.png", "is not a folder: create it"),
        ("clips/sheet.png", "would become part of the dataset"),
    ],
)
def test_a_sheet_that_cannot_be_written_is_refused_beforehand(name: str, message: str, tmp_path: Path) -> None:
    make(tmp_path / "clips" / "a.mp4", caption="a")
    with pytest.raises(ValueError, match=message):
        check([DatasetConfig(path=str(tmp_path / "clips"))], MODEL, sheet=tmp_path / name)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_names_that_are_no_text_can_be_reported(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    source = make(tmp_path / "a.mp4")
    name = os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(source, tmp_path / "clips" / name)
    (tmp_path / "clips" / name).with_suffix(".txt").write_text("a")
    lines: list[str] = []
    check([DatasetConfig(path=str(tmp_path / "clips"))], MODEL, sheet=tmp_path / "a.png", log=lines.append)
    assert lines[1].startswith("caf?.mp4  4/24")


def test_several_datasets_are_reported_together(tmp_path: Path) -> None:
    make(tmp_path / "a" / "a.mp4", caption="a")
    make(tmp_path / "b" / "b.mp4", caption="b")
    lines: list[str] = []
    configs = [DatasetConfig(path=str(tmp_path / "a")), DatasetConfig(path=str(tmp_path / "b"), fps=4.0, frames=(2,))]
    assert check(configs, MODEL, log=lines.append) == 0
    assert [line.split()[:5] for line in lines[1:3]] == [
        ["a.mp4", "4/24", "8", "->", "8"],
        ["b.mp4", "2/12", "8", "->", "4"],
    ]
    assert lines[-2:] == ["samples of 2 x 16x8: 1", "samples of 4 x 16x8: 1"]


def test_samples_travel_to_other_processes(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4", caption="a")
    (sample,) = only(read_dataset(tmp_path)).samples
    assert pickle.loads(pickle.dumps(sample)) == sample
    assert hash(pickle.loads(pickle.dumps(sample))) == hash(sample)
