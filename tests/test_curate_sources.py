"""What becomes a source: files, folders, shards, and the lists of public data sets, with all that can be wrong."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from videofactory_train.curate import tables
from videofactory_train.curate.manifests import literal, seconds
from videofactory_train.curate.sources import Tally, content, find_sources, path_text, text_path
from videofactory_train.curate.stage import Row
from videofactory_train.curate.tables import Problem, Record, read_records

from videofactory_core.video import read_frames

SCHEMA = pa.schema(
    {
        **dict.fromkeys(("source_id", "path", "name", "caption", "licence", "extra"), pa.string()),
        **dict.fromkeys(("start", "end"), pa.float64()),
        **dict.fromkeys(("offset", "length"), pa.int64()),
    }
)


def make(path: Path, caption: str = "") -> Path:
    """A file that differs from others; what is in it does not matter here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.fsencode(path) + b"\0" * 300_000)
    if caption:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def film(path: Path, count: int = 60, first: int = 0, gop: int = 20) -> Path:
    """Frames at 10 a second that are grey, each by its number from `first` on; every `gop`th is a key frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"g": str(gop), "sc_threshold": "0", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for number in range(first, first + count):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), 10 + 4 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number - first, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def numbers(source: Path | bytes, times: Sequence[float]) -> list[int]:
    """What `film` drew."""
    return ((read_frames(source, times).float().mean(dim=(1, 2, 3)) - 10) / 4).round().int().tolist()


def search(*paths: Path, **settings: Any) -> tuple[list[Row], list[Tally]]:
    """Rows, which Parquet must be able to hold, and tallies."""
    tallies: list[Tally] = []
    rows = list(find_sources(paths, tell=tallies.append, **settings))
    assert pa.Table.from_pylist(rows, SCHEMA).to_pylist() == [
        {name: row[name] for name in SCHEMA.names} for row in rows
    ]
    assert len({row["source_id"] for row in rows}) == len(rows)
    assert sum(tally.found for tally in tallies) == len(rows)
    for row in rows:
        json.loads(row["extra"], parse_constant=pytest.fail)
    return rows, tallies


def names(rows: Sequence[Row]) -> list[str]:
    return [row["name"] for row in rows]


def write_csv(path: Path, *rows: dict[str, Any], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


# Files and folders


def test_a_folder_has_its_videos_in_order_with_their_captions(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for name in ("b.mp4", "a.webm", "deep/er/c.MOV", "deep/a.gif"):
        make(root / name, f" the caption of {name}\n")
    make(root / "e.mkv")
    for name in (".hidden.mp4", ".git/x.mp4", "__MACOSX/b.mp4", "cache/x.mp4", "notes.md", "d.png"):
        make(root / name)
    (root / "cache" / "CACHEDIR.TAG").touch()
    rows, (tally,) = search(root)
    assert names(rows) == ["set/a.webm", "set/b.mp4", "set/e.mkv", "set/deep/a.gif", "set/deep/er/c.MOV"]
    assert [row["caption"] for row in rows][:3] == ["the caption of a.webm", "the caption of b.mp4", None]
    assert [row["path"] for row in rows][3] == str(root / "deep" / "a.gif")
    assert all(row["start"] is row["end"] is row["offset"] is row["length"] is None for row in rows)
    assert list(tally.lines()) == [f"{root} (folder): 5 sources"]


def test_a_folder_that_is_passed_over_can_be_named(tmp_path: Path) -> None:
    make(tmp_path / ".made" / "a.mp4")
    (tmp_path / ".made" / "CACHEDIR.TAG").touch()
    assert not search(tmp_path)[0]
    assert names(search(tmp_path / ".made")[0]) == [".made/a.mp4"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    make(tmp_path / "set" / "a.mp4")
    make(tmp_path / "elsewhere" / "b.mp4")
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "itself").symlink_to(tmp_path / "set" / "itself")
    assert names(search(tmp_path / "set")[0]) == ["set/a.mp4", "set/more/b.mp4"]


def test_a_source_is_known_by_its_content(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a" / "clip.mp4"), make(tmp_path / "b" / "clip.mp4")
    assert one.stat().st_size == two.stat().st_size
    (first, second), _ = search(tmp_path / "a", tmp_path / "b")
    assert first["source_id"] != second["source_id"]
    # Under another name, in another place.
    moved = tmp_path / "elsewhere" / "renamed.MKV"
    moved.parent.mkdir()
    shutil.move(one, moved)
    assert search(moved)[0][0]["source_id"] == first["source_id"]
    # Another ending is another video.
    moved.write_bytes(moved.read_bytes()[:-1] + b"1")
    assert search(moved)[0][0]["source_id"] != first["source_id"]


def test_a_file_that_is_reached_again_is_one_source(tmp_path: Path) -> None:
    path = make(tmp_path / "set" / "a.mp4")
    (tmp_path / "set" / "b.mp4").symlink_to(path)
    shutil.copy(path, tmp_path / "set" / "c.mp4")
    rows, tallies = search(path, tmp_path / "set", path)
    assert [row["path"] for row in rows] == [str(path)]
    assert [tally.again for tally in tallies] == [0, 3, 1]
    assert list(tallies[1].lines()) == [f"{tmp_path / 'set'} (folder): 0 sources, 3 known already"]


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_any_name_survives(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path / "set")
    os.mkdir(folder)
    given_names = [b"a\nb.mp4", b"caf\xe9.mp4", b"\xff\xfe0000.mp4", "日本 \U0001f600.mp4".encode()]
    for name in given_names:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(name)
    rows, (tally,) = search(tmp_path / "set")
    assert tally.problems == 0
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), tmp_path / "part.parquet")
    back = pq.read_table(tmp_path / "part.parquet").to_pylist()
    found = {os.path.basename(os.fsencode(text_path(row["path"]))) for row in back}
    assert found == set(given_names)
    for row in back:
        path = content(row)
        assert isinstance(path, Path)
        assert path.read_bytes() == os.path.basename(os.fsencode(path))
        assert row["name"].isprintable()
    assert "set/a\\nb.mp4" in names(back)


@given(
    st.text(st.characters(exclude_characters="\0")) | st.binary().map(os.fsdecode).filter(lambda text: "\0" not in text)
)
def test_paths_are_text_and_come_back(path: str) -> None:
    text = path_text(path)
    text.encode("utf-8")
    assert text_path(text) == path


def test_what_only_looks_like_a_video_is_a_source_too(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "b.mp4").touch()
    (tmp_path / "c.mp4").write_text("notes")
    rows, (tally,) = search(tmp_path)
    assert len(rows) == 3
    assert tally.problems == 0
    assert names(search(tmp_path / "a.mp4")[0]) == [(tmp_path / "a.mp4").as_posix()]


@pytest.mark.skipif(os.name == "nt", reason="there are none there")
def test_what_cannot_be_read_is_counted(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "gone.mp4")
    os.mkfifo(tmp_path / "c.mp4")
    os.mkfifo(tmp_path / "d.tar")
    make(tmp_path / "e.mp4")
    rows, (tally, pipe) = search(tmp_path, tmp_path / "c.mp4")
    assert names(rows) == [f"{tmp_path.name}/a.mp4", f"{tmp_path.name}/e.mp4"]
    assert tally.problems == 3
    assert "b.mp4: it cannot be read (it is no file" in tally.reasons[0]
    assert pipe.problems == 1


@pytest.mark.skipif(os.name == "nt" or not os.geteuid(), reason="the administrator may read everything")
def test_a_folder_that_is_closed_is_counted(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4")
    make(tmp_path / "closed" / "b.mp4")
    (tmp_path / "closed").chmod(0)
    try:
        rows, (tally,) = search(tmp_path)
    finally:
        (tmp_path / "closed").chmod(0o700)
    assert len(rows) == 1
    assert tally.problems == 1
    assert "closed" in tally.reasons[0]


def test_a_name_that_is_wrong_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    make(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"there is no file or folder .*gone: check its name"):
        find_sources([tmp_path / "a.mp4", tmp_path / "gone"])
    with pytest.raises(ValueError, match="is an address: fetch the videos"):
        find_sources([Path("https://example.com/a.mp4")])
    with pytest.raises(ValueError, match="is not a folder"):
        find_sources([tmp_path / "a.mp4"], look_in=[tmp_path / "a.mp4"])


# Shards


def pack(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return path


def test_videos_in_a_shard_are_opened_where_they_lie(tmp_path: Path) -> None:
    one, two = film(tmp_path / "one.mp4", 8), film(tmp_path / "two.mp4", 8, first=30)
    about = json.dumps({"caption": "two", "url": "somewhere", "score": float("nan")}).encode()
    members = {"0000.mp4": one.read_bytes(), "0000.txt": b" one \n", "0001.mp4": two.read_bytes(), "0001.json": about}
    shard = pack(tmp_path / "00000.tar", {**members, "0002.jpg": b"a picture", "0003.json": b"{"})
    rows, (tally,) = search(shard)
    assert (tally.kind, tally.problems) == ("shard", 0)
    assert [row["caption"] for row in rows] == ["one", "two"]
    assert {row["path"] for row in rows} == {str(shard)}
    data = content(rows[1])
    assert data == two.read_bytes()
    assert numbers(data, [0.0, 0.7]) == [30, 37]
    assert json.loads(rows[1]["extra"]) == {"member": "0001.mp4", "caption": "two", "url": "somewhere", "score": None}
    # Unpacked it is the same source, and in a folder the shard is found.
    assert search(two)[0][0]["source_id"] == rows[1]["source_id"]
    rows, (tally,) = search(tmp_path)
    assert (tally.found, tally.again) == (2, 2)


def test_a_shard_that_is_cut_off_gives_what_is_there(tmp_path: Path) -> None:
    members = {f"{number}.mp4": os.urandom(5000) for number in range(4)}
    whole = pack(tmp_path / "a.tar", {**members, "0.json": b"no"}).read_bytes()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.tar").write_bytes(whole[:12_500])
    (tmp_path / "set" / "b.tar").write_bytes(b"no shard")
    make(tmp_path / "set" / "c.mp4")
    rows, (tally,) = search(tmp_path / "set")
    assert names(rows)[:2] == ["set/a.tar/0.mp4", "set/a.tar/1.mp4"]
    assert names(rows)[-1] == "set/c.mp4"
    assert [reason.split(":")[0] for reason in tally.reasons] == ["set/a.tar", "set/b.tar"]
    (tmp_path / "whole.tar").write_bytes(whole)
    rows, (tally,) = search(tmp_path / "whole.tar")
    assert (len(rows), tally.problems) == (4, 1)


# Manifests

HDVG = {
    "AAA": {
        "url": "https://www.youtube.com/watch?v=AAA",
        "clip": {
            "AAA.7.mp4": {
                "span": ["00:00:03.000", "00:00:05.500"],
                "fps": 10,
                "scene_split": [
                    {"clip_id": "AAA.7_0", "scene_cut": [4, 12], "caption": "the first"},
                    {"clip_id": "AAA.7_1", "scene_cut": [12, 30], "caption": "the second"},
                ],
            },
            "AAA.8.mp4": {
                "span": ["00:00:04.500", "00:00:05.500"],
                "fps": 10,
                "scene_split": [{"clip_id": "AAA.8_0", "scene_cut": [0, -1], "caption": "all of it"}],
            },
        },
    },
    "BBB": {"url": "", "clip": {"BBB.0.mp4": {"span": ["0:00:00.0", "0:00:01.0"], "fps": 10, "scene_split": []}}},
    "CCC": {
        "clip": {
            "CCC.1.mp4": {
                "span": ["00:01:00.000", "00:02:00.000"],
                "fps": 29.97,
                "scene_split": [{"clip_id": "CCC.1_0", "scene_cut": [0, -1], "caption": "not here"}],
            }
        }
    },
}


def stream_copy(source: Path, path: Path, start: float, end: float) -> Path:
    """What HD-VILA's clips are: packets from the key frame before `start` on, with times that begin at 0."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copying = getattr(new, "add_stream_from_template", None)
        copy = copying(stream) if copying else new.add_stream(template=stream)
        old.seek(int(start / stream.time_base), stream=stream)
        first = None
        for packet in old.demux(stream):
            if packet.dts is None or packet.pts * stream.time_base >= end:
                continue
            first = packet.dts if first is None else first
            packet.dts, packet.pts, packet.stream = packet.dts - first, packet.pts - first, copy
            new.mux(packet)
    return path


