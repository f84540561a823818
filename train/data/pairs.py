"""Pairs for the upscaler: patches of large frames, and the same places in frames that were made small."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from videofactory_core.objective import Process, seed_for

from ..artefacts import Spoiler
from ..degradation import Degradation, degrade, downscale, sharpen
from .batches import Group, leave_interrupts, order
from .cache import Broken
from .moving_shapes import DIRECTIONS, MovingShapes, Scene, draw
from .samples import Sample, decode

# Small pixels around a patch that are made small with it, so that its edge looks like any other place.
MARGIN = 16


Place = tuple[int, int]
# Small frames, places of patches in them, the patches' originals `[K, F, 3, sP, sP]`, and those sharpened.
Part = tuple[Tensor, list[Place], Tensor, Tensor]


class Region(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def enlarged(self, scale: int) -> Region:
        """The same of a picture `scale` times as large."""
        return Region(*(scale * number for number in self))

    def cut(self, frames: Tensor) -> Tensor:
        return frames[..., self.top : self.top + self.height, self.left : self.left + self.width]


class Row(NamedTuple):
    """One sample of a batch: the batch's number, the row among those of all processes, and what is to be read."""

    batch: int
    row: int
    group: int
    item: int


@dataclass(frozen=True)
class Shown:
    """Frames `large [F, 3, H, W]`, uint8 or in 0..1, and what is known of them.

    `small [F, 3, h, w]` in 0..1 are the same where they are known without loss, and `weights [h, w]` say how often a
    place is taken; None is everywhere alike.
    """

    large: Tensor
    caption: str = ""
    small: Tensor | None = None
    weights: Tensor | None = None


class Source(Protocol):
    """Where large frames come from."""

    def order(self, size: int, first: int) -> Iterator[list[Row]]:
        """The rows of batch number `first` and of those behind it, `size` for all processes together."""
        ...

    def read(self, row: Row) -> tuple[Shown, list[Broken]]:
        """What a row shows, and what should have stood there; ValueError when there is nothing."""
        ...


@dataclass(frozen=True)
class DrawnShapes:
    """Moving shapes, drawn at both sizes: one frame of each clip, or with `whole_clips` all of them.

    Patches lie where the shape's outline is, because the rest is flat.
    """

    clips: MovingShapes
    scale: int
    whole_clips: bool

    def order(self, size: int, first: int) -> Iterator[list[Row]]:
        for batch in itertools.count(first):
            yield [Row(batch, row, 0, batch * size + row) for row in range(size)]

    def read(self, row: Row) -> tuple[Shown, list[Broken]]:
        return self.show(row.item), []

    def show(self, item: int) -> Shown:
        """A frame of clip number `item`, or that clip."""
        clips, scene, frames = self.clips, self.clips.scene(item), self.clips.num_frames
        if not self.whole_clips:
            scene, frames = _still(scene, item % frames, frames), 1
        small, large = (
            rearrange(draw(scene, frames, clips.height * n, clips.width * n), "C F H W -> F C H W") / 2 + 0.5
            for n in (1, self.scale)
        )
        edges = F.max_pool2d(large, self.scale) + F.max_pool2d(-large, self.scale)
        return Shown(large, scene.caption, small, edges.amax((0, 1)) + 1e-6)


def _still(scene: Scene, frame: int, num_frames: int) -> Scene:
    """A scene that stands as another does in one of its frames."""
    step_x, step_y = DIRECTIONS[scene.direction]
    moved = scene.travel * frame / max(1, num_frames - 1)
    x, y = scene.start_x + step_x * moved, scene.start_y + step_y * moved
    return replace(scene, start_x=x, start_y=y, travel=0.0)


@dataclass(frozen=True)
class Decoded:
    """Samples of datasets; one that cannot be read is replaced by the next of its group."""

    groups: Sequence[Group]
    seed: int

    def order(self, size: int, first: int) -> Iterator[list[Row]]:
        for batch, (group, items) in enumerate(order(self.groups, size, self.seed, first), first):
            yield [Row(batch, row, group, item) for row, item in enumerate(items)]

    def read(self, row: Row) -> tuple[Shown, list[Broken]]:
        samples = self.groups[row.group].samples
        broken: list[Broken] = []
        for offset in range(len(samples)):
            sample = samples[(row.item + offset) % len(samples)]
            try:
                return show(sample), broken
            except ValueError as error:
                broken.append(Broken.of(sample, str(error)))
        name, reason = broken[0]
        raise ValueError(f"none of the samples of {samples[0].bucket} can be read; {name}: {reason}")


