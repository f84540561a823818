"""The stages of curation that need no weights of others: scenes, keyframe, text and motion, on clips drawn here."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from videofactory_train.curate import motion
from videofactory_train.curate.keyframe import Keyframe
from videofactory_train.curate.motion import Motion, affine_residuals, deviations, moves
from videofactory_train.curate.scenes import Scenes
from videofactory_train.curate.stage import Row, Stage
from videofactory_train.curate.text import Box, Text, edge_share

from videofactory_core.video import read_frames

cv2 = pytest.importorskip("cv2")
pa = pytest.importorskip("pyarrow")
needs_scenedetect = pytest.mark.skipif(bool(Scenes().missing()), reason=Scenes().missing())

# Numbers of the frames after the cuts of `shots`, which has 30 frames a second.
CUTS = [0, 60, 150, 216, 285]
COUNT, RATE = 360, 30
BITS = 9


def encode(path: Path, pictures: Sequence[Any], codec: str = "libx264", rate: int = RATE, **settings: Any) -> Path:
    """A file by another writer: `options`, and `pts` at `clock` ticks a second."""
    clock = settings.get("clock", rate)
    with av.open(str(path), "w") as file:
        # Otherwise the encoder puts a key frame at each cut.
        options = {"sc_threshold": "0", "preset": "ultrafast", "crf": "18"} if codec == "libx264" else {}
        stream = file.add_stream(codec, rate=rate, options={**options, **settings.get("options", {})})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, clock)
        for picture, pts in zip(pictures, settings.get("pts", range(len(pictures))), strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = pts, Fraction(1, clock)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


@lru_cache(maxsize=32)
def texture(height: int, width: int, seed: int) -> Any:
    """Detail of all sizes, as photographs have."""
    generator = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for cell in (4, 8, 16, 32, 64, 128):
        grid = generator.normal(size=(height // cell + 2, width // cell + 2, 3))
        total += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) * cell**0.5
    return np.clip(128 + 40 * total / total.std(), 0, 255).astype(np.uint8)


def shots(size: tuple[int, int] = (160, 96)) -> list[Any]:
    """A moving texture for each shot, above bars that spell the number of the frame."""
    width, height = size
    tints = ((0, 0, 120), (120, 20, 0), (0, 60, 0), (120, 120, 60), (20, 0, 40))
    views = [texture(height, width + COUNT, seed) // 2 + np.uint8(tint) for seed, tint in enumerate(tints)]
    pictures = []
    for number in range(COUNT):
        shot = sum(number >= cut for cut in CUTS) - 1
        picture = views[shot][:, number : number + width].copy()
        # Gray code: from one frame to the next only one of them changes.
        bars = [255 * ((number ^ number >> 1) >> bit & 1) for bit in range(BITS)]
        picture[-height // 6 :] = np.repeat(bars, width // BITS + 1)[:width, None]
        pictures.append(picture)
    return pictures


def number_of(picture: Any) -> int:
    """Which frame of `shots` a picture is."""
    height, width = picture.shape[:2]
    cell = width // BITS + 1
    row = picture[-height // 12].astype(float).mean(-1)
    number = 0
    for bit in reversed(range(BITS)):
        number |= (int(row[bit * cell + cell // 2] > 128) ^ number >> bit + 1 & 1) << bit
    return number


def source(path: Path, **settings: Any) -> Row:
    return {"source_id": "abc", "path": str(path), "name": path.name, "caption": "a cat", "licence": "CC0", **settings}


def clips_of(path: Path, stage: Stage | None = None, **settings: Any) -> list[Row]:
    (result,) = (stage or Scenes()).open()([source(path, **settings)])
    return result["clips"]


def frames_at(clip: Row, times: Sequence[float]) -> list[int]:
    return [number_of(picture) for picture in read_frames(clip["path"], times).numpy()]


def fits(stage: Stage, row: Row) -> bool:
    """Whether a row holds the stage's columns, in kinds that can be written."""
    names = stage.columns()
    return pa.Table.from_pylist([{name: row[name] for name in names}], schema=pa.schema(names)).num_rows == 1


# Scenes


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    return shots()


@pytest.fixture(scope="module")
def plain(pictures: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("plain") / "clip.mp4", pictures)


@needs_scenedetect
@pytest.mark.parametrize("detector", ["adaptive", "content", "histogram"])
def test_detectors_find_the_cuts(detector: Any, plain: Path) -> None:
    clips = clips_of(plain, Scenes(detector=detector))
    assert [round(clip["start"] * RATE) for clip in clips] == CUTS
    assert [round(clip["end"] * RATE) for clip in clips] == [*CUTS[1:], COUNT]


@needs_scenedetect
def test_hashes_tell_coarse_pictures_apart(tmp_path: Path) -> None:
    grids = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
    pictures = [cv2.resize(grid, (160, 96), interpolation=cv2.INTER_CUBIC) for grid in grids for _ in range(25)]
    clips = clips_of(encode(tmp_path / "clip.mp4", pictures, rate=10), Scenes(detector="hash"))
    assert [(clip["start"], clip["end"]) for clip in clips] == [(0, 2.5), (2.5, 5), (5, 7.5)]


@needs_scenedetect
def test_a_threshold_replaces_the_detectors_own(plain: Path) -> None:
    assert len(clips_of(plain, Scenes(detector="content", threshold=250.0))) == 1