def test_hdvg_counts_frames_in_copies_that_begin_at_a_key_frame(tmp_path: Path) -> None:
    manifest = tmp_path / "list"
    manifest.write_text(json.dumps(HDVG, indent=1))
    whole = film(tmp_path / "videos" / "AAA.mp4")
    rows, (tally,) = search(manifest, look_in=[whole.parent])
    assert [(row["name"], row["caption"]) for row in rows] == [
        ("AAA.7_0", "the first"),
        ("AAA.7_1", "the second"),
        ("AAA.8_0", "all of it"),
    ]
    # The key frames are at 0, 2 and 4 seconds; 4 is the cut itself.
    assert [(row["start"], row["end"]) for row in rows] == [(2.5, 3.2), (3.3, 5.0), (4.0, 5.5)]
    copy = stream_copy(whole, tmp_path / "AAA.7.mp4", 3.0, 5.5)
    # Frames 5 and 11 of the copy.
    wanted = numbers(copy, [0.5, 1.1])
    assert wanted == [25, 31]
    assert numbers(whole, [rows[0]["start"], rows[0]["end"] - 0.1]) == wanted
    assert (tally.kind, tally.absent, tally.absent_names) == ("HD-VG-130M", 1, ["CCC.1_0"])
    assert "academic use only" in tally.licence == rows[0]["licence"]
    assert json.loads(rows[0]["extra"])["manifest"] == "HD-VG-130M"
    assert json.loads(rows[0]["extra"])["scene_cut"] == [4, 12]
    assert list(tally.lines())[2] == "  not here: CCC.1_0"

    rows, _ = search(manifest, look_in=[whole.parent], hdvg_mode="approx")
    assert [(row["start"], row["end"]) for row in rows] == [(3.5, 4.2), (4.3, 6.0), (4.5, 5.5)]


