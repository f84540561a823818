"""What is measured of folders of videos: drawn clips in real files, and a network so small that it is written out."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from videofactory_train.data.moving_shapes import MovingShapes
from videofactory_train.data.shape_checker import check, summarise
from videofactory_train.evaluate import frechet
from videofactory_train.evaluate.fvd import FVD, VARIANTS
from videofactory_train.evaluate.metrics import ClipMetric, SetMetric, fvd_metric, open_metrics, shapes
from videofactory_train.evaluate.report import address_of, markdown, side_by_side, write_report
from videofactory_train.evaluate.result import (
    Floor,
    Result,
    ScoredClip,
    Scores,
    check_comparable,
    differing,
    read_results,
    relative,
    write_results,
)
from videofactory_train.evaluate.score import Scoring, interval, measure, score
from videofactory_train.evaluate.videos import Sampling, differences, read_videos

from videofactory_core.video import read_video, write_video

FPS, FRAMES = 8.0, 12
SAMPLING = Sampling(frames=FRAMES)
MARKUP = "<b>bold</b> \"><img src=x onerror=\"document.title='run'\"> &amp; 'quoted' | `x`"


class Colours:
    """Features of a clip that can be read off: colours of its quarters, how sharp it is, and how it changes."""

    variant = "colours"
    least_frames = 3

    def describe(self) -> dict[str, str]:
        return {"weights": "none", "crop": "none"}

    def __call__(self, frames: Tensor) -> Tensor:
        video = frames.float().permute(0, 4, 1, 2, 3) / 255
        quarters = F.adaptive_avg_pool3d(video, (1, 2, 2)).flatten(1)
        edges = video.diff(dim=4).abs().mean((1, 2, 3, 4))
        once, twice = video.diff(dim=2), video.diff(dim=2).diff(dim=2)
        # What clips show differs much from one to the next; how they move shall weigh more.
        changes = [once.abs().mean((1, 2, 3, 4)), twice.abs().mean((1, 2, 3, 4))]
        return torch.cat([quarters / 10, 20 * torch.stack([edges, *changes], 1)], 1)


def colours(name: str = "fd-colours") -> SetMetric:
    return SetMetric(
        name,
        Colours(),
        lambda generated, real: {"": frechet.between(generated, real)},
        follow=lambda generated, real, seed: {"": frechet.extrapolate(generated, real, seed=seed).value},
    )


def brightness() -> ClipMetric:
    return ClipMetric("brightness", lambda frames, caption: {"": float(frames.float().mean()) / 255})


def word_count() -> ClipMetric:
    return ClipMetric("words", lambda frames, caption: {"": len(caption.split())}, needs_caption=True)


Change = Callable[[Tensor], Tensor]


def shuffled(frames: Tensor) -> Tensor:
    return frames[torch.randperm(len(frames), generator=torch.Generator().manual_seed(3))]


def blurred(frames: Tensor) -> Tensor:
    pictures = F.avg_pool2d(F.pad(frames.permute(0, 3, 1, 2), (4,) * 4, mode="replicate"), 9, 1)
    return pictures.permute(0, 2, 3, 1)


def frozen(frames: Tensor) -> Tensor:
    return frames[:1].expand_as(frames)


def draw(
    folder: Path,
    count: int,
    seed: int = 0,
    change: Change | None = None,
    *,
    size: tuple[int, int] = (64, 36),
    frames: int = FRAMES,
    captions: bool = True,
    suffix: str = ".mp4",
) -> Path:
    """A folder of clips of moving shapes; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = MovingShapes(count, frames, size[1], size[0], seed)
    for number in range(count):
        clip = drawn[number]
        pictures = clip["video"].permute(1, 2, 3, 0) / 2 + 0.5
        path = folder / f"{number:03}{suffix}"
        write_video(path, pictures if change is None else change(pictures), FPS)
        if captions:
            path.with_suffix(".txt").write_text(clip["caption"], encoding="utf-8")
    return folder