@needs_scenedetect
def test_fades_are_cut_in_their_middle(tmp_path: Path) -> None:
    light = [255] * 40 + [0] * 20 + [255] * 60
    path = encode(tmp_path / "fades.mp4", [np.full((48, 64, 3), value, np.uint8) for value in light], rate=20)
    clips = clips_of(path, Scenes(detector="threshold"))
    assert [(clip["start"], clip["end"]) for clip in clips] == [(0, 2.5), (2.5, 6)]


@needs_scenedetect
def test_a_grey_picture_that_darkens_is_not_cut(tmp_path: Path) -> None:
    """Black must not get colours by rounding, for their hue is of chance."""
    picture = texture(360, 640, 1)[..., :1].repeat(3, 2)
    light = np.abs(np.linspace(-1, 1, 61))
    path = encode(tmp_path / "clip.mp4", [(picture * share).astype(np.uint8) for share in light], rate=20)
    assert [(clip["start"], clip["end"]) for clip in clips_of(path, Scenes(detector="content"))] == [(0, 3.05)]


def onnx_of_brightness() -> bytes:
    """A network in TransNetV2's place: `output` is the mean of each frame of `input [N, 100, 27, 48, 3]`."""

    def varint(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    def field(number: int, value: int | bytes | str) -> bytes:
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        data = value.encode() if isinstance(value, str) else value
        return varint(number << 3 | 2) + varint(len(data)) + data

    def node(kind: str, into: str, out: str, *attributes: bytes) -> bytes:
        return field(1, into) + field(2, out) + field(4, kind) + b"".join(field(5, item) for item in attributes)

    def value(name: str, kind: int, *shape: int | str) -> bytes:
        sides = b"".join(field(1, field(1 if isinstance(side, int) else 2, side)) for side in shape)
        return field(1, name) + field(2, field(1, field(1, kind) + field(2, sides)))

    to_float = field(1, "to") + field(3, 1) + field(20, 2)
    axes = field(1, "axes") + field(8, 2) + field(8, 3) + field(20, 7)
    keep = field(1, "keepdims") + field(3, 0) + field(20, 2)
    graph = (
        field(1, node("Cast", "input", "x", to_float))
        + field(1, node("ReduceMean", "x", "output", axes, keep))
        + field(2, "brightness")
        + field(11, value("input", 2, "n", 100, 27, 48, 3))
        + field(12, value("output", 1, "n", 100, 3))
    )
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))


@needs_scenedetect
def test_transnetv2_is_the_users_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = tmp_path / "model.onnx"
    assert "scenes.model" in Scenes(detector="transnetv2", model=str(model)).missing()
    model.write_bytes(onnx_of_brightness())
    stage = Scenes(detector="transnetv2", model=str(model), threshold=128.0)
    assert stage.missing() == ""
    flashes = [255 if number in (50, 51, 130) else 20 for number in range(210)]
    path = encode(tmp_path / "clip.mp4", [np.full((48, 64, 3), value, np.uint8) for value in flashes], rate=20)
    assert [(clip["start"], clip["end"]) for clip in clips_of(path, stage)] == [(0, 2.5), (2.5, 6.5), (6.5, 10.5)]


GROUPS = {"g": "24", "bf": "3"}
FILES: list[tuple[str, str, dict[str, Any]]] = [
    ("long.mp4", "libx264", {"options": {"g": "250", "bf": "3"}}),
    ("open.mp4", "libx264", {"options": {**GROUPS, "x264-params": "open-gop=1"}}),
    ("late.mp4", "libx264", {"options": GROUPS, "pts": range(75, 75 + COUNT)}),
    ("clip.ts", "libx264", {"options": GROUPS}),
    ("open.ts", "libx264", {"options": {**GROUPS, "x264-params": "open-gop=1"}}),
    ("variable.mkv", "libx264", {"options": GROUPS, "clock": 1000}),
    ("variable.mp4", "libx264", {"options": GROUPS, "clock": 1000}),
    ("clip.avi", "mpeg4", {}),
    ("clip.webm", "libvpx-vp9", {"options": {"cpu-used": "8", "deadline": "realtime"}}),
]


@needs_scenedetect
@pytest.mark.parametrize(("name", "codec", "settings"), FILES, ids=[name for name, _, _ in FILES])
def test_clips_are_found_again_by_their_times(
    name: str, codec: str, settings: dict[str, Any], pictures: list[Any], tmp_path: Path
) -> None:
    if settings.get("clock") == 1000:
        steps = np.random.default_rng(1).integers(15, 60, COUNT - 1)
        settings = {**settings, "pts": np.cumsum([0, *steps]).tolist()}
    path = encode(tmp_path / name, pictures, codec, **settings)
    clips = clips_of(path, Scenes(min_seconds=1.0))
    assert len(clips) == len(CUTS)
    for clip, first, end in zip(clips, CUTS, [*CUTS[1:], COUNT], strict=True):
        # Half a millisecond before the end the last frame is on screen, whatever times are rounded to.
        middle = (clip["start"] + clip["end"]) / 2
        shown = frames_at(clip, [clip["start"], middle, clip["end"] - 2e-3])
        assert (shown[0], shown[-1]) == (first, end - 1)
        assert first < shown[1] < end - 1
        if path.suffix != ".avi":
            with av.open(str(path)) as file:
                stream = file.streams.video[0]
                assert Fraction(clip["time_base"]) == stream.time_base
                inside = [
                    number_of(frame.to_ndarray(format="rgb24"))
                    for frame in file.decode(stream)
                    if clip["start_pts"] <= frame.pts < clip["end_pts"]
                ]
            assert inside == list(range(first, end))
        assert fits(Scenes(), clip)
    assert len({clip["clip_id"] for clip in clips}) == len(clips)
    assert [clip["end"] for clip in clips[:-1]] == [clip["start"] for clip in clips[1:]]