@pytest.mark.parametrize("mode", ["stream_copy", "approx"])
def test_hdvg_prefers_the_clip_and_the_scene_to_the_whole_video(tmp_path: Path, mode: Any) -> None:
    manifest = tmp_path / "hdvg.json"
    manifest.write_text(json.dumps(HDVG))
    film(tmp_path / "AAA.mp4")
    clip, scene, other = (make(tmp_path / f"{name}.mp4") for name in ("AAA.7", "AAA.7_1", "AAA.8"))
    rows, _ = search(manifest, hdvg_mode=mode)
    assert [row["path"] for row in rows] == [str(clip), str(scene), str(other)]
    assert [(row["start"], row["end"]) for row in rows] == [(0.5, 1.2), (None, None), (None, None)]


def test_hdvg_names_a_video_in_which_no_key_frame_is_found(tmp_path: Path) -> None:
    manifest = tmp_path / "hdvg.json"
    manifest.write_text(json.dumps(HDVG))
    (tmp_path / "AAA.mp4").write_text("notes")
    rows, (tally,) = search(manifest)
    assert not rows
    assert tally.problems == 3
    assert "AAA.mp4 cannot be read as a video" in tally.reasons[0]
    assert len(search(manifest, hdvg_mode="approx")[0]) == 3


def test_hdvila(tmp_path: Path) -> None:
    clips = [{"clip_id": f"X.{n}.mp4", "span": [f"00:00:0{n}.500", f"00:00:0{n + 1}.000"]} for n in range(3)]
    lines = [json.dumps({"video_id": video, "url": "u", "clip": clips}) for video in ("X", "Y")]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    make(tmp_path / "X.mp4"), make(tmp_path / "X.1.webm")
    rows, (tally,) = search(tmp_path / "a.txt")
    found = [(Path(row["path"]).name, row["start"], row["end"]) for row in rows]
    assert found == [("X.mp4", 0.5, 1.0), ("X.1.webm", None, None), ("X.mp4", 2.5, 3.0)]
    assert (tally.kind, tally.again, tally.absent) == ("HD-VILA-100M", 1, 2)
    assert json.loads(rows[0]["extra"])["url"] == "u"