def break_off(path: Path) -> None:
    """Cut off the last frames, which only decoding finds out: the index stands at the beginning."""
    content = path.read_bytes()
    path.write_bytes(content[: -len(content) // 10])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("videos") / "real", 48)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("videos") / "generated", 20, seed=1)


def features_of(folder: Path) -> Any:
    return torch.cat([Colours()(frames[None]) for frames in read_videos(folder, SAMPLING)]).numpy()


def quiet(_: str) -> None:
    pass


def run(generated: Path, *metrics: SetMetric | ClipMetric, **options: Any) -> Scores:
    options.setdefault("sampling", SAMPLING)
    options.setdefault("scoring", Scoring(resamples=20, workers=2))
    return score(generated, metrics or (colours(),), generated, log=quiet, **options)


# Videos


def test_videos_come_in_order_with_their_captions_sizes_and_frames(tmp_path: Path) -> None:
    draw(tmp_path, 3)
    (tmp_path / "001.txt").unlink()
    (tmp_path / "sheet.png").write_bytes(b"a picture is passed over")
    videos = read_videos(tmp_path, SAMPLING)
    drawn = MovingShapes(3, FRAMES, 36, 64, 0)
    assert [video.name for video in videos.videos] == ["000.mp4", "001.mp4", "002.mp4"]
    assert [video.caption for video in videos.videos] == [drawn[0]["caption"], "", drawn[2]["caption"]]
    assert [(video.size, video.frames, video.fps) for video in videos.videos] == [((64, 36), FRAMES, FPS)] * 3
    assert videos.left_out == ()
    assert len(videos) == 3
    for frames, clip in zip(videos, drawn, strict=True):
        assert frames.shape == (FRAMES, 36, 64, 3)
        assert frames.dtype == torch.uint8
        error = frames.float() / 127.5 - 1 - clip["video"].permute(1, 2, 3, 0)
        assert error.abs().mean() < 0.03


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_a_files_own_frames_are_its_frames_one_after_the_other(tmp_path: Path, suffix: str) -> None:
    draw(tmp_path, 1, suffix=suffix, frames=31)
    path = tmp_path / f"000{suffix}"
    stored = (read_video(path).frames * 255).round().to(torch.uint8)
    for start, first in (("head", 0), ("centre", 9)):
        found = read_videos(tmp_path, Sampling(FRAMES, start=start))[0]
        assert torch.equal(found, stored[first : first + FRAMES])
    assert torch.equal(read_videos(tmp_path, Sampling(31))[0], stored)


def test_frames_by_time_are_those_shown_then(tmp_path: Path) -> None:
    draw(tmp_path, 1)
    stored = (read_video(tmp_path / "000.mp4").frames * 255).round().to(torch.uint8)
    assert torch.equal(read_videos(tmp_path, Sampling(6, fps=FPS / 2))[0], stored[::2])
    assert torch.equal(read_videos(tmp_path, Sampling(FRAMES, fps=2 * FPS))[0], stored[:6].repeat_interleave(2, 0))
    with pytest.raises(ValueError, match="6 of 7 frames at 4 a second"):
        read_videos(tmp_path, Sampling(7, fps=FPS / 2))


def test_a_random_start_depends_on_name_and_seed_alone(tmp_path: Path) -> None:
    draw(tmp_path / "one", 4, frames=40)
    draw(tmp_path / "other", 2, frames=40)

    def starts(folder: str, seed: int) -> list[float]:
        found = read_videos(tmp_path / folder, Sampling(4, start="random", seed=seed))
        return [video.times[0] for video in found.videos]

    assert starts("one", 0)[:2] == starts("other", 0)
    assert starts("one", 0) != starts("one", 1)
    assert len(set(starts("one", 0))) > 1


def test_broken_and_short_videos_are_named_and_left_out(tmp_path: Path) -> None:
    draw(tmp_path, 4, frames=40)
    draw(tmp_path / "short", 1, frames=5)
    break_off(tmp_path / "001.mp4")
    (tmp_path / "002.mp4").write_bytes(b"no video")
    scores = run(tmp_path, brightness(), sampling=Sampling(40))
    assert scores.results[0].n == 2
    assert [clip.name for clip in scores.clips] == ["000.mp4", "003.mp4"]
    reasons = dict(scores.left_out)
    assert list(reasons) == ["generated: 001.mp4", "generated: 002.mp4", "generated: short/000.mp4"]
    assert "5 of 40 frames" in reasons["generated: short/000.mp4"]
    assert str(tmp_path) not in "".join(reasons.values())
    assert "Left out: 3 (001.mp4: " in scores.generated
    with pytest.raises(ValueError, match=r"none of the 1 videos in .*short.* 5 of 12 frames"):
        read_videos(tmp_path / "short", SAMPLING)


def test_nothing_that_can_be_decoded_is_said(tmp_path: Path) -> None:
    draw(tmp_path, 1, frames=40)
    break_off(tmp_path / "000.mp4")
    with pytest.raises(ValueError, match=r"none of the 1 videos .* can be decoded"):
        run(tmp_path, brightness(), sampling=Sampling(40))
    for folder in ("nowhere", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=folder):
            read_videos(tmp_path / folder, SAMPLING)
    (tmp_path / "empty" / "only.png").write_bytes(b"")
    with pytest.raises(ValueError, match="no videos"):
        read_videos(tmp_path / "empty", SAMPLING)


def test_metadata_names_videos_captions_and_parts(tmp_path: Path) -> None:
    draw(tmp_path, 2, captions=False, frames=40)
    rows = [
        {"file_name": "001.mp4", "prompt": "second"},
        {"file_name": "000.mp4", "text": "part", "start": 1.0, "end": 4.0},
        {"file_name": "gone.mp4", "text": "not there"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    videos = read_videos(tmp_path, SAMPLING)
    assert [(video.name, video.caption) for video in videos.videos] == [
        ("000.mp4 1-4 s", "part"),
        ("001.mp4", "second"),
    ]
    assert videos.left_out == (("gone.mp4", "it is not there: check the path"),)
    stored = (read_video(tmp_path / "000.mp4").frames * 255).round().to(torch.uint8)
    assert torch.equal(videos[0], stored[8 : 8 + FRAMES])


def test_other_sizes_and_rates_are_said_with_the_counts(tmp_path: Path) -> None:
    draw(tmp_path / "real", 3)
    draw(tmp_path / "mixed", 2)
    (tmp_path / "fast").mkdir()
    draw(tmp_path / "mixed" / "wide", 1, size=(96, 36), frames=14)
    real, mixed = (read_videos(tmp_path / name, SAMPLING) for name in ("real", "mixed"))
    assert real.describe() == "3 videos of 64x36 pixels, 8 fps and 12 frames"
    assert mixed.describe() == "3 videos of 64x36 (2), 96x36 (1) pixels, 8 fps and 12 to 14 frames"
    assert list(differences(real, real)) == []
    draw(tmp_path / "gif", 1, suffix=".gif")
    assert list(differences(read_videos(tmp_path / "gif", SAMPLING), real)) == []
    write_video(tmp_path / "fast" / "a.mp4", torch.zeros(FRAMES, 36, 64, 3), 30)
    fast = read_videos(tmp_path / "fast", SAMPLING)
    assert list(differences(fast, real)) == ["the rates in frames a second differ: generated 30, real 8"]
    assert list(differences(replace(fast, sampling=Sampling(FRAMES, fps=8.0)), real)) == []
    assert list(differences(mixed, real)) == ["the sizes differ: generated 64x36 (2), 96x36 (1), real 64x36"]
    assert run(tmp_path / "mixed", real=tmp_path / "real").notes[0].startswith("the sizes differ")


def test_one_video_alone_is_measured_where_that_means_something(real: Path) -> None:
    scores = run(real / "003.mp4", colours(), brightness(), real=real)
    assert [(result.metric, result.n, result.interval) for result in scores.results] == [("brightness", 1, None)]
    assert (
        "fd-colours is not measured: it needs 2 videos or more on each side, and there is 1 generated"
        in scores.notes[0]
    )
    assert scores.clips[0].caption == MovingShapes(48, seed=0).scene(3).caption
    (real / "other").mkdir()
    shutil.copy(real / "004.mp4", real / "other" / "003.mp4")
    alone = read_videos(real / "003.mp4", SAMPLING)
    shutil.rmtree(real / "other")
    assert [video.name for video in alone.videos] == ["003.mp4"]
    with pytest.raises(ValueError, match="there is 1 real"):
        run(real, real=real / "003.mp4")


# Values


def test_a_distance_and_its_settings_are_those_written_out(generated: Path, real: Path) -> None:
    scores = run(generated, real=real)
    (result,) = scores.results
    assert result.value == pytest.approx(frechet.between(features_of(generated), features_of(real)), rel=1e-5)
    assert result.n == 20
    assert result.settings["real videos"] == 48
    expected = {"variant": "colours", "weights": "none", "frames": FRAMES, "fps": "the files' own", "seed": 0}
    assert {key: result.settings[key] for key in expected} == expected
    assert result.settings["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert scores.less_is_better == ("fd-colours",)


def test_real_videos_are_nearest_and_worse_ones_further(real: Path, tmp_path: Path) -> None:
    def distance(name: str, change: Change | None) -> Result:
        return run(draw(tmp_path / name, 48, 1, change), real=real).results[0]

    found = {change.__name__: distance(change.__name__, change) for change in (shuffled, blurred, frozen)}
    alike = distance("alike", None)
    assert alike.interval is not None
    assert alike.floor is not None
    for result in found.values():
        assert result.interval is not None
        assert result.interval[0] > alike.interval[1]
    assert distance("twice", lambda frames: blurred(blurred(frames))).value > found["blurred"].value
    # What only differs in its random numbers is as far away as real videos are from each other.
    assert alike.floor.generated == pytest.approx(alike.floor.value, rel=0.5)
    assert run(real, real=real).results[0].value == pytest.approx(0, abs=1e-9)


def test_order_workers_and_batch_change_nothing(
    generated: Path, real: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    draw(tmp_path, 6, seed=1)
    draw(tmp_path / "wide", 5, seed=2, size=(96, 36))
    metrics = (colours(), brightness(), word_count())
    first = run(tmp_path, *metrics, real=real)
    again = run(tmp_path, *metrics, real=real, scoring=Scoring(resamples=20, workers=7))
    assert again == first

    import videofactory_train.data.sources as sources

    walk = sources.os.walk

    def any_order(*arguments: Any, **options: Any) -> Iterator[Any]:
        for parent, folders, files in walk(*arguments, **options):
            random.Random(5).shuffle(files)
            yield parent, folders, files

    monkeypatch.setattr(sources.os, "walk", any_order)
    assert run(tmp_path, *metrics, real=real) == first
    other = run(tmp_path, *metrics, real=real, scoring=Scoring(resamples=20, workers=2, batch=1))
    assert other.clips == first.clips
    for one, two in zip(first.results, other.results, strict=True):
        assert two.settings == one.settings
        assert [two.value, *(two.interval or ())] == pytest.approx([one.value, *(one.interval or ())], rel=1e-4)


def test_many_sizes_are_measured_in_their_places(tmp_path: Path) -> None:
    for number in range(7):
        draw(tmp_path / str(number % 3) / str(number), 2, seed=number, size=(64 + 4 * number, 36))
    together = measure(read_videos(tmp_path, SAMPLING), [colours()], 2, 1).features["fd-colours"]
    assert np.allclose(together, features_of(tmp_path), rtol=1e-5)
    assert len(together) == 14


def test_one_metric_does_not_depend_on_the_others(generated: Path, real: Path) -> None:
    alone = run(generated, colours(), real=real).results
    beside = run(generated, brightness(), colours("fd-again"), colours(), real=real).results
    assert beside[-1] == alone[0]


def test_real_videos_get_what_their_parts_get(generated: Path, real: Path, tmp_path: Path) -> None:
    floor = run(generated, real=real).results[0].floor
    assert floor is not None
    assert (floor.n, floor.against) == (20, 28)
    # What stands in for the generated is not among what it is compared with.
    shared = replace(colours(), compare=lambda a, b: {"": float((a[:, None] == b).all(2).any(1).mean())})
    apart = run(generated, shared, real=real).results[0].floor
    assert apart is not None
    assert apart.value == 0
    assert run(real, shared, real=real).results[0].value == 1
    # Too few for a part of the same number: both values are of as many as there are.
    many = run(real, real=generated)
    assert many.results[0].floor is not None
    assert (many.results[0].floor.n, many.results[0].floor.against) == (10, 10)
    assert "too few for their value at n = 48" in many.notes[-1]
    second = draw(tmp_path / "second", 20, seed=7)
    result = run(generated, real=real, second_real=second).results[0]
    assert result.floor is not None
    assert (result.floor.n, result.floor.against, result.floor.source) == (20, 48, "a second set")
    assert result.floor.generated == result.value
    assert result.floor.value == run(second, real=real).results[0].value
    with pytest.raises(ValueError, match="the same videos"):
        run(generated, real=real, second_real=shutil.copytree(real, tmp_path / "copy"))


def test_the_line_in_one_over_n_is_followed_where_asked(generated: Path, real: Path, tmp_path: Path) -> None:
    result = run(generated, real=real, scoring=Scoring(resamples=0, extrapolate=True)).results[0]
    assert result.interval is None
    first, second = (features_of(folder) for folder in (generated, real))
    assert result.limit == pytest.approx(frechet.extrapolate(first, second).value, rel=1e-4)
    assert run(generated, real=real).results[0].limit is None
    few = run(draw(tmp_path, 5), real=real, scoring=Scoring(resamples=0, extrapolate=True))
    assert few.results[0].limit is None
    assert "16 videos or more" in few.notes[-1]


@pytest.mark.parametrize("repeats", [True, False])
def test_intervals_of_a_mean_have_its_known_width(repeats: bool) -> None:
    rows = np.random.default_rng(0).normal(5.0, 2.0, 400)
    value = {"": float(rows.mean())}
    low, high = interval(lambda some: {"": float(some.mean())}, [rows], value, 2000, 0, repeats)[""]
    assert (low + high) / 2 == pytest.approx(value[""], abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * rows.std() / math.sqrt(len(rows)), rel=0.08)


def test_intervals_cover_the_value_that_others_get(tmp_path: Path) -> None:
    random_numbers = np.random.default_rng(0)
    draws = [random_numbers.normal(size=(2, 60, 4)) for _ in range(60)]
    distances = [frechet.between(*pair) for pair in draws]
    covered = 0
    for (one, other), value in zip(draws, distances, strict=True):
        low, high = interval(lambda a, b: {"": frechet.between(a, b)}, [one, other], {"": value}, 100, 0)[""]
        covered += low <= np.mean(distances) <= high
    assert 0.8 <= covered / len(draws) <= 1.0


def test_videos_without_captions_do_not_count_where_these_matter(tmp_path: Path) -> None:
    draw(tmp_path, 4)
    (tmp_path / "002.txt").unlink()
    scores = run(tmp_path, word_count(), brightness())
    assert [(result.metric, result.n) for result in scores.results] == [("words", 3), ("brightness", 4)]
    assert scores.results[0].value == np.mean([clip.scores["words"] for clip in scores.clips if clip.caption])
    assert scores.clips[2].scores["words"] is None
    assert scores.notes == ("words: 1 of 4 videos have no caption: write it into a .txt file of the same name",)
    with pytest.raises(ValueError, match="4 of 4 videos have no caption"):
        run(draw(tmp_path / "none", 4, captions=False), word_count())


def test_shapes_are_judged_by_the_pixel_checker(tmp_path: Path) -> None:
    folder = draw(tmp_path / "good", 6, size=(128, 72))
    scores = run(folder, shapes())
    videos, drawn = read_videos(folder, SAMPLING), MovingShapes(6, FRAMES, 72, 128, 0)
    verdicts = [check(frames.permute(3, 0, 1, 2) / 127.5 - 1) for frames in videos]
    shares = summarise((drawn.scene(i).combination, verdict) for i, verdict in enumerate(verdicts))
    assert {result.metric: result.value for result in scores.results} == {
        f"shapes-{name}": share for name, share in shares.items()
    }
    assert scores.of("shapes-all").value == 1.0
    # Steady motion is gone where time is shuffled, but the colours are still there.
    worse = run(draw(tmp_path / "shuffled", 6, change=shuffled, size=(128, 72)), shapes())
    assert worse.of("shapes-all").value < 0.5
    assert worse.of("shapes-colour").value == 1.0
    (folder / "000.txt").write_text("a cat", encoding="utf-8")
    mixed = run(folder, shapes())
    assert mixed.of("shapes-all").n == 5
    assert "shapes: 1 of 6 videos have no caption of a moving shape" in mixed.notes[0]


def test_what_cannot_be_measured_is_refused_before_anything_is_read(tmp_path: Path, generated: Path) -> None:
    with pytest.raises(ValueError, match="fd-colours needs 3 frames of each video or more, not 2"):
        run(tmp_path / "nowhere", real=tmp_path, sampling=Sampling(2))
    with pytest.raises(ValueError, match="fd-colours compares with real videos"):
        run(tmp_path / "nowhere")
    for options in ({"frames": 0}, {"fps": -1}, {"fps": math.nan}, {"start": "end"}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Sampling(**options)  # type: ignore[arg-type]
    for options in ({"resamples": -1}, {"batch": 0}, {"workers": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Scoring(**options)


def test_intervals_of_shares_stay_between_the_least_and_the_most(tmp_path: Path) -> None:
    draw(tmp_path, 3, size=(128, 72))
    draw(tmp_path / "shuffled", 9, change=shuffled, size=(128, 72))
    result = run(tmp_path, shapes(), scoring=Scoring(resamples=300)).of("shapes-all")
    assert 0 < result.value < 0.5
    assert result.interval is not None
    assert 0 <= result.interval[0] < result.value < result.interval[1] < 1


def test_metrics_are_opened_by_their_names(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    found = open_metrics(["flicker", "shapes", "flicker"], {}, torch.device("cpu"))
    assert [metric.name for metric in found] == ["flicker", "shapes"]
    for names, weights, said in (
        (["fvd"], {}, "'fvd' is no metric: use clipsim, fid, flicker, fvd-i3d"),
        (["shapes"], {"shapes": tmp_path}, "'shapes' is no metric with weights"),
        (["fvd-i3d"], {"stream": tmp_path}, "fvd-i3d is measured by a network: give a local copy"),
        (["fvd-i3d"], {"fvd-i3d": tmp_path / "gone"}, "there is no file"),
    ):
        with pytest.raises(ValueError, match=said):
            open_metrics(names, weights, torch.device("cpu"))


def test_fvd_takes_its_variants_covariance(generated: Path, real: Path) -> None:
    def network(clips: Tensor) -> Tensor:
        return torch.cat([clips.mean((2, 3, 4)), clips.diff(dim=2).abs().mean((2, 3, 4))], 1)

    for name in ("fvd-videogpt", "fvd-i3d"):
        extractor = FVD(VARIANTS[name], network, "a hash", torch.device("cpu"))
        features = [
            torch.cat([extractor(frames[None]) for frames in read_videos(folder, SAMPLING)]).numpy()
            for folder in (generated, real)
        ]
        scores = run(generated, fvd_metric(extractor), real=real, scoring=Scoring(resamples=0))
        assert scores.of(name).value == pytest.approx(frechet.between(*features, VARIANTS[name].ddof), rel=1e-4)
        assert scores.of(name).settings["weights"] == "a hash"
    with pytest.raises(ValueError, match="fvd-i3d needs 9 frames of each video or more, not 8"):
        run(generated, fvd_metric(extractor), real=real, sampling=Sampling(8))


def test_a_network_that_two_metrics_share_sees_clips_once(real: Path) -> None:
    class Counted(Colours):
        clips = 0

        def __call__(self, frames: Tensor) -> Tensor:
            self.clips += len(frames)
            return super().__call__(frames)

    extractor = Counted()
    pair = [replace(colours(name), extractor=extractor) for name in ("one", "two")]
    assert len(run(real, *pair, real=real).results) == 2
    assert extractor.clips == 2 * 48


def test_inception_is_the_librarys(tmp_path: Path) -> None:
    """FID and IS of frames against torch-fidelity's own functions, with random weights."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as library
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric

    weights = tmp_path / "inception.pth"
    torch.manual_seed(0)
    # The class loads its weights as it is made.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save(library.FeatureExtractorInceptionV3("x", ["2048"]).state_dict(), weights)
    metrics = open_metrics(["is", "fid"], {"inception": weights}, torch.device("cpu"))
    folders = [draw(tmp_path / str(seed), 3, seed, size=(64, 36)) for seed in (0, 1)]
    found = run(folders[0], *metrics, real=folders[1], sampling=Sampling(4), scoring=Scoring(resamples=3))
    network = library.FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(weights))
    features = [
        [torch.cat(parts) for parts in zip(*(network(clip.permute(0, 3, 1, 2)) for clip in clips), strict=True)]
        for clips in (read_videos(folder, Sampling(4)) for folder in folders)
    ]
    statistics = [fid_features_to_statistics(pooled) for pooled, _ in features]
    expected = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert found.of("fid").value == pytest.approx(expected, rel=1e-3)
    assert found.of("is").value == isc_features_to_metric(features[0][1])["inception_score_mean"]
    assert found.less_is_better == ("fid",)
    weights.write_bytes(b"else")
    with pytest.raises(ValueError, match="is not torch-fidelity's"):
        open_metrics(["fid"], {"inception": weights}, torch.device("cpu"))


def test_digests_are_of_the_files_and_not_of_their_names(tmp_path: Path) -> None:
    one = read_videos(draw(tmp_path / "one", 3), SAMPLING)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    (tmp_path / "other" / "000.mp4").rename(tmp_path / "other" / "9.mp4")
    (tmp_path / "other" / "000.txt").rename(tmp_path / "other" / "9.txt")
    other = read_videos(tmp_path / "other", SAMPLING)
    assert (one.digest(), one.prompts()) == (other.digest(), other.prompts())
    (tmp_path / "other" / "9.txt").write_text("something else", encoding="utf-8")
    changed = read_videos(tmp_path / "other", SAMPLING)
    assert changed.digest() == one.digest()
    assert changed.prompts() != one.prompts()
    assert read_videos(tmp_path / "one", replace(SAMPLING, frames=5)).digest() != one.digest()
    assert read_videos(draw(tmp_path / "new", 3, seed=4), SAMPLING).digest() != one.digest()


def test_damage_shows_only_while_measuring(tmp_path: Path) -> None:
    draw(tmp_path, 3, frames=40)
    break_off(tmp_path / "001.mp4")
    videos = read_videos(tmp_path, Sampling(40))
    assert len(videos) == 3
    with pytest.raises(ValueError, match=r"001\.mp4"):
        videos[1]
    measured = measure(videos, [colours(), brightness()], 2, 1)
    assert len(measured.videos) == 2
    assert measured.features["fd-colours"].shape == (2, 15)
    assert measured.scores["brightness"].shape == (2,)


# Results


def a_result(metric: str = "fvd", value: float = 3.5, **settings: Any) -> Result:
    floor = Floor(1.0, 8, 8, 3.0, "a second set")
    return Result(metric, value, (1.0, 5.0), 16, {"frames": 16, "versions": {"torch": "2"}, **settings}, floor, 2.0)


def a_score(*results: Result, **changes: Any) -> Scores:
    clips = (ScoredClip("a.mp4", "a.mp4", "a cat", {"flicker": 0.25, "clipsim": None}),)
    return Scores("16 videos", "32 videos", results or (a_result(),), clips, **changes)


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    scores = a_score(a_result(), a_result("flicker"), left_out=(("b.mp4", "broken"),), notes=("one",))
    plain = replace(scores, results=(replace(a_result(), interval=None, floor=None, limit=None),))
    for some in (scores, plain):
        path = write_results(some, tmp_path / "new")
        assert read_results(path) == some
        assert read_results(tmp_path / "new") == some
    assert json.loads(path.read_text(encoding="utf-8"))["results"][0]["settings"]["frames"] == 16


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "results": [{}]}', '{"format": 1}']
)
def test_other_files_are_no_results(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"results\.json holds no results"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_results(tmp_path / "nowhere.json")


def test_results_of_other_settings_are_refused_and_the_settings_named() -> None:
    one = a_score(a_result(weights="ab", crop="middle"))
    check_comparable({"one": one, "two": a_score(a_result(weights="ab", crop="middle"))})
    versions = a_score(a_result(weights="ab", crop="middle", versions={"torch": "3"}))
    check_comparable({"one": one, "two": versions})
    other = a_score(a_result(value=1.0, weights="cd", frames=8))
    with pytest.raises(ValueError, match="compare") as error:
        check_comparable({"one": one, "two": other})
    for said in (
        "fvd: weights is ab in one and cd in two",
        "fvd: frames is 16 in one and 8 in two",
        "fvd: crop is middle in one and not set in two",
    ):
        assert said in str(error.value)
    assert differing(one.results[0], other.results[0])["frames"] == (16, 8)
    with pytest.raises(ValueError, match="weights is ab"):
        side_by_side({"one": one, "two": other})
    table = side_by_side({"one": one, "two": other}, anyway=True)
    assert "| fvd | 3.5 [1, 5] | 1 [1, 5] |" in table
    assert "weights is ab in one and cd in two" in table


def test_sets_with_other_metrics_stand_side_by_side() -> None:
    table = side_by_side({"one": a_score(a_result("fvd")), "two": a_score(a_result("flicker"))})
    assert "| fvd | 3.5 [1, 5] |  |" in table
    assert "| flicker |  | 3.5 [1, 5] |" in table


def test_scored_folders_of_other_real_videos_do_not_compare(generated: Path, real: Path, tmp_path: Path) -> None:
    draw(tmp_path / "real", 48, seed=9)
    sets = {"one": run(generated, real=real), "two": run(generated, real=tmp_path / "real")}
    with pytest.raises(ValueError, match="fd-colours: real is "):
        check_comparable(sets)
    fewer = {"all": sets["one"], "few": run(draw(tmp_path / "few", 7), real=real)}
    with pytest.raises(ValueError, match="fd-colours: generated videos is 20 in all and 7 in few"):
        check_comparable(fewer)
    # A mean over clips does not grow with their number.
    check_comparable({"all": run(generated, brightness()), "few": run(tmp_path / "few", brightness())})


def test_markdown_holds_values_settings_and_what_was_left_out() -> None:
    scores = a_score(
        a_result(weights="abc"),
        left_out=((f"generated: {MARKUP}", "broken\nhere"),),
        notes=("few videos",),
        less_is_better=("fvd",),
    )
    text = markdown(scores)
    assert "| fvd (less is better) | 3.5 | [1, 5] | 16 | 1, generated 3 (n = 8 against 8) | 2 |" in text
    assert "`fvd`: frames: 16; versions: torch 2; weights: abc; what real videos get: a second set" in text
    assert "* few videos" in text
    assert "<b>" not in text
    assert "quoted' \\| `x` | broken here |" in text


def test_addresses_lead_to_the_files(tmp_path: Path) -> None:
    assert address_of("a b/100% #1?.mp4") == "a%20b/100%25%20%231%3F.mp4"
    assert address_of("c:d.mp4") == "c%3Ad.mp4"
    assert address_of("../x.mp4") == "../x.mp4"
    assert address_of("D:/x y.mp4") == "file:///D:/x%20y.mp4"
    assert relative(tmp_path / "a" / "b.mp4", tmp_path / "out") == "../a/b.mp4"
    assert relative(tmp_path / "out" / "b.mp4", tmp_path / "out") == "b.mp4"


# The page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, real: Path) -> Path:
    """The page of a folder whose name is an address's trouble, with a caption that is a page's."""
    folder = draw(tmp_path_factory.mktemp("report") / "100% of #1?", 9, seed=2)
    draw(folder / "more", 1, seed=5, suffix=".gif")
    (folder / "004.txt").write_text(MARKUP, encoding="utf-8")
    (folder / "005.txt").unlink()
    (folder / f"broken{'x' * 60}.mp4").write_bytes(b"no video")
    out = folder.parent / "out"
    scores = score(
        folder,
        [colours(), brightness(), word_count()],
        out,
        real=real,
        sampling=SAMPLING,
        scoring=Scoring(resamples=20, extrapolate=True),
        log=quiet,
    )
    write_results(scores, out)
    return write_report(read_results(out), out)


@dataclass
class Opened:
    """A page from the disk, and what it says and asks for."""

    page: Any
    told: list[str]
    asked: list[str]

    def cards(self, selector: str) -> list[str]:
        """Texts of the cards, also of those that lie outside of the window and are not laid out."""
        return self.page.locator(f".clip {selector}").all_text_contents()

    def order_by(self, key: str, direction: str = "least first") -> list[str]:
        """The names of the clips in the order that is chosen."""
        score, order = self.page.locator("select").all()
        score.select_option(key)
        order.select_option(direction)
        return self.cards("a")


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a file without a network."""
    contexts = []

    def open_page(path: Path, width: int = 1200, **options: Any) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        contexts.append(context)
        page, told, asked = context.new_page(), [], []
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return Opened(page, told, asked)

    yield open_page
    for context in contexts:
        context.close()


PLAYING = "() => [...document.querySelectorAll('video')].filter(v => v.currentTime > 0 && !v.paused).length"


def test_the_clips_play_beside_their_prompts(page: Path, opened: Any) -> None:
    found = opened(page)
    found.page.locator(".clips").scroll_into_view_if_needed()
    # Every build of Chromium plays .webm, not every one H.264; what is loaded shows in what it asks for.
    found.page.wait_for_function("() => [...document.querySelectorAll('video')].some(v => v.networkState > 0)")
    assert found.told == []
    assert found.page.title() == "Scores of 10 videos"
    assert found.asked[0] == page.as_uri()
    folder = (page.parent.parent / "100% of #1?").as_uri()
    assert all(url.startswith((folder, page.as_uri())) for url in found.asked)
    assert len(found.cards("p")) == 10
    assert found.cards("p")[4] == MARKUP
    assert found.page.locator("img").evaluate_all("all => all.map(img => img.getAttribute('src'))") == [
        "../100%25%20of%20%231%3F/more/000.gif"
    ]


def test_clips_are_ordered_by_each_score(page: Path, opened: Any) -> None:
    scores = read_results(page.parent)
    found = opened(page)
    names = [clip.name for clip in scores.clips]
    assert found.cards("a") == names
    assert found.order_by("name", "most first") == names[::-1]
    for key in ("brightness", "words"):
        known = [clip for clip in scores.clips if clip.scores[key] is not None]
        rest = [clip.name for clip in scores.clips if clip.scores[key] is None]
        for direction, sign in (("least first", 1), ("most first", -1)):
            ordered = sorted(known, key=lambda clip: sign * (clip.scores[key] or 0))
            assert found.order_by(key, direction) == [clip.name for clip in ordered] + rest
    assert found.order_by("name") == names


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (400, "dark")])
def test_the_page_fits_its_window(page: Path, opened: Any, width: int, scheme: str) -> None:
    found = opened(page, width, color_scheme=scheme)
    wide = found.page.evaluate("""() => {
        const outside = element => element.closest('.box') === null;
        const wide = [...document.body.querySelectorAll('*')].filter(
            element => outside(element) && element.getBoundingClientRect().right > innerWidth + 0.5);
        return [...wide.map(element => element.tagName), document.documentElement.scrollWidth > innerWidth];
    }""")
    assert wide == [False]
    assert found.told == []


def test_clips_play_where_they_are_seen_and_motion_is_wanted(real: Path, tmp_path: Path, opened: Any) -> None:
    folder = draw(tmp_path / "clips", 12, suffix=".webm")
    scores = score(folder, [brightness()], tmp_path, sampling=SAMPLING, scoring=Scoring(resamples=0), log=quiet)
    path = write_report(scores, tmp_path)
    found = opened(path, 400)
    found.page.locator(".clip video").first.scroll_into_view_if_needed()
    found.page.wait_for_function(f"() => ({PLAYING})() > 0")
    assert 0 < found.page.evaluate(PLAYING) < 12
    still = opened(path, 400, reduced_motion="reduce")
    still.page.locator(".clip video").first.scroll_into_view_if_needed()
    still.page.wait_for_timeout(500)
    assert still.page.evaluate(PLAYING) == 0