@needs_scenedetect
@pytest.mark.skipif(int(av.__version__.split(".")[0]) < 15, reason="copies no streams of this kind")
def test_what_an_edit_list_hides_is_in_no_clip(pictures: list[Any], tmp_path: Path) -> None:
    whole, part = encode(tmp_path / "whole.mp4", pictures, options=GROUPS), tmp_path / "part.mp4"
    with av.open(str(whole)) as old, av.open(str(part), "w", options={"avoid_negative_ts": "disabled"}) as new:
        stream = old.streams.video[0]
        target = new.add_stream_from_template(stream)
        shift = int(Fraction(130, RATE) / stream.time_base)
        for packet in old.demux(stream):
            if packet.pts is not None and packet.pts * stream.time_base * RATE >= 120:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, target
                new.mux(packet)
    clips = clips_of(part, Scenes(min_seconds=0.2))
    assert [frames_at(clip, [clip["start"], clip["end"] - 2e-3]) for clip in clips] == [
        [130, 149],
        [150, 215],
        [216, 284],
        [285, 359],
    ]


@needs_scenedetect
@pytest.mark.parametrize("name", ["clip.mp4", "clip.ts", "clip.avi"])
def test_a_part_of_a_file_gives_the_clips_within(name: str, pictures: list[Any], tmp_path: Path) -> None:
    codec = "mpeg4" if name.endswith("avi") else "libx264"
    path = encode(tmp_path / name, pictures, codec, options={"g": "24"})
    clips = clips_of(path, Scenes(min_seconds=0.5), start=6.0, end=8.5)
    assert [(clip["start"], clip["end"]) for clip in clips] == [
        (pytest.approx(6, abs=1e-3), pytest.approx(7.2, abs=1e-3)),
        (pytest.approx(7.2, abs=1e-3), pytest.approx(8.5, abs=1e-3)),
    ]
    assert frames_at(clips[0], [clips[0]["start"]]) == [180]
    with pytest.raises(ValueError, match=r"shows no sound frame after 60\.00 seconds"):
        clips_of(path, start=60.0)


@needs_scenedetect
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(0, 2), (2, 5), (5, 7.2), (7.2, 9.5), (9.5, 12)]),
        ({"min_seconds": 2.5}, [(2, 5), (9.5, 12)]),
        ({"min_seconds": 1.0, "trim_seconds": 0.5}, [(0.5, 1.5), (2.5, 4.5), (5.5, 6.7), (7.7, 9), (10, 11.5)]),
        ({"min_seconds": 1.1, "max_seconds": 2.3}, [(0, 2), (2, 3.5), (3.5, 5), (5, 7.2), (7.2, 9.5), (9.5, 10.75)]),
        ({"trim_seconds": 2.0}, []),
    ],
)
def test_lengths_are_as_the_settings_say(
    settings: dict[str, float], expected: list[tuple[float, float]], plain: Path
) -> None:
    clips = clips_of(plain, Scenes(**settings))
    found = [(clip["start"], clip["end"]) for clip in clips][: len(expected) or None]
    assert found == [pytest.approx(span, abs=1e-6) for span in expected]