def panda(video: str, **cells: str) -> dict[str, str]:
    row = {
        "videoID": video,
        "url": f"https://www.youtube.com/watch?v={video}",
        "timestamp": "[['0:00:01.500', '0:00:03.000'], ['0:01:00.000', '1:00:00.25']]",
        "caption": r"['A \d neuron, in \'black\'.', 'Another.']",
        "matching_score": "[0.25, 0.5]",
        "desirable_filtering": "['desirable', '1_low_desirable_score']",
        "shot_boundary_detection": "[[['0:00:00.0', '0:00:01.0']], []]",
    }
    return {**row, **cells}


def test_panda(tmp_path: Path) -> None:
    # A video id may begin with a dash, and name nothing that is here.
    manifest = write_csv(tmp_path / "p.csv", panda("-2y_"), panda("gone"))
    make(tmp_path / "v" / "-2y_.mkv")
    rows, (tally,) = search(manifest, look_in=[tmp_path / "v"])
    assert [(row["name"], row["start"], row["end"]) for row in rows] == [("-2y_.0", 1.5, 3), ("-2y_.1", 60, 3600.25)]
    assert [row["caption"] for row in rows] == ["A \\d neuron, in 'black'.", "Another."]
    extra = json.loads(rows[1]["extra"])
    assert (extra["matching_score"], extra["desirable_filtering"]) == (0.5, "1_low_desirable_score")
    assert (tally.kind, tally.absent, tally.problems) == ("Panda-70M", 2, 0)
    assert "not for commercial use" in tally.licence
    # Lists as they are, and an id only in the address.
    row = {key: literal(cell) if cell.startswith("[") else cell for key, cell in panda("-2y_").items()}
    del row["videoID"]
    del row["shot_boundary_detection"]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "p.parquet")
    assert [row["source_id"] for row in search(tmp_path / "p.parquet", look_in=[tmp_path / "v"])[0]] == [
        row["source_id"] for row in rows
    ]