def show(sample: Sample) -> Shown:
    """A sample's frames; ValueError when they cannot be had."""
    return Shown(rearrange(decode(sample), "F H W C -> F C H W"), sample.clip.caption or "")


@dataclass(frozen=True)
class RawPairs:
    """A batch as it leaves a worker: `small [N, F, 3, h, w]` in 0..1, of which patches are yet to be cut.

    `places [N, K, 2]` are the patches' first rows and columns in it, and `large [N, K, F, 3, sP, sP]` the originals;
    `sharp` are those sharpened, or None. `rows` are the samples' rows in the batch, `broken` what was replaced.
    """

    number: int
    rows: tuple[int, ...]
    captions: tuple[str, ...]
    small: Tensor
    places: Tensor
    large: Tensor
    sharp: Tensor | None
    broken: tuple[Broken, ...]

    def pin_memory(self) -> RawPairs:
        """The batch where CUDA copies from while it computes; `DataLoader` asks for it by this name."""
        sharp = None if self.sharp is None else self.sharp.pin_memory()
        return replace(self, small=self.small.pin_memory(), large=self.large.pin_memory(), sharp=sharp)


@dataclass(frozen=True)
class PairReader(Dataset["RawPairs | str"]):
    """The batch of given rows; a sentence instead when nothing can be read.

    From each sample come `patches` patches of `patch` small pixels. With `whole` all of them come from the whole small
    frames, for a model that is to see frames as in use; otherwise each with its surroundings is made small on its own,
    which is far less work. What is drawn for a row depends on `seed`, the batch's number and the row alone.
    """

    source: Source
    scale: int
    patch: int
    patches: int
    whole: bool
    degradation: Degradation | None
    sharpen: bool
    seed: int

    def __getitem__(self, rows: list[Row]) -> RawPairs | str:
        captions: list[str] = []
        broken: list[Broken] = []
        parts: list[Part] = []
        for row in rows:
            try:
                shown, left_out = self.source.read(row)
            except ValueError as error:
                return str(error)
            captions.append(shown.caption)
            broken += left_out
            seed = np.random.SeedSequence(self.seed, spawn_key=(row.batch, row.row))
            parts += self._parts(shown, np.random.Generator(np.random.PCG64(seed)))
        small, places, large, sharp = zip(*parts, strict=True)
        return RawPairs(
            rows[0].batch,
            tuple(row.row for row in rows),
            tuple(captions),
            torch.stack(small),
            torch.tensor(places),
            torch.stack(large),
            torch.stack(sharp) if self.sharpen else None,
            tuple(broken),
        )

    def _parts(self, shown: Shown, generator: np.random.Generator) -> Iterator[Part]:
        height, width = (side // self.scale for side in shown.large.shape[2:])
        places = [self._place(shown, height, width, generator) for _ in range(self.patches)]
        if self.whole:
            yield self._part(shown, Region(0, 0, height, width), places, generator)
            return
        reach = self.patch + 2 * MARGIN
        sides = min(height, reach), min(width, reach)
        for y, x in places:
            top = min(max(0, y - MARGIN), height - sides[0])
            left = min(max(0, x - MARGIN), width - sides[1])
            yield self._part(shown, Region(top, left, *sides), [(y - top, x - left)], generator)

    def _place(self, shown: Shown, height: int, width: int, generator: np.random.Generator) -> Place:
        """Row and column of a random patch."""
        if shown.weights is None:
            y, x = generator.integers(0, (height - self.patch + 1, width - self.patch + 1)).tolist()
            return y, x
        sums = shown.weights.double().flatten().cumsum(0).numpy()
        point = int(np.searchsorted(sums[:-1], generator.random() * sums[-1], side="right"))
        y, x = (np.array(divmod(point, width)) - generator.integers(0, self.patch, 2)).tolist()
        return min(max(0, y), height - self.patch), min(max(0, x), width - self.patch)

    def _part(self, shown: Shown, region: Region, places: list[Place], generator: np.random.Generator) -> Part:
        large = as_float(region.enlarged(self.scale).cut(shown.large))
        sharp = sharpen(large) if self.sharpen else large
        exact = None if shown.small is None else region.cut(shown.small)
        small = self._small(sharp, exact, generator)
        cuts = [Region(y, x, self.patch, self.patch).enlarged(self.scale) for y, x in places]
        originals, targets = (torch.stack([cut.cut(frames) for cut in cuts]) for frames in (large, sharp))
        return small, places, originals, targets

    def _small(self, large: Tensor, exact: Tensor | None, generator: np.random.Generator) -> Tensor:
        if self.degradation is not None:
            return degrade(large, self.scale, self.degradation, generator)
        return downscale(large, self.scale) if exact is None else exact

    def whole_pair(self, shown: Shown, number: int) -> tuple[Tensor, Tensor]:
        """Whole frames, small and large but never sharpened; what is drawn depends on `seed` and `number` alone."""
        large = as_float(shown.large)
        return self._small(large, shown.small, np.random.default_rng((self.seed, number))), large


def as_float(frames: Tensor) -> Tensor:
    """Frames in 0..1."""
    return frames if frames.is_floating_point() else frames.float() / 255


class Patches(NamedTuple):
    """What the upscaler learns from: `small [N, 3, P, P]`, what it should become, `target [N, 3, sP, sP]`, and what
    that looks like unsharpened, `original`; all in 0..1."""

    small: Tensor
    target: Tensor
    original: Tensor


class RowOrder(Sampler[list[Row]]):
    """The rows that one process takes of its source's batches."""

    def __init__(self, source: Source, batch_size: int, process: Process, first: int) -> None:
        self.source = source
        self.batch_size = batch_size
        self.process = process
        self.first = first

    def __iter__(self) -> Iterator[list[Row]]:
        start = self.process.rank * self.batch_size
        for rows in self.source.order(self.batch_size * self.process.world, self.first):
            yield rows[start : start + self.batch_size]


@dataclass(frozen=True)
class PatchBatches:
    """This process's batches of `batch_size` patches; `spoiler` does what it does on the device, in this process."""

    reader: PairReader
    spoiler: Spoiler | None
    batch_size: int
    workers: int
    process: Process
    accelerator: Accelerator
    log: Callable[[str], None]

    def __call__(self, first: int) -> Iterator[Patches]:
        """Batch number `first` and those behind it; ValueError when nothing can be read."""
        loader: DataLoader[RawPairs | str] = DataLoader(
            self.reader,
            batch_size=None,
            sampler=RowOrder(self.reader.source, self.batch_size // self.reader.patches, self.process, first),
            num_workers=self.workers,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=leave_interrupts,
            # Else the loader takes a number from the generator of the run.
            generator=torch.Generator(),
        )
        named = set()
        for batch in loader:
            if isinstance(batch, str):
                raise ValueError(batch)
            for broken in batch.broken:
                if broken not in named:
                    named.add(broken)
                    self.log(f"left out {broken.name}: {broken.reason}")
            yield self._cut(batch)

    def _cut(self, batch: RawPairs) -> Patches:
        device, seed = self.accelerator.device, self.reader.seed
        small = batch.small.to(device, non_blocking=True)
        if self.spoiler is not None:
            assert self.reader.whole
            seeds = [seed_for(seed, batch.number, row) for row in batch.rows]
            small = self.spoiler(small, batch.captions, [torch.Generator().manual_seed(seed) for seed in seeds])
        side = self.reader.patch
        cut = [
            Region(y, x, side, side).cut(clip)
            for clip, places in zip(small, batch.places.tolist(), strict=True)
            for y, x in places
        ]
        original, target = (
            rearrange(x.to(device, non_blocking=True), "N K F C H W -> (N K F) C H W")
            for x in (batch.large, batch.large if batch.sharp is None else batch.sharp)
        )
        return Patches(torch.stack(cut).flatten(0, 1), target, original)
