"""Which samples form a batch, and how they are read."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from videofactory_train.data.batches import Batch, Group, Order, RawBatch, by_bucket, loader, order, stack_contexts
from videofactory_train.data.cache import Cache, Filled
from videofactory_train.data.samples import Bucket, Sample, decode
from videofactory_train.data.sources import Clip

from videofactory_core import checkpoint
from videofactory_core.config import PRESETS
from videofactory_core.video import write_video

CONFIG = PRESETS["debug"]
FPS = 8.0
BUCKET = Bucket(4, 16, 8)
LONG_CAPTION = "a red square " * 40


def named(number: int, bucket: Bucket = BUCKET) -> Sample:
    """A sample that is never decoded."""
    return Sample(Clip(str(number), Path(str(number)), "a square"), (0.0,), bucket, "bucket")


def group_of(size: int, weight: float = 1.0) -> Group:
    return Group([named(number) for number in range(size)], weight)


def take(rows: Iterator[tuple[int, list[int]]], count: int) -> list[tuple[int, list[int]]]:
    return list(itertools.islice(rows, count))


SIZES = st.lists(st.integers(1, 12), min_size=1, max_size=4)
WEIGHTS = st.floats(0.01, 10)


@settings(deadline=None, max_examples=50)
@given(SIZES, st.data(), st.integers(1, 7), st.integers(0, 2**64 - 1))
def test_every_sample_of_a_group_is_shown_before_one_comes_again(
    sizes: list[int], data: st.DataObject, batch_size: int, seed: int
) -> None:
    made = [group_of(size, data.draw(WEIGHTS)) for size in sizes]
    shown: dict[int, list[int]] = {number: [] for number in range(len(made))}
    for number, rows in take(order(made, batch_size, seed), 40):
        assert len(rows) == batch_size
        shown[number] += rows
    for number, rows in shown.items():
        size = sizes[number]
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size))


@settings(deadline=None, max_examples=50)
@given(SIZES, st.data(), st.integers(1, 7), st.integers(0, 2**64 - 1), st.integers(0, 60))
def test_starting_anywhere_gives_the_same_batches(
    sizes: list[int], data: st.DataObject, batch_size: int, seed: int, first: int
) -> None:
    made = [group_of(size, data.draw(WEIGHTS)) for size in sizes]
    assert take(order(made, batch_size, seed, first), 10) == take(order(made, batch_size, seed), first + 10)[first:]


def test_starting_far_away_gives_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [group_of(5, 1.0), group_of(3, 2.0)]
    expected = take(order(made, 2, 0, 1000), 10)
    monkeypatch.setattr("videofactory_train.data.batches.REPLAY", 7)
    assert take(order(made, 2, 0, 1000), 10) == expected


@settings(deadline=None, max_examples=50)
@given(SIZES, st.integers(1, 5), st.integers(1, 4), st.integers(0, 100), st.integers(0, 30))
def test_processes_take_the_rows_of_one_large_batch(
    sizes: list[int], batch_size: int, num_processes: int, seed: int, first: int
) -> None:
    made = [group_of(size) for size in sizes]
    parts = [iter(Order(made, batch_size, seed, first, rank, num_processes)) for rank in range(num_processes)]
    whole = iter(Order(made, batch_size * num_processes, seed, first, 0, 1))
    for _ in range(10):
        group, rows = next(whole)
        mine = [next(part) for part in parts]
        assert {number for number, _ in mine} == {group}
        assert [row for _, part in mine for row in part] == rows


def test_rounds_are_shuffled_and_seeds_differ() -> None:
    made = [group_of(100)]
    rounds = [rows for _, rows in take(order(made, 100, 0), 3)]
    other = [rows for _, rows in take(order(made, 100, 1), 3)]
    assert len({tuple(rows) for rows in [*rounds, *other, list(range(100))]}) == 7


def test_datasets_are_mixed_by_their_weight_and_buckets_by_their_size() -> None:
    small, large = Bucket(4, 16, 8), Bucket(4, 32, 16)
    first = [named(number, small if number < 30 else large) for number in range(40)]
    second = [named(number, small) for number in range(1000)]
    made = by_bucket(first, 3.0) + by_bucket(second, 1.0)
    assert [len(group.samples) for group in made] == [30, 10, 1000]
    assert {sample.bucket for group in made for sample in group.samples[:1]} == {small, large}
    draws = 20_000
    counts = Counter(number for number, _ in take(order(made, 1, 0), draws))
    for number, share in enumerate([0.75 * 0.75, 0.25 * 0.75, 0.25]):
        assert counts[number] / draws == pytest.approx(share, abs=0.015)


def test_repeats_lengthen_a_round_and_leave_the_weight() -> None:
    once, thrice = (by_bucket([named(0), named(1, Bucket(1, 16, 8)), named(2)], 2.0, repeats) for repeats in (1, 3))
    assert [group.weight for group in thrice] == [group.weight for group in once]
    assert [len(group.samples) for group in thrice] == [6, 3]
    shown = Counter(thrice[0].samples[row] for _, rows in take(order(thrice[:1], 6, 0), 1) for row in rows)
    assert set(shown.values()) == {3}


# Reading


def draw_clip(path: Path, number: int) -> None:
    frames = torch.full((6, 16, 32, 3), 20 * number % 256, dtype=torch.uint8)
    for i in range(6):
        frames[i, 4:12, 2 + 3 * i : 10 + 3 * i, number % 3] = 230
    write_video(path, frames, FPS)


def one_sample(path: Path, caption: str, bucket: Bucket = BUCKET) -> Sample:
    times = tuple(i / FPS for i in range(bucket.frames))
    return Sample(Clip(path.name, path, caption), times, bucket, "bucket")


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Six clips, the first with a caption of two chunks, and two pictures."""
    for number in range(8):
        draw_clip(tmp_path / f"{number}.mp4", number)
    clips = [one_sample(tmp_path / f"{n}.mp4", f"number {n}" if n else LONG_CAPTION) for n in range(6)]
    return clips + [one_sample(tmp_path / f"{n}.mp4", f"number {n}", Bucket(1, 16, 8)) for n in (6, 7)]


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def fill(folder: Path, samples: Sequence[Sample], accelerator: Accelerator) -> Filled:
    torch.manual_seed(0)
    model = checkpoint.build(CONFIG)
    return Cache(folder).fill(
        samples, [], model.autoencoder, model.text_encoder, accelerator, workers=0, log=lambda line: None
    )