def test_lvd(tmp_path: Path) -> None:
    row = {"key": "k1", "video_id": "V", "refined_caption": "long", "span": "['0:00:01.0', '0:00:04.5']"}
    row |= {"orig_span": "", "scene_cut": "", "total score": "3.5"}
    hdvg = {**row, "key": "k2", "span": "", "orig_span": "['0:00:03.0', '0:00:05.5']", "scene_cut": "[4, 12]"}
    manifest = write_csv(tmp_path / "lvd.csv", row, hdvg, {**row, "key": "k3.mp4"}, {**row, "key": "k4", "span": ""})
    film(tmp_path / "V.mp4"), make(tmp_path / "k3.mp4")
    rows, (tally,) = search(manifest)
    assert [(Path(row["path"]).name, row["start"], row["end"]) for row in rows] == [
        ("V.mp4", 1.0, 4.5),
        # Of the file's rate, for the list has none.
        ("V.mp4", 2.5, 3.2),
        ("k3.mp4", None, None),
    ]
    assert (tally.kind, tally.absent, rows[0]["caption"]) == ("LVD-2M", 1, "long")
    assert search(manifest, hdvg_mode="approx")[0][1]["start"] == 3.5
    assert json.loads(rows[0]["extra"]) == {
        "manifest": "LVD-2M",
        "key": "k1",
        "video_id": "V",
        "span": "['0:00:01.0', '0:00:04.5']",
        "total score": "3.5",
    }


@pytest.mark.parametrize(
    ("row", "kind", "said"),
    [
        ({"video": "a_0.mp4", "caption": "words", "aesthetic score": "5.5", "fps": "30.0"}, "OpenVid-1M", "CC BY 4.0"),
        ({"videoid": "a_0", "contentUrl": "u", "duration": "PT00H", "page_dir": "d", "name": "words"}, "WebVid", "no "),
        ({"file_name": "a_0.mp4", "text": "words", "more": "1"}, "VideoFolder", ""),
        ({"path": "gone/a_0.mp4", "caption": "words"}, "VideoFolder", ""),
    ],
)
def test_lists_of_files(tmp_path: Path, row: dict[str, str], kind: str, said: str) -> None:
    make(tmp_path / "v" / "a_0.mp4")
    gone = {key: value.replace("a_0", "b_0") for key, value in row.items()}
    rows, (tally,) = search(write_csv(tmp_path / "list.txt", row, gone), look_in=[tmp_path / "v"])
    assert [(Path(row["path"]).name, row["caption"], row["start"]) for row in rows] == [("a_0.mp4", "words", None)]
    assert (tally.kind, tally.found, tally.absent) == (kind, 1, 1)
    assert said in rows[0]["licence"] == tally.licence


