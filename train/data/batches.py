"""Which samples form batch number n, and the loader that reads them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .cache import Broken, Filled
from .samples import Bucket, Sample, decode

# How many earlier draws are made at once to find a place in the order.
REPLAY = 1 << 20


@dataclass(frozen=True)
class Group:
    """Samples of one dataset and one bucket, which a batch is made of, and how often their turn comes among groups."""

    samples: Sequence[Sample]
    weight: float


def by_bucket(samples: Sequence[Sample], weight: float, num_repeats: int = 1) -> list[Group]:
    """A dataset's samples in groups of one bucket, with the part of `weight` that is their part of the dataset.

    Each sample is there `num_repeats` times. Groups come in the order in which their buckets first appear.
    """
    buckets: dict[Bucket, list[Sample]] = {}
    for sample in samples:
        buckets.setdefault(sample.bucket, []).append(sample)
    return [Group(part * num_repeats, weight * len(part) / len(samples)) for part in buckets.values()]


@dataclass(frozen=True)
class Batch:
    """Samples of one group from the cache: `latents [B, C, F, h, w]`, scaled, and `context [B, L, D]`, both float32.

    `broken` are the samples that should have stood here and were replaced.
    """

    captions: tuple[str, ...]
    latents: Tensor
    context: Tensor
    broken: tuple[Broken, ...] = ()

    def pin_memory(self) -> Batch:
        """The batch where CUDA copies from while it computes; `DataLoader` asks for it by this name."""
        return replace(self, latents=self.latents.pin_memory(), context=self.context.pin_memory())


@dataclass(frozen=True)
class RawBatch:
    """Samples of one group before they are encoded: `video [B, F, H, W, 3]` uint8; `broken` as in `Batch`."""

    captions: tuple[str, ...]
    video: Tensor
    broken: tuple[Broken, ...] = ()

    def pin_memory(self) -> RawBatch:
        """As `Batch.pin_memory`."""
        return replace(self, video=self.video.pin_memory())


Rows = tuple[int, list[int]]


def order(groups: Sequence[Group], batch_size: int, seed: int, first: int = 0) -> Iterator[Rows]:
    """The number of the group and of its samples for batch number `first`, `first + 1` and so on without end.

    `batch_size` is that of all processes together. The group is drawn by the weights. Its samples come shuffled, every
    one once before any comes again; a batch that reaches the end of a shuffled round goes on with the next. Batch n is
    the same whatever `first` is: the draws before it, which say how far each group has come, are made again.
    """
    assert groups
    assert all(group.samples and group.weight > 0 for group in groups)
    bounds = np.cumsum([group.weight for group in groups])
    draws = _generator(seed)

    def draw(count: int) -> Any:
        # Without the last bound, which a draw might reach by rounding.
        return np.searchsorted(bounds[:-1], draws.random(count) * bounds[-1], side="right")

    turns = np.zeros(len(groups), np.int64)
    for done in range(0, first, REPLAY):
        turns += np.bincount(draw(min(REPLAY, first - done)), minlength=len(groups))
    rounds: dict[int, tuple[int, Any]] = {}
    while True:
        group = int(draw(1)[0])
        place, count = int(turns[group]) * batch_size, len(groups[group].samples)
        turns[group] += 1
        rows = []
        for number in range(place, place + batch_size):
            current, within = divmod(number, count)
            if rounds.get(group, (-1,))[0] != current:
                rounds[group] = current, _generator(seed, group, current).permutation(count)
            rows.append(int(rounds[group][1][within]))
        yield group, rows


def _generator(seed: int, *where: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=where)))


class Order(Sampler[Rows]):
    """The rows of `order` that one process takes."""

    def __init__(
        self, groups: Sequence[Group], batch_size: int, seed: int, first: int, process: int, num_processes: int
    ) -> None:
        self.batches = partial(order, groups, batch_size * num_processes, seed, first)
        self.part = slice(process * batch_size, (process + 1) * batch_size)

    def __iter__(self) -> Iterator[Rows]:
        for group, rows in self.batches():
            yield group, rows[self.part]


class Reader(Dataset["Batch | RawBatch | str"]):
    """The batch of given rows; a sentence instead when nothing of its group can be read.

    A sample that cannot be read is replaced by the next of its group.
    """

    def __init__(self, groups: Sequence[Group], filled: Filled | None) -> None:
        self.groups = groups
        self.filled = filled
        self.empty = filled.read_context("") if filled is not None else None

    def __getitem__(self, rows: Rows) -> Batch | RawBatch | str:
        group, numbers = rows
        samples = self.groups[group].samples
        broken: dict[Sample, Broken] = {}
        captions, found = [], []
        for number in numbers:
            for sample in (samples[(number + offset) % len(samples)] for offset in range(len(samples))):
                if sample in broken:
                    continue
                try:
                    found.append(self._read(sample))
                except ValueError as error:
                    broken[sample] = Broken.of(sample, str(error))
                    continue
                captions.append(sample.clip.caption or "")
                break
            else:
                name, reason = next(iter(broken.values()))
                return f"none of the samples of {samples[0].bucket} can be read; {name}: {reason}"
        clips, *contexts = zip(*found, strict=True)
        if self.empty is None:
            return RawBatch(tuple(captions), torch.stack(clips), tuple(broken.values()))
        context = stack_contexts(contexts[0], self.empty)
        return Batch(tuple(captions), torch.stack(clips), context, tuple(broken.values()))

    def _read(self, sample: Sample) -> tuple[Tensor, ...]:
        """Frames, or latents and context."""
        if self.filled is None:
            return (decode(sample),)
        return self.filled.read_latents(sample), self.filled.read_context(sample.clip.caption or "")


def stack_contexts(contexts: Sequence[Tensor], empty: Tensor) -> Tensor:
    """`[B, L, D]` of features `[l, D]` each, the shorter ones followed by those of the empty prompt, `empty [77, D]`.

    That is what the encoder gives for the prompts together.
    """
    longest = max(len(context) for context in contexts)
    return torch.stack([torch.cat([c, empty.repeat((longest - len(c)) // len(empty), 1)]) for c in contexts])


def loader(
    groups: Sequence[Group], filled: Filled | None, batch_size: int, seed: int, workers: int, accelerator: Accelerator
) -> Callable[[int], Iterator[Batch | RawBatch]]:
    """A function from a number to the batches of this process from that number on, `batch_size` samples each.

    They are `Batch` of what `filled` holds, or with None `RawBatch` of frames that the workers decode. The workers live
    as long as the iterator. Raises ValueError where nothing of a group can be read.
    """
    return partial(_batches, groups, filled, batch_size, seed, workers, accelerator)


def _batches(
    groups: Sequence[Group],
    filled: Filled | None,
    batch_size: int,
    seed: int,
    workers: int,
    accelerator: Accelerator,
    first: int,
) -> Iterator[Batch | RawBatch]:
    batches: DataLoader[Batch | RawBatch | str] = DataLoader(
        Reader(groups, filled),
        batch_size=None,
        sampler=Order(groups, batch_size, seed, first, accelerator.process_index, accelerator.num_processes),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=leave_interrupts,
        # Else the loader takes a number from the generator of the run.
        generator=torch.Generator(),
    )
    for batch in batches:
        if isinstance(batch, str):
            raise ValueError(batch)
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def leave_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of a terminal, and the loop may want batches to finish its step.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