@needs_scenedetect
def test_what_is_damaged_is_in_no_clip(pictures: list[Any], tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", pictures, options={"g": "30", "crf": "23"})
    with av.open(str(path)) as file:
        packets = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    place, size = packets[100]
    data[place + 8 : place + size] = bytes(255 - byte for byte in data[place + 8 : place + size])
    path.write_bytes(data)
    clips = clips_of(path, Scenes(min_seconds=0.5))
    spans = [(round(clip["start"] * RATE), round(clip["end"] * RATE)) for clip in clips]
    assert spans[0] == (0, 60)
    assert spans[2:] == [(120, 150), (150, 216), (216, 285), (285, 360)]
    assert spans[1][0] == 60
    assert 90 <= spans[1][1] <= 101
    for clip, (first, end) in zip(clips, spans, strict=True):
        times = [clip["start"] + number / RATE for number in range(end - first)]
        assert frames_at(clip, times) == list(range(first, end))


@needs_scenedetect
def test_a_file_that_breaks_off_has_clips_up_to_there(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "part.ts"
    encode(path, shots(), options=GROUPS)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    clips = clips_of(path)
    assert [round(clip["start"] * RATE) for clip in clips] == CUTS[: len(clips)]
    assert 2 <= len(clips) < len(CUTS)


@needs_scenedetect
def test_a_member_of_a_shard_is_read_where_it_lies(plain: Path, tmp_path: Path) -> None:
    shard = tmp_path / "shard.tar"
    with tarfile.open(shard, "w") as file:
        file.add(plain, "clip.mp4")
    with tarfile.open(shard) as file:
        member = file.getmember("clip.mp4")
    place = {"offset": member.offset_data, "length": member.size}
    clips = clips_of(shard, **place)
    assert [clip["start"] for clip in clips] == [clip["start"] for clip in clips_of(plain)]
    assert (clips[1]["path"], clips[1]["offset"], clips[1]["length"]) == (str(shard), *place.values())
    (found,) = Keyframe().open()(clips[1:2])
    assert number_of(np.asarray(Image.open(io.BytesIO(found["image"])))) == 105


@needs_scenedetect
def test_a_clip_says_where_it_comes_from(plain: Path) -> None:
    clip = clips_of(plain, start=2.0, end=5.0)[0]
    assert clip["source_id"] == "abc"
    assert (clip["caption"], clip["licence"], clip["name"]) == ("a cat", "CC0", "clip.mp4 2.00-5.00 s")
    assert (clip["width"], clip["height"], clip["fps"]) == (160, 96, pytest.approx(30))
    assert clip["clip_id"] == "abc-2000-5000"


@needs_scenedetect
def test_small_and_single_pictures_are_no_exception(tmp_path: Path) -> None:
    dot = encode(tmp_path / "dot.mkv", [np.full((1, 1, 3), 90, np.uint8)] * 30, "ffv1", rate=10)
    assert [(clip["end"], clip["width"], clip["height"]) for clip in clips_of(dot)] == [(3.0, 1, 1)]
    Image.new("RGB", (64, 48)).save(tmp_path / "one.png")
    assert clips_of(tmp_path / "one.png") == []


@needs_scenedetect
def test_what_is_no_video_is_named(tmp_path: Path) -> None:
    for name, data in (("empty.mp4", b""), ("text.mp4", b"this is no video" * 100)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name} cannot be read as a video"):
            clips_of(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"absent\.mp4 is not a file"):
        clips_of(tmp_path / "absent.mp4")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scenes(min_seconds=-1.0), "min_seconds: -1.0 is out of range"),
        (lambda: Scenes(threshold=float("nan")), "threshold: nan is out of range"),
        (lambda: Scenes(max_seconds=3.0), "max_seconds: 3 is too near to min_seconds; use 4 or more"),
        (lambda: Motion(estimator="pwc"), 'estimator: .* use dis, raft_small, raft_large or "module:function"'),
        (lambda: Motion(fps=0.0), "fps: 0.0 is no frame rate"),
        (lambda: Motion(width=16), "width: 16 is out of range"),
        (lambda: Text(threshold=1.0), "threshold: 1.0 is no score"),
        (lambda: Text(band=320), "band: 320 is out of range"),
        (lambda: Text(min_height=-1.0), "min_height: -1.0 is out of range"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make: Callable[[], Stage], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_stages_travel_to_other_processes() -> None:
    for stage in (Scenes(min_seconds=3.0), Keyframe(), Motion(), Text()):
        assert pickle.loads(pickle.dumps(stage)) == stage


# Keyframes


def clip_of(path: Path, start: float, end: float, width: int, height: int, fps: float = RATE) -> Row:
    return {
        "clip_id": "a",
        "path": str(path),
        "name": path.name,
        "start": start,
        "end": end,
        "width": width,
        "height": height,
        "fps": fps,
    }


def test_the_keyframe_is_the_picture_in_the_middle(plain: Path) -> None:
    rows = [clip_of(plain, 2.0, 5.0, 160, 96), clip_of(plain, 7.2, 9.5, 160, 96)]
    found = Keyframe().open()(rows)
    assert [row["time"] for row in found] == [3.5, 8.35]
    pictures = [np.asarray(Image.open(io.BytesIO(row["image"]))) for row in found]
    assert [number_of(picture) for picture in pictures] == [105, 250]
    assert pictures[0].shape == (96, 160, 3)
    assert fits(Keyframe(), found[0])
    # Alone or with others it is the same.
    assert Keyframe().open()(rows[1:]) == found[1:]


def test_large_keyframes_become_smaller(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", shots((960, 540))[:31])
    (found,) = Keyframe().open()([clip_of(path, 0.0, 1.0, 960, 540)])
    picture = Image.open(io.BytesIO(found["image"]))
    assert (picture.size, picture.format) == ((640, 360), "JPEG")
    assert number_of(np.asarray(picture)) == 15


# Motion

# Width and height, and frames a second, of the clips that are judged.
VIEW, SECONDS, DRAWN_FPS = (640, 360), 5, 4
CLIP_TIMES = np.arange(SECONDS * DRAWN_FPS) / DRAWN_FPS


def seen(
    picture: Any, x: float = 0.0, y: float = 0.0, zoom: float = 1.0, turn: float = 0.0, size: tuple[int, int] = VIEW
) -> Any:
    """What a camera sees of a picture: its middle moved by x, y pixels, `zoom` times as large, turned by degrees."""
    height, width = picture.shape[:2]
    cosine, sine = (f(np.radians(turn)) / zoom for f in (np.cos, np.sin))
    right, down = size[0] / 2, size[1] / 2
    matrix = np.array(
        [
            [cosine, -sine, width / 2 + x - cosine * right + sine * down],
            [sine, cosine, height / 2 + y - sine * right - cosine * down],
        ]
    )
    return cv2.warpAffine(picture, matrix, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def eased(t: float) -> float:
    """From 0 to 1 within the clip, slow at both ends."""
    share = t / SECONDS
    return share * share * (3 - 2 * share)


def with_object(background: Any, thing: Any, x: float, y: float) -> Any:
    """A round thing in front of a background, its middle at x, y."""
    radius = thing.shape[0] / 2
    down, right = np.mgrid[: VIEW[1], : VIEW[0]]
    mask = np.hypot(right - x, down - y) < radius - 2
    moved = cv2.warpAffine(thing, np.float64([[1, 0, x - radius], [0, 1, y - radius]]), VIEW)
    return np.where(mask[..., None], moved, background)


@lru_cache
def blobs(seed: int) -> Any:
    """Round shapes that cover 30 % of a picture."""
    heights = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(720, 1280)), (0, 0), 40)
    return (heights > np.quantile(heights, 0.7)).astype(np.uint8) * 255


def layered(draw: Callable[[Any, float], Any], seed: int = 11) -> Any:
    """Things at several distances, the near ones in front; `draw` shows a layer by its nearness, 0.25 to 1."""
    shown = draw(texture(720, 1280, seed), 0.25)
    for number, near in enumerate((0.45, 0.7, 1.0)):
        layer = texture(720, 1280, seed + number + 1)
        mask = draw(blobs(seed + number), near)[..., None] > 127
        shown = np.where(mask, draw(layer, near), shown)
    return shown


def draw(name: str) -> list[Any]:
    """The clip of that name."""
    ground, other = texture(720, 1280, 1), texture(720, 1280, 2)
    generator = np.random.default_rng(3)
    ball, disc = texture(90, 90, 4), texture(300, 300, 5)
    # A hand that goes 8 to 16 pixels somewhere in each half of a second.
    turns, steps = generator.uniform(0, 2 * np.pi, 2 * SECONDS), generator.uniform(8, 16, 2 * SECONDS)
    path = np.cumsum([steps * np.cos(turns), steps * np.sin(turns)], 1)
    shake = np.stack([np.interp(CLIP_TIMES, np.arange(2 * SECONDS) / 2, way) for way in path], 1)
    frames: dict[str, Callable[[float, Any], Any]] = {
        "static": lambda t, s: seen(ground),
        "noise": lambda t, s: np.clip(seen(ground) + generator.normal(0, 6, (*VIEW[::-1], 3)), 0, 255),
        "pan slow": lambda t, s: seen(ground, x=12 * t),
        "pan fast": lambda t, s: seen(ground, x=50 * t - 125),
        "pan diagonal": lambda t, s: seen(ground, x=12 * t, y=8 * t),
        "pan eased": lambda t, s: seen(ground, x=65 * eased(t)),
        "zoom": lambda t, s: seen(ground, zoom=1 + 0.04 * t),
        "zoom exponential": lambda t, s: seen(ground, zoom=1.04**t),
        "zoom eased": lambda t, s: seen(ground, zoom=1 + 0.22 * eased(t)),
        "zoom and pan": lambda t, s: seen(ground, x=6 * t, zoom=1 + 0.04 * t),
        "zoom fast": lambda t, s: seen(ground, zoom=1 + 0.15 * t),
        "rotation": lambda t, s: seen(ground, turn=2 * t),
        "shaky picture": lambda t, s: seen(ground, x=s[0], y=s[1]),
        "parallax sideways": lambda t, s: layered(lambda layer, near: seen(layer, x=10 * t * (0.13 + near))),
        "slide show": lambda t, s: seen(ground if t < SECONDS / 2 else other),
        "small object": lambda t, s: with_object(seen(ground), ball, 100 + 60 * t, 180),
        "big object": lambda t, s: with_object(seen(ground), disc, 160 + 60 * t, 180),
        "object on a pan": lambda t, s: with_object(seen(ground, x=12 * t), disc, 480 - 60 * t, 180),
        "parallax handheld": lambda t, s: layered(
            lambda layer, near: seen(layer, x=2 * s[0] * near**2, y=2 * s[1] * near**2)
        ),
        "parallax dolly": lambda t, s: layered(lambda layer, near: seen(layer, zoom=1 / (1 - 0.12 * near * t))),
    }
    return [np.asarray(frames[name](t, s)).round().astype(np.uint8) for t, s in zip(CLIP_TIMES, shake, strict=True)]


DROPPED = (
    "static",
    "noise",
    "pan slow",
    "pan fast",
    "pan diagonal",
    "pan eased",
    "zoom",
    "zoom exponential",
    "zoom eased",
    "zoom and pan",
    "zoom fast",
    "rotation",
    "shaky picture",
    "parallax sideways",
)
KEPT = (
    "slide show",
    "small object",
    "big object",
    "object on a pan",
    "parallax handheld",
    "parallax dolly",
)


def measured(path: Path, stage: Motion | None = None, end: float = SECONDS, **row: Any) -> Row:
    (found,) = (stage or Motion()).open()([{**clip_of(path, 0.0, end, *VIEW, DRAWN_FPS), **row}])
    return found


@pytest.mark.parametrize("name", [*DROPPED, *KEPT])
def test_clips_stay_whose_parts_move_differently(name: str, tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", draw(name), rate=DRAWN_FPS, options={"crf": "23"})
    found = measured(path)
    assert found["pairs"] == 9
    assert fits(Motion(), found)
    assert moves(found["o_avg"], found["o_md"]) is (name in KEPT), found
    # The extra score tells them apart too, relative to the motion as a whole, but for what hardly moves.
    if name not in ("static", "noise", "slide show"):
        assert (found["affine_residual"] > 0.2 * found["o_avg"]) is (name in (*KEPT, "parallax sideways")), found


def test_measures_are_in_units_of_a_picture_640_wide(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", draw("pan slow"), rate=DRAWN_FPS)
    # 12 pixels a second of a view that is 640 wide, by frames that lie half a second apart.
    for width in (320, 640):
        assert measured(path, Motion(width=width))["o_avg"] == pytest.approx(6, rel=0.03)
    assert measured(path, Motion(fps=4.0))["o_avg"] == pytest.approx(3, rel=0.03)
    assert measured(path, Motion(fps=4.0))["pairs"] == 19


def test_the_mean_deviation_is_taken_as_the_setting_says() -> None:
    lengths = np.array([[[1.0, 3.0], [1.0, 3.0]], [[5.0, 3.0], [5.0, 3.0]]], np.float32)
    # Means over time are 3 everywhere; those over the picture 2 and 4.
    assert deviations(lengths, "global") == (3.0, 1.0)
    assert deviations(lengths, "temporal") == (3.0, 1.0)
    assert deviations(lengths, "spatial") == (3.0, 1.0)
    lengths[1] = lengths[0]
    assert deviations(lengths, "global") == (2.0, 1.0)
    assert deviations(lengths, "temporal") == (2.0, 0.0)
    assert deviations(lengths, "spatial") == (2.0, 1.0)


def test_the_deviation_of_a_zoom_is_the_analytic_one(tmp_path: Path) -> None:
    """|x| over 16:9 has mean / mean absolute deviation = 2.878, whatever the speed."""
    path = encode(tmp_path / "clip.mp4", draw("zoom exponential"), rate=DRAWN_FPS)
    assert measured(path)["ratio"] == pytest.approx(2.878, rel=0.03)


@pytest.mark.parametrize(
    ("o_avg", "o_md", "expected"),
    [
        (0.2, 0.2, False),
        (0.3, 0.2, True),
        (4, 2, False),
        (4, 2.1, True),
        (30, 6, False),
        (30, 6.1, True),
        (3, 0, False),
    ],
)
def test_the_rule_is_the_papers(o_avg: float, o_md: float, expected: bool) -> None:
    assert moves(o_avg, o_md) is expected
    assert moves(o_avg, o_md, o_avg_over=100.0) is False


def test_an_affine_motion_leaves_nothing_and_an_object_its_share() -> None:
    y, x = np.mgrid[:45, :80].astype(float)
    affine = np.stack([0.3 + 0.02 * x - 0.01 * y, -2 + 0.03 * y], -1)
    thing = affine.copy()
    thing[10:28, 20:60] += (6, 8)
    found = affine_residuals(np.stack([affine, thing]))
    assert found[0] == pytest.approx(0, abs=1e-9)
    # The rest of the picture says how the camera moves.
    assert found[1] == pytest.approx(10 * 18 * 40 / (45 * 80), rel=0.01)


def difference(weights: str) -> motion.Estimator:
    """An estimator that takes the change in brightness for motion to the right."""

    def estimate(first: Any, second: Any) -> Any:
        change = second[..., 1].astype(np.float32) - first[..., 1]
        return np.stack([change * float(weights), np.zeros_like(change)], -1)

    return estimate


def test_other_estimators_plug_in(tmp_path: Path) -> None:
    steps = [np.full((64, 64, 3), 10 * number, np.uint8) for number in range(20)]
    path = encode(tmp_path / "clip.mkv", steps, "ffv1", rate=4)
    stage = Motion(estimator=f"{__name__}:difference", weights="0.5", width=64)
    assert stage.missing() == ""
    found = measured(path, stage, width=64, height=64)
    # Two frames a second are 20 levels apart, a half of which is 10 pixels of 64, of which 640 are as many as 100.
    assert found["o_avg"] == pytest.approx(100, rel=0.03)
    assert found["affine_residual"] == pytest.approx(0, abs=1e-3)
    assert "has no function absent" in Motion(estimator=f"{__name__}:absent").missing()
    assert "cannot be imported" in Motion(estimator="no_such_module:flow").missing()


def test_even_motion_without_any_deviation_has_no_ratio(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mkv", [np.full((64, 64, 3), 90, np.uint8)] * 20, "ffv1", rate=4)
    found = measured(path, Motion(estimator=f"{__name__}:difference", weights="1"))
    assert (found["o_avg"], found["o_md"], found["ratio"]) == (0, 0, None)
    assert fits(Motion(), found)


def test_long_clips_are_judged_by_some_of_their_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = [np.full((32, 64, 3), 3 * number, np.uint8) for number in range(80)]
    path = encode(tmp_path / "clip.mkv", levels, "ffv1", rate=4)
    stage = Motion(estimator=f"{__name__}:difference", weights="1", width=64)
    whole = measured(path, stage, end=20, width=64, height=32)
    monkeypatch.setattr(motion, "FRAMES_AT_A_TIME", 7)
    assert measured(path, stage, end=20, width=64, height=32) == whole
    monkeypatch.setattr(motion, "MOST_PAIRS", 5)
    some = measured(path, stage, end=20, width=64, height=32)
    assert (whole["pairs"], some["pairs"]) == (39, 5)
    # Each of them still half a second apart.
    assert some["o_avg"] == pytest.approx(whole["o_avg"], rel=0.1)


def test_the_next_scene_is_not_looked_at(tmp_path: Path) -> None:
    light = [np.full((32, 64, 3), 40 if number < 30 else 240, np.uint8) for number in range(60)]
    times = [round(number * 1000 / 15) for number in range(60)]
    path = encode(tmp_path / "clip.mkv", light, "ffv1", rate=15, clock=1000, pts=times)
    stage = Motion(estimator=f"{__name__}:difference", weights="1", width=64)
    for end in (1.999, 2.0, 2.001):
        row = {**clip_of(path, 0.0, end, 64, 32, 15.0)}
        (found,) = stage.open()([row])
        assert (found["o_avg"], found["pairs"]) == (0, 3)


def test_a_clip_of_one_frame_is_too_short(plain: Path) -> None:
    with pytest.raises(ValueError, match=r"clip\.mp4 lasts 0\.40 seconds, too short for two frames at 2 fps"):
        measured(plain, end=0.4)


@pytest.mark.parametrize("size", [(16, 96), (160, 2)])
def test_narrow_pictures_can_be_measured(size: tuple[int, int], tmp_path: Path) -> None:
    picture = texture(128, 256, 1)
    frames = [picture[: size[1], number : number + size[0]] for number in range(20)]
    path = encode(tmp_path / "clip.mp4", frames, rate=4)
    assert measured(path, width=size[0], height=size[1])["o_avg"] > 0


def test_raft_takes_local_weights(tmp_path: Path) -> None:
    from torchvision.models.optical_flow import raft_small

    torch.manual_seed(0)
    model = raft_small(weights=None).eval()
    weights = tmp_path / "raft.pth"
    stage = Motion(estimator="raft_small", weights=str(weights), width=128)
    assert "no file" in stage.missing()
    assert "raft_small_C_T_V2" in stage.missing()
    torch.save(model.state_dict(), weights)
    assert stage.missing() == ""
    estimate = motion._raft("raft_small", str(weights))
    first, second = texture(128, 128, 1), texture(128, 128, 2)
    pair = [torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1 for picture in (first, second)]
    with torch.inference_mode():
        expected = model(*pair)[-1][0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(estimate(first, second), expected, rtol=1e-3, atol=1e-3)
    assert estimate(first[:70, :100], second[:70, :100]).shape == (70, 100, 2)
    save_file(model.state_dict(), tmp_path / "raft.safetensors")
    again = motion._raft("raft_small", str(tmp_path / "raft.safetensors"))
    np.testing.assert_array_equal(again(first, second), estimate(first, second))
    torch.save({"a": torch.zeros(1)}, weights)
    for content, words in ((None, "; get https"), (b"nothing", r" \(.*is not a safetensors file.*; get https")):
        if content:
            weights.write_bytes(content)
        with pytest.raises(ValueError, match=rf"is not torchvision's raft_small{words}"):
            stage.open()


# Text


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10, 10, 50, 50), 1.0),
        ((100, 100, 500, 250), 0.0),
        ((16, 150, 93, 180), 1 - 33 / 77),
        ((30, 100, 610, 130), 1 - 520 / 580),
        ((200, 280, 400, 320), 0.5),
        ((0, 0, 640, 360), 1 - 520 * 240 / (640 * 360)),
    ],
)
def test_the_share_of_a_box_in_the_band(box: tuple[float, float, float, float], expected: float) -> None:
    assert edge_share(Box(*box, score=1.0), (640, 360), 60) == pytest.approx(expected)


def test_pictures_lower_than_two_bands_are_all_edge() -> None:
    assert edge_share(Box(300, 50, 340, 60, 1.0), (640, 110), 60) == 1


def scene_with(*texts: tuple[str, int, int, int], size: tuple[int, int] = (640, 360)) -> bytes:
    """A JPEG of soft colours with texts at x, y and of a height."""
    picture = Image.fromarray(cv2.resize(texture(45, 80, 3) // 3 + 40, size, interpolation=cv2.INTER_CUBIC))
    for words, x, y, height in texts:
        ImageDraw.Draw(picture).text((x, y), words, "white", ImageFont.load_default(height))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)
    return file.getvalue()


TEXTS: dict[str, tuple[list[tuple[str, int, int, int]], bool]] = {
    "nothing": ([], True),
    "name in the corner": ([("@channel", 530, 20, 20)], False),
    "small name in the corner": ([("@channel name", 540, 330, 11)], False),
    "subtitle": ([("and then they all went home", 170, 318, 24)], False),
    "subtitle of two lines": ([("and then they all", 220, 280, 24), ("went home", 260, 318, 24)], False),
    "text on a shirt": ([("TEAM 7", 270, 190, 28)], True),
    "title": ([("THE LONG WAY", 140, 140, 56)], True),
    "at the left edge": ([("LIVE", 4, 50, 22)], False),
    "sign at the left": ([("HOTEL", 14, 150, 26)], False),
    "over both side bands": ([("a line of text that goes from side to side", 36, 170, 29)], True),
}


@pytest.mark.parametrize("name", TEXTS)
def test_clips_stay_that_have_no_text_along_the_edges(name: str) -> None:
    if Text().missing():
        pytest.skip(Text().missing())
    texts, keep = TEXTS[name]
    (found,) = Text().open()([{"image": scene_with(*texts)}])
    assert (found["text_edge"] < 0.5) is keep, found
    assert len(found["text_boxes"]) >= len(texts)
    assert fits(Text(), found)
    for x0, y0, x1, y1, score in found["text_boxes"]:
        assert 0 <= x0 < x1 <= 640
        assert 0 <= y0 < y1 <= 360
        assert y1 - y0 >= 8
        assert 0 < score <= 1


def test_small_pictures_are_measured_as_if_they_were_640_wide() -> None:
    if Text().missing():
        pytest.skip(Text().missing())
    pictures = scene_with(("CHANNEL", 500, 20, 28)), scene_with(("CHANNEL", 250, 10, 14), size=(320, 180))
    large, small = Text().open()([{"image": picture} for picture in pictures])
    assert np.allclose(large["text_boxes"][0][:4], small["text_boxes"][0][:4], atol=10)
    # What is lower than the least height does not count.
    (none,) = Text(min_height=100.0).open()([{"image": scene_with(("CHANNEL", 500, 20, 28))}])
    assert none == {"text_boxes": [], "text_edge": 0.0}


def test_pp_ocr_comes_from_a_local_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", "5.4")
    folder = tmp_path / "detector"
    stage = Text(detector="pp_ocr", weights=str(folder))
    assert "name a folder with a PP-OCR detector" in stage.missing()
    torch.manual_seed(0)
    model = transformers.AutoModelForObjectDetection.from_config(transformers.PPOCRV5MobileDetConfig())
    model.save_pretrained(folder)
    transformers.PPOCRV5ServerDetImageProcessor().save_pretrained(folder)
    assert stage.missing() == ""
    rows = [{"image": scene_with(("CHANNEL", 500, 20, 28))}, {"image": scene_with(size=(640, 480))}]
    found = stage.open()(rows)
    # Random weights find something or nothing, but always the same.
    assert found == [stage.open()([row])[0] for row in rows]
    assert all(fits(stage, row) for row in found)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is no PP-OCR detector"):
        stage.open()


@pytest.fixture(scope="module")
def craft() -> Any:
    from videofactory_train.curate.craft import Craft

    torch.manual_seed(0)
    model = Craft().eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if "running_var" in name:
                value.uniform_(0.5, 1.5)
            elif "running_mean" in name:
                value.normal_(std=0.1)
    return model


def test_craft_is_the_authors_network(craft: Any) -> None:
    """Against torchvision's VGG16, cut up and joined as the authors' file does it."""
    from torch.nn import functional as F
    from torchvision.models import vgg16_bn

    assert len(craft.state_dict()) == 154
    assert sum(value.numel() for value in craft.parameters()) == 20_770_466
    features = vgg16_bn(weights=None).eval().features
    for part in ("slice1", "slice2", "slice3", "slice4"):
        for place, layer in getattr(craft.basenet, part).named_children():
            features[int(place)].load_state_dict(layer.state_dict())
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(1, 3, 64, 96, generator=generator)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        x = (picture - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
        taken = []
        for begin, end in ((0, 12), (12, 19), (19, 29), (29, 39)):
            x = features[begin:end](x)
            # torchvision's ReLU at the beginning of the next part changes this tensor itself.
            taken.append(x)
        y = torch.cat([craft.basenet.slice5(x), taken.pop()], 1)
        for layer in (craft.upconv1, craft.upconv2, craft.upconv3, craft.upconv4):
            y = layer.conv(y)
            if taken:
                skip = taken.pop()
                y = torch.cat([F.interpolate(y, size=skip.shape[2:], mode="bilinear", align_corners=False), skip], 1)
        expected = craft.conv_cls(y)
        assert torch.allclose(craft(picture), expected, atol=1e-5)
        assert expected.std() > 1e-3
        # Other sides are filled up with black.
        filled = F.pad(picture[:, :, :50, :70], (0, 26, 0, 14))
        assert torch.allclose(craft(picture[:, :, :50, :70]), craft(filled)[:, :, :25, :35], atol=1e-5)


def test_craft_reads_the_authors_file(craft: Any, tmp_path: Path) -> None:
    weights = tmp_path / "craft.pth"
    stage = Text(detector="craft", weights=str(weights))
    assert "craft_mlt_25k.pth" in stage.missing()
    torch.save({f"module.{key}": value for key, value in craft.state_dict().items()}, weights)
    assert stage.missing() == ""
    (found,) = stage.open()([{"image": scene_with(size=(160, 64))}])
    assert fits(stage, found)
    # As .safetensors, and what is no weights at all.
    save_file(craft.state_dict(), tmp_path / "craft.safetensors")
    other = Text(detector="craft", weights=str(tmp_path / "craft.safetensors"))
    assert other.open()([{"image": scene_with(size=(160, 64))}]) == [found]
    torch.save({"module.a": torch.zeros(1)}, weights)
    for content, words in ((None, "; get it again"), (b"nothing", r" \(.*is not a safetensors file")):
        if content:
            weights.write_bytes(content)
        with pytest.raises(ValueError, match=rf"is not CRAFT's craft_mlt_25k\.pth{words}"):
            stage.open()


def test_an_older_pytorch_does_not_read_the_authors_file(
    craft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its restricted reader can be tricked with the format of that file."""
    weights = tmp_path / "craft.pth"
    torch.save(craft.state_dict(), weights, _use_new_zipfile_serialization=False)
    stage = Text(detector="craft", weights=str(weights))
    assert fits(stage, stage.open()([{"image": scene_with(size=(160, 64))}])[0])
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.5.1"))
    with pytest.raises(ValueError, match="which PyTorch reads safely from 2"):
        stage.open()


def test_craft_joins_characters_to_words() -> None:
    from videofactory_train.curate.craft import find_boxes

    characters, links = np.zeros((60, 100), np.float32), np.zeros((60, 100), np.float32)
    # Two characters with a link between them, one alone, one too weak, and one too small.
    characters[10:20, 10:18] = characters[10:20, 24:32] = 0.9
    links[14:16, 16:26] = 0.8
    characters[40:50, 60:70] = 0.75
    characters[40:50, 20:30] = 0.6
    characters[5:7, 80:82] = 0.95
    word, alone = sorted(find_boxes(characters, links, 0.7))
    # 172 pixels of 22 x 10 grow by int(2 sqrt(172 * 10 / 220)) / 2 = 2.5; 100 of 10 x 10 by 3.
    assert word == pytest.approx(((10 - 2.5) * 2, (10 - 2.5) * 2, (32 + 2.5) * 2, (20 + 2.5) * 2, 0.9))
    assert alone == pytest.approx((57 * 2, 37 * 2, 73 * 2, 53 * 2, 0.75))