@pytest.mark.parametrize("kind", ["csv", "semicolons", "utf-16", "mark", "jsonl", "array", "parquet"])
def test_a_table_is_known_by_its_content(tmp_path: Path, kind: str) -> None:
    rows = [
        {"video": "a.mp4", "start": 1.5, "end": 2.0, "caption": "é, a"},
        {"video": "b.mp4", "start": None, "end": None, "caption": ""},
    ]
    make(tmp_path / "a.mp4"), make(tmp_path / "b.mp4")
    path = tmp_path / "list.dat"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{**row, "bytes": b"\0video"} for row in rows]), path)
    elif kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    elif kind == "array":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8-sig")
    else:
        encoding = {"utf-16": "utf-16", "mark": "utf-8-sig"}.get(kind, "utf-8")
        write_csv(path, *rows, delimiter=";" if kind == "semicolons" else ",", encoding=encoding)
    found, (tally,) = search(path)
    assert [(row["name"], row["start"], row["end"], row["caption"]) for row in found] == [
        ("a.mp4 1.5-2 s", 1.5, 2.0, "é, a"),
        ("b.mp4", None, None, None),
    ]
    assert tally.problems == 0
    assert "bytes" not in json.loads(found[0]["extra"])


def test_a_folder_with_a_table_has_what_this_names(tmp_path: Path) -> None:
    for name in ("train/a.mp4", "train/b.mp4", "train/deep/c.mp4", "test/d.mp4"):
        make(tmp_path / "set" / name)
    rows = [{"file_name": "deep/c.mp4", "text": "c"}, {"file_name": "a.mp4", "text": "a"}, {"file_name": "no.mp4"}]
    (tmp_path / "set" / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "set" / "test" / "metadata.csv").write_text("date,place\n1,2\n")
    found, (tally,) = search(tmp_path / "set")
    assert [(row["name"], row["caption"]) for row in found] == [
        ("set/test/d.mp4", None),
        ("deep/c.mp4", "c"),
        ("a.mp4", "a"),
    ]
    assert (tally.absent, tally.problems) == (1, 1)
    assert "it is no manifest that is known" in tally.reasons[0]


def test_a_name_that_two_files_have_is_not_guessed(tmp_path: Path) -> None:
    make(tmp_path / "v" / "one" / "X.mp4"), make(tmp_path / "v" / "two" / "X.webm")
    (tmp_path / "v" / "same").symlink_to(tmp_path / "v" / "two")
    manifest = write_csv(tmp_path / "p.csv", panda("X"))
    rows, (tally,) = search(manifest, look_in=[tmp_path / "v"])
    assert not rows
    assert tally.problems == 2
    assert "are both called so" in tally.reasons[0]
    os.remove(tmp_path / "v" / "one" / "X.mp4")
    # Reached by two ways it is still one.
    assert len(search(manifest, look_in=[tmp_path / "v", tmp_path / "v" / "two"])[0]) == 2


# What can be wrong