def first_batches(
    groups: list[Group],
    filled: Filled | None,
    accelerator: Accelerator,
    count: int = 6,
    workers: int = 0,
    first: int = 0,
) -> list[Batch | RawBatch]:
    return list(itertools.islice(loader(groups, filled, 3, 7, workers, accelerator)(first), count))


def assert_equal(first: Batch | RawBatch, second: Batch | RawBatch) -> None:
    for one, other in zip(vars(first).values(), vars(second).values(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_batch_holds_what_the_cache_holds(tmp_path: Path, samples: list[Sample], accelerator: Accelerator) -> None:
    filled = fill(tmp_path / "cache", samples, accelerator)
    by_caption = {sample.clip.caption: sample for sample in samples}
    empty = filled.read_context("")
    lengths = set()
    for batch in first_batches(by_bucket(samples, 1.0), filled, accelerator, count=12):
        assert isinstance(batch, Batch)
        assert batch.latents.dtype == batch.context.dtype == torch.float32
        assert len({by_caption[caption].bucket for caption in batch.captions}) == 1
        lengths.add(batch.context.shape[1])
        for caption, latents, context in zip(batch.captions, batch.latents, batch.context, strict=True):
            assert torch.equal(latents, filled.read_latents(by_caption[caption]))
            own = filled.read_context(caption)
            assert torch.equal(context[: len(own)], own)
            for start in range(len(own), len(context), 77):
                assert torch.equal(context[start : start + 77], empty)
    assert lengths == {77, 154}


def test_captions_of_different_length_are_padded_as_the_encoder_does(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator
) -> None:
    filled = fill(tmp_path / "cache", samples[:2], accelerator)
    captions = [samples[1].clip.caption or "", LONG_CAPTION, ""]
    torch.manual_seed(0)
    expected = checkpoint.build(CONFIG).text_encoder.encode(captions)
    empty = filled.read_context("")
    context = stack_contexts([filled.read_context(caption) for caption in captions], empty)
    torch.testing.assert_close(context, expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(context[2], torch.cat([empty, empty]))


def test_without_a_cache_a_batch_holds_frames(samples: list[Sample], accelerator: Accelerator) -> None:
    by_caption = {sample.clip.caption: sample for sample in samples}
    for batch in first_batches(by_bucket(samples, 1.0), None, accelerator):
        assert isinstance(batch, RawBatch)
        assert batch.video.dtype == torch.uint8
        for caption, frames in zip(batch.captions, batch.video, strict=True):
            assert torch.equal(frames, decode(by_caption[caption]))


@pytest.mark.parametrize(
    ("method", "cached"), [("spawn", True), *((multiprocessing.get_start_method(), cached) for cached in (True, False))]
)
def test_workers_change_nothing_in_the_batches_nor_in_the_run(
    tmp_path: Path,
    samples: list[Sample],
    accelerator: Accelerator,
    method: str,
    cached: bool,
) -> None:
    filled = fill(tmp_path / "cache", samples, accelerator) if cached else None
    made = by_bucket(samples, 1.0)
    expected = first_batches(made, filled, accelerator)
    before, state = multiprocessing.get_start_method(), torch.get_rng_state()
    multiprocessing.set_start_method(method, force=True)
    try:
        found = first_batches(made, filled, accelerator, workers=2)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert torch.equal(torch.get_rng_state(), state)
    later = first_batches(made, filled, accelerator, count=2, first=4)
    for one, other in zip([*found, *later], [*expected, *expected[4:]], strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("cached", [True, False])
def test_a_sample_that_breaks_is_replaced_by_the_next_and_named(
    tmp_path: Path, samples: list[Sample], accelerator: Accelerator, cached: bool
) -> None:
    clips = samples[:6]
    made = [Group(clips, 1.0)]
    filled = fill(tmp_path / "cache", samples, accelerator) if cached else None
    expected = first_batches(made, filled, accelerator)
    harmed = [filled.cache.path(filled.latents[clips[n]]) if filled else clips[n].clip.path for n in (1, 2, 5)]
    harmed[0].unlink()
    for path in harmed[1:]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    instead = {clips[1]: clips[3], clips[2]: clips[3], clips[5]: clips[0]}
    whole = {sample.clip.caption: instead.get(sample, sample).clip.caption for sample in clips}
    for workers in (0, 1):
        found = first_batches(made, filled, accelerator, workers=workers)
        for one, other in zip(found, expected, strict=True):
            assert list(one.captions) == [whole[caption] for caption in other.captions]
            gone = {sample.clip.name for sample in instead if sample.clip.caption in other.captions}
            named = {name for name, _ in one.broken}
            # The second of two broken neighbours is met on the way from the first.
            assert gone <= named <= gone | {"2.mp4"}
            assert all(reason for _, reason in one.broken)
        assert {name for batch in found for name, _ in batch.broken} == {"1.mp4", "2.mp4", "5.mp4"}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_group_of_which_nothing_is_left_is_a_sentence(
    samples: list[Sample], accelerator: Accelerator, workers: int
) -> None:
    for sample in samples[6:]:
        sample.clip.path.write_bytes(b"no video")
    made = by_bucket(samples[:6], 1.0) + by_bucket(samples[6:], 1.0)
    with pytest.raises(ValueError, match=r"none of the samples of 1 x 16x8 can be read; [67]\.mp4: ") as raised:
        first_batches(made, None, accelerator, count=40, workers=workers)
    assert "\n" not in str(raised.value)