def test_nothing_in_a_cell_is_carried_out(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"[open({str(mark)!r}, 'w').write('x')]"
    bad = [panda("X", timestamp=code), panda("X", caption=code), panda("X", matching_score=code)]
    bad += [
        panda("X", timestamp=text)
        for text in ("[" * 3000, "-" * 9000 + "1", "{[]: 1}", "9" * 5000, "()", "", "[[1, 2]]")
    ]
    bad += [panda("X", timestamp="[['0:00:05', '0:00:01'], ['a', 'b']]"), panda("X", timestamp="[[], [1, 2, 3]]")]
    manifest = write_csv(tmp_path / "p.csv", *bad, panda("X"))
    make(tmp_path / "X.mp4")
    rows, (tally,) = search(manifest)
    assert not mark.exists()
    assert [(row["start"], row["end"]) for row in rows] == [(1.5, 3), (60, 3600.25)]
    assert (tally.problems, len(tally.reasons)) == (len(bad) + 2, 5)
    assert "is no list of values" in tally.reasons[0]
    assert list(tally.lines())[-1] == f"  left out: {len(bad) - 3} more"


def test_a_manifest_that_is_unknown_or_broken_is_named(tmp_path: Path) -> None:
    unknown = {
        "notes.txt": "Roses are red\nviolets",
        "a.json": '{"a": 1}',
        "b.json": "[1, 2",
        "c.csv": "video,caption\n",
    }
    for name, text in unknown.items():
        (tmp_path / name).write_text(text)
    make(tmp_path / "X.mp4")
    rows, tallies = search(*(tmp_path / name for name in unknown), tmp_path / "X.mp4")
    assert len(rows) == 1
    assert [tally.problems for tally in tallies] == [1, 1, 1, 1, 0]
    assert "it has Roses are red" in tallies[0].reasons[0]
    assert "it has no entries" in tallies[3].reasons[0]


def test_lines_that_are_broken_are_counted(tmp_path: Path) -> None:
    good = {"file_name": "a.mp4"}
    lines = [b"{", json.dumps(good).encode(), b"[]", b'{"file_name": 1.5}', b'{"file_name": "\xff.mp4"}', b"{" * 9000]
    lines += [b'{"file_name": "a.mp4", "start": "soon"}', b'{"file_name": "a.mp4", "start": 2, "end": 1}']
    (tmp_path / "list").write_bytes(b"\n".join(lines))
    make(tmp_path / "a.mp4")
    rows, (tally,) = search(tmp_path / "list")
    assert names(rows) == ["a.mp4"]
    assert (tally.problems, tally.absent) == (6, 1)


def test_a_manifest_that_is_cut_off_gives_what_is_there(tmp_path: Path) -> None:
    text = json.dumps({"ZZZ": HDVG["AAA"], **HDVG})
    (tmp_path / "list").write_text(text[: text.index('"CCC')])
    make(tmp_path / "AAA.mp4"), make(tmp_path / "ZZZ.mp4")
    rows, (tally,) = search(tmp_path / "list", hdvg_mode="approx")
    assert len(rows) == 6
    assert tally.problems == 1
    assert "it is not JSON from there on" in tally.reasons[0]


def spoiled(values: Any, junk: Any) -> Iterator[Any]:
    """Copies in each of which one thing is junk or missing."""
    yield junk
    if isinstance(values, dict):
        for key in values:
            yield {name: value for name, value in values.items() if name != key}
            yield from ({**values, key: other} for other in spoiled(values[key], junk))
    elif isinstance(values, list):
        for place in range(len(values)):
            yield from ([*values[:place], other, *values[place + 1 :]] for other in spoiled(values[place], junk))


@pytest.mark.parametrize("junk", [None, -1, 1e400, "__import__('os')", [], {}, [[]], {"a": [None]}, True, "\ud800"])
def test_an_entry_that_is_nonsense_spoils_no_other(tmp_path: Path, junk: Any) -> None:
    make(tmp_path / "AAA.mp4"), make(tmp_path / "ZZZ.mp4")
    bad = list(spoiled(HDVG["AAA"], junk))
    assert len(bad) > 30
    videos = {"first": HDVG["AAA"], **{f"b{number}": value for number, value in enumerate(bad)}, "ZZZ": HDVG["AAA"]}
    (tmp_path / "list").write_text(json.dumps({"AAA": videos.pop("first"), **videos}))
    rows, (tally,) = search(tmp_path / "list", hdvg_mode="approx")
    assert {Path(row["path"]).name for row in rows} == {"AAA.mp4", "ZZZ.mp4"}
    assert len(rows) == 6
    assert tally.problems > 0


def test_json_is_read_a_piece_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"one": {"a": [1, -2.5e3, None]}, 't\\w"o': {"é": "}]", "b": {"c": []}}, "n": 12345, "": {}}
    path = tmp_path / "list"
    path.write_text(f" {json.dumps(values, indent=3)}\n", encoding="utf-8")
    for size in (1, 2, 7, 64, 1 << 20):
        monkeypatch.setattr(tables, "CHUNK", size)
        read = list(read_records(path) or ())
        assert read == [
            Problem(key, "it is no object") if key == "n" else Record(key, value) for key, value in values.items()
        ]


def test_times_are_read() -> None:
    assert [seconds(value) for value in ("1:02:03.5", "02:03", " 3.25", 4, None, "", float("nan"))] == [
        3723.5,
        123.0,
        3.25,
        4.0,
        None,
        None,
        None,
    ]
    for value in ("1:2:3:4", "-1", "x", ":", "inf", 1e400, [1], True):
        with pytest.raises(ValueError, match="is no time"):
            seconds(value)
